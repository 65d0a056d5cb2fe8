"""Checkpoints from elsewhere run nothing in the tools that read them."""

from __future__ import annotations

import contextlib
import importlib.util
import pickle
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # ranks of the pool import this file by its path

from attacks import ATTACKS, Canary, copy_attacked  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
# What each tool is asked for; {folder} is one iteration's, {hf} the model it was made from.
COMMANDS = {
    "export": (
        "convert_checkpoint",
        "export --megatron {folder} --output {out}/hf --hf-config {hf}",
    ),
    "verify": ("convert_checkpoint", "verify --megatron {folder} --hf {hf}"),
    "prepare": (
        "prepare_cost_embedding",
        "--from-checkpoint {folder} --output {out}/e.safetensors --vocab-size 131",
    ),
    "generate": ("generate", "--megatron {folder} --hf-config {hf} --prompt w1 --max-new-tokens 1"),
}
STOPPED = {"metadata_itself", "metadata_within", "metadata_by_name", "tensor_piece"}
"""Where the tool has to refuse; what is in objects alone is passed over."""


def run_tool(name: str, command: str, **places: object) -> int:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.main(command.format(**places).split())
    except SystemExit as stop:
        assert stop.code not in (None, 0), stop.code
        return 1
    return 0


def save_honest(folder: Path) -> tuple[Path, Path]:
    """Write a model with a tokenizer, and its Megatron checkpoint; return both folders."""
    from hf_models import save_model
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from megatron_emo.conversion.import_hf import import_hf

    save_model("llama", folder / "hf")
    words = {f"w{index}": index for index in range(131)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(
        folder / "hf"
    )
    import_hf(folder / "hf", folder / "mg", say=lambda line: None)
    return folder / "hf", folder / "mg"


def check_tools(folder: str) -> None:
    hf, megatron = save_honest(Path(folder))
    for tool, (name, command) in COMMANDS.items():
        (out := Path(folder, tool)).mkdir()
        assert run_tool(name, command, folder=megatron, hf=hf, out=out) == 0, (
            f"{tool} of the honest"
        )
    for attack in ATTACKS:
        for tool, (name, command) in COMMANDS.items():
            place = Path(folder, f"{attack}_{tool}")
            made = Path(f"{place}_made")
            spoilt = copy_attacked(megatron, place, attack, made)
            (out := Path(f"{place}_out")).mkdir()
            stopped = run_tool(name, command, folder=spoilt, hf=hf, out=out)
            assert not made.exists(), f"{attack} ran in {tool}"
            is_read = attack != "tensor_piece" or tool != "prepare"
            assert not is_read or stopped == (attack in STOPPED), f"{tool} of {attack}: {stopped}"
            assert stopped == 0 or not list(out.iterdir()), f"{tool} of {attack} left an output"


def test_no_tool_runs_what_a_checkpoint_holds(run_distributed, tmp_path):
    """In a rank of the pool, since comparing logits builds Megatron's model."""
    run_distributed(1)(check_tools, folder=str(tmp_path))


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_attacks_are_real(tmp_path, attack):
    """Read as torch and Megatron read them, each does run."""
    hf, megatron = save_honest(tmp_path)
    made = tmp_path / "made"
    folder = copy_attacked(megatron, tmp_path / "spoilt", attack, made)
    with contextlib.suppress(AttributeError):
        pickle.loads((folder / ".metadata").read_bytes())
    for file in [*folder.glob("__9_*"), *folder.glob("common.pt")]:
        torch.load(file, weights_only=False)
    if attack != "metadata_by_name":  # the old protocol does not follow the dot
        assert made.exists()


def test_an_index_cannot_change_torchs_classes(tmp_path):
    """By pickle's BUILD, whose second half sets attributes, of a class as of any object."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

    from megatron_emo.torch_dist import tensor_shapes

    before = dict(vars(Metadata)), dict(vars(BytesStorageMetadata))
    module = b"ctorch.distributed.checkpoint.metadata\n"
    state = b"(N(dVstorage_meta\nI1\nsVhidden\nI1\nstb"
    (tmp_path / ".metadata").write_bytes(module + b"Metadata\n" + state + b".")
    with pytest.raises(ValueError, match="sets attributes of Metadata, which are torch's"):
        tensor_shapes(tmp_path)
    assert before == (dict(vars(Metadata)), dict(vars(BytesStorageMetadata)))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "torch.distributed.checkpoint.metadata.Enum",
            "torch.distributed.checkpoint.metadata.field",
        ),
        *("torch.distributed.checkpoint.filesystem.FileSystemWriter", "torch.load", "torch.Tensor"),
        *("builtins.getattr", "functools.partial", "collections.Counter", "pathlib.Path"),
        *("torch.serialization.load", "megatron.core.dist_checkpointing.mapping.ShardedObject"),
    ],
)
def test_names_outside_the_list_are_refused(tmp_path, name):
    from megatron_emo.torch_dist import tensor_shapes

    module, _, attribute = name.rpartition(".")
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(ValueError, match=f"found {name}, which has no place there"):
        tensor_shapes(tmp_path)


def test_the_canary_is_no_ordinary_object(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "made")))
    assert (tmp_path / "made").is_file()
