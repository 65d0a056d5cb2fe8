#!/usr/bin/env bash
# llama2.c's files into a Hugging Face folder.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

"$PYTHON" examples/stories260k/convert_to_hf.py \
    --checkpoint "$STORIES_DIR/stories260K.bin" \
    --tokenizer "$STORIES_DIR/tok512.bin" \
    --output "$HF_DIR" \
    --overwrite
