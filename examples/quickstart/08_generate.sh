#!/usr/bin/env bash
# Text from the exported folder. Of such a small model it has the look of the corpus, no more.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if ! is_built "$GENERATED" "$HF_DIR/config.json"; then
    HF_HUB_DISABLE_PROGRESS_BARS=1 "$PYTHON" tools/generate.py \
        --hf "$HF_DIR" \
        --prompt "Return True if the" \
        --temperature 0.6 \
        --top-p 0.9 \
        --seed "${SEED:-1234}" >"$GENERATED.part"
    mv "$GENERATED.part" "$GENERATED"
fi
cat "$GENERATED"
