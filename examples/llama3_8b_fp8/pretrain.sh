#!/usr/bin/env bash
# Llama-3-8B from random weights under EMO-1, in FP8 through Transformer Engine; mock data unless
# DATA_PATH says otherwise. NAME=${NAME:-default} can be set from outside, and flags of
# pretrain_gpt_emo.py can be added behind the script's name:
#
#   RECIPE=tensorwise TP=4 bash examples/llama3_8b_fp8/pretrain.sh --train-iters 50
#
# DRY_RUN=1 or --print: show the command and end. SMOKE=1: a tiny model, 2 iterations, any machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ ${1:-} == --print ]]; then
    DRY_RUN=1
    shift
fi
DRY_RUN=${DRY_RUN:-0}
SMOKE=${SMOKE:-0}
if [[ $SMOKE == 1 ]]; then
    NUM_LAYERS=2 HIDDEN_SIZE=64 FFN_HIDDEN_SIZE=128 NUM_HEADS=4 NUM_QUERY_GROUPS=2
    SEQ_LENGTH=${SEQ_LENGTH:-64}
    VOCAB_SIZE=512
    GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-2}
    TRAIN_ITERS=${TRAIN_ITERS:-2}
    EVAL_ITERS=${EVAL_ITERS:-0}
    LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-0}
    TP=${TP:-1}
    GPUS_PER_NODE=${GPUS_PER_NODE:-1}
    RECIPE=${RECIPE:-none}
    TRANSFORMER_IMPL=${TRANSFORMER_IMPL:-local}
    RUN_DIR=${RUN_DIR:-runs/llama3_8b_fp8-smoke}
else
    NUM_LAYERS=32 HIDDEN_SIZE=4096 FFN_HIDDEN_SIZE=14336 NUM_HEADS=32 NUM_QUERY_GROUPS=8
    SEQ_LENGTH=${SEQ_LENGTH:-8192}
    VOCAB_SIZE=128256
fi
RUN_DIR=${RUN_DIR:-runs/llama3_8b_fp8}
TRAIN_ITERS=${TRAIN_ITERS:-1000}
# delayed and tensorwise from Ada and Hopper on, mxfp8 from Blackwell on; none trains in bf16.
RECIPE=${RECIPE:-delayed}
TRANSFORMER_IMPL=${TRANSFORMER_IMPL:-transformer_engine}
TP=${TP:-2}
PP=${PP:-1}
CP=${CP:-1}
OBJECTIVE=${OBJECTIVE:-emo1}
DATA_PATH=${DATA_PATH:-MOCK}
TOKENIZER_MODEL=${TOKENIZER_MODEL:-}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python
    [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Before Blackwell, communication overlaps products in the order meant with one queue alone.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

DISTRIBUTED_ARGS=(--nproc-per-node "$GPUS_PER_NODE")
if ((NNODES == 1)); then
    DISTRIBUTED_ARGS+=(--standalone) # a free port of this machine
else
    DISTRIBUTED_ARGS+=(
        --nnodes "$NNODES"
        --node-rank "${NODE_RANK:?expected 0 to NNODES - 1, another on each node}"
        --master-addr "${MASTER_ADDR:?expected the name or address of node 0}"
        --master-port "${MASTER_PORT:-29500}"
    )
fi

MODEL_ARGS=(
    --num-layers "$NUM_LAYERS"
    --hidden-size "$HIDDEN_SIZE"
    --ffn-hidden-size "$FFN_HIDDEN_SIZE"
    --num-attention-heads "$NUM_HEADS"
    --group-query-attention
    --num-query-groups "$NUM_QUERY_GROUPS"
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
    --position-embedding-type rope
    --rotary-base 500000
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
    --init-method-std 0.02
)

TRAINING_ARGS=(
    --micro-batch-size "${MICRO_BATCH_SIZE:-1}"
    --global-batch-size "${GLOBAL_BATCH_SIZE:-128}"
    --train-iters "$TRAIN_ITERS"
    --lr "${LR:-3e-4}"
    --min-lr "${MIN_LR:-3e-5}"
    --lr-decay-style cosine
    --lr-warmup-iters "${LR_WARMUP_ITERS:-100}"
    --weight-decay 0.1
    --adam-beta1 0.9
    --adam-beta2 0.95
    --clip-grad 1.0
    --seed "${SEED:-1234}"
    --bf16
    --transformer-impl "$TRANSFORMER_IMPL"
)
case $RECIPE in
    none) ;;
    delayed | tensorwise | mxfp8)
        TRAINING_ARGS+=(--fp8-format "${FP8_FORMAT:-hybrid}" --fp8-recipe "$RECIPE")
        ;;
    *)
        echo "RECIPE=$RECIPE: expected delayed, tensorwise, mxfp8 or none" >&2
        exit 1
        ;;
