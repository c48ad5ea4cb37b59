"""What stands between the encoder's matrix products: our two passes against PyTorch's, eager and compiled.

    python benchmarks/encoder_kernels.py

Shapes of large-v3, fp16: `add_layer_norm` on (B 1500, 1280), twice a layer, `bias_gelu` on (B 1500, 5120), once. Microseconds
in a CUDA graph: cold, with buffers rotated past the L2, and hot, over and over on the same, as between two products at batch 1,
where the L2 holds all. The floor is that of the cold one: bytes over the bandwidth of reading a large tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import gelu, layer_norm
from whisper_triton.benchmarks.harness import check, clones, measure, parse_args, print_table, read_bandwidth, write_rows

from whisper_triton.kernels import add_layer_norm, add_layer_norm_reference, bias_gelu, bias_gelu_reference

T, C, F, EPS = 1500, 1280, 5120, 1e-5
LIMIT = torch.finfo(torch.float16).max - 1000


def stock_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.clamp(x + residual, min=-LIMIT, max=LIMIT)
    return total, layer_norm(total, (C,), weight, bias, EPS)


def stock_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return gelu(x + bias)


def row(
    name: str,
    B: int,
    tensors: list[torch.Tensor],
    constants: list[torch.Tensor],
    variants: dict[str, Callable[..., object]],
    touched: int,
    bandwidth: float,
) -> dict[str, object]:
    """Times every variant on rotated copies of `tensors` and on one; the constants are small and shared."""
    rotated = clones(tensors)
    found: dict[str, object] = {"kernel": name, "B": B, "floor_us": touched / bandwidth / 1e3}
    for variant, function in variants.items():
        found[f"{variant}_us"], spread = measure([partial(function, *t, *constants) for t in rotated])
        found[f"{variant}_hot_us"] = measure([partial(function, *rotated[0], *constants)] * 20)[0]
        if variant == "ours":
            found["spread_us"] = spread
    best = min(found["eager_us"], found["compiled_us"])
    return found | {"GB/s": touched / found["ours_us"] / 1e3, "best/ours": best / found["ours_us"]}


def bench(B: int, bandwidth: float) -> list[dict[str, object]]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.float16)

    x, residual, weight, bias = randn(B * T, C), randn(B * T, C), randn(C), randn(C)
    exact = add_layer_norm_reference(*(t.double() for t in (x, residual, weight, bias)), EPS)
    ours, stock = add_layer_norm(x, residual, weight, bias, EPS, LIMIT), stock_norm(x, residual, weight, bias)
    for part, *results in zip(("sum", "norm"), ours, exact, stock, strict=True):
        check(f"the {part} of add_layer_norm at batch {B}", *results)
    variants = {
        "ours": lambda x, r, w, b: add_layer_norm(x, r, w, b, EPS, LIMIT),
        "eager": stock_norm,
        "compiled": torch.compile(stock_norm),
    }
    rows = [row("add_layer_norm", B, [x, residual], [weight, bias], variants, 4 * x.nbytes, bandwidth)]

    x, bias = randn(B * T, F), randn(F)
    exact, ours = x.double(), x.clone()
    bias_gelu_reference(exact, bias.double())
    bias_gelu(ours, bias)
    check(f"bias_gelu at batch {B}", ours, exact, stock_gelu(x, bias))
    variants = {"ours": bias_gelu, "eager": stock_gelu, "compiled": torch.compile(stock_gelu)}
    return [*rows, row("bias_gelu", B, [x], [bias], variants, 2 * x.nbytes, bandwidth)]


def main() -> None:
    args = parse_args(__doc__, "encoder_kernels.jsonl")
    bandwidth = read_bandwidth()
    rows = [line for B in (1, 8) for line in bench(B, bandwidth)]
    print(f"read bandwidth {bandwidth:.0f} GB/s")
    print_table(rows)
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
