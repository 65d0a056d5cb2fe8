#!/usr/bin/env bash
# One node of a pretraining run with torchrun; run it on every node.
#
#   bash examples/multinode/train.sh [--print] RECIPE [flags of pretrain_gpt_emo.py]
#
# RECIPE is a name in examples/multinode/recipes (gpt_125m, llama3_8b_fp8, moe) or a file like them.
# Flags behind it come last and win. --print (or DRY_RUN=1) shows the command and ends; SMOKE=1 makes
# the recipe's model tiny. Everything else is set from the environment:
#
#   NNODES=1               nodes; under Slurm those of the allocation
#   MASTER_ADDR            name or address of the node where all meet, node 0
#   MASTER_PORT=29500      its port
#   NODE_RANK              0 to NNODES - 1; under Slurm the node's number in the allocation
#   NETWORK_INTERFACE      for NCCL and gloo, for example eth0; by default each looks for one
#   GPUS_PER_NODE          by default those Slurm gave or nvidia-smi lists; 0 runs on the CPU
#   TRANSFORMER_IMPL       by default transformer_engine with GPUs, else local
#   RANKS_PER_NODE         processes on this node; by default one a GPU, or one without GPUs
#   RUN_DIR=runs/RECIPE    checkpoints (resumed from), tensorboard, logs; on a filesystem all nodes see
#   DATA_PATH=MOCK, TOKENIZER_TYPE=HuggingFaceTokenizer, TOKENIZER_MODEL, SPLIT=99,1,0, NUM_WORKERS=1
#   OBJECTIVE=emo1, COST_EMBEDDING=output-layer, EMO_START_ITER=0, EMO_RAMP_ITERS=0, EMO_LOSS_PATH=auto,
#   EMO_WORKSPACE_MB=512, EMO_COST_DTYPE=bf16
#   CHECKPOINTS=1          0: nothing is saved or resumed from, as where steps are timed
#   SAVE_INTERVAL=500, EVAL_INTERVAL=500, EVAL_ITERS=10, LOG_INTERVAL=1
#   DISTRIBUTED_TIMEOUT_MINUTES=10         how long a collective waits for a lost rank
#   DISTRIBUTED_TIMEOUT_SECONDS_AFTER_INIT the same from the second iteration on; it must outlast a save
#   JOIN_TIMEOUT_S=900     how long nodes wait for each other at the start
#   SHUTDOWN_TIMEOUT_S=240 from the signal to SIGKILL; it must outlast a step and a save
#   CONSOLE_RANKS          local ranks whose output is shown, by default the first and the last;
#                          all of it is in RUN_DIR/logs
#   EMO_PREFLIGHT=0        1: tools/doctor.py on all ranks first
#   PYTHON                 by default .venv/bin/python where there is one, else python
#
# Exit codes: 0 done, 75 stopped by a signal and saved (start it again), else those of docs/reliability.md
# or 128 + n for signal n.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' examples/multinode/train.sh
}

DRY_RUN=${DRY_RUN:-0}
case ${1:-} in
    -h | --help)
        usage
        exit
        ;;
    --print)
        DRY_RUN=1
        shift
        ;;
esac
RECIPE_NAME=${1:-}
[[ -n $RECIPE_NAME && $RECIPE_NAME != -* ]] || {
    echo "expected a recipe's name before any flag: see train.sh --help" >&2
    exit 78
}
shift
RECIPE_FILE=examples/multinode/recipes/$RECIPE_NAME.sh
[[ -e $RECIPE_FILE ]] || RECIPE_FILE=$RECIPE_NAME
[[ -f $RECIPE_FILE ]] || {
    echo "recipe $RECIPE_NAME: expected one of $(cd examples/multinode/recipes && echo *.sh) or a file" >&2
    exit 78
}
RECIPE_NAME=$(basename "$RECIPE_FILE" .sh)

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python
    [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Before Blackwell, communication overlaps products in the order meant with one queue alone.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

SMOKE=${SMOKE:-0}
GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
if [[ -z $GPUS_PER_NODE ]]; then
    GPUS_PER_NODE=0
    if command -v nvidia-smi >/dev/null; then
        GPUS_PER_NODE=$(nvidia-smi --list-gpus | wc -l)
    fi
fi
RANKS_PER_NODE=${RANKS_PER_NODE:-$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))}
TRANSFORMER_IMPL=${TRANSFORMER_IMPL:-$( ((GPUS_PER_NODE > 0)) && echo transformer_engine || echo local)}
OBJECTIVE=${OBJECTIVE:-emo1}
RUN_DIR=${RUN_DIR:-runs/$RECIPE_NAME}

# The recipe sets MODEL_ARGS, TRAINING_ARGS, MODEL_PARALLEL_ARGS and VOCAB_SIZE, that of mock data.
MODEL_ARGS=() TRAINING_ARGS=() MODEL_PARALLEL_ARGS=() VOCAB_SIZE=
# shellcheck source=examples/multinode/recipes/gpt_125m.sh
source "$RECIPE_FILE"
TRAINING_ARGS+=(--transformer-impl "$TRANSFORMER_IMPL")
if [[ $TRANSFORMER_IMPL == local ]]; then
    # Megatron's own layers, without the kernels that Transformer Engine and Apex bring.
    TRAINING_ARGS+=(--attention-backend unfused --no-rope-fusion --no-persist-layer-norm
        --no-masked-softmax-fusion --no-gradient-accumulation-fusion)
fi

if ((GPUS_PER_NODE > 0)); then
    MODEL_PARALLEL_ARGS+=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
