#!/usr/bin/env bash
# The baseline: cross-entropy alone. It logs 'emo loss' by its own output layer as that learns.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

is_trained "$MLE_DIR" "$TRAIN_ITERS" "${DATA_PREFIX}_text_document.idx" || train "$MLE_DIR" \
    --train-iters "$TRAIN_ITERS" \
    --objective mle \
    --emo-cost-embedding output-layer
