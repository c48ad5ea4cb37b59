"""The parser of CTranslate2's weight file: what it reads, and that nothing corrupt gets past it."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from counts import CHANGED_FILES, count
from ctranslate2_writer import pack_model, pack_string, store
from hypothesis import given
from hypothesis import strategies as st

from whisper_triton.ctranslate2 import CheckpointError, ModelFile

EMBEDDING = "decoder/embeddings/weight"
HEADER = len(pack_model({}, {})) - 4  # without the number of aliases


def tensors() -> dict[str, torch.Tensor]:
    """A scalar, a vector, a matrix and a convolution's weight."""
    generator = torch.Generator().manual_seed(0)
    return {
        "decoder/num_heads": torch.tensor(6, dtype=torch.int16),
        "decoder/layer_norm/gamma": torch.randn(5, generator=generator),
        EMBEDDING: torch.randn(7, 5, generator=generator),
        "encoder/conv1/weight": torch.randn(4, 3, 3, generator=generator),
    }


def read(folder: Path, content: bytes) -> ModelFile:
    """Writes `content` to a file and opens it."""
    path = folder / "model.bin"
    path.write_bytes(content)
    return ModelFile(path)


def refused(folder: Path, content: bytes) -> str:
    """The message with which `content` is refused, after a check of its form."""
    with pytest.raises(CheckpointError) as caught:
        read(folder, content)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'model.bin'}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "int8", "int16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_read_as_written(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    file = read(tmp_path, pack_model(store(tensors(), kind)))
    for name, tensor in tensors().items():
        assert file.shape(name) == tensor.shape
        if tensor.dim() == 0:
            assert file.scalar(name) == 6
            continue
        found = file.tensor(name, dtype)
        assert found.dtype == dtype
        if kind.startswith("int") and name.endswith("weight"):
            # Half a step of rounding, of which there are 127 (int8, for each row) or 1024 (int16) up to the largest.
            largest = tensor.abs().flatten(1).amax(1).view(-1, *[1] * (tensor.dim() - 1))
            step = largest / 127 if kind == "int8" else tensor.abs().max() / 1024
            assert ((found.float() - tensor).abs() <= 0.5001 * step + tensor.abs() * torch.finfo(dtype).eps).all()
        else:
            stored = tensor if kind.startswith("int") else tensor.to(getattr(torch, kind))
            assert torch.equal(found, stored.to(dtype))


def test_names_leave_out_scales_and_keep_aliases(tmp_path: Path) -> None:
    file = read(tmp_path, pack_model(store(tensors(), "int8")))
    assert file.names() == {*tensors(), "decoder/projection/weight"}
    assert file.same("decoder/projection/weight", EMBEDDING)
    assert not file.same("encoder/conv1/weight", EMBEDDING)
    # An alias of a quantized tensor brings its scales.
    alias = file.tensor("decoder/projection/weight", torch.float32)
    assert torch.equal(alias, file.tensor(EMBEDDING, torch.float32))
    assert file.scalar("decoder/none") is None


def test_tensors_are_copies(tmp_path: Path) -> None:
    file = read(tmp_path, pack_model(tensors()))
    file.tensor(EMBEDDING, torch.float32).zero_()
    assert torch.equal(file.tensor(EMBEDDING, torch.float32), tensors()[EMBEDDING])


@pytest.mark.bad_input
def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = pack_model(store(tensors(), "int8"))
    for size in range(1, len(whole)):
        assert "truncated" in refused(tmp_path, whole[:size]), size
    assert "empty" in refused(tmp_path, b"")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pack_model(tensors(), version=5), "file version 5 is not known"),
        (b"PK\x03\x04" + b"\0" * 100, "file version .* is not known"),
        (pack_model(tensors(), spec="TransformerSpec"), "holds a 'TransformerSpec', not a Whisper model"),
        (pack_model(tensors(), revision=2), "revision 2 of WhisperSpec is not known"),
        (pack_model(tensors()) + b"\0", "1 bytes follow the last entry"),
        (pack_model(tensors(), {"a": "b"}), "no tensor b"),
        (pack_model(tensors(), {EMBEDDING: "decoder/num_heads"}), f"{EMBEDDING} appears twice"),
    ],
)
def test_corrupt_file(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, content)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (pack_string("a") + struct.pack("<BIBI", 1, 2, 6, 8) + b"\0" * 8, "tensor type 6, which is not known"),
        (pack_string("a") + struct.pack("<BIBI", 1, 3, 0, 8) + b"\0" * 8, r"shape \[3\] in float32 cannot have 8 bytes"),
        (pack_string("a") + struct.pack("<BIBI", 1, 0, 0, 0), "cannot have 0 bytes"),
        (pack_string("a") + struct.pack("<BIIBI", 2, 1 << 31, 1 << 31, 0, 0), "cannot have 0 bytes"),
        (pack_string("a") + struct.pack("<BIBI", 1, 1 << 30, 1, 1 << 30), "truncated"),
        (pack_string("a") + struct.pack("<B4IBI", 4, 1, 1, 1, 1, 0, 4) + b"\0" * 4, "has 4 dims, at most 3"),
        (struct.pack("<H", 2) + b"ab", "is no text"),
        (struct.pack("<H", 3) + b"a\n\0", "is no text"),
        (struct.pack("<H", 3) + b"\xff\xfe\0", "is no text"),
        (struct.pack("<H", 0), "is no text"),
    ],
)
def test_corrupt_entry(tmp_path: Path, entry: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, pack_model({}, {})[: HEADER - 4] + struct.pack("<I", 1) + entry + struct.pack("<I", 0))


@given(st.data())
def test_any_changed_byte_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    count(CHANGED_FILES)
    content = bytearray(pack_model(store(tensors(), "int8")))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    # Any other exception fails the test.
    with suppress(CheckpointError):
        file = read(tmp_path_factory.getbasetemp(), bytes(content))
        for name in file.names():
            file.tensor(name, torch.float32)


@pytest.mark.bad_input
@pytest.mark.parametrize("scale", [torch.zeros(7), torch.full((7,), torch.nan), torch.ones(6), torch.ones(7, 1)])
def test_bad_scales(tmp_path: Path, scale: torch.Tensor) -> None:
    stored = store(tensors(), "int8")
    stored[f"{EMBEDDING}_scale"] = scale
    with pytest.raises(CheckpointError, match="scale"):
        read(tmp_path, pack_model(stored)).tensor(EMBEDDING, torch.float32)
    del stored[f"{EMBEDDING}_scale"]
    with pytest.raises(CheckpointError, match="int8 but the file holds no"):
        read(tmp_path, pack_model(stored)).tensor(EMBEDDING, torch.float32)


@pytest.mark.bad_input
def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        ModelFile(tmp_path / "model.bin")