fi

NNODES=${NNODES:-${SLURM_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
MASTER_PORT=${MASTER_PORT:-29500}
RUN_ID=${SLURM_JOB_ID:-$RECIPE_NAME}-${SLURM_RESTART_COUNT:-0}

if [[ -n ${NETWORK_INTERFACE:-} ]]; then
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$NETWORK_INTERFACE}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NETWORK_INTERFACE}
fi

# require NAME WHAT: ends where the variable NAME is not set.
require() {
    [[ -n ${!1:-} ]] || {
        echo "$1: expected $2" >&2
        exit 78
    }
}
if ((NNODES > 1)); then
    require NODE_RANK "0 to NNODES - 1, another on each node"
    require MASTER_ADDR "the name or address of node 0"
fi

# distributed_arguments PORT NAME: torchrun's, for a run called NAME that meets at PORT.
distributed_arguments() {
    DISTRIBUTED_ARGS=(--nproc-per-node "$RANKS_PER_NODE")
    if ((NNODES == 1)); then
        DISTRIBUTED_ARGS+=(--standalone) # a free port of this machine
        return
    fi
    # Not c10d, whose agents ask the store on another node ten times a second and hang, with nothing
    # to stop them, when that node cannot be reached any more.
    DISTRIBUTED_ARGS+=(
        --nnodes "$NNODES"
        --node-rank "$NODE_RANK"
        --rdzv-backend static
        --rdzv-endpoint "$MASTER_ADDR:$1"
        --rdzv-id "$2"
        --rdzv-conf "timeout=${JOIN_TIMEOUT_S:-900}"
    )
}

SHUTDOWN_TIMEOUT_S=${SHUTDOWN_TIMEOUT_S:-240}
distributed_arguments "$MASTER_PORT" "$RUN_ID"
LOG_DIR=$RUN_DIR/logs/$RUN_ID/node_$(printf %04d "${NODE_RANK:-0}")
DISTRIBUTED_ARGS+=(
    --shutdown-timeout "$SHUTDOWN_TIMEOUT_S"
    --log-dir "$LOG_DIR"
    --tee 3
    --local-ranks-filter "${CONSOLE_RANKS:-0,$((RANKS_PER_NODE - 1))}"
)

if [[ ${DATA_PATH:-MOCK} == MOCK ]]; then
    DATA_ARGS=(--mock-data --tokenizer-type NullTokenizer --vocab-size "$VOCAB_SIZE")
else
    require TOKENIZER_MODEL "what --tokenizer-model takes, by default a Hugging Face folder or name"
    read -r -a blend <<<"$DATA_PATH" # a prefix, or WEIGHT PREFIX WEIGHT PREFIX ...
    DATA_ARGS=(
        --data-path "${blend[@]}"
        --data-cache-path "$RUN_DIR/data-cache"
        --tokenizer-type "${TOKENIZER_TYPE:-HuggingFaceTokenizer}"
        --tokenizer-model "$TOKENIZER_MODEL"
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

RUNNING_ARGS=(
    --log-interval "${LOG_INTERVAL:-1}"
    --tensorboard-log-interval 1
    --log-throughput
    --tensorboard-dir "$RUN_DIR/tensorboard"
    --eval-interval "${EVAL_INTERVAL:-500}"
    --eval-iters "${EVAL_ITERS:-10}"
    --emo-grace-s "$SHUTDOWN_TIMEOUT_S"
    --distributed-timeout-minutes "${DISTRIBUTED_TIMEOUT_MINUTES:-10}"
)
if [[ ${CHECKPOINTS:-1} == 1 ]]; then
    RUNNING_ARGS+=(
        --save "$RUN_DIR/checkpoints"
        --load "$RUN_DIR/checkpoints" # from the newest checkpoint, if there is one
        --save-interval "${SAVE_INTERVAL:-500}"
    )
fi
if [[ -n ${DISTRIBUTED_TIMEOUT_SECONDS_AFTER_INIT:-} ]]; then
    RUNNING_ARGS+=(--distributed-timeout-seconds-after-init "$DISTRIBUTED_TIMEOUT_SECONDS_AFTER_INIT")
fi

FLAGS=(
    "${MODEL_ARGS[@]}"
    "${TRAINING_ARGS[@]}"
    "${MODEL_PARALLEL_ARGS[@]}"
    "${DATA_ARGS[@]}"
    "${EMO_ARGS[@]}"
    "${RUNNING_ARGS[@]}"
    "$@"
)
# -u: what ranks print is shown as it comes, and before torchrun's own last words.
COMMAND=("$PYTHON" -u -m megatron_emo.launch.torchrun "${DISTRIBUTED_ARGS[@]}" pretrain_gpt_emo.py "${FLAGS[@]}")
if [[ $DRY_RUN == 1 ]]; then
    printf '%q ' "${COMMAND[@]}"
    echo
    exit
fi

command -v "$PYTHON" >/dev/null || {
    echo "PYTHON=$PYTHON: expected a Python with this package; make env builds .venv" >&2
    exit 78
}
mkdir -p "$LOG_DIR"
if [[ ${EMO_PREFLIGHT:-0} == 1 ]]; then
    distributed_arguments "$((MASTER_PORT + 1))" "$RUN_ID-doctor"
    "$PYTHON" -u -m megatron_emo.launch.torchrun "${DISTRIBUTED_ARGS[@]}" tools/doctor.py "${FLAGS[@]}"
fi
# Signals go to torchrun, not to a shell in front of it.
exec "${COMMAND[@]}"
