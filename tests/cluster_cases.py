"""Attention by clusters of programs against its references: what its tests on a GPU and those by emulation share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from attention_cases import Shape, assert_close_as_pytorch, bits, lay_out, random_caches, random_states, storage, twin
from whisper_triton.kernels._cluster import ClusterTiles
from whisper_triton.kernels._clustered_cross import Projection, clustered_cross
from whisper_triton.kernels._clustered_rows import RowTiles, clustered_rows
from whisper_triton.kernels._clustered_self import clustered_self
from whisper_triton.kernels._linear_call import LinearCall
from whisper_triton.kernels.decode_attention import LOG2E
from whisper_triton.kernels.skinny_linear import LayerNorm, skinny_linear_reference

from whisper_triton.kernels import append_attention_reference, decode_attention_reference

EPS, SCALE = 1e-5, 0.125
HEAD_DIM = 64


class Layer(NamedTuple):
    """What stands before attention: x (B, K), weights (H * D, K), biases (H * D,) or None, and the layer norm's two (K,)."""

    x: torch.Tensor
    weights: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor

    def double(self) -> Layer:
        def of(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.double()

        return Layer(of(self.x), [*map(of, self.weights)], [*map(of, self.biases)], of(self.norm_weight), of(self.norm_bias))

    def project(self) -> torch.Tensor:
        """(B, parts * H * D), in PyTorch, in the tensors' dtype."""
        y = F.layer_norm(self.x, self.x.shape[1:], self.norm_weight, self.norm_bias, EPS)
        parts = [F.linear(y, weight, bias) for weight, bias in zip(self.weights, self.biases, strict=True)]
        return torch.cat([parts[0] * SCALE, *parts[1:]], dim=-1)

    def project_reference(self) -> torch.Tensor:
        norm = LayerNorm(self.norm_weight, self.norm_bias, EPS)
        return skinny_linear_reference(self.x, tuple(self.weights), tuple(self.biases), layer_norm=norm, scale=SCALE)


def random_layer(parts: int, H: int, K: int, dtype: torch.dtype, device: torch.device, B: int = 1) -> Layer:
    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    N = H * HEAD_DIM
    weights = [normal(N, K, scale=2 * K**-0.5) for _ in range(parts)]
    biases = [normal(N) if i != 1 else None for i in range(parts)]
    return Layer(normal(B, K), weights, biases, 1 + normal(K, scale=0.1), normal(K, scale=0.1))


def check_cross(H: int, S: int, K: int, dtype: torch.dtype, tiles: ClusterTiles, device: torch.device, B: int = 1) -> None:
    """Rows whose queries are projected in the same launch."""
    layer = random_layer(1, H, K, dtype, device, B)
    shape = Shape(B, 1, H, HEAD_DIM, S, S)
    caches = random_caches(shape, dtype, device, [S] * B)
    before = [storage(cache) for cache in caches]
    projection = Projection(layer.weights[0], layer.biases[0], layer.norm_weight, layer.norm_bias, EPS, SCALE)
    out = clustered_cross(layer.x, projection, *caches, LOG2E, None, tiles)
    assert out.shape == shape.states
    assert out.dtype == dtype

    def attend(query: torch.Tensor, *caches: torch.Tensor) -> torch.Tensor:
        return decode_attention_reference(query.view(shape.states), *caches, None, scale=1.0, is_causal=False)

    exact = attend(layer.double().project_reference(), *(cache.double() for cache in caches))
    assert_close_as_pytorch(out, exact, attend(layer.project(), *caches))
    assert all(torch.equal(storage(cache), buffer) for cache, buffer in zip(caches, before, strict=True))


def check_join(B: int, H: int, S: int, dtype: torch.dtype, tiles: ClusterTiles, device: torch.device) -> None:
    """Several rows, whose queries are given; those that have ended read no key."""
    shape = Shape(B, 1, H, HEAD_DIM, S, S)
    (query,) = random_states(shape, dtype, device, 1)
    caches = random_caches(shape, dtype, device, [S] * B)

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return decode_attention_reference(*tensors, None, scale=SCALE, is_causal=False)

    exact, pytorch = attend(*(t.double() for t in (query, *caches))), attend(query, *caches)
    out = clustered_cross(query, None, *caches, SCALE * LOG2E, None, tiles)
    assert_close_as_pytorch(out, exact, pytorch)
    ended = torch.zeros(B, dtype=torch.int64, device=device)
    ended[0] = 7
    for cache in caches:
        cache[0] = torch.nan
    some = clustered_cross(query, None, *caches, SCALE * LOG2E, ended, tiles)
    assert torch.equal(bits(some[1:]), bits(out[1:]))
    assert not some[0].any()


def check_self(H: int, S: int, K: int, position: int, dtype: torch.dtype, tiles: ClusterTiles, device: torch.device) -> None:
    """One row at `position`; slots from there on are NaNs before, and all but one after."""
    layer = random_layer(3, H, K, dtype, device)
    shape = Shape(1, 1, H, HEAD_DIM, S, min(max(position, 0), S))
    caches = random_caches(shape, dtype, device, [shape.length])
    expected = [twin(cache) for cache in caches]
    place = torch.tensor(position, device=device)
    norm = layer.norm_weight, layer.norm_bias, EPS
    out = clustered_self(layer.x, layer.weights, layer.biases, *norm, SCALE, *caches, place, LOG2E, tiles)
    assert out.shape == shape.states
    assert out.dtype == dtype
    if not 0 <= position < S:
        for cache, other in zip(caches, expected, strict=True):
            assert torch.equal(storage(cache), storage(other))
        return

    def attend(qkv: torch.Tensor, *caches: torch.Tensor) -> torch.Tensor:
        states = qkv.view(1, 1, 3, H, HEAD_DIM).unbind(2)
        return append_attention_reference(*states, *caches, place, scale=1.0)

    exact_caches = [cache.double() for cache in expected]
    exact = attend(layer.double().project_reference(), *exact_caches)
    pytorch = attend(layer.project(), *expected)
    assert_close_as_pytorch(out, exact, pytorch)
    for cache, other, exactly in zip(caches, expected, exact_caches, strict=True):
        written = (slice(None), slice(None), slice(position, position + 1))
        assert_close_as_pytorch(cache[written], exactly[written], other[written])
        other[written] = cache[written]
        assert torch.equal(storage(cache), storage(other))


def check_rows(link: str, B: int, N: int, K: int, dtype: torch.dtype, tiles: RowTiles, device: torch.device) -> None:
    """A linear layer with what surrounds it in the link of a decoder's layer; NaNs all around what is read and written."""

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = (torch.randn(*shape, device=device) * scale).to(dtype)
        return lay_out(values.view(1, 1, -1, shape[-1]), "contiguous").view(shape)

    parts = 3 if link == "q/k/v" else 1
    x, weights = normal(B, K), [normal(N, K, scale=2 * K**-0.5) for _ in range(parts)]
    biases = [normal(N) if i != 1 else None for i in range(parts)]
    has_norm, gelu, scale = link != "fc2", link == "fc1", SCALE if link in ("q/k/v", "cross query") else 1.0
    norm = LayerNorm(1 + normal(K, scale=0.1), normal(K, scale=0.1), EPS) if has_norm else None
    residual = None if has_norm else normal(B, N)
    out = clustered_rows(LinearCall(x, weights, biases, *(norm or (None, None, 0.0)), scale, gelu, residual), tiles)

    def of(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.double()

    exact_norm = norm and LayerNorm(of(norm.weight), of(norm.bias), EPS)
    exact = skinny_linear_reference(
        of(x), tuple(map(of, weights)), tuple(map(of, biases)),
        layer_norm=exact_norm, scale=scale, gelu=gelu, residual=of(residual),
    )  # fmt: skip
    y = x if norm is None else F.layer_norm(x, (K,), norm.weight, norm.bias, EPS)
    products = [F.linear(y, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    pytorch = torch.cat([products[0] * scale, *products[1:]], dim=-1)
    pytorch = F.gelu(pytorch) if gelu else pytorch
    assert_close_as_pytorch(out, exact, pytorch if residual is None else pytorch + residual)
