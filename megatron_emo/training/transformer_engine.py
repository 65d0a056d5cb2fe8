"""Whether the layers and number formats asked for exist here, looked at before a model is built.

Megatron (core 0.19.2) says it late or not at all: without Transformer Engine it ends in a TypeError
while it builds layers, and layers of its own compute in bf16 whatever --fp8-format says.

    python -m megatron_emo.training.transformer_engine --fp8-format hybrid --fp8-recipe mxfp8

answers for scripts, before they start anything: exit code 0, or 1 and what to do.
"""

from __future__ import annotations

import argparse
import importlib
import sys

import torch

PIP_COMMAND = "pip install --no-build-isolation 'transformer_engine[pytorch]'"
CONTAINER = "nvcr.io/nvidia/pytorch"
_LOCAL_FLAGS = (
    "--transformer-impl local --attention-backend unfused --no-rope-fusion "
    "--no-persist-layer-norm --no-masked-softmax-fusion --no-gradient-accumulation-fusion"
)
_NEEDED_CAPABILITY = {"blockwise": (9, 0), "mxfp8": (10, 0)}
"""By recipe, where the tensor cores of 8.9 (Ada) do not do."""
_FP8_CAPABILITY = (8, 9)
_FP4_CAPABILITY = (10, 0)


def import_obstacle() -> str:
    """Return why Transformer Engine cannot be imported, "" where it can."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    # Libraries that do not fit the driver or torch end in errors of many types.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_transformer_engine(args: argparse.Namespace) -> None:
    """Refuse Transformer Engine's layers, FP8 and FP4 where they are not to be had.

    Args:
        args: with Megatron's transformer_impl, fp8, fp8_recipe and fp4.

    Raises:
        ValueError: the flag, what is missing and what to install or to leave out.
    """
    narrow = _narrow_flag(args)
    if args.transformer_impl == "transformer_engine":
        _check_import(narrow)
    elif narrow and args.transformer_impl == "local":
        raise ValueError(
            f"{narrow}: with --transformer-impl local no layer computes in it; expected "
            "--transformer-impl transformer_engine"
        )
    if narrow:
        _check_device(args, narrow)


def _narrow_flag(args: argparse.Namespace) -> str:
    """Return the flag and value that ask for eight or four bits, "" without."""
    if args.fp8:
        return f"--fp8-format {args.fp8} --fp8-recipe {_recipe(args)}"
    return f"--fp4-format {args.fp4}" if args.fp4 else ""


def _recipe(args: argparse.Namespace) -> str:
    """Return the recipe's name, which Megatron keeps as text or as an enumeration."""
    return getattr(args.fp8_recipe, "value", args.fp8_recipe)


def _check_import(narrow: str) -> None:
    obstacle = import_obstacle()
    if obstacle:
        without = f"{_LOCAL_FLAGS}, in bf16" if narrow else _LOCAL_FLAGS
        raise ValueError(
            f"--transformer-impl transformer_engine (the default){' ' + narrow if narrow else ''}: "
            f"Transformer Engine cannot be imported ({obstacle}). Install it into this environment "
            f"with {PIP_COMMAND} (it compiles against the CUDA toolkit and the torch it finds), or "
            f"train in a container that has it, {CONTAINER}; or without it: {without}"
        )


def _check_device(args: argparse.Namespace, narrow: str) -> None:
    if not torch.cuda.is_available():
        raise ValueError(
            f"{narrow}: it needs a GPU with Transformer Engine, and torch finds no CUDA device"
        )
    needed = _FP4_CAPABILITY
    if args.fp8:
        needed = _NEEDED_CAPABILITY.get(_recipe(args), _FP8_CAPABILITY)
    found = torch.cuda.get_device_capability()
    if found < needed:
        raise ValueError(
            f"{narrow}: expected a GPU of compute capability {needed[0]}.{needed[1]} or above, "
            f"found {torch.cuda.get_device_name()} with {found[0]}.{found[1]}"
        )


def main(argv: list[str] | None = None) -> None:
    """Check what the flags ask for; for scripts, in the place of a traceback."""
    parser = argparse.ArgumentParser(description="Check for Transformer Engine and its formats.")
    parser.add_argument("--fp8-format", dest="fp8", default=None)
    parser.add_argument("--fp8-recipe", default="delayed")
    args = parser.parse_args(argv)
    args.transformer_impl, args.fp4 = "transformer_engine", None
    try:
        check_transformer_engine(args)
    except ValueError as error:
        raise SystemExit(f"{error}") from None
    version = getattr(importlib.import_module("transformer_engine"), "__version__", "unknown")
    print(f"Transformer Engine {version}, {_narrow_flag(args) or 'bf16'}: available")


if __name__ == "__main__":
    sys.exit(main())
