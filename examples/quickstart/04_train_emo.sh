#!/usr/bin/env bash
# The same model on the same batches for as long, under EMO-1.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

is_trained "$EMO_DIR" "$TRAIN_ITERS" "$COST_EMBEDDING" || train "$EMO_DIR" \
    --train-iters "$TRAIN_ITERS" \
    --objective emo1 \
    --emo-cost-embedding "$COST_EMBEDDING"
