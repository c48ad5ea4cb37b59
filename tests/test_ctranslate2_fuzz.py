"""Changed CTranslate2 files: each gives the parser's own error, in one line, or a model; no crash, hang or flood of memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from counts import CHANGED_FILES, count
from ctranslate2_writer import pack_model, pack_string, pack_tensor, store, whisper_tensors, write_directory
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ctranslate2 import tensors
from whisper_models import tiny_whisper

from whisper_triton.conversion import convert
from whisper_triton.ctranslate2 import CheckpointError, ModelFile

SMALL = pack_model(store(tensors(), "int8"))
NUMBERS = st.sampled_from([0, 1, 2, 3, 127, 128, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])


TINY = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
WEIGHTS = store(whisper_tensors(tiny_whisper(**TINY)), "int8")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A whole model's directory, to be changed file by file."""
    return write_directory(tmp_path, tiny_whisper(**TINY), "int8")


@pytest.fixture(scope="module")
def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose `model.bin` each example writes anew."""
    return write_directory(tmp_path_factory.mktemp("model"), tiny_whisper(**TINY), "int8")


def read_all(path: Path) -> None:
    """Opens the file and reads every tensor of it."""
    file = ModelFile(path)
    for name in file.names():
        file.scalar(name) if file.shape(name) == () else file.tensor(name, torch.float32)


def refused_or_fine(act: Callable[[Path], object], path: Path) -> None:
    """Any exception but the parser's own fails the test, and so does a message that names no file or takes several lines."""
    count(CHANGED_FILES)
    message = f"{path}: nothing wrong"
    try:
        act(path)
    except CheckpointError as error:
        message = str(error)
    assert message.startswith((str(path), "the tokenizer"))
    assert message.isprintable()


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes = SMALL) -> bytes:
    """Bits turned over, numbers of 1, 2 or 4 bytes replaced, pieces cut out, repeated or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        what = draw(st.sampled_from(["bit", "number", "cut", "end", "repeat", "insert"]))
        if what == "bit" and place < len(data):
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif what == "number":
            size = draw(st.sampled_from([1, 2, 4]))
            data[place : place + size] = (draw(NUMBERS) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        elif what == "cut":
            del data[place : place + draw(st.integers(1, 64))]
        elif what == "end":
            del data[place:]
        elif what == "repeat":
            data[place:place] = data[place : place + draw(st.integers(1, 200))]
        else:
            data[place:place] = draw(st.binary(min_size=1, max_size=16))
    return bytes(data)


@settings(max_examples=400)
@given(content=changed_bytes())
def test_changed_bytes_are_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.bin"
    path.write_bytes(content)
    refused_or_fine(read_all, path)


@settings(max_examples=100)
@given(content=st.binary(max_size=200).map(lambda data: SMALL[:22] + data))
def test_anything_behind_a_good_header_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.bin"
    path.write_bytes(content)
    refused_or_fine(read_all, path)


@st.composite
def changed_tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """A file that parses, of a model with tensors left out, renamed, in another shape or dtype, or with other values."""
    found = dict(WEIGHTS)
    for name in draw(st.lists(st.sampled_from(sorted(WEIGHTS)), min_size=1, max_size=3, unique=True)):
        tensor = found.pop(name)
        what = draw(st.sampled_from(["left out", "renamed", "shape", "flat", "dtype", "values", "scalar"]))
        if what == "renamed":
            found[draw(st.sampled_from([name + "x", name.replace("0", "1"), name.replace("encoder", "decoder")]))] = tensor
        elif what == "shape":
            found[name] = tensor.new_ones(draw(st.lists(st.integers(1, 70), max_size=3)))
        elif what == "flat":
            found[name] = tensor.flatten()
        elif what == "dtype":
            kind = draw(st.sampled_from([torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16]))
            found[name] = tensor.to(kind)
        elif what == "values":
            values = [0, -1, 5, 100, *([0.5, torch.nan, torch.inf] if tensor.is_floating_point() else [])]
            found[name] = torch.full_like(tensor, draw(st.sampled_from(values)))
        elif what == "scalar":
            found[name] = torch.tensor(draw(st.sampled_from([0.0, -1.0, 2.5, 1.0, torch.nan, torch.inf, -torch.inf])))
    return found


@settings(max_examples=100)
@given(changed=changed_tensors())
def test_changed_tensors_are_refused_or_a_model(shared_directory: Path, changed: dict[str, torch.Tensor]) -> None:
    (shared_directory / "model.bin").write_bytes(pack_model(changed, {}))
    refused_or_fine(lambda path: convert(path, torch.float32), shared_directory)


NUMBER = struct.Struct("<I").pack
HEAD = SMALL[: len(pack_model({}, {})) - 8]  # version, kind and revision
ENTRY = pack_tensor("a", torch.ones(1))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(HEAD + NUMBER(65537) + ENTRY, "number of tensors is 65537, at most 65536", id="too many tensors"),
        pytest.param(HEAD + NUMBER(0xFFFFFFFF) + ENTRY, "number of tensors is 4294967295", id="most tensors"),
        pytest.param(HEAD + NUMBER(2) + ENTRY + ENTRY + NUMBER(0), "a appears twice", id="a name twice"),
        pytest.param(HEAD + NUMBER(1) + ENTRY + NUMBER(1 << 31), "number of aliases is 2147483648", id="too many aliases"),
        pytest.param(HEAD + NUMBER(1) + ENTRY + NUMBER(1), "truncated", id="an alias missing"),
        pytest.param(
            HEAD + NUMBER(1) + ENTRY + NUMBER(1) + pack_string("b") + pack_string("b"), "no tensor b", id="alias of itself"
        ),
        pytest.param(
            pack_model({"a": torch.ones(1000)}, {f"b{i}": "a" for i in range(1000)}),
            "aliases up to b3 stand for more bytes than the file has",
            id="aliases without end",
        ),
        pytest.param(
            HEAD + NUMBER(1) + pack_string("a") + struct.pack("<B3IBI", 3, *[0xFFFFFFFF] * 3, 0, 0xFFFFFFFF),
            r"a of shape \[4294967295, 4294967295, 4294967295\] in float32 cannot have 4294967295 bytes",
            id="the largest shape",
        ),
        pytest.param(HEAD + NUMBER(1) + struct.pack("<H", 0xFFFF) + b"a", "truncated", id="a name of 64 KB"),
        pytest.param(b"\x80\x04\x95" + SMALL, "file version .* is not known", id="a pickle"),
    ],
)
def test_a_file_made_to_hurt_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_all(tmp_path / "model.bin")
    assert str(caught.value).isprintable()


def without_positions(width: int) -> dict[str, torch.Tensor]:
    names = WEIGHTS.keys() - {"encoder/position_encodings/encodings"}
    return {name: WEIGHTS[name] for name in names} | {"encoder/conv1/bias": torch.zeros(width)}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        *(
            pytest.param(WEIGHTS | {"decoder/num_heads": heads}, r"heads in the decoder do not divide its width 32", id=name)
            for name, heads in {
                "two heads as a float": torch.tensor(2.0),
                "two heads as a bfloat16": torch.tensor(2.0, dtype=torch.bfloat16),
                "half a head": torch.tensor(0.5),
                "NaN heads": torch.tensor(torch.nan),
                "endless heads": torch.tensor(torch.inf),
                "negative heads": torch.tensor(-2, dtype=torch.int16),
                "five heads": torch.tensor(5, dtype=torch.int16),
            }.items()
        ),
        *(
            pytest.param(without_positions(width), f"no Whisper is {width} wide", id=f"sines for a width of {width}")
            for width in (1, 2, 33)
        ),
        pytest.param(without_positions(8), r"encoder.conv1.bias is \[8\], should be \[32\]", id="sines for another width"),
    ],
)
def test_numbers_that_are_no_whispers_are_refused(directory: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    (directory / "model.bin").write_bytes(pack_model(tensors))
    with pytest.raises(CheckpointError, match=message):
        convert(directory, torch.float32)


DEEP = "[" * 100_000


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param(name, content if isinstance(content, str) else json.dumps(content), message, id=f"{name} {i}")
        for i, (name, content, message) in enumerate(
            [
                ("config.json", DEEP, "config.json: not a JSON file"),
                ("config.json", "", "config.json: not a JSON file"),
                ("config.json", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "config.json: not a JSON file"),
                ("config.json", {"alignment_heads": "x"}, "alignment_heads should list pairs"),
                ("config.json", {"alignment_heads": [[0, 0, 0]]}, "alignment_heads should list pairs"),
                ("config.json", {"alignment_heads": [[0, -1]]}, "alignment_heads should list pairs"),
                ("config.json", {"alignment_heads": [[0.0, 1]]}, "alignment_heads should list pairs"),
                ("config.json", {"suppress_ids": [True]}, "suppress_ids should list token ids"),
                ("vocabulary.json", DEEP, "vocabulary.json: not a vocabulary"),
                ("tokenizer.json", DEEP, "tokenizer.json: not a tokenizer"),
                ("preprocessor_config.json", DEEP, "preprocessor_config.json: not a JSON file"),
                ("preprocessor_config.json", {"feature_size": "x"}, "x mel bins, the model has 16"),
                ("preprocessor_config.json", {"feature_size": None}, "None mel bins"),
                ("preprocessor_config.json", {"feature_size": 10**9}, "1000000000 mel bins"),
                ("preprocessor_config.json", {"n_fft": 0}, "n_fft is '0', in Whisper it is 400"),
                ("preprocessor_config.json", {"n_fft": 10**12}, "in Whisper it is 400"),
                ("preprocessor_config.json", {"hop_length": 0}, "hop_length is '0', in Whisper it is 160"),
                ("preprocessor_config.json", {"chunk_length": 10**9}, "in Whisper it is 30"),
                ("preprocessor_config.json", {"sampling_rate": [1] * 99}, "in Whisper it is 16000"),
            ]
        )
    ],
)
def test_companions_made_to_hurt_are_refused(directory: Path, name: str, content: str, message: str) -> None:
    (directory / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(directory, torch.float32)
    assert str(caught.value).isprintable()
