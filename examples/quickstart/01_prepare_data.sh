#!/usr/bin/env bash
# Text, a tokenizer for it, and the text in that tokenizer's ids as Megatron reads them.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

is_built "$CORPUS" || "$PYTHON" tools/make_demo_corpus.py --output "$CORPUS"
is_built "$TOKENIZER" "$CORPUS" || "$PYTHON" tools/train_tokenizer.py \
    --input "$CORPUS" \
    --vocab-size "$VOCAB_SIZE" \
    --output "$TOKENIZER" \
    --overwrite
is_built "${DATA_PREFIX}_text_document.idx" "$TOKENIZER" || "$PYTHON" tools/preprocess_data.py \
    --input "$CORPUS" \
    --output-prefix "$DATA_PREFIX" \
    --tokenizer-type SentencePieceTokenizer \
    --tokenizer-model "$TOKENIZER" \
    --append-eod \
    --log-interval 5000 \
    --overwrite
