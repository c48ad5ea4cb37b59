"""Checkpoints of transformers' format: pickles and code are never run, and broken weights are refused in one line."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ctranslate2_writer import write_directory
from safetensors.torch import load_file, save_file
from whisper_models import tiny_whisper

from whisper_triton.checkpoints import CheckpointError, load_model

WEIGHTS = "model.safetensors"
TINY = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}


class Armed:
    """What a pickle may do: unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's directory of transformers."""
    folder = tmp_path_factory.mktemp("saved")
    model, processor = load_model(str(write_directory(folder / "a", tiny_whisper(**TINY))), torch.float32, "cpu")
    model.save_pretrained(folder / "b")
    processor.save_pretrained(folder / "b")
    return folder / "b"


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def refused(directory: Path, message: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(str(directory), torch.float32, "cpu")
    assert str(caught.value).startswith(str(directory))
    assert str(caught.value).isprintable()


def arm(path: Path) -> Path:
    """Writes a pickle there that would leave a mark, and returns where."""
    mark = path.parent / "unpickled"
    path.write_bytes(pickle.dumps(Armed(mark)))
    return mark


def test_the_pickle_would_work(tmp_path: Path) -> None:
    mark = arm(tmp_path / "a.bin")
    pickle.loads((tmp_path / "a.bin").read_bytes())
    assert mark.exists()


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "whisper.ckpt"])
def test_a_directory_of_pickles_is_refused_and_none_is_read(directory: Path, name: str) -> None:
    (directory / WEIGHTS).unlink()
    mark = arm(directory / name)
    refused(directory, f"{name} may be a pickle, which could run code: convert it to safetensors")
    assert not mark.exists()


@pytest.mark.bad_input
def test_weights_saved_by_torch_are_refused_though_they_are_harmless(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()
    refused(directory, "pytorch_model.bin may be a pickle")


@pytest.mark.bad_input
def test_a_pickle_beside_safetensors_is_left_alone(directory: Path) -> None:
    mark = arm(directory / "pytorch_model.bin")
    load_model(str(directory), torch.float32, "cpu")
    assert not mark.exists()


@pytest.mark.bad_input
def test_an_index_that_names_pickles_is_refused(directory: Path) -> None:
    names = load_file(directory / WEIGHTS).keys()
    (directory / WEIGHTS).unlink()
    mark = arm(directory / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory, "model.safetensors.index.json names 'pytorch_model.bin', which is no safetensors file")
    assert not mark.exists()


@pytest.mark.bad_input
def test_a_pickle_called_safetensors_is_refused(directory: Path) -> None:
    mark = arm(directory / WEIGHTS)
    refused(directory)
    assert not mark.exists()


@pytest.mark.bad_input
def test_a_pickle_called_model_bin_is_refused(directory: Path) -> None:
    for name in ("config.json", WEIGHTS):
        (directory / name).unlink()
    (directory / "config.json").write_text("{}")
    mark = arm(directory / "model.bin")
    with pytest.raises(CheckpointError, match=r"model\.bin: file version \d+ is not known"):
        load_model(str(directory), torch.float32, "cpu")
    assert not mark.exists()


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", ["whisper", "something-new"])
def test_code_beside_the_weights_is_not_run(directory: Path, kind: str) -> None:
    mark = directory / "imported"
    (directory / "code.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Config: pass\n")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Config"}}
    (directory / "config.json").write_text(json.dumps(config))
    if kind == "whisper":
        load_model(str(directory), torch.float32, "cpu")  # which transformers knows without that code
    else:
        refused(directory, "contains custom code|something-new")
    assert not mark.exists()


def _rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return rewrite


CONV = "model.encoder.conv1.bias"
BROKEN: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "missing": (Path.unlink, "no file named model.safetensors"),
    "empty": (lambda path: path.write_bytes(b""), None),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), None),
    "one byte less": (lambda path: path.write_bytes(path.read_bytes()[:-1]), None),
    "one byte more": (lambda path: path.write_bytes(path.read_bytes() + b"x"), None),
    "a header of 2**63 bytes": (lambda path: path.write_bytes(struct.pack("<Q", 1 << 63) + path.read_bytes()[8:]), None),
    "a header that is no JSON": (lambda path: path.write_bytes(struct.pack("<Q", 4) + b"[[[["), None),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), None),
    "a tensor missing": (_rewrite(lambda tensors: tensors.pop(CONV)), f"lacks {CONV}"),
    "a tensor of another shape": (
        _rewrite(lambda tensors: tensors.update({CONV: torch.zeros(3)})),
        rf"{CONV} is \[3\], should be \[32\]",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("what", BROKEN)
def test_broken_weights_are_refused(directory: Path, what: str) -> None:
    change, message = BROKEN[what]
    change(directory / WEIGHTS)
    refused(directory, message)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[" * 100_000),
        ("config.json", "\0"),
        ("config.json", '{"model_type": "whisper", "d_model": "wide"}'),
        ("config.json", '{"model_type": "whisper", "d_model": -32}'),
        ("config.json", '{"model_type": "gpt2"}'),
        ("config.json", '{"model_type": ["whisper"]}'),
        ("generation_config.json", "{"),
        ("generation_config.json", "{}"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", ""),
        ("processor_config.json", "["),
    ],
)
def test_broken_settings_are_refused(directory: Path, name: str, content: str) -> None:
    (directory / name).write_text(content)
    refused(directory)
