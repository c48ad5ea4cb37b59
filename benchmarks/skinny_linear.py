"""The linear layers of a decode step, with what surrounds them: our kernel against cuBLAS, eager and compiled, link by link.

    python benchmarks/skinny_linear.py

By default the shapes of large-v3, fp16. Microseconds a link in a CUDA graph, weights rotated past the L2; `eager` is layer
norm, `F.linear` a weight, GELU and residual as PyTorch has them, `compiled` the same under torch.compile, `packed` that with
the weights of q, k and v in one and the query's scale in it. The floor is the bytes of the weights over the bandwidth measured
in the same run. Every call of ours loads its weights before it waits for the one before, as in the chain, and calls of one kind
follow one another here: `benchmarks/decoder_step.py` says what each costs in the chain. In fp32 the kernel takes one row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from whisper_triton.benchmarks.harness import Place, Row, check
from whisper_triton.benchmarks.models import Shape, shapes_on
from whisper_triton.benchmarks.tasks import measure_named, parser_for
from whisper_triton.kernels.skinny_linear import LayerNorm

from whisper_triton.fused import max_rows
from whisper_triton.kernels import skinny_linear, skinny_linear_reference

EPS = 1e-5
Call = Callable[..., torch.Tensor]


def stock_linear(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
    *,
    layer_norm: LayerNorm | None = None,
    scale: float = 1.0,
    gelu: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the modules of transformers run, in the dtype of `x`."""
    y = x if layer_norm is None else F.layer_norm(x, x.shape[-1:], layer_norm.weight, layer_norm.bias, layer_norm.eps)
    parts = [F.linear(y, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    parts[0] = parts[0] * scale if scale != 1.0 else parts[0]
    y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    y = F.gelu(y) if gelu else y
    return y if residual is None else y + residual


def double(value: object) -> object:
    """`value` with every tensor in it in float64."""
    if isinstance(value, LayerNorm):
        return LayerNorm(value.weight.double(), value.bias.double(), value.eps)
    if isinstance(value, tuple):
        return tuple(map(double, value))
    return value.double() if isinstance(value, torch.Tensor) else value


def pack(
    weights: list[torch.Tensor], biases: tuple[torch.Tensor | None, ...], options: dict[str, object]
) -> tuple[list[torch.Tensor], tuple[torch.Tensor], dict[str, object]]:
    """The arguments of one product in place of three, with the first one's scale in its weights."""
    N, scale = weights[0].shape[0], options["scale"]
    weight = torch.cat(weights)
    bias = torch.cat([weight.new_zeros(N) if bias is None else bias for bias in biases])
    weight[:N] *= scale
    bias[:N] *= scale
    return [weight], (bias,), {name: value for name, value in options.items() if name != "scale"}


def bench_link(place: Place, B: int, link: str, N: int, K: int, parts: int, options: dict[str, object]) -> Row:
    x = place.randn(B, K)
    weights = [place.randn(N, K, scale=K**-0.5) for _ in range(parts)]
    biases = (None,) if link == "LM head" else (place.randn(N), None, place.randn(N)) if parts == 3 else (place.randn(N),)
    compiled, arguments = place.compile(stock_linear), (weights, biases, options)
    ways = {"ours": (skinny_linear, arguments), "eager": (stock_linear, arguments), "compiled": (compiled, arguments)}
    if parts == 3:
        ways["packed"] = compiled, pack(*arguments)
    exact = skinny_linear_reference(*double((x, tuple(weights), biases)), **{k: double(v) for k, v in options.items()})
    stock, times = stock_linear(x, tuple(weights), biases, **options), {}
    for way, (function, (own_weights, *others)) in ways.items():
        check(f"skinny_linear, {way}, {link} at batch {B}", call(function, x, own_weights, *others), exact, stock)
        times[way] = place.measure([partial(call, function, x, w, *others) for w in place.clones(own_weights)])
    (ours_us, spread_us), size = times.pop("ours"), sum(weight.nbytes for weight in weights)
    return {
        "benchmark": "skinny_linear",
        "B": B,
        "link": link,
        "ours_us": ours_us,
        "spread_us": spread_us,
        **{f"{way}_us": us for way, (us, _) in times.items()},
        "floor_us": place.floor_us(size),
        "MB": size / 1e6,
        "GB/s": size / ours_us / 1e3,
        "best/ours": min(us for us, _ in times.values()) / ours_us,
    }


def call(
    function: Call,
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: tuple[torch.Tensor | None, ...],
    options: dict[str, object],
) -> torch.Tensor:
    return function(x, tuple(weights), biases, **options)


def bench(place: Place, shape: Shape, B: int) -> list[Row]:
    """A row a link; none where the kernel does not take so many rows."""
    if max_rows(place.dtype, place.device) < B:
        return []
    C = shape.d_model
    norm = {"layer_norm": LayerNorm(place.randn(C), place.randn(C), EPS)}
    scale, residual = {"scale": shape.head_dim**-0.5}, {"residual": place.randn(B, C)}
    return [
        bench_link(place, B, *link)
        for link in (
            ("q/k/v", C, C, 3, norm | scale),
            ("out", C, C, 1, residual),
            ("cross query", C, C, 1, norm | scale),
            ("fc1", 4 * C, C, 1, norm | {"gelu": True}),
            ("fc2", C, 4 * C, 1, residual),
            ("LM head", shape.vocabulary, C, 1, norm),
        )
    ]


def main() -> None:
    measure_named(parser_for(__doc__, "large-v3").parse_args(), "skinny_linear", {"skinny_linear": bench}, shapes_on)


if __name__ == "__main__":
    main()
