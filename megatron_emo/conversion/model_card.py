"""The README.md of an exported model: how it was trained, and what was checked."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron_emo.conversion.export_hf import MegatronCheckpoint

_OBJECTIVE_SETTINGS = (
    "emo_start_iter emo_ramp_iters emo_weight_max emo_half emo_detach_target emo_ratio_eps "
    "emo_scale emo_eta emo_gamma emo_weight_min emo_mixing_ratio emo_cost_dim emo_cost_dtype"
).split()
_PACKAGES = ("megatron_emo", "megatron-core", "torch", "transformers")


def model_card(
    name: str,
    checkpoint: MegatronCheckpoint,
    dtype: torch.dtype,
    tokenizer_names: list[str],
    checked: list[str],
    origin: str = "",
) -> str:
    """Return the card, with a table of what the checkpoint's arguments say.

    Of files only the last part of the path: cards are published.

    Args:
        checked: what was verified, and how it came out.
        origin: where weights come from that were stored twice.
    """
    rows = _training(checkpoint) + _model(checkpoint, dtype)
    if origin:
        rows.append(("weights", origin))
    rows.append(("tokenizer", ", ".join(tokenizer_names) or "none in this folder"))
    rows.append(("versions", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)))
    rows.append(("verified against the Megatron checkpoint", "; ".join(checked) or "no"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n"
        f"- megatron\n- megatron_emo\n---\n\n# {name}\n\n"
        f"Converted from a Megatron checkpoint.\n\n| | |\n|---|---|\n{table}\n"
    )


def _training(checkpoint: MegatronCheckpoint) -> list[tuple[str, Any]]:
    values = vars(checkpoint.args)
    samples = values.get("consumed_train_samples") or 0
    iteration = values.get("iteration") or 0
    if checkpoint.folder.name.startswith("iter_"):
        iteration = int(checkpoint.folder.name.removeprefix("iter_"))
    rows: list[tuple[str, Any]] = [("iterations", iteration)]
    if samples:
        tokens = samples * values["seq_length"]
        rows.append(("tokens seen", f"{tokens:,} ({samples:,} samples of {values['seq_length']})"))
    if "objective" in values:
        given = {n: values[n] for n in _OBJECTIVE_SETTINGS if values.get(n) not in (None, 0)}
        rows.append(("objective", values["objective"]))
        rows.append(("its settings", ", ".join(f"{n}={v}" for n, v in given.items()) or "defaults"))
        cost = values.get("emo_cost_embedding")
        if cost or values.get("emo_cost_embedding_id"):
            rows.append(("cost embedding", Path(cost or "output-layer").name))
            rows.append(("its sha256", values.get("emo_cost_embedding_id") or "not in the loss"))
    if values.get("data_path"):
        rows.append(("data", " ".join(Path(str(part)).name for part in values["data_path"])))
    return rows


def _model(checkpoint: MegatronCheckpoint, dtype: torch.dtype) -> list[tuple[str, Any]]:
    settings = checkpoint.settings
    rows: list[tuple[str, Any]] = [
        ("architecture", f"{settings.model_type}, {settings.num_layers} layers"),
        ("vocabulary", f"{settings.vocab_size:,}"),
        ("dtype", str(dtype).removeprefix("torch.")),
    ]
    if getattr(checkpoint.args, "fp8", None):
        kept = "FP8" if getattr(checkpoint.args, "fp8_param_gather", False) else "high precision"
        note = f"products in FP8, weights kept in {kept}; its scales are not part of this folder"
        rows.append(("trained in FP8", note))
    return rows


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
