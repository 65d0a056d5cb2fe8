"""Master weights beside narrower ones, in the forms in which Megatron's optimizers save them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hf_models import save_model
from safetensors.torch import load_file

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.export_hf import ExportOptions, export_hf
from megatron_emo.conversion.import_hf import import_hf
from megatron_emo.conversion.torch_dist_writer import PieceWriter, common_state, write_index
from megatron_emo.torch_dist import TensorReader, read_arguments

Tensors = dict[str, torch.Tensor]
FC2 = "decoder.layers.mlp.linear_fc2.weight"
WIDE = ExportOptions(dtype=torch.float32)
BUCKET = (
    "optimizer.distributed.dp_group_idx_0.gbuf_idx_0."
    "dtype_(torch.bfloat16, torch.float32).bucket_idx_0.param"
)


def to_bf16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16()


def through_fp8(tensor: torch.Tensor) -> torch.Tensor:
    """What a weight in FP8 with one scale a tensor is worth, as Megatron stores it; in bf16."""
    if tensor.dim() < 2 or tensor.shape[-1] == 1:
        return tensor.bfloat16()
    scale = 448 / tensor.abs().amax()
    return ((tensor * scale).to(torch.float8_e4m3fn).float() / scale).bfloat16()


def pieces(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor, tuple, tuple]]:
    """A layer at a time, as the arguments of PieceWriter.write."""
    for key, tensor in tensors.items():
        if ".layers." in key and not key.startswith("optimizer"):
            yield from ((key, part, (i,), (len(tensor),)) for i, part in enumerate(tensor))
        else:
            yield key, tensor, (), ()


def write_bucket(writer: PieceWriter, masters: Tensors, num_ranks: int) -> None:
    """One bucket: last layer first, at multiples of 64, each data-parallel rank its even share."""
    parameters = [part for _, part, _, _ in pieces(masters)][::-1]
    starts, end = [], 0
    for parameter in parameters:
        starts.append(-(-end // 64) * 64)
        end = starts[-1] + parameter.numel()
    flat = torch.full((end,), torch.nan)
    cuts = {0, end, *(end * rank // num_ranks for rank in range(num_ranks))}
    for start, parameter in zip(starts, parameters, strict=True):
        flat[start : start + parameter.numel()] = parameter.flatten()
        cuts |= {start, start + parameter.numel()}
    for start, stop in zip(sorted(cuts), sorted(cuts)[1:], strict=False):
        shape = {"shape": (end,), "offsets": (start,), "sizes": (stop - start,)}
        writer._add(BUCKET, flat[start:stop].clone(), dtype="float32", **shape)


def by_name(prefix: str) -> Callable[[PieceWriter, Tensors], None]:
    def write(writer: PieceWriter, masters: Tensors) -> None:
        for key, tensor in masters.items():
            writer.write(prefix + key, tensor, (), ())

    return write


def flat_parts(writer: PieceWriter, masters: Tensors) -> None:
    """Of two tensor-parallel ranks: rows halved, but of the layers' last products the columns."""
    for key, tensor in masters.items():
        layers = tensor if ".layers." in key else tensor[None]
        is_by_columns = "linear_proj" in key or "linear_fc2" in key
        parts = []
        for layer in layers:
            halves = layer.chunk(2, dim=int(is_by_columns)) if layer.dim() == 2 else [layer]
            parts.append(torch.stack([half.flatten() for half in halves]))
        grid = [len(layers)] if ".layers." in key else []
        if layers.dim() == 3:
            grid += [1, 2] if is_by_columns else [2, 1]
        else:
            grid.append(1)
        flat = torch.stack(parts).reshape(*grid, -1)
        writer.write("optimizer.state.fp32_param." + key, flat, (), ())


def write_stored(
    writer: PieceWriter, key: str, tensor: torch.Tensor, index: tuple, stack: tuple
) -> None:
    """As Megatron does: of a gated layer the two halves apart."""
    if "linear_fc1.weight" not in key:
        writer.write(key, tensor, index, stack)
        return
    shape = (*stack, *tensor.shape)
    for number, half in enumerate(tensor.chunk(2)):
        where = {"offsets": (*index, number * len(half), 0), "sizes": (1, *half.shape)}
        writer._add(key, half[None].clone(), shape=shape, dtype=str(half.dtype)[6:], **where)


MASTERS: dict[str, Callable[[PieceWriter, Tensors], None]] = {
    "plain-optimizer": by_name("optimizer.state.fp32_param."),
    "fully-reshardable": by_name("optimizer.state.param."),
    "chained": by_name("chained_0.optimizer.state.fp32_param."),
    "flat-parts": flat_parts,
    "buckets": lambda writer, masters: write_bucket(writer, masters, 1),
    "buckets-of-3-ranks": lambda writer, masters: write_bucket(writer, masters, 3),
}


@pytest.fixture
def checkpoint(tmp_path) -> Callable[..., Path]:
    """Return make(stored, masters, ...) -> folder with weights so stored, of the model in hf/."""

    def make(
        store: Callable[[torch.Tensor], torch.Tensor],
        write_masters: Callable[[PieceWriter, Tensors], None] | None,
        change: Callable[[Tensors], None] = lambda masters: None,
        **arguments,
    ) -> Path:
        save_model("llama", tmp_path / "hf")
        import_hf(tmp_path / "hf", tmp_path / "mg", say=quiet)
        reader = TensorReader(tmp_path / "mg" / "release")
        masters = {key: reader.read(key) for key in reader.shapes}
        change(masters)
        args = read_arguments(tmp_path / "mg" / "release")
        vars(args).update(params_dtype=torch.bfloat16, bf16=True, **arguments)
        folder = tmp_path / "iter_0000003"
        folder.mkdir()
        with open(folder / "__0_0.distcp", "wb") as stream:
            writer = PieceWriter(stream, "__0_0.distcp")
            writer.write_object(*common_state(args))
            for key, tensor, index, stack in pieces(masters):
                write_stored(writer, key, store(tensor), index, stack)
            if write_masters is not None:
                write_masters(writer, masters)
        write_index(folder, writer.pieces)
        return folder

    return make


