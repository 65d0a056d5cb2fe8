#!/usr/bin/env bash
# Every step in turn; what is built already is reused.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TIMEFORMAT='all steps: %R s, user CPU %U s'
time for step in examples/quickstart/0?_*.sh; do
    echo "== $step"
    bash "$step"
done

cat <<MESSAGE

MLE checkpoint    $MLE_DIR/checkpoints
EMO-1 checkpoint  $EMO_DIR/checkpoints, resumed to $RESUMED_DIR/checkpoints
cost embedding    $COST_EMBEDDING
exported model    $HF_DIR
generated text    $GENERATED
full logs         $MLE_DIR.log, $EMO_DIR.log, $RESUMED_DIR.log
curves            $RUN_DIR/curves.png
TensorBoard       $PYTHON -m tensorboard.main --logdir $RUN_DIR
$(grep 'nats below' "$RUN_DIR/summary.txt")
MESSAGE
