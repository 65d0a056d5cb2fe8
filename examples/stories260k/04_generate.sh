#!/usr/bin/env bash
# The same story from all three, the most probable token each time.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TEXT_ARGS=(--prompt "$PROMPT" --max-new-tokens "$MAX_NEW_TOKENS")

# log NAME COMMAND...: run the command with all that it says besides the text in NAME.log.
log() {
    local file=$RUN_DIR/$1.log
    shift
    if ! "$@" 2>"$file"; then
        tail -n 20 "$file" >&2
        echo "[$STEP] failed; above are the last lines of $file" >&2
        return 1
    fi
}

log hf "$PYTHON" tools/generate.py --hf "$HF_DIR" --temperature 0 "${TEXT_ARGS[@]}" \
    >"$RUN_DIR/hf.txt"
cat "$RUN_DIR/hf.txt"
log megatron "$PYTHON" examples/stories260k/generate_megatron.py --megatron "$MEGATRON_DIR" \
    "${TEXT_ARGS[@]}" --output "$RUN_DIR/megatron.txt" >"$RUN_DIR/megatron.out"
log exported "$PYTHON" tools/generate.py --hf "$EXPORTED_DIR" --temperature 0 "${TEXT_ARGS[@]}" \
    >"$RUN_DIR/exported.txt"
for name in megatron exported; do
    diff "$RUN_DIR/hf.txt" "$RUN_DIR/$name.txt" || {
        echo "[$STEP] $RUN_DIR/$name.txt: expected the text of $RUN_DIR/hf.txt" >&2
        exit 1
    }
done
echo "[$STEP] the same text from $HF_DIR, $MEGATRON_DIR and $EXPORTED_DIR"
