"""The kernels whose programs work in clusters, on GPUs that have them; by emulation in test_emulated.py."""

from __future__ import annotations

import pytest
import torch
from attention_cases import bits, captured, random_caches
from cluster_cases import EPS, HEAD_DIM, SCALE, Shape, check_cross, check_join, check_rows, check_self, random_layer
from whisper_triton.kernels._cluster import ClusterTiles
from whisper_triton.kernels._clustered_cross import Projection, clustered_cross
from whisper_triton.kernels._clustered_rows import RowTiles
from whisper_triton.kernels._clustered_self import clustered_self
from whisper_triton.kernels.decode_attention import LOG2E

from whisper_triton.kernels import _dispatch

pytestmark = pytest.mark.gpu

TILES = [ClusterTiles(num_warps, PACE) for num_warps in (4, 8) for PACE in (1, 4)]
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _has_clusters(device: torch.device) -> None:
    if _dispatch.capability(device) != (9, 0):
        pytest.skip("not this GPU's")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_cross(tiles: ClusterTiles, dtype: torch.dtype, device: torch.device) -> None:
    for H, S, K in ((20, 1500, 1280), (16, 1500, 1024), (1, 1499, 256), (3, 1, 512), (2, 257, 768)):
        check_cross(H, S, K, dtype, tiles, device)
    check_cross(20, 1500, 1280, dtype, tiles, device, B=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_join(tiles: ClusterTiles, dtype: torch.dtype, device: torch.device) -> None:
    for B, H, S in ((8, 20, 1500), (1, 20, 1500), (32, 16, 1500), (3, 1, 1), (2, 2, 513)):
        check_join(B, H, S, dtype, tiles, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_self(tiles: ClusterTiles, dtype: torch.dtype, device: torch.device) -> None:
    for position in (0, 1, 31, 32, 63, 64, 65, 255, 256, 300, 447, 448, -1, 2**40):
        check_self(20, 448, 1280, position, dtype, tiles, device)
    check_self(1, 8, 256, 7, dtype, tiles, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("link", ["q/k/v", "cross query", "fc1", "fc2"])
@pytest.mark.parametrize("tiles", [RowTiles(32, 4, 4, 2), RowTiles(16, 2, 4, 1), RowTiles(64, 4, 4, 4)], ids=str)
def test_rows(tiles: RowTiles, link: str, dtype: torch.dtype, device: torch.device) -> None:
    for B, N, K in ((8, 1280, 1280), (2, 1280, 5120), (16, 1024, 4096), (9, 100, 1024), (32, 1280, 1280), (1, 16, 1024)):
        check_rows(link, B, N, K, dtype, tiles, device)


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_a_captured_chain_follows_the_position_on_the_device(tiles: ClusterTiles, device: torch.device) -> None:
    H, K, dtype = 20, HEAD_DIM * 20, torch.float16
    own = [random_layer(3, H, K, dtype, device) for _ in range(3)]
    cross = [random_layer(1, H, K, dtype, device) for _ in range(3)]
    own_caches = [random_caches(Shape(1, 1, H, HEAD_DIM, 448, 0), dtype, device, [0]) for _ in own]
    cross_caches = [random_caches(Shape(1, 1, H, HEAD_DIM, 1500, 1500), dtype, device, [1500]) for _ in cross]
    position, x = torch.zeros((), dtype=torch.int64, device=device), torch.empty(1, K, dtype=dtype, device=device)

    def step(synchronize: bool = False) -> torch.Tensor:
        out = x
        for mine, caches, other, frames in zip(own, own_caches, cross, cross_caches, strict=True):
            norm = mine.norm_weight, mine.norm_bias, EPS
            out = clustered_self(out, mine.weights, mine.biases, *norm, SCALE, *caches, position, LOG2E, tiles).view(1, K)
            if synchronize:
                torch.cuda.synchronize()
            projection = Projection(other.weights[0], other.biases[0], other.norm_weight, other.norm_bias, EPS, SCALE)
            out = clustered_cross(out, projection, *frames, LOG2E, None, tiles).view(1, K)
            if synchronize:
                torch.cuda.synchronize()
        position.add_(1)
        return out

    graph, result = captured(step)
    inputs = torch.randn(448, 1, K, device=device).to(dtype)
    results: list[torch.Tensor] = []
    for replay in (True, False):
        for caches in own_caches:
            for cache in caches:
                cache.fill_(torch.nan)
        position.zero_()
        for row in inputs:
            x.copy_(row)
            if replay:
                graph.replay()
            results.append((result if replay else step(synchronize=True)).clone())
    for i in range(448):
        assert torch.equal(bits(results[i]), bits(results[448 + i])), i
