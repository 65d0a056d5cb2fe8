#!/usr/bin/env bash
# Both runs' curves in one image, and a table of where they began and ended.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CURVES=$RUN_DIR/curves.png
SUMMARY=$RUN_DIR/summary.txt
EMO_TRACKER=$EMO_DIR/checkpoints/latest_checkpointed_iteration.txt
MLE_TRACKER=$MLE_DIR/checkpoints/latest_checkpointed_iteration.txt

if ! { [[ -e $CURVES ]] && is_built "$SUMMARY" "$EMO_TRACKER" "$MLE_TRACKER"; }; then
    "$PYTHON" tools/plot_training_curves.py \
        --run "MLE=$MLE_DIR/tensorboard" \
        --run "EMO-1=$EMO_DIR/tensorboard" \
        --title "costs: MLE by its own output layer as it learns, EMO-1 by that layer's last state" \
        --output "$CURVES" >"$SUMMARY.part"
    mv "$SUMMARY.part" "$SUMMARY"
fi
cat "$SUMMARY"
