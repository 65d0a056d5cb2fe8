#!/usr/bin/env bash
# A few iterations more, from the checkpoint of the EMO run.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

LOGGING_ARGS=(--log-interval 1 --tensorboard-log-interval 1)
LAST_ITER=$((TRAIN_ITERS + RESUME_ITERS))
EMO_TRACKER=$EMO_DIR/checkpoints/latest_checkpointed_iteration.txt

# The longer run keeps the schedule that the checkpoint holds: Megatron refuses to guess between
# that one and its own, which depends on --train-iters.
is_trained "$RESUMED_DIR" "$LAST_ITER" "$EMO_TRACKER" || train "$RESUMED_DIR" \
    --load "$EMO_DIR/checkpoints" \
    --exit-on-missing-checkpoint \
    --train-iters "$LAST_ITER" \
    --use-checkpoint-opt-param-scheduler \
    --objective emo1 \
    --emo-cost-embedding "$COST_EMBEDDING"
