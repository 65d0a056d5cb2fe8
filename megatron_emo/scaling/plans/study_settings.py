"""The sections `data:` and `launch:` of a plan: what is trained on, and how runs are started."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_emo.scaling.counts.memory import Layout
from megatron_emo.scaling.plans.recipe import check_ranges

OUTPUT_LAYER = "output-layer"
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class DataSettings:
    """What runs are trained and scored on. Relative paths are relative to the plan's file."""

    path: tuple[str, ...] = ()
    """As --data-path: a prefix, prefixes, or weights and prefixes in turn."""
    tokenizer_type: str = "HuggingFaceTokenizer"
    tokenizer_model: str = ""
    """A file or folder; or a name, as Hugging Face has them, where neither exists."""
    split: str = "1,0,0"
    """Of training, validation and test."""
    held_out: str | None = None
    """A .jsonl or .txt of documents that `score` measures every run on."""
    cost_embedding: str = OUTPUT_LAYER
    """A file of tools/prepare_cost_embedding.py, or output-layer."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("data.path: expected a Megatron prefix or a list, got nothing")
        spaced = next((word for word in self.path if len(word.split()) != 1), None)
        if spaced is not None:
            raise ValueError(f"data.path: expected paths without spaces, got {spaced!r}")
        shares = self.split.split(",")
        try:
            is_right = len(shares) == 3 and float(shares[0]) > 0 and min(map(float, shares)) >= 0
        except ValueError:
            is_right = False
        if not is_right:
            raise ValueError(f"data.split: expected three numbers like 1,0,0, got {self.split!r}")

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The paths without their weights."""
        return tuple(word for word in self.path if not _is_weight(word))

    def resolved(self, folder: Path) -> DataSettings:
        """Return it with paths made absolute, relative ones from `folder` on."""

        def place(path: str) -> str:
            return str(Path(folder, path).resolve())

        model = self.tokenizer_model
        is_path = model.startswith((".", "/")) or Path(folder, model).exists()
        is_table = self.cost_embedding != OUTPUT_LAYER
        return replace(
            self,
            path=tuple(word if _is_weight(word) else place(word) for word in self.path),
            tokenizer_model=place(model) if model and is_path else model,
            held_out=None if self.held_out is None else place(self.held_out),
            cost_embedding=place(self.cost_embedding) if is_table else OUTPUT_LAYER,
        )


def _is_weight(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class LaunchSettings:
    """How a run is started; nothing here but `precision` decides what it computes."""

    nodes: int = 1
    gpus_per_node: int | None = None
    """0: on the CPU. None: as many as ranks_per_node."""
    ranks_per_node: int | None = None
    """None: layout.gpus over the nodes."""
    precision: str | None = None
    """fp32 or bf16; None: bf16 on GPUs, else fp32."""
    save_interval: int | None = None
    """Steps between checkpoints; None: a tenth of the run's."""
    threads: int = 1
    """OMP_NUM_THREADS of a rank."""
    num_workers: int = 1
    """Data workers of a rank."""
    eval_interval: int = 500
    """Steps."""
    eval_iters: int = 0
    """Batches of an evaluation during training; none by default, since `score` measures."""
    shutdown_s: int = 240
    """Seconds from SIGTERM to SIGKILL: they must outlast a step and a save."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(
            ("nodes", "ranks_per_node", "save_interval", "threads", "eval_interval", "shutdown_s"),
            (1, 10**6),
        )
        counts |= dict.fromkeys(("gpus_per_node", "num_workers", "eval_iters"), (0, 10**6))
        check_ranges("launch", self, counts)
        if self.precision not in (None, *PRECISIONS):
            raise ValueError(
                f"launch.precision: expected one of {PRECISIONS}, got {self.precision!r}"
            )

    def resolved(self, layout: Layout) -> LaunchSettings:
        """Return it with nothing left open but `save_interval`.

        Raises:
            ValueError: nodes and ranks that do not come to layout.gpus.
        """
        ranks = self.ranks_per_node or max(1, layout.gpus // self.nodes)
        if ranks * self.nodes != layout.gpus:
            raise ValueError(
                f"launch: nodes {self.nodes} x ranks_per_node {ranks}: expected layout.gpus = "
                f"{layout.gpus}"
            )
        gpus = ranks if self.gpus_per_node is None else self.gpus_per_node
        if 0 < gpus < ranks:
            raise ValueError(
                f"launch.gpus_per_node {gpus}: expected 0, or at least ranks_per_node {ranks}"
            )
        precision = self.precision or ("bf16" if gpus else "fp32")
        return replace(self, ranks_per_node=ranks, gpus_per_node=gpus, precision=precision)
