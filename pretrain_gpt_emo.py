"""Pretrain GPT with the EMO loss: Megatron-LM's pretrain_gpt.py command line and --objective.

    torchrun --nproc-per-node 8 pretrain_gpt_emo.py --objective emo1 \
        --emo-cost-embedding cost_embedding.safetensors  [the flags of pretrain_gpt.py]
"""

import time

_PROGRAM_START = time.time()  # before the imports, which Megatron's start-up report counts

from megatron_emo.training.run import main  # noqa: E402

if __name__ == "__main__":
    main(program_start=_PROGRAM_START)
