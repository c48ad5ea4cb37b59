"""Cross-attention of one decode step with its layer norm and query projection: ours against PyTorch's modules, by batch.

    python benchmarks/cross_attention.py

By default the shapes of large-v3, fp16. Microseconds a layer in a CUDA graph, weights and caches rotated past the L2. `apart`
is `skinny_linear` and `decode_attention`, each a launch of ours or two, which `ours` is too where it is not one launch;
`cudnn`, `flash` and so on are PyTorch's layer norm, `F.linear` and that backend of SDPA, `compiled` the same under
torch.compile with the backend that SDPA chooses. The floor is the bytes of the weight, keys and values over the bandwidth
measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from whisper_triton.benchmarks.alternatives import BACKENDS, Attention, best, sdpa, time_alternatives
from whisper_triton.benchmarks.harness import Place, Row, check
from whisper_triton.benchmarks.models import Shape, shapes_on
from whisper_triton.benchmarks.tasks import measure_named, parser_for
from whisper_triton.kernels.skinny_linear import LayerNorm

from whisper_triton.fused import max_rows
from whisper_triton.kernels import cross_attention, cross_attention_reference, decode_attention, skinny_linear

EPS = 1e-5


def default_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(query.transpose(1, 2), key, value, scale=scale).transpose(1, 2)


def bench(place: Place, shape: Shape, B: int) -> list[Row]:
    """A row; none where the kernels do not take so many rows."""
    if max_rows(place.dtype, place.device) < B:
        return []
    C, H, S, D = shape.d_model, shape.heads, shape.frames, shape.head_dim
    scale = D**-0.5
    x, bias = place.randn(B, C), place.randn(C)
    norm = LayerNorm(place.randn(C), place.randn(C), EPS)
    tensors = place.randn(C, C, scale=C**-0.5), *(place.randn(B, H, S, D) for _ in range(2))
    counters = torch.zeros(B * H, dtype=torch.int32, device=place.device)

    def ours(weight: torch.Tensor, *caches: torch.Tensor) -> torch.Tensor:
        return cross_attention(x, weight, bias, *caches, layer_norm=norm, scale=scale, counters=counters)

    def apart(weight: torch.Tensor, *caches: torch.Tensor) -> torch.Tensor:
        query = skinny_linear(x, (weight,), (bias,), layer_norm=norm, scale=scale).view(B, 1, H, D)
        return decode_attention(query, *caches, scale=1.0, is_causal=False, read_ahead=True, counters=counters)

    def modules(attend: Attention) -> Callable[..., torch.Tensor]:
        def layer(weight: torch.Tensor, *caches: torch.Tensor) -> torch.Tensor:
            y = F.layer_norm(x, (C,), norm.weight, norm.bias, EPS)
            return attend((F.linear(y, weight, bias) * scale).view(B, 1, H, D), *caches, 1.0)

        return layer

    exact = cross_attention_reference(
        x.double(), tensors[0].double(), bias.double(), *(cache.double() for cache in tensors[1:]),
        layer_norm=LayerNorm(norm.weight.double(), norm.bias.double(), EPS), scale=scale,
    )  # fmt: skip
    stock = modules(default_attention)(*tensors)
    for name, function in (("cross_attention", ours), ("cross_attention in launches of their own", apart)):
        check(name, function(*tensors), exact, stock)

    rotated = place.clones(tensors)
    ours_us = place.measure([lambda t=t: ours(*t) for t in rotated])
    apart_us = place.measure([lambda t=t: apart(*t) for t in rotated])
    variants = {name: modules(sdpa(backend)) for name, backend in BACKENDS.items()}
    variants["compiled"] = place.compile(modules(default_attention))
    times = time_alternatives(place, variants, rotated, exact, stock)
    size = sum(tensor.nbytes for tensor in tensors)
    return [
        {
            "benchmark": "cross_attention",
            "B": B,
            "ours_us": ours_us[0],
            "spread_us": ours_us[1],
            "apart_us": apart_us[0],
            "apart_spread_us": apart_us[1],
            **times,
            "floor_us": place.floor_us(size),
            "MB": size / 1e6,
            "ours_GB/s": size / ours_us[0] / 1e3,
            "best/ours": best(times) / ours_us[0],
        }
    ]


def main() -> None:
    measure_named(
        parser_for(__doc__, "large-v3", "1,2,8").parse_args(), "cross_attention", {"cross_attention": bench}, shapes_on
    )


if __name__ == "__main__":
    main()
