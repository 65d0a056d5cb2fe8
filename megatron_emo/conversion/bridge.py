"""The weight mappings of megatron-bridge, on a GPTModel that is already built.

Only its mappings are used: checkpoints, vocabulary padding, configs and tokenizers are ours. The
wheel's own requirements cannot be installed beside this package, so it comes with `--no-deps`,
and is imported at the first call (about ten seconds).
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_emo.conversion.errors import ConversionError

INSTALL_COMMAND = "pip install --no-deps megatron-bridge==0.6.2 omegaconf==2.4.0 einops==0.8.2"
BESIDE_ENVIRONMENT = Path(sys.prefix) / "bridge"
"""Where `make env` puts the wheels, searched after the environment's own packages."""

_LORA_LAYERS = "megatron.bridge.peft.lora_layers"
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""What older HF folders hold although it follows from the config; `.attn.bias` is GPT-2's mask."""


def is_available() -> bool:
    """True where megatron-bridge can be found; nothing of it is imported."""
    _search_beside_environment()
    try:
        return importlib.util.find_spec("megatron.bridge") is not None
    except ModuleNotFoundError:
        return False


def supported_architectures() -> tuple[str, ...]:
    """Return the names of the HF model classes that the engine can map, sorted.

    Raises:
        ImportError: megatron-bridge is missing.
    """
    registered = _import_model_bridge().get_model_bridge._exact_types
    names = {key if isinstance(key, str) else key.__name__ for key in registered}
    return tuple(sorted(names))


def hf_to_model(hf_dir: str | Path, model: torch.nn.Module) -> None:
    """Copy the weights of an HF folder into a GPTModel of one rank, in the model's dtype.

    One tensor of the folder is in memory at a time. Only safetensors are read, and no code of the
    folder is run. No collective.

    Args:
        model: built with the folder's own vocabulary, without padding.

    Raises:
        ImportError: megatron-bridge is missing.
        ConversionError: an architecture without mapping; a parameter that the folder has no tensor
            for, or a tensor that no parameter takes (all are named); a shape that differs.
    """
    _import_model_bridge()
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(hf_dir, local_files_only=True, trust_remote_code=False)
    mappings = _mappings_for(config)
    if not any(Path(hf_dir).glob("*.safetensors")):
        raise ConversionError(f"{hf_dir}: expected *.safetensors in it, found none")
    folder = PreTrainedCausalLM.from_pretrained(str(hf_dir), trust_remote_code=False)
    _say_whether_tied(model)
    with _quiet():
        tasks = mappings.build_conversion_tasks(folder, [model])
    tasks = [task for task in tasks if task is not None]
    keys = set(folder.state.source.get_all_keys())
    _check_coverage(hf_dir, model, tasks, keys)
    _check_tied_copy(config, folder.state, keys)
    for task in tasks:
        source = mappings.maybe_modify_loaded_hf_weight(task.mapping.hf_param, folder.state)
        with _quiet():
            weight = task.mapping.hf_to_megatron(source, task.megatron_module)
        if weight.shape != task.param_weight.shape:
            raise ConversionError(
                f"{hf_dir}: {_hf_names(task)} give {tuple(weight.shape)} for {task.param_name}, "
                f"expected {tuple(task.param_weight.shape)}"
            )
        with torch.no_grad():
            task.param_weight.copy_(weight)


