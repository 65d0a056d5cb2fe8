"""How large the study is: models, steps and texts, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from megatron_emo.study.language_modeling.corpora import DOMAINS

OBJECTIVES: Mapping[str, tuple[str, ...]] = {
    "mle": (),
    "tailr": ("--emo-gamma", "1e-7", "--emo-weight-min", "0.2"),
    "mixce": ("--emo-eta", "0.5"),
    "emo1": (),
    "emo2": (),
}
"""Settings of each: TaiLr's of its released code, MixCE's in the middle of its range, EMO-1 as in
the paper (half, no cap on the ratio), EMO-2 as released in EMOLoss 0.0.3 (no half, no cap)."""


@dataclass(frozen=True)
class Training:
    """One run of pretrain()."""

    lr: float
    batch_size: int
    """Sequences."""
    iters: int | None = None
    epochs: float | None = None
    """Over the training tokens, where `iters` is None."""
    lr_decay_style: str = "cosine"
    min_lr: float = 0.0
    warmup_share: float = 0.05
    weight_decay: float = 0.1
    save_interval: int | None = None
    """Iterations between checkpoints that a run can go on from; None: the weights at its end."""


@dataclass(frozen=True)
class Size:
    """All that the flags of run.py do not say one by one."""

    tuning: Training
    seq_length: int
    domains: tuple[str, ...] = tuple(DOMAINS)
    objectives: tuple[str, ...] = tuple(OBJECTIVES)
    seeds: tuple[int, ...] = (1, 2, 3)
    base: Training | None = None
    """None: the base comes from a Hugging Face folder."""
    model: tuple[str, ...] = ()
    """Megatron's flags of the base."""
    vocab_size: int | None = None
    num_prompts: int = 256
    test_documents: int | None = None
    """Scored for perplexity; None: all."""
    valid_documents: int | None = None
    """On which temperatures are fitted; None: all."""
    max_new_tokens: int = 80
    generation_batch: int = 64
    clusterings: int = 5
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Expected of tasks by their kind, on one core; measured."""


_LLAMA = (
    *("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu"),
    *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--attention-dropout", "0", "--hidden-dropout", "0"),
)


def _llama(layers: int, hidden: int, ffn: int, heads: int) -> tuple[str, ...]:
    shape = {
        "--num-layers": layers,
        "--hidden-size": hidden,
        "--ffn-hidden-size": ffn,
        "--num-attention-heads": heads,
    }
    return (*(word for flag, value in shape.items() for word in (flag, str(value))), *_LLAMA)


SIZES = {
    # A Llama of 3.3M parameters. The whole table in under two hours on two cores.
    "laptop": Size(
        base=Training(lr=2e-3, batch_size=16, iters=600, min_lr=2e-4, save_interval=100),
        tuning=Training(lr=1e-3, batch_size=16, iters=50, lr_decay_style="linear"),
        seq_length=128,
        model=_llama(layers=4, hidden=192, ffn=512, heads=6),
        vocab_size=4096,
        test_documents=250,
        valid_documents=60,
        seconds={"data": 10, "base": 520, "train": 58, "export": 11, "evaluate": 70},
    ),
    # The paper's recipe: GPT-2 or OPT-125M, official training splits.
    "paper": Size(
        tuning=Training(
            lr=5e-5,
            batch_size=32,
            epochs=3,
            lr_decay_style="linear",
            warmup_share=0.0,
            weight_decay=0.0,
            save_interval=500,
        ),
        seq_length=256,
        num_prompts=4000,
        generation_batch=128,
    ),
    # Every step at toy size: that it runs, not what it finds.
    "smoke": Size(
        base=Training(lr=1e-3, batch_size=2, iters=2, save_interval=2),
        tuning=Training(lr=1e-3, batch_size=2, iters=2),
        seq_length=64,
        domains=("tinystories",),
        objectives=("mle", "emo1"),
        seeds=(1,),
        model=_llama(layers=1, hidden=16, ffn=32, heads=2),
        vocab_size=512,
        num_prompts=8,
        test_documents=6,
        valid_documents=4,
        max_new_tokens=32,
        clusterings=2,
    ),
}


def grow(size: Size, times: int) -> Size:
    """Return the size with steps, prompts and scored documents multiplied.

    Raises:
        ValueError: times below 1.
    """
    if times < 1:
        raise ValueError(f"--grow: expected at least 1, got {times}")

    def more(value):
        return None if value is None else value * times

    def longer(training: Training | None) -> Training | None:
        if training is None:
            return None
        return replace(training, iters=more(training.iters), epochs=more(training.epochs))

    return replace(
        size,
        base=longer(size.base),
        tuning=longer(size.tuning),
        num_prompts=size.num_prompts * times,
        test_documents=more(size.test_documents),
        valid_documents=more(size.valid_documents),
        seconds={kind: seconds * times for kind, seconds in size.seconds.items()},
    )
