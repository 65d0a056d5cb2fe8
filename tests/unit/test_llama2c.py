"""llama2.c's files as Hugging Face folders, against its forward pass and its way to cut text,
written down here from the format alone."""

from __future__ import annotations

import importlib.util
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_emo.conversion.errors import ConversionError
from megatron_emo.conversion.llama2c import Llama2cModel, convert_llama2c, split_pairs
from megatron_emo.conversion.llama2c_tokenizer import SPACE, Vocabulary, read_vocabulary
from megatron_emo.cost_embedding.map_tokenizer import token_keys

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
STORIES = DATA / "models" / "stories260K"
SIZES = {"dim": 24, "ffn": 20, "layers": 3, "heads": 4, "kv": 2, "vocab": 300, "positions": 32}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "\n<s>\n", "\n</s>\n"]
CHARACTERS = list(" abc<>s\n") + ["é"]


def quiet(line: str) -> None:
    pass


def write_model(path: Path, *, tied: bool = True, **changes: int) -> dict[str, np.ndarray]:
    """Write random weights as a model file and return them by llama2.c's names."""
    size = SIZES | changes
    dim, ffn, layers, vocab = (size[name] for name in ("dim", "ffn", "layers", "vocab"))
    head = dim // size["heads"]
    shapes = {
        "tok_emb": (vocab, dim),
        "attn_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, size["kv"] * head, dim),
        "wv": (layers, size["kv"] * head, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, ffn, dim),
        "w2": (layers, dim, ffn),
        "w3": (layers, ffn, dim),
        "final_norm": (dim,),
        "freq_cis": (2, size["positions"], head // 2),
        "wcls": (vocab, dim),
    }
    if tied:
        del shapes["wcls"]
    generator = np.random.default_rng(1)
    weights = {
        name: (generator.normal(size=shape) * 0.2 + ("norm" in name)).astype("<f4")
        for name, shape in shapes.items()
    }
    header = [dim, ffn, layers, size["heads"], size["kv"], vocab if tied else -vocab]
    data = struct.pack("<7i", *header, size["positions"])
    path.write_bytes(data + b"".join(weight.tobytes() for weight in weights.values()))
    return weights


def llama2c_logits(weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Logits [s, V] in float64, neighbouring rows of a head turned together."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    heads, kv = SIZES["heads"], SIZES["kv"]
    size, length = SIZES["dim"] // heads, len(tokens)
    angles = np.outer(np.arange(length), 10000.0 ** -(np.arange(0, size, 2) / size))
    turn = np.exp(1j * angles)[:, None]  # [s, 1, size / 2]

    def norm(x, gain):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain

    def rotate(x):  # [s, heads, size]
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x = w["tok_emb"][tokens]
    for i in range(SIZES["layers"]):
        y = norm(x, w["attn_norm"][i])
        q = rotate((y @ w["wq"][i].T).reshape(length, heads, size))
        k = rotate((y @ w["wk"][i].T).reshape(length, kv, size)).repeat(heads // kv, 1)
        v = (y @ w["wv"][i].T).reshape(length, kv, size).repeat(heads // kv, 1)
        scores = np.einsum("shd,thd->hst", q, k) / np.sqrt(size)
        scores = np.where(np.tril(np.ones((length, length))) > 0, scores, -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        x = x + np.einsum("hst,thd->shd", share, v).reshape(length, -1) @ w["wo"][i].T
        y = norm(x, w["ffn_norm"][i])
        gate = y @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["w3"][i].T)) @ w["w2"][i].T
    return norm(x, w["final_norm"]) @ w.get("wcls", w["tok_emb"]).T


def vocabulary(seed: int, *, size: int = 300, is_ordered: bool = True) -> tuple[list, list]:
    """(pieces, scores): some characters and random joins of them, overlapping ones too."""
    drawn = random.Random(seed)
    joined: list[str] = []
    while len(joined) < size - 259 - len(CHARACTERS):
        known = CHARACTERS + joined
        piece = drawn.choice(known) + drawn.choice(known)
        if piece not in known and len(piece) < 9:
            joined.append(piece)
    scores = [-float(index) for index in range(size - 259)]
    if not is_ordered:
        drawn.shuffle(scores)
    return [*SPECIAL, *BYTES, *joined, *CHARACTERS], [0.0] * 259 + scores


def write_tokenizer(path: Path, pieces: list, scores: list) -> None:
    data = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    longest = struct.pack("<i", max(map(len, data)))
    entries = [
        struct.pack("<fi", score, len(piece)) + piece
        for piece, score in zip(data, scores, strict=True)
    ]
    path.write_bytes(longest + b"".join(entries))


def llama2c_encode(text: str, pieces: list[str], scores: list[float]) -> list[int]:
    """<s>, a space, the characters or their bytes; then the best pair, the left one of equals."""
    ids = {piece: index for index, piece in enumerate(pieces)}
    tokens = [1, ids[" "]] if text else [1]
    for character in text:
        known = ids.get(character)
        tokens += [byte + 3 for byte in character.encode()] if known is None else [known]
    while True:
        pairs = enumerate(zip(tokens, tokens[1:], strict=False))
        made = [(ids.get(pieces[a] + pieces[b]), place) for place, (a, b) in pairs]
        found = [(-scores[piece], place, piece) for piece, place in made if piece is not None]
        if not found:
            return tokens
        _, place, piece = min(found)
        tokens[place : place + 2] = [piece]


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """A model file and a tokenizer file that belong together."""
    model, tokenizer = tmp_path / "model.bin", tmp_path / "tokenizer.bin"
    write_model(model)
    write_tokenizer(tokenizer, *vocabulary(0))
    return model, tokenizer


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_llama2c(files, tmp_path, tied):
    weights = write_model(files[0], tied=tied)
    convert_llama2c(*files, tmp_path / "hf", say=quiet)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values())
    assert next(model.parameters()).dtype == torch.float32
    assert model.config.tie_word_embeddings == tied
    tokens = torch.randint(300, (32,))
    with torch.no_grad():
        found = model(tokens[None]).logits[0]
    expected = llama2c_logits(weights, tokens.tolist())
    # fp32 against float64: some 1e-6 of the largest logit.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_the_folder_holds_what_state_dict_returns(files, tmp_path):
    from safetensors.torch import load_file

    convert_llama2c(*files, tmp_path / "hf", say=quiet)
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    given = Llama2cModel(files[0]).state_dict()
    assert stored.keys() == given.keys() and "lm_head.weight" not in stored
    assert all(torch.equal(stored[name], given[name]) for name in stored)


def test_rows_of_a_pair_are_half_a_head_apart():
    rows = torch.arange(12.0)[:, None]
    assert split_pairs(rows, 2).flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@pytest.mark.parametrize("is_ordered", [True, False])
def test_text_is_cut_as_llama2c_cuts_it(tmp_path, is_ordered):
    for seed in range(20):
        pieces, scores = vocabulary(seed, is_ordered=is_ordered)
        write_tokenizer(tmp_path / "tokenizer.bin", pieces, scores)
        tokenizer = read_vocabulary(tmp_path / "tokenizer.bin", 300).tokenizer(max_length=64)
        drawn = random.Random(seed)
        for length in range(40):
            text = "".join(drawn.choice(" aaabbc<>s\né€😀xA0\t") for _ in range(length))
            ids = tokenizer(text)["input_ids"]
            assert ids == llama2c_encode(text, pieces, scores), (seed, text)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_folder_keeps_the_tokenizer(files, tmp_path):
    convert_llama2c(*files, tmp_path / "hf", say=quiet)
    pieces, scores = vocabulary(0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    # Special tokens are no more than text where they are written out.
    for text in ("", " ", "  abc aab\nbca", "a <s> b </s>", "<unk>", "<0x41>", "\n<s>\n", "é€ x"):
        assert tokenizer(text)["input_ids"] == llama2c_encode(text, pieces, scores), text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 300)
    assert tokenizer.model_max_length == SIZES["positions"]
    assert tokenizer(SPACE)["input_ids"] == tokenizer(" ")["input_ids"]  # as SentencePiece
    # What a cost table of another tokenizer is mapped by.
    keys = token_keys(tokenizer)
    assert keys[pieces.index(" ")] == (False, b" ") and keys[1] == (True, b"<s>")
    assert keys[pieces.index("<0x0D>")] == (False, b"\r")


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES}")
def test_real_stories_are_cut_as_llama2c_cuts_them():
    data = (STORIES / "tok512.bin").read_bytes()
    pieces, scores, place = [], [], 4
    while place < len(data):
        score, length = struct.unpack_from("<fi", data, place)
        pieces.append(data[place + 8 : place + 8 + length].decode())
        scores.append(score)
        place += 8 + length
    tokenizer = read_vocabulary(STORIES / "tok512.bin", 512).tokenizer(max_length=10**6)
    with open(DATA / "text" / "tinystories_944k.txt", encoding="utf-8", newline="") as stream:
        stories = stream.read(16_000)
    num_tokens = 0
    for start in range(0, len(stories), 400):
        text = stories[start : start + 400]
        ids = tokenizer(text)["input_ids"]
        assert ids == llama2c_encode(text, pieces, scores)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        num_tokens += len(ids)
    assert num_tokens < len(stories) / 2  # of more than one character each


def truncated(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


HEADER = 28
EMBEDDING = 4 * SIZES["vocab"] * SIZES["dim"]


@pytest.mark.parametrize(
    ("num_bytes", "message"),
    [
        (0, "found 0 bytes, expected a header of 28"),
        (27, "found 27 bytes, expected a header of 28"),
        (28, "it ends in model.embed_tokens"),
        (HEADER + EMBEDDING - 1, "it ends in model.embed_tokens"),
        (HEADER + EMBEDDING, "it ends in input_layernorm"),
        (-1, "it ends in the rotary tables"),
        (-4 * SIZES["positions"] * 6 - 4, "it ends in model.norm"),
    ],
)
def test_a_truncated_model_is_named(files, tmp_path, num_bytes, message):
    truncated(files[0], num_bytes)
    with pytest.raises(ConversionError, match=rf"--checkpoint .*model\.bin: .*{message}"):
        convert_llama2c(*files, tmp_path / "hf", say=quiet)
    assert not any(tmp_path.glob("hf*"))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 0x616B3432, "found a header of version 20, expected version 0"),
        (0, 26, "expected dim to be a multiple of 2 n_heads"),
        (4, 3, "expected dim to be a multiple of 2 n_heads"),
        (2, 0, "found .*n_layers 0.*, expected sizes from 1 on"),
        (5, -300, "vocab_size has the wrong sign"),
        (6, 16, "384 too many"),
        (1, 2**31 - 1, "it ends in mlp.gate_proj"),
    ],
)
def test_a_header_that_does_not_fit_is_named(files, tmp_path, place, value, message):
    header = list(struct.unpack("<7i", files[0].read_bytes()[:28]))
    header[place] = value
    files[0].write_bytes(struct.pack("<7i", *header) + files[0].read_bytes()[28:])
    with pytest.raises(ConversionError, match=message):
        convert_llama2c(*files, tmp_path / "hf", say=quiet)
    assert not any(tmp_path.glob("hf*"))