def quiet(line: str) -> None:
    pass


def exported(folder: Path, options: ExportOptions | None = None) -> tuple[Tensors, list[str]]:
    """(tensors of the folder that it is exported to, what was said on the way)."""
    said: list[str] = []
    output = folder.parent / "out"
    export_hf(folder, output, options, say=said.append)
    return load_file(output / "model.safetensors"), said


def hf_tensors(tmp_path: Path) -> Tensors:
    return load_file(tmp_path / "hf" / "model.safetensors")


@pytest.mark.parametrize("form", MASTERS)
def test_fp32_is_that_of_the_master_weights(checkpoint, tmp_path, form):
    found, said = exported(checkpoint(to_bf16, MASTERS[form]), WIDE)
    expected = hf_tensors(tmp_path)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == torch.float32 and torch.equal(found[key], tensor), key
    assert "15 of 15 tensors from the optimizer's fp32 master weights" in said


def test_without_being_asked_for_they_are_not_read(checkpoint, tmp_path):
    found, said = exported(checkpoint(to_bf16, MASTERS["fully-reshardable"]))
    for key, tensor in hf_tensors(tmp_path).items():
        assert torch.equal(found[key], tensor.bfloat16()), key
    assert not any("master" in line for line in said)


def test_a_checkpoint_without_them_is_widened_and_says_so(checkpoint, tmp_path):
    found, said = exported(checkpoint(to_bf16, None), WIDE)
    for key, tensor in hf_tensors(tmp_path).items():
        assert torch.equal(found[key], tensor.bfloat16().float()), key
    line = "0 of 15 tensors from the optimizer's fp32 master weights"
    assert f"{line}, which the checkpoint does not have; all as stored" in said


@pytest.mark.parametrize("form", ["fully-reshardable", "buckets-of-3-ranks"])
def test_a_run_that_keeps_fp8_is_exported_from_its_masters_unasked(checkpoint, tmp_path, form):
    folder = checkpoint(through_fp8, MASTERS[form], fp8="e4m3", fp8_param_gather=True)
    asked: list[Path] = []
    export_hf(folder, tmp_path / "out", check=asked.append, say=quiet)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for key, tensor in hf_tensors(tmp_path).items():
        assert torch.equal(found[key], tensor.bfloat16()), key
    assert asked == []
    assert "logits not compared, since the run's own" in (tmp_path / "out/README.md").read_text()
    stored = TensorReader(folder).read(FC2)
    masters = TensorReader(tmp_path / "mg" / "release").read(FC2)
    assert (stored.float() - masters).norm() > 0.02 * masters.norm()


def test_a_run_that_keeps_fp8_without_masters_is_exported_as_stored(checkpoint, tmp_path):
    folder = checkpoint(through_fp8, None, fp8="e4m3", fp8_param_gather=True)
    found, said = exported(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(found[name], TensorReader(folder).read(FC2, (1,)))
    assert any("0 of 15 tensors" in line for line in said)


def test_weights_stored_in_fp8_come_from_the_master_of_their_name(checkpoint, tmp_path):
    def store(tensor: torch.Tensor) -> torch.Tensor:
        is_fc2 = tensor.shape == (64, 96)
        return tensor.to(torch.float8_e4m3fn) if is_fc2 else tensor.bfloat16()

    found, said = exported(checkpoint(store, MASTERS["fully-reshardable"]))
    for key, tensor in hf_tensors(tmp_path).items():
        assert torch.equal(found[key], tensor.bfloat16()), key
    assert any(line.startswith("2 of 15 tensors from") for line in said)


def test_a_master_of_another_shape_is_named(checkpoint):
    def write(writer: PieceWriter, masters: Tensors) -> None:
        writer.write("optimizer.state.param." + FC2, masters[FC2][:, :-1], (), ())

    message = r"optimizer\.state\.param\..*fc2\.weight has shape \[2, 63, 96\], expected \[2, 64, 9"
    with pytest.raises(ConversionError, match=message):
        exported(checkpoint(to_bf16, write), WIDE)


def test_a_place_that_cannot_be_told_from_another_is_not_taken(checkpoint, tmp_path):
    """Two norms whose masters differ by less than bf16 shows: either could be either."""
    names = ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"]

    def alike(masters: Tensors) -> None:
        first, second = (masters[f"decoder.layers.{name}"] for name in names)
        first[0] = first[0].bfloat16().float()
        second[0] = first[0] * (1 + 2**-12)

    found, said = exported(checkpoint(to_bf16, MASTERS["buckets"], alike), WIDE)
    assert any(line.startswith("13 of 15 tensors from") for line in said)
    assert any("--dist-ckpt-optim-fully-reshardable" in line for line in said)
    ours, theirs = found["model.layers.0.input_layernorm.weight"], hf_tensors(tmp_path)
    assert torch.equal(ours, theirs["model.layers.0.input_layernorm.weight"].bfloat16().float())


def test_masters_of_another_training_step_are_not_taken(checkpoint, tmp_path):
    def write(writer: PieceWriter, masters: Tensors) -> None:
        write_bucket(writer, {key: 1.01 * tensor for key, tensor in masters.items()}, 1)

    found, said = exported(checkpoint(to_bf16, write), WIDE)
    for key, tensor in hf_tensors(tmp_path).items():
        assert torch.equal(found[key], tensor.bfloat16().float()), key
    assert any(line.startswith("0 of 15 tensors from") for line in said)
