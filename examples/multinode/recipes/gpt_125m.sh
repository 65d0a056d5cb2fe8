# shellcheck shell=bash disable=SC2034  # train.sh reads these
# GPT of 125M parameters in Llama's form, in bf16. TP, MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE, TRAIN_ITERS,
# LR, MIN_LR, LR_WARMUP_ITERS, SEQ_LENGTH, SEED are set from the environment.
if [[ $SMOKE == 1 ]]; then
    NUM_LAYERS=2 HIDDEN_SIZE=64 FFN_HIDDEN_SIZE=128 NUM_HEADS=4 VOCAB_SIZE=512
    SEQ_LENGTH=${SEQ_LENGTH:-64} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-4}
    MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-2} TRAIN_ITERS=${TRAIN_ITERS:-4}
    LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-1} EVAL_ITERS=${EVAL_ITERS:-0}
else
    NUM_LAYERS=12 HIDDEN_SIZE=768 FFN_HIDDEN_SIZE=2048 NUM_HEADS=12 VOCAB_SIZE=50257
fi
MODEL_ARGS=(
    --num-layers "$NUM_LAYERS"
    --hidden-size "$HIDDEN_SIZE"
    --ffn-hidden-size "$FFN_HIDDEN_SIZE"
    --num-attention-heads "$NUM_HEADS"
    --seq-length "${SEQ_LENGTH:-2048}"
    --max-position-embeddings "${SEQ_LENGTH:-2048}"
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --attention-dropout 0
    --hidden-dropout 0
    --init-method-std 0.02
)
TRAINING_ARGS=(
    --micro-batch-size "${MICRO_BATCH_SIZE:-8}"
    --global-batch-size "${GLOBAL_BATCH_SIZE:-256}"
    --train-iters "${TRAIN_ITERS:-5000}"
    --lr "${LR:-6e-4}"
    --min-lr "${MIN_LR:-6e-5}"
    --lr-decay-style cosine
    --lr-warmup-iters "${LR_WARMUP_ITERS:-500}"
    --weight-decay 0.1
    --adam-beta1 0.9
    --adam-beta2 0.95
    --clip-grad 1.0
    --seed "${SEED:-1234}"
    --bf16
)
MODEL_PARALLEL_ARGS=(--tensor-model-parallel-size "${TP:=1}")
