# shellcheck shell=bash disable=SC2034  # train.sh reads these
# A mixture of experts: 0.92B parameters, 0.22B of them at work for a token (4 of 32 experts). From the
# environment: EP=8 ranks share the experts, TP=1, PP=1; MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE, TRAIN_ITERS,
# LR, MIN_LR, LR_WARMUP_ITERS, SEQ_LENGTH, SEED.
if [[ $SMOKE == 1 ]]; then
    NUM_LAYERS=2 HIDDEN_SIZE=64 NUM_HEADS=4 VOCAB_SIZE=512
    NUM_EXPERTS=4 TOP_K=2 EXPERT_FFN_HIDDEN_SIZE=64
    SEQ_LENGTH=${SEQ_LENGTH:-64} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-4}
    MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1} TRAIN_ITERS=${TRAIN_ITERS:-2}
    LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-0} EVAL_ITERS=${EVAL_ITERS:-0} EP=${EP:-1}
else
    NUM_LAYERS=16 HIDDEN_SIZE=1024 NUM_HEADS=16 VOCAB_SIZE=50257
    NUM_EXPERTS=32 TOP_K=4 EXPERT_FFN_HIDDEN_SIZE=512
fi
MODEL_ARGS=(
    --num-layers "$NUM_LAYERS"
    --hidden-size "$HIDDEN_SIZE"
    --ffn-hidden-size "$EXPERT_FFN_HIDDEN_SIZE"
    --num-attention-heads "$NUM_HEADS"
    --seq-length "${SEQ_LENGTH:-4096}"
    --max-position-embeddings "${SEQ_LENGTH:-4096}"
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --attention-dropout 0
    --hidden-dropout 0
    --init-method-std 0.02
    --num-experts "$NUM_EXPERTS"
    --moe-ffn-hidden-size "$EXPERT_FFN_HIDDEN_SIZE"
    --moe-router-topk "$TOP_K"
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-2
    --moe-token-dispatcher-type alltoall
)
TRAINING_ARGS=(
    --micro-batch-size "${MICRO_BATCH_SIZE:-2}"
    --global-batch-size "${GLOBAL_BATCH_SIZE:-256}"
    --train-iters "${TRAIN_ITERS:-10000}"
    --lr "${LR:-4e-4}"
    --min-lr "${MIN_LR:-4e-5}"
    --lr-decay-style cosine
    --lr-warmup-iters "${LR_WARMUP_ITERS:-500}"
    --weight-decay 0.1
    --adam-beta1 0.9
    --adam-beta2 0.95
    --clip-grad 1.0
    --seed "${SEED:-1234}"
    --bf16
)
MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "${TP:=1}"
    --pipeline-model-parallel-size "${PP:=1}"
    --expert-model-parallel-size "${EP:=8}"
)
if ((TP > 1)); then
    MODEL_PARALLEL_ARGS+=(--sequence-parallel) # Megatron asks for it with experts
fi
if [[ $TRANSFORMER_IMPL == transformer_engine ]]; then
    TRAINING_ARGS+=(--moe-grouped-gemm --moe-permute-fusion)
fi
