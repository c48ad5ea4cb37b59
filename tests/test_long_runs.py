"""Many windows of changing batch sizes, one after another: each as the first of its size was, and no memory is lost.

On a GPU 2,000 windows and more than 100,000 steps, which are replays; on a CPU a few of both, launched.
"""

from __future__ import annotations

import gc
import resource
import sys

import pytest
import torch
from counts import STEPS, WINDOWS, count
from whisper_models import mel, tiny_whisper

from whisper_triton import accelerate, decoder
from whisper_triton.attention import STATE

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels", "eager_steps")

BATCH_SIZES = (1, 3, 2, 5, 1, 4)  # of the windows in turn
TOKENS = 54  # a window decodes, after a prompt of two: all but the first in steps


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def most_resident_bytes() -> int:
    """The most of the host's memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("windows", [pytest.param(2000, marks=[pytest.mark.gpu, pytest.mark.timeout(600)]), 12])
def test_every_window_is_as_the_first_and_memory_stays_flat(
    windows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(decoder, "is_fusable", lambda model, batch_size: False)
    model = accelerate(tiny_whisper(device, seed=3, dtype=torch.float32 if device.type == "cpu" else torch.float16))
    kinds = [(B, seed) for seed, B in enumerate(BATCH_SIZES)]  # each with features of its own
    features = [mel(B, device, seed=seed).to(model.dtype) for B, seed in kinds]
    tokens = TOKENS if windows > 100 else 10
    kwargs = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    wanted = [model.generate(one, **kwargs) for one in features]
    assert len({str(one.tolist()) for one in wanted}) == len(kinds)
    kept, settled, steps = None, 0, 0
    for window in range(windows):
        i = window % len(kinds)
        assert torch.equal(model.generate(features[i], **kwargs), wanted[i]), f"window {window}"
        steps += tokens - 1
        if window + 1 in (windows // 3, 2 * windows // 3, windows):
            usage = live_tensors(), torch.cuda.memory_allocated() if device.type == "cuda" else 0
            kept = kept or usage
            assert all(now <= then for now, then in zip(usage, kept, strict=True))  # less, where other tests have left some
            settled = settled or most_resident_bytes()
    assert most_resident_bytes() - settled < 16 << 20
    assert sorted(getattr(model, STATE).steps) == sorted(set(BATCH_SIZES))
    assert steps >= (100_000 if windows >= 2000 else 1)
    count(WINDOWS, windows)
    count(STEPS, steps)
