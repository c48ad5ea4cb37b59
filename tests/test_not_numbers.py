"""NaN and infinities in what the kernels are given: they show where they do in the references, and nowhere else.

One element of one tensor is no number. Each element of the result is then of the kind that float64 says, NaN, an infinity or a
finite number; and where float64's does not change at all, the kernel's does not either, to the last bit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from attention_cases import bits
from whisper_triton.kernels._linear_tiles import Tiles
from whisper_triton.kernels._paced import has_paced_copies
from whisper_triton.kernels.skinny_linear import LayerNorm, skinny_linear, skinny_linear_reference

from whisper_triton import kernels

# The interpreter's NumPy warns of what is no number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EPS = 1e-5
VALUES = (torch.nan, torch.inf, -torch.inf)
Tensors = dict[str, torch.Tensor]


class Case(NamedTuple):
    """Tensors by name, of which any may hold what is no number, and what is done to them; they stay as they are."""

    tensors: Tensors
    kernel: Callable[..., torch.Tensor]
    reference: Callable[..., torch.Tensor]


def linear(
    device: torch.device,
    B: int = 1,
    K: int = 96,
    N: int = 40,
    tiles: Tiles | None = None,
    gelu: bool = False,
    norm: bool = True,
    has_bias: bool = True,
) -> Case:
    dtype = torch.float16
    shapes = {"x": (B, K), "weight": (N, K)} | ({"bias": (N,)} if has_bias else {})
    shapes |= {"norm_weight": (K,), "norm_bias": (K,)} if norm else {"residual": (B, N)}

    def run(op: Callable[..., torch.Tensor], x, weight, bias=None, residual=None, norm_weight=None, norm_bias=None, **options):
        layer_norm = None if norm_weight is None else LayerNorm(norm_weight, norm_bias, EPS)
        return op(x, (weight,), (bias,), layer_norm=layer_norm, residual=residual, gelu=gelu, **options)

    return Case(
        normal(shapes, dtype, device),
        lambda **tensors: run(skinny_linear, **tensors, tiles=tiles),
        lambda **tensors: run(skinny_linear_reference, **tensors),
    )


def normal(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> Tensors:
    return {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}


def decode(device: torch.device, T: int = 1, H: int = 2, S: int = 40, length: int | None = 35, D: int = 64, B: int = 2) -> Case:
    """Over all of the cache where no length is given, and then as a step calls it."""
    shapes = {"query": (B, T, H, D), "key_cache": (B, H, S, D), "value_cache": (B, H, S, D)}
    position = None if length is None else torch.tensor(length, device=device)
    options = {"read_ahead": True, "counters": counters(device, B * H)} if length is None else {}

    def run(op: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda query, key_cache, value_cache: op(query, key_cache, value_cache, position, scale=0.125, **options)

    return Case(normal(shapes, torch.float16, device), run(kernels.decode_attention), run(kernels.decode_attention_reference))


def counters(device: torch.device, heads: int) -> torch.Tensor:
    return torch.zeros(heads, dtype=torch.int32, device=device)


def append(
    device: torch.device,
    T: int = 1,
    H: int = 2,
    S: int = 40,
    position: int = 30,
    D: int = 64,
    B: int = 2,
    read_ahead: bool = False,
) -> Case:
    """The result, and beside it what lies in the caches afterwards."""
    shapes = dict.fromkeys(("query", "key", "value"), (B, T, H, D)) | dict.fromkeys(("key_cache", "value_cache"), (B, H, S, D))
    slot = torch.tensor(position, device=device)

    def run(op: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def attend(query, key, value, key_cache, value_cache) -> torch.Tensor:
            caches = key_cache.clone(), value_cache.clone()
            out = op(query, key, value, *caches, slot, scale=0.125, read_ahead=read_ahead)
            return torch.cat([tensor.flatten() for tensor in (out, *caches)])

        return attend

    return Case(normal(shapes, torch.float16, device), run(kernels.append_attention), run(kernels.append_attention_reference))


def cross(device: torch.device, B: int = 2, H: int = 2, S: int = 40, K: int = 96, D: int = 32) -> Case:
    shapes = {"x": (B, K), "weight": (H * D, K), "bias": (H * D,), "norm_weight": (K,), "norm_bias": (K,)}
    shapes |= dict.fromkeys(("key_cache", "value_cache"), (B, H, S, D))
    tensors = normal(shapes, torch.float16, device)
    tensors["weight"] *= K**-0.5
    joins = counters(device, B * H)

    def run(op: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def attend(x, weight, bias, norm_weight, norm_bias, key_cache, value_cache) -> torch.Tensor:
            norm = LayerNorm(norm_weight, norm_bias, EPS)
            return op(x, weight, bias, key_cache, value_cache, layer_norm=norm, scale=0.125, counters=joins)

        return attend

    return Case(tensors, run(kernels.cross_attention), run(kernels.cross_attention_reference))


def project(device: torch.device) -> Case:
    B, S, H, D, C = 2, 20, 2, 32, 48
    shapes = {"states": (B, S, C), "key_weight": (H * D, C), "value_weight": (H * D, C), "bias": (H * D,)}

    def run(op: Callable[..., None]) -> Callable[..., torch.Tensor]:
        def fill(states, key_weight, value_weight, bias) -> torch.Tensor:
            caches = [states.new_zeros(B, H, S, D) for _ in range(2)]
            if states.dtype == torch.float64:  # which no table takes
                products = states @ key_weight.T, states @ value_weight.T + bias
                return torch.stack([product.view(B, S, H, D).transpose(1, 2) for product in products])
            op(states, kernels.cross_table([key_weight], [value_weight], [bias], *([cache] for cache in caches)))
            return torch.stack(caches)

        return fill

    return Case(normal(shapes, torch.float16, device), run(kernels.project_cross_kv), run(kernels.project_cross_kv_reference))


def embed(device: torch.device) -> Case:
    ids, position = torch.randint(0, 9, (3, 4), device=device), torch.tensor(2, device=device)
    return Case(
        normal({"tokens": (9, 80), "positions": (7, 80)}, torch.float16, device),
        lambda tokens, positions: kernels.embed_tokens(ids, tokens, positions, position),
        lambda tokens, positions: kernels.embed_tokens_reference(ids, tokens, positions, position),
    )


def norm_of_sum(device: torch.device) -> Case:
    return Case(
        normal({"x": (6, 96), "residual": (3, 96), "weight": (96,), "bias": (96,)}, torch.float16, device),
        lambda **tensors: torch.stack(kernels.add_layer_norm(*tensors.values(), EPS)),
        lambda **tensors: torch.stack(kernels.add_layer_norm_reference(*tensors.values(), EPS)),
    )


def gelu(device: torch.device) -> Case:
    def run(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        kernels.bias_gelu(x, bias)
        return x

    return Case(
        normal({"x": (5, 70), "bias": (70,)}, torch.float16, device),
        run,
        lambda x, bias: torch.nn.functional.gelu(x + bias),
    )


CASES: dict[str, Callable[[torch.device], Case]] = {
    "linear": linear,
    "linear, residual": lambda device: linear(device, norm=False),
    "linear, rows": lambda device: linear(device, B=3),
    "linear, rows, GELU": lambda device: linear(device, B=3, gelu=True),
    "linear, rows, split K": lambda device: linear(device, B=3, K=512, tiles=Tiles(16, 4, 4, True), norm=False),
    "decode_attention": decode,
    "decode_attention, prompt": lambda device: decode(device, T=3),
    "append_attention": append,
    "append_attention, prompt": lambda device: append(device, T=3),
    "cross_attention": cross,
    "project_cross_kv": project,
    "embed_tokens": embed,
    "add_layer_norm": norm_of_sum,
    "bias_gelu": gelu,
}
# Whose kernels on a Hopper are others, with paced copies and clusters: the op's module, and what launches the kernel.
WIDE: dict[str, tuple[str, str, Callable[[torch.device], Case]]] = {
    "linear": ("skinny_linear", "paced_linear", lambda device: linear(device, K=1280, N=1280)),
    "linear, GELU": ("skinny_linear", "paced_linear", lambda device: linear(device, K=1280, N=5120, gelu=True)),
    "linear, rows": ("skinny_linear", "paced_rows", lambda device: linear(device, B=8, K=1280, N=1280)),
    "linear, split K": ("skinny_linear", "paced_rows", lambda device: linear(device, B=8, K=5120, N=1280, norm=False)),
    "LM head": ("skinny_linear", "paced_rows", lambda device: linear(device, K=1280, N=51866, has_bias=False)),
    "LM head, rows": ("skinny_linear", "paced_rows", lambda device: linear(device, B=8, K=1280, N=51866, has_bias=False)),
    "decode_attention": ("decode_attention", "paced_attention", lambda device: decode(device, H=20, S=1500, length=None)),
    "decode_attention, many heads": (
        "decode_attention",
        "paced_stream",
        lambda device: decode(device, H=20, S=1500, length=None, B=8),
    ),
    "append_attention": (
        "append_attention",
        "paced_append",
        lambda device: append(device, H=20, S=448, position=300, B=1, read_ahead=True),
    ),
    "cross_attention": (
        "cross_attention",
        "clustered_cross",
        lambda device: cross(device, B=1, H=20, S=1500, K=1280, D=64),
    ),
    "cross_attention, rows": (
        "decode_attention",
        "paced_stream",
        lambda device: cross(device, B=8, H=20, S=1500, K=1280, D=64),
    ),
}


def kinds(tensor: torch.Tensor) -> torch.Tensor:
    """Of each element: 0 for a finite number, 1 and -1 for the infinities, 2 for NaN."""
    return torch.where(tensor.isnan(), 2, tensor.isinf() * tensor.sign().nan_to_num()).int()


def assert_shown_where_it_should_be(case: Case, times: int) -> None:
    def exact(tensors: Tensors) -> torch.Tensor:
        return case.reference(**{name: tensor.double() for name, tensor in tensors.items()})

    good, wanted = case.kernel(**case.tensors), exact(case.tensors)
    assert good.isfinite().all()
    shown = 0
    for name, tensor in case.tensors.items():
        for value in VALUES * times:
            bad = tensor.clone()
            bad.view(-1)[torch.randint(bad.numel(), ())] = value
            tensors = case.tensors | {name: bad}
            out, reference = case.kernel(**tensors), exact(tensors)
            assert torch.equal(kinds(out), kinds(reference)), (name, value)
            same = reference == wanted
            assert torch.equal(bits(out)[same], bits(good)[same]), (name, value)
            shown += not reference.isfinite().all()
    assert shown >= len(case.tensors)


@pytest.mark.parametrize("name", CASES)
def test_in_small_calls(name: str, device: torch.device) -> None:
    assert_shown_where_it_should_be(CASES[name](device), 2 if device.type == "cpu" else 20)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WIDE)
def test_in_wide_models(name: str, device: torch.device) -> None:
    op, launcher, make = WIDE[name]
    module = importlib.import_module(f"whisper_triton.kernels.{op}")
    with mock.patch.object(module, launcher, wraps=getattr(module, launcher)) as launched:
        assert_shown_where_it_should_be(make(device), 5)
    assert launched.called == has_paced_copies(device, torch.float16)
