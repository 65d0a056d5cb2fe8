"""What of a model Megatron's flags and --use-checkpoint-args leave out.

--use-checkpoint-args takes over the sizes of a checkpoint's model, and forgets what is listed here:
the run would start from good weights and compute something else, without a word.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_emo.torch_dist import TRACKER, read_arguments, resolve_checkpoint_dir

_FORGOTTEN_VALUES = {
    "layernorm_epsilon": "--norm-epsilon",
    "rope_scaling_factor": "--rope-scaling-factor",
    "rotary_seq_len_interpolation_factor": "--rotary-seq-len-interpolation-factor",
}
_FORGOTTEN_SWITCHES = {
    "openai_gelu": "--openai-gelu",
    "qk_layernorm": "--qk-layernorm",
    "relu": "--relu",
    "use_rope_scaling": "--use-rope-scaling",
}


def add_model_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the activation of OPT, for which Megatron has no flag."""
    parser.add_argument_group("model").add_argument(
        "--relu", action="store_true", help="Use ReLU instead of default gelu"
    )
    return parser


def with_checkpoint_arguments(argv: list[str]) -> list[str]:
    """Return `argv`, with --use-checkpoint-args followed by the flags that it forgets.

    They come from the checkpoint's arguments, and a flag that is typed stays as it is. So does a
    typed --tokenizer-type, which Megatron would replace by the checkpoint's. A checkpoint that
    cannot be read is left to Megatron to report.
    """
    typed = {word.partition("=")[0] for word in argv}
    if "--use-checkpoint-args" not in typed:
        return argv
    saved = _saved_arguments(argv)
    added = []
    for name, flag in _FORGOTTEN_VALUES.items():
        if saved.get(name) is not None and flag not in typed:
            added += [flag, str(saved[name])]
    for name, flag in _FORGOTTEN_SWITCHES.items():
        if saved.get(name) is True and flag not in typed:
            added.append(flag)
    if "--tokenizer-type" in typed:
        added.append("--no-use-tokenizer-model-from-checkpoint-args")
    return [*argv, *added]


def model_config_from_args(args: argparse.Namespace) -> Any:
    """Return Megatron's GPTModelConfig with the activation and the rotary scaling asked for.

    Raises:
        ValueError: --relu beside another activation.
    """
    from megatron.training.argument_utils import gpt_config_from_args

    if args.relu and (args.swiglu or args.squared_relu or args.quick_geglu or args.openai_gelu):
        raise ValueError("--relu: expected no other activation's flag beside it")
    config = gpt_config_from_args(args)
    # Left at 8 otherwise. Open in 0.19.2.
    config.rope_scaling_factor = args.rope_scaling_factor
    if args.relu:
        config.transformer.activation_func = torch.nn.functional.relu
        config.transformer.bias_activation_fusion = False
    elif args.openai_gelu and not args.bias_gelu_fusion:
        # Megatron no longer looks at the flag: fused it is this function anyway, unfused erf.
        config.transformer.activation_func = _tanh_gelu
    return config


def _tanh_gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _saved_arguments(argv: list[str]) -> dict[str, Any]:
    """The arguments in the checkpoint that the run starts from."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    for flag in ("--load", "--pretrained-checkpoint"):
        parser.add_argument(flag)
    parser.add_argument("--ckpt-step", type=int)
    given, _ = parser.parse_known_args(argv)
    for root in (given.load, given.pretrained_checkpoint):
        if root is not None and Path(root, TRACKER).is_file():
            step = given.ckpt_step if root == given.load else None
            try:
                saved = read_arguments(resolve_checkpoint_dir(root, step))
            except (ValueError, OSError):
                return {}
            return {} if saved is None else vars(saved)
    return {}
