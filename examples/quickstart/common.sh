# What the numbered scripts share: where things lie, what is trained, and how a run is started.
# NAME=${NAME:-default} can be set from outside, for example TRAIN_ITERS=1000 bash run_all.sh.
# Setting SMOKE=1 runs every step on a tiny model for 4 iterations.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

PYTHON=${PYTHON:-.venv/bin/python}
command -v "$PYTHON" >/dev/null || {
    echo "PYTHON=$PYTHON: expected a Python with this package; make env builds .venv" >&2
    exit 1
}
SMOKE=${SMOKE:-0}
if [[ $SMOKE == 1 ]]; then
    RUN_DIR=${RUN_DIR:-runs/quickstart-smoke}
    VOCAB_SIZE=${VOCAB_SIZE:-512}
    TRAIN_ITERS=${TRAIN_ITERS:-4}
    RESUME_ITERS=${RESUME_ITERS:-2}
    LOG_INTERVAL=1
    MODEL_ARGS=(--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 2
        --seq-length 32 --max-position-embeddings 32)
    VALIDATION_ARGS=(--eval-interval 2 --eval-iters 1)
else
    RUN_DIR=${RUN_DIR:-runs/quickstart}
    VOCAB_SIZE=${VOCAB_SIZE:-2048}
    TRAIN_ITERS=${TRAIN_ITERS:-200}
    RESUME_ITERS=${RESUME_ITERS:-10}
    LOG_INTERVAL=20
    MODEL_ARGS=(--num-layers 2 --hidden-size 128 --ffn-hidden-size 352 --num-attention-heads 4
        --seq-length 128 --max-position-embeddings 128)
    VALIDATION_ARGS=(--eval-interval 50 --eval-iters 6)
fi

CORPUS=$RUN_DIR/data/corpus.jsonl
TOKENIZER=$RUN_DIR/data/tokenizer.model
DATA_PREFIX=$RUN_DIR/data/demo
MLE_DIR=$RUN_DIR/mle
EMO_DIR=$RUN_DIR/emo
RESUMED_DIR=$RUN_DIR/emo-resumed
COST_EMBEDDING=$RUN_DIR/cost_embedding.safetensors
HF_DIR=$RUN_DIR/emo-hf
GENERATED=$RUN_DIR/generated.txt

# A small Llama: rotary positions, RMSNorm, SwiGLU, no biases, an output layer of its own.
MODEL_ARGS+=(
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
)
TRAINING_ARGS=(
    --micro-batch-size "${MICRO_BATCH_SIZE:-16}"
    --global-batch-size "${GLOBAL_BATCH_SIZE:-16}"
    --lr "${LR:-3e-3}"
    --min-lr "${MIN_LR:-3e-4}"
    --lr-decay-style cosine
    --lr-decay-iters "$TRAIN_ITERS"
    --lr-warmup-fraction 0.05
    --weight-decay 0.1
    --adam-beta2 0.95
    --clip-grad 1.0
    --seed "${SEED:-1234}"
)
DATA_ARGS=(
    --data-path "${DATA_PREFIX}_text_document"
    --data-cache-path "$RUN_DIR/data/cache"
    --split 90,10,0
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "$TOKENIZER"
    --num-workers 0
)
LOGGING_ARGS=(--log-interval "$LOG_INTERVAL" --tensorboard-log-interval 1)

# A GPU is used when torch can use it. Without one, two ranks share the CPU.
if [[ -z ${NUM_GPUS:-} ]]; then
    NUM_GPUS=0
    if command -v nvidia-smi >/dev/null; then
        NUM_GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    fi
    export NUM_GPUS
fi
PARALLEL_ARGS=()
NUM_RANKS=$((NUM_GPUS == 1 ? 1 : 2))
if ((NUM_GPUS > 0)); then
    export CUDA_DEVICE_MAX_CONNECTIONS=1
    PARALLEL_ARGS=(--bf16)
    if ! "$PYTHON" -c 'import transformer_engine.pytorch' >/dev/null 2>&1; then
        # Megatron's own layers, without the kernels that Transformer Engine and Apex bring.
        PARALLEL_ARGS+=(--transformer-impl local --attention-backend unfused --no-rope-fusion
            --no-persist-layer-norm --no-masked-softmax-fusion --no-gradient-accumulation-fusion)
    fi
fi
PARALLEL_ARGS+=(--tensor-model-parallel-size "$NUM_RANKS")

STEP=$(basename "$0" .sh)
trap 'echo "[$STEP] $SECONDS s"' EXIT

# is_built FILE [SOURCE...]: FILE exists and no SOURCE is newer; says so.
is_built() {
    local file=$1 source
    shift
    [[ -e $file ]] || return 1
    for source in "$@"; do
        [[ ! $source -nt $file ]] || return 1
    done
    echo "[$STEP] skipped: $file is built (remove it to run this step again)"
}

# is_trained DIR ITERATION [SOURCE...]: DIR holds a checkpoint of ITERATION newer than SOURCE; says
# so.
is_trained() {
    local tracker=$1/checkpoints/latest_checkpointed_iteration.txt iteration=$2
    shift 2
    [[ -e $tracker && $(<"$tracker") == "$iteration" ]] && is_built "$tracker" "$@"
}

# train DIR FLAGS...: one training run from nothing into DIR; prints its progress. Everything that
# Megatron prints goes to DIR.log.
train() {
    local dir=$1 log=$1.log
    shift
    rm -rf "$dir"
    mkdir -p "$dir"
    echo "[$STEP] $NUM_RANKS ranks, $NUM_GPUS GPUs; all output in $log"
    # --standalone lets the ranks meet at a free port.
    if ! "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NUM_RANKS" \
        pretrain_gpt_emo.py "${PARALLEL_ARGS[@]}" "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" \
        "${VALIDATION_ARGS[@]}" "${DATA_ARGS[@]}" "${LOGGING_ARGS[@]}" \
        --tensorboard-dir "$dir/tensorboard" \
        --save "$dir/checkpoints" \
        --save-interval "$TRAIN_ITERS" \
        "$@" 2>&1 | tee "$log" | show_progress; then
        tail -n 60 "$log" >&2
        echo "[$STEP] failed; above are the last lines of $log" >&2
        return 1
    fi
}

# Of Megatron's lines: those of our own start, iterations, validations and checkpoints, and of their
# columns the ones this example is about. The validation that Megatron repeats on other batches when
# the loop has ended is left to the log.
show_progress() {
    local number='[^|]*[^| ]' loss=' \| lm loss( value)?:[^|]*[^| ] \| emo loss( value)?:[^|]*[^| ]'
    sed -u -n -E \
        -e "s/ \| [^|]* PPL:$number//g" \
        -e "s/^.*(iteration +[0-9]+\/ *[0-9]+) .*( \| elapsed$number).*($loss) .*( \| objective weight:$number).*( \| objective weight max:$number).*/\1\2\3\6\7/p" \
        -e "s/^ *(validation loss at iteration [0-9]+)($loss) .*/\1\2/p" \
        -e '/^running without CUDA|^> (objective|cost|MLE|resuming)|EmbeddingWarning|successfully (saved|loaded)/p'
}
