"""What stands between the encoder's matrix products: our two passes against PyTorch's, eager and compiled.

    python benchmarks/encoder_kernels.py

By default the shapes of large-v3, fp16: `add_layer_norm` on (B 1500, 1280), twice a layer, `bias_gelu` on (B 1500, 5120), once.
Microseconds in a CUDA graph: cold, with buffers rotated past the L2, and hot, over and over on the same, as between two
products at batch 1, where the L2 holds all. The floor is that of the cold one: bytes over the bandwidth of reading a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import gelu, layer_norm
from whisper_triton.benchmarks.harness import Place, Row, check
from whisper_triton.benchmarks.models import Shape, shapes_on
from whisper_triton.benchmarks.tasks import measure_named, parser_for

from whisper_triton.kernels import add_layer_norm, add_layer_norm_reference, bias_gelu, bias_gelu_reference

EPS = 1e-5


def time_variants(
    name: str,
    B: int,
    tensors: list[torch.Tensor],
    constants: list[torch.Tensor],
    variants: dict[str, Callable[..., object]],
    touched: int,
    place: Place,
) -> Row:
    """Times every variant on rotated copies of `tensors` and on one; the constants are small and shared."""
    rotated = place.clones(tensors)
    found: Row = {"benchmark": name, "B": B, "floor_us": place.floor_us(touched)}
    for variant, function in variants.items():
        found[f"{variant}_us"], spread = place.measure([partial(function, *t, *constants) for t in rotated])
        found[f"{variant}_hot_us"] = place.measure([partial(function, *rotated[0], *constants)] * 20)[0]
        if variant == "ours":
            found["spread_us"] = spread
    best = min(found["eager_us"], found["compiled_us"])
    return found | {"GB/s": touched / found["ours_us"] / 1e3, "best/ours": best / found["ours_us"]}


def bench_add_layer_norm(place: Place, shape: Shape, B: int) -> list[Row]:
    C = shape.d_model
    limit = torch.finfo(place.dtype).max - 1000

    def stock_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.clamp(x + residual, min=-limit, max=limit)
        return total, layer_norm(total, (C,), weight, bias, EPS)

    x, residual = (place.randn(B * shape.frames, C) for _ in range(2))
    weight, bias = place.randn(C), place.randn(C)
    exact = add_layer_norm_reference(*(t.double() for t in (x, residual, weight, bias)), EPS)
    variants = {
        "ours": lambda x, r, w, b: add_layer_norm(x, r, w, b, EPS, limit),
        "eager": stock_norm,
        "compiled": place.compile(stock_norm),
    }
    stock = stock_norm(x, residual, weight, bias)
    for variant in ("ours", "compiled"):
        for part, *results in zip(("sum", "norm"), variants[variant](x, residual, weight, bias), exact, stock, strict=True):
            check(f"the {part} of add_layer_norm, {variant}, at batch {B}", *results)
    return [time_variants("add_layer_norm", B, [x, residual], [weight, bias], variants, 4 * x.nbytes, place)]


def bench_bias_gelu(place: Place, shape: Shape, B: int) -> list[Row]:
    F = 4 * shape.d_model

    def stock_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return gelu(x + bias)

    x, bias = place.randn(B * shape.frames, F), place.randn(F)
    exact, ours = x.double(), x.clone()
    bias_gelu_reference(exact, bias.double())
    bias_gelu(ours, bias)
    compiled = place.compile(stock_gelu)
    for variant, result in (("ours", ours), ("compiled", compiled(x, bias))):
        check(f"bias_gelu, {variant}, at batch {B}", result, exact, stock_gelu(x, bias))
    variants = {"ours": bias_gelu, "eager": stock_gelu, "compiled": compiled}
    return [time_variants("bias_gelu", B, [x], [bias], variants, 2 * x.nbytes, place)]


def main() -> None:
    benches = {"add_layer_norm": bench_add_layer_norm, "bias_gelu": bench_bias_gelu}
    measure_named(parser_for(__doc__, "large-v3").parse_args(), "encoder_kernels", benches, shapes_on)


if __name__ == "__main__":
    main()
