"""The kernels in Gluon, which Triton's interpreter does not know, by an emulator of their PTX: tests/ptx.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="nothing is compiled without Triton")

import torch
from whisper_triton.kernels._cluster import ClusterTiles
from whisper_triton.kernels._clustered_cross import Projection, clustered_cross
from whisper_triton.kernels._clustered_rows import RowTiles, clustered_rows
from whisper_triton.kernels._clustered_self import clustered_self
from whisper_triton.kernels._linear_call import LinearCall

from whisper_triton.kernels import _paced

ROOT = Path(__file__).parents[1]


def test_every_case_is_right_and_every_damage_is_noticed(tmp_path: Path) -> None:
    # A process of its own, because the suite runs with the interpreter on.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    script = [sys.executable, str(ROOT / "tests" / "run_emulated.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [f"{case['name']}: {case['error']}, at most {case['bound']}" for case in cases if not case["ok"]]
    assert not wrong, "\n".join(wrong)
    assert done.returncode == 0, done.stderr
    kinds = {case["name"].partition(" ")[0] for case in cases}
    assert kinds == {"linear", "rows", "attention", "append", "cluster", "copies", "damaged:"}


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("K", "D", "num_warps", "dtype"),
    [
        (384, 64, 4, torch.float16),  # no whole chunks
        (512, 80, 4, torch.float16),
        (512, 64, 16, torch.float16),  # half a row of a head a warp
        (512, 64, 4, torch.float32),
    ],
)
def test_attention_that_is_not_for_clusters_is_refused(
    K: int, D: int, num_warps: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_paced, "capability", lambda device: (9, 0))
    x, weight, vector, cache = (empty(*shape).to(dtype) for shape in ((1, K), (D, K), (K,), (1, 1, 8, D)))
    norm, tiles = (vector, vector, 1e-5), ClusterTiles(num_warps, 2)
    with pytest.raises(ValueError, match=rf"clusters are for .* got \(1, {K}\)"):
        clustered_cross(x, Projection(weight, weight[:, 0], *norm, 1.0), cache, cache, 1.0, None, tiles)
    with pytest.raises(ValueError, match=rf"clusters are for .* got \(1, {K}\)"):
        clustered_self(x, [weight] * 3, [None] * 3, *norm, 1.0, cache, cache, torch.tensor(0), 1.0, tiles)


@pytest.mark.parametrize(
    ("B", "K", "tiles"),
    [
        (8, 1280, (32, 8, 4, 2)),  # more programs than lanes that hold a row's moments
        (8, 384, (32, 4, 4, 2)),  # shares of K that are no tensor cores' tiles
        (8, 1280, (24, 4, 4, 2)),
        (32, 512, (64, 4, 8, 2)),  # more to exchange than a kernel can declare
    ],
)
def test_linear_layers_that_are_not_for_clusters_are_refused(
    B: int, K: int, tiles: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_paced, "capability", lambda device: (9, 0))
    call = LinearCall(empty(B, K), [empty(64, K)], [None], None, None, 0.0, 1.0, False, None)
    with pytest.raises(ValueError, match=r"clusters of two or four|bytes are to be exchanged"):
        clustered_rows(call, RowTiles(*tiles))


def test_no_clusters_without_paced_copies() -> None:
    call = LinearCall(empty(8, 512), [empty(64, 512)], [None], None, None, 0.0, 1.0, False, None)
    with pytest.raises(ValueError, match="on cpu"):
        clustered_rows(call, RowTiles(32, 4, 4, 2))