def change(place: int, piece: object):
    def apply(pieces: list, scores: list) -> None:
        pieces[place] = piece

    return apply


def drop_last(pieces: list, scores: list) -> None:
    del pieces[-1], scores[-1]


def add_one(pieces: list, scores: list) -> None:
    pieces.append("zz")
    scores.append(-100.0)


def tie(pieces: list, scores: list) -> None:
    scores[260] = scores[259]


def not_finite(pieces: list, scores: list) -> None:
    scores[280] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_last, "found 299 pieces, expected 300, the vocab_size of --checkpoint"),
        (add_one, "found 301 pieces, expected 300"),
        (change(68, "A"), "found \\['A'\\] as id 68, expected '<0x41>'"),
        (change(290, "a"), "found 'a' as id 29[0-9] and 29[0-9], expected it once"),
        (change(290, ""), "found '' as id 290, expected no empty piece"),
        (change(290, b"\xff"), "piece 290 at byte .*expected UTF-8"),
        (not_finite, "piece 280 at byte .*expected a finite score"),
        (tie, "found ids 259 and 260 with the score -0, expected another for each"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_named(files, tmp_path, spoil, message):
    pieces, scores = vocabulary(0)
    spoil(pieces, scores)
    write_tokenizer(files[1], pieces, scores)
    with pytest.raises(ConversionError, match=f"--tokenizer.*{message}"):
        convert_llama2c(*files, tmp_path / "hf", say=quiet)
    assert not any(tmp_path.glob("hf*"))


@pytest.mark.parametrize("cut", [1, 9, 12])
def test_a_truncated_tokenizer_is_named(files, cut):
    data = files[1].read_bytes()
    files[1].write_bytes(data[:-cut])
    with pytest.raises(ConversionError, match=r"piece 29[89] at byte \d+: the file ends in it"):
        read_vocabulary(files[1], 300)


def test_another_file_is_no_tokenizer(files):
    with pytest.raises(ConversionError, match="not a tokenizer of llama2.c, or damaged"):
        read_vocabulary(files[0], 300)


def test_pieces_that_are_not_made_of_pairs_may_share_a_score():
    pieces = [*SPECIAL, *BYTES, "a", "b", "ab"]
    assert Vocabulary(pieces, [0.0] * 262).merges() == [("a", "b")]


def test_the_command_ends_with_a_message_and_keeps_what_is_there(files, tmp_path, capsys):
    path = ROOT / "examples" / "stories260k" / "convert_to_hf.py"
    spec = importlib.util.spec_from_file_location("convert_to_hf", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    argv = ["--checkpoint", str(files[0]), "--tokenizer", str(files[1])]
    argv += ["--output", str(tmp_path / "hf")]
    module.main(argv)
    assert "layer 3/3: " in capsys.readouterr().out
    before = {file: file.read_bytes() for file in (tmp_path / "hf").iterdir()}
    with pytest.raises(SystemExit, match=r"convert_to_hf: --output .*give --overwrite"):
        module.main(argv)
    truncated(files[0], -1)
    with pytest.raises(SystemExit, match="convert_to_hf: --checkpoint .*rotary tables"):
        module.main([*argv, "--overwrite"])
    with pytest.raises(SystemExit, match="--checkpoint .*none: no such file"):
        module.main([*argv, "--checkpoint", str(tmp_path / "none")])
    assert {file: file.read_bytes() for file in (tmp_path / "hf").iterdir()} == before