esac
if [[ $RECIPE == delayed ]]; then
    TRAINING_ARGS+=(--fp8-amax-history-len 1024 --fp8-amax-compute-algo max)
fi
if [[ $TRANSFORMER_IMPL == local ]]; then
    # Megatron's own layers, without the kernels that Transformer Engine and Apex bring.
    TRAINING_ARGS+=(--attention-backend unfused --no-rope-fusion --no-persist-layer-norm
        --no-masked-softmax-fusion --no-gradient-accumulation-fusion)
fi

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --context-parallel-size "$CP"
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
if ((TP > 1)); then
    MODEL_PARALLEL_ARGS+=(--sequence-parallel)
fi

if [[ $DATA_PATH == MOCK ]]; then
    DATA_ARGS=(--mock-data --tokenizer-type NullTokenizer --vocab-size "$VOCAB_SIZE")
else
    read -r -a blend <<<"$DATA_PATH" # a prefix, or WEIGHT PREFIX WEIGHT PREFIX ...
    DATA_ARGS=(
        --data-path "${blend[@]}"
        --data-cache-path "$RUN_DIR/data-cache"
        --tokenizer-type HuggingFaceTokenizer
        --tokenizer-model "${TOKENIZER_MODEL:?expected a Hugging Face folder or name}"
    )
fi
DATA_ARGS+=(
    --split "${SPLIT:-99,1,0}"
    --make-vocab-size-divisible-by 128
    --num-workers "${NUM_WORKERS:-1}"
)

EMO_ARGS=(
    --objective "$OBJECTIVE"
    --emo-loss-path "${EMO_LOSS_PATH:-auto}"
    --emo-workspace-mb "${EMO_WORKSPACE_MB:-512}"
)
if [[ $OBJECTIVE == emo* ]]; then
    EMO_ARGS+=(
        --emo-cost-embedding "${COST_EMBEDDING:-output-layer}"
        --emo-cost-dtype "${EMO_COST_DTYPE:-bf16}"
        --emo-start-iter "${EMO_START_ITER:-0}"
        --emo-ramp-iters "${EMO_RAMP_ITERS:-0}"
    )
fi

LOGGING_ARGS=(
    --log-interval 1
    --tensorboard-log-interval 1
    --log-throughput
    --tensorboard-dir "$RUN_DIR/tensorboard"
    --eval-interval "${EVAL_INTERVAL:-500}"
    --eval-iters "${EVAL_ITERS:-10}"
    --save "$RUN_DIR/checkpoints"
    --load "$RUN_DIR/checkpoints" # from the newest checkpoint, if there is one
    --save-interval "${SAVE_INTERVAL:-500}"
)

COMMAND=(
    "$PYTHON" -m torch.distributed.run "${DISTRIBUTED_ARGS[@]}"
    pretrain_gpt_emo.py
    "${MODEL_ARGS[@]}"
    "${TRAINING_ARGS[@]}"
    "${MODEL_PARALLEL_ARGS[@]}"
    "${DATA_ARGS[@]}"
    "${EMO_ARGS[@]}"
    "${LOGGING_ARGS[@]}"
    "$@"
)
if [[ $DRY_RUN == 1 ]]; then
    printf '%q ' "${COMMAND[@]}"
    echo
    exit
fi

command -v "$PYTHON" >/dev/null || {
    echo "PYTHON=$PYTHON: expected a Python with this package; make env builds .venv" >&2
    exit 1
}
if [[ $TRANSFORMER_IMPL == transformer_engine ]]; then
    CHECK_ARGS=()
    if [[ $RECIPE != none ]]; then
        CHECK_ARGS=(--fp8-format "${FP8_FORMAT:-hybrid}" --fp8-recipe "$RECIPE")
    fi
    "$PYTHON" -m megatron_emo.training.transformer_engine "${CHECK_ARGS[@]}"
fi
mkdir -p "$RUN_DIR"
exec "${COMMAND[@]}"
