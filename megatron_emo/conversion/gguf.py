"""A model out of one GGUF file, as a plain Hugging Face folder of dense weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.gguf_header import check_gguf_header
from megatron_emo.conversion.staging import Staging

_PRE_TOKENIZER = "tokenizer.ggml.pre"
_DIGITS_APART = ("smollm",)
"""Names under which llama.cpp splits digits off one by one before it applies GPT-2's pattern.
transformers (5.23) applies the pattern alone, and cuts blanks before a digit otherwise."""


def find_gguf(folder: str | Path) -> Path:
    """Return the first .gguf file under `folder`, by path.

    Raises:
        FileNotFoundError: no such folder, or none in it.
    """
    found = sorted(Path(folder).rglob("*.gguf"))
    if not found:
        raise FileNotFoundError(f"--package {folder}: expected a .gguf file under it, found none")
    return found[0]


def unpack_gguf(
    file: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Write config, weights (safetensors), tokenizer and generation settings; return parameters.

    transformers reads the file; quantised blocks are multiplied out and stored in `dtype`. The
    model is whole in memory. `output` appears at the end, by one rename.

    Raises:
        FileNotFoundError, FileExistsError: no such file; an output without `overwrite`.
        ConversionError: a file that is damaged or that transformers cannot read.
        ImportError: the gguf package is not installed.
    """
    file = Path(file)
    pre_tokenizer = _read_pre_tokenizer(file)
    recipe = {"task": "unpack_gguf", "source": file.name, "dtype": str(dtype)}
    staging = Staging(Path(output), recipe, resume=False, overwrite=overwrite)
    say(f"{file.name}: reading {file.stat().st_size:,} bytes")
    try:
        model, tokenizer = _load(file, dtype)
    except (ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        raise ConversionError(f"--gguf {file}: transformers cannot read it: {error}") from error
    if pre_tokenizer in _DIGITS_APART:
        _split_digits(tokenizer)
    say(f"{output}: writing {model.num_parameters():,} parameters in {dtype}")
    model.save_pretrained(staging.folder)
    tokenizer.save_pretrained(staging.folder)
    staging.publish()
    return model.num_parameters()


def _read_pre_tokenizer(file: Path) -> str:
    check_gguf_header(file)
    from gguf import GGUFReader

    try:
        field = GGUFReader(file).get_field(_PRE_TOKENIZER)
        found = "" if field is None else field.contents()
    except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise ConversionError(f"--gguf {file}: damaged or cut off: {error!r}") from error
    return found if isinstance(found, str) else ""


def _load(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {
        "pretrained_model_name_or_path": file.parent,
        "gguf_file": file.name,
        "trust_remote_code": False,
    }
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Without it, newer versions keep quantised blocks where they find kernels for them.
    if hasattr(transformers, "GgufConfig"):
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    _shorten_floats(model.config)
    return model.to(dtype), tokenizer


def _shorten_floats(config: Any) -> None:
    """Make 1e-5 of 9.999999747378752e-06: the file's numbers are fp32, a config's are read as
    fp64."""
    for name, value in vars(config).items():
        if isinstance(value, float):
            setattr(config, name, float(str(np.float32(value))))


def _split_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