def model_to_hf(
    model: torch.nn.Module, hf_config: Any, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (HF name, tensor on the CPU) for a GPTModel of one rank, in the model's order.

    A tied output layer comes once, under the embedding's name, as HF stores it. No collective.

    Args:
        hf_config: transformers' config of the folder to write; `architectures` may be unset.
        dtype: of the tensors; by default the model's.

    Raises:
        ImportError: megatron-bridge is missing.
        ConversionError: an architecture without mapping; parameters that no mapping takes, by name.
    """
    _import_model_bridge()
    mappings = _mappings_for(hf_config)
    _say_whether_tied(model)
    with _quiet():
        tasks = mappings.build_conversion_tasks(hf_config, [model], weight_dtype=dtype)
    tasks = [task for task in tasks if task is not None]
    _check_assigned("model", model, tasks)
    exported = mappings.stream_weights_megatron_to_hf(
        [model], hf_config, cpu=True, show_progress=False, conversion_tasks=tasks
    )
    for name, tensor in exported:
        if not (model.share_embeddings_and_output_weights and name == "lm_head.weight"):
            yield name, tensor.detach()


def _search_beside_environment() -> None:
    """`megatron` is a namespace package: parts of it may lie in several entries of sys.path."""
    path = str(BESIDE_ENVIRONMENT)
    if BESIDE_ENVIRONMENT.is_dir() and path not in sys.path:
        sys.path.append(path)


def _import_model_bridge() -> types.ModuleType:
    """Return Bridge's registry of mappings, ours among them."""
    if not is_available():
        raise ImportError(
            f"megatron-bridge is not installed; expected version 0.6.2: {INSTALL_COMMAND} "
            "(--no-deps, since its requirements cannot be resolved; `make env` installs it, too)"
        )
    _stand_in_for_lora_layers()
    with _quiet():
        import megatron.bridge  # noqa: F401  registers Bridge's mappings
        from megatron.bridge.models.conversion import model_bridge

        from megatron_emo.conversion import bridge_architectures

        bridge_architectures.register()
    return model_bridge


def _stand_in_for_lora_layers() -> None:
    """Put empty classes in the place of the one module that imports Transformer Engine at its top.

    Conversion knows no adapters. Where Transformer Engine can work the module is imported as it is.
    Open in megatron-bridge 0.6.2.
    """
    if _LORA_LAYERS in sys.modules or (
        torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    ):
        return
    module = types.ModuleType(_LORA_LAYERS)
    for name in ("LinearAdapter", "LoRALinear", "LoRATopKRouter"):
        setattr(module, name, type(name, (), {}))
    sys.modules[_LORA_LAYERS] = module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back warnings and log lines about optional packages, and root handlers set on the way.

    What Bridge warns of and goes on, a tensor or a parameter left out, is an error here.
    """
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


def _mappings_for(hf_config: Any) -> Any:
    """Return Bridge's mappings for the config's architecture.

    Raises:
        ConversionError: none is registered, or the config asks for code of its own folder.
    """
    import transformers
    from megatron.bridge.models.conversion import model_bridge

    if getattr(hf_config, "auto_map", None):
        raise ConversionError(f"config.json: auto_map {hf_config.auto_map}: custom code is not run")
    name = _architecture_of(hf_config)
    if name not in supported_architectures():
        raise ConversionError(
            f"config.json: architectures [{name!r}]: expected one of "
            f"{', '.join(supported_architectures())}"
        )
    return model_bridge.get_model_bridge(getattr(transformers, name, name), hf_config=hf_config)


def _architecture_of(hf_config: Any) -> str:
    """Return the name of the config's causal LM class, by its type where the config has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if hf_config.architectures:
        return hf_config.architectures[0]
    by_type = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf_config.model_type)
    return by_type if isinstance(by_type, str) else hf_config.model_type


def _say_whether_tied(model: torch.nn.Module) -> None:
    """Bridge asks the model's config, where only its own builders put it."""
    is_tied = model.share_embeddings_and_output_weights
    model.config.share_embeddings_and_output_weights = is_tied


def _hf_names(task: Any) -> list[str]:
    names = task.mapping.hf_param
    return [names] if isinstance(names, str) else list(names.values())


def _check_coverage(
    hf_dir: str | Path, model: torch.nn.Module, tasks: Iterable[Any], keys: set[str]
) -> None:
    # A parameter whose tensors are missing has a task without a module.
    wanted = [task for task in tasks if not task.mapping.allow_hf_name_mismatch]
    missing = sorted({name for task in wanted for name in _hf_names(task)} - keys)
    if missing:
        raise ConversionError(f"{hf_dir}: no tensors {missing}, which the model has parameters for")
    _check_assigned(hf_dir, model, tasks)
    taken = {name for task in tasks for name in _hf_names(task)}
    if model.share_embeddings_and_output_weights:
        taken.add("lm_head.weight")
    left = sorted(key for key in keys - taken if not key.endswith(_DERIVED_SUFFIXES))
    if left:
        raise ConversionError(f"{hf_dir}: no parameter of the model takes {left}")


def _check_assigned(origin: object, model: torch.nn.Module, tasks: Iterable[Any]) -> None:
    mapped = {task.param_name for task in tasks if task.megatron_module is not None}
    left = sorted(name for name, _ in model.named_parameters() if name not in mapped)
    if left:
        raise ConversionError(f"{origin}: nothing is mapped to the parameters {left}")


def _check_tied_copy(config: Any, state: Any, keys: set[str]) -> None:
    """Where a tied folder stores its output layer as well, both have to be the same."""
    embeddings = [key for key in keys if key.endswith(("embed_tokens.weight", "wte.weight"))]
    is_stored_twice = config.tie_word_embeddings and "lm_head.weight" in keys
    if is_stored_twice and not torch.equal(state["lm_head.weight"], state[embeddings[0]]):
        raise ConversionError(
            f"config.json: tie_word_embeddings is true, but lm_head.weight and {embeddings[0]} "
            "differ; expected false"
        )
