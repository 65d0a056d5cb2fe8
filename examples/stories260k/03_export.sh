#!/usr/bin/env bash
# The checkpoint back into a Hugging Face folder, and its weights against those of step 01.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

"$PYTHON" tools/convert_checkpoint.py export \
    --megatron "$MEGATRON_DIR" \
    --output "$EXPORTED_DIR" \
    --overwrite
"$PYTHON" tools/convert_checkpoint.py verify \
    --megatron "$MEGATRON_DIR" \
    --hf "$HF_DIR" \
    --verify weights
