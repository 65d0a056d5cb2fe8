#!/usr/bin/env bash
# The EMO run as a folder that transformers loads; it appears once weights and logits agree.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

LOG=$HF_DIR.log
EMO_TRACKER=$EMO_DIR/checkpoints/latest_checkpointed_iteration.txt

if ! { [[ -e $LOG ]] && is_built "$HF_DIR/config.json" "$EMO_TRACKER"; }; then
    echo "[$STEP] all output in $LOG"
    if ! "$PYTHON" tools/convert_checkpoint.py export \
        --megatron "$EMO_DIR/checkpoints" \
        --output "$HF_DIR" \
        --overwrite >"$LOG" 2>&1; then
        tail -n 60 "$LOG" >&2
        echo "[$STEP] failed; above are the last lines of $LOG" >&2
        exit 1
    fi
fi
grep -E '^(weights:|logits) ' "$LOG"
