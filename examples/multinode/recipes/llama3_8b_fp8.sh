# shellcheck shell=bash disable=SC2034  # train.sh reads these
# Llama-3-8B from random weights, its layers in FP8 through Transformer Engine. From the environment:
# FP8_RECIPE=delayed (Ada, Hopper), tensorwise (the same), mxfp8 (Blackwell) or none (bf16, the
# baseline); FP8_FORMAT=hybrid; TP=2, PP=1, CP=1; MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE, TRAIN_ITERS, LR,
# MIN_LR, LR_WARMUP_ITERS, SEQ_LENGTH, SEED.
if [[ $SMOKE == 1 ]]; then
    NUM_LAYERS=2 HIDDEN_SIZE=64 FFN_HIDDEN_SIZE=128 NUM_HEADS=4 NUM_QUERY_GROUPS=2 VOCAB_SIZE=512
    SEQ_LENGTH=${SEQ_LENGTH:-64} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-2}
    TRAIN_ITERS=${TRAIN_ITERS:-2} LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-0} EVAL_ITERS=${EVAL_ITERS:-0}
    TP=${TP:-1} FP8_RECIPE=${FP8_RECIPE:-none}
else
    NUM_LAYERS=32 HIDDEN_SIZE=4096 FFN_HIDDEN_SIZE=14336 NUM_HEADS=32 NUM_QUERY_GROUPS=8
    VOCAB_SIZE=128256
fi
FP8_RECIPE=${FP8_RECIPE:-delayed}
SEQ_LENGTH=${SEQ_LENGTH:-8192}
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
    --train-iters "${TRAIN_ITERS:-1000}"
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
)
case $FP8_RECIPE in
    none) ;;
    delayed | tensorwise | mxfp8)
        TRAINING_ARGS+=(--fp8-format "${FP8_FORMAT:-hybrid}" --fp8-recipe "$FP8_RECIPE")
        ;;
    *)
        echo "FP8_RECIPE=$FP8_RECIPE: expected delayed, tensorwise, mxfp8 or none" >&2
        exit 78
        ;;
esac
if [[ $FP8_RECIPE == delayed ]]; then
    TRAINING_ARGS+=(--fp8-amax-history-len 1024 --fp8-amax-compute-algo max)
fi
MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "${TP:=2}"
    --pipeline-model-parallel-size "${PP:=1}"
    --context-parallel-size "${CP:=1}"
)
if ((TP > 1)); then
    MODEL_PARALLEL_ARGS+=(--sequence-parallel)
fi
