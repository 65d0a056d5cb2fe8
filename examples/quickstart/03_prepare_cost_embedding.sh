#!/usr/bin/env bash
# The cost embedding as in the paper: the output layer of a trained model, frozen.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

is_built "$COST_EMBEDDING" "$MLE_DIR/checkpoints/latest_checkpointed_iteration.txt" ||
    "$PYTHON" tools/prepare_cost_embedding.py \
        --from-checkpoint "$MLE_DIR/checkpoints" \
        --tokenizer-type SentencePieceTokenizer \
        --tokenizer-model "$TOKENIZER" \
        --output "$COST_EMBEDDING" \
        --overwrite
