# What the numbered scripts share: where things lie.
# NAME=${NAME:-default} can be set from outside, for example PROMPT="Lily and Tom" bash run_all.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Megatron warns of kernels that a CPU has no use for.
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}
# Everything is read from disk.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1

PYTHON=${PYTHON:-.venv/bin/python}
command -v "$PYTHON" >/dev/null || {
    echo "PYTHON=$PYTHON: expected a Python with this package; make env builds .venv" >&2
    exit 1
}
STORIES_DIR=${STORIES_DIR:-../shared/data/models/stories260K}
for file in stories260K.bin tok512.bin; do
    [[ -f $STORIES_DIR/$file ]] || {
        echo "STORIES_DIR=$STORIES_DIR: expected stories260K.bin and tok512.bin in it, found no" \
            "$file; both are in the folder stories260K of huggingface.co/karpathy/tinyllamas" >&2
        exit 1
    }
done

RUN_DIR=${RUN_DIR:-runs/stories260k}
PROMPT=${PROMPT:-}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-256}
HF_DIR=$RUN_DIR/hf
MEGATRON_DIR=$RUN_DIR/megatron
EXPORTED_DIR=$RUN_DIR/exported

STEP=$(basename "$0" .sh)
trap 'echo "[$STEP] $SECONDS s"' EXIT
