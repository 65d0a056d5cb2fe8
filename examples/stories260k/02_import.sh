#!/usr/bin/env bash
# The Hugging Face folder into a Megatron checkpoint; weights and logits are compared on the way.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

"$PYTHON" tools/convert_checkpoint.py import \
    --hf "$HF_DIR" \
    --output "$MEGATRON_DIR" \
    --overwrite
