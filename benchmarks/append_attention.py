"""Self-attention of one decode step, write and attend: our one launch against what the stock static layer runs, and others.

    python benchmarks/append_attention.py

By default the shapes of large-v3: 20 heads, 448 slots, head dim 64, fp16. Microseconds a layer in a CUDA graph, caches
rotated past the L2. Stock is arange, add, two index_copy_, the position's add_, and SDPA over all slots with a mask (made once
a step); `cudnn`, `efficient`, `math` and `flex` are stock's write followed by that attention, FlexAttention with a block mask
of the length (made once a step too), `compiled` stock's layer under torch.compile.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention
from whisper_triton.benchmarks.alternatives import BACKENDS, Attention, flex, sdpa, time_alternatives
from whisper_triton.benchmarks.harness import Place, Row, check
from whisper_triton.benchmarks.models import Shape, shapes_on
from whisper_triton.benchmarks.tasks import measure_named, parser_for
from whisper_triton.benchmarks.update_kv_cache import stock_write

from whisper_triton.kernels import append_attention, append_attention_reference

LENGTHS = (20, 100, 200, 448)


def default_attention(mask: torch.Tensor) -> Attention:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        return scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=mask, scale=scale).transpose(1, 2)

    return attend


def bench_length(place: Place, shape: Shape, B: int, length: int) -> Row:
    H, S, D = shape.heads, shape.slots, shape.head_dim
    scale = D**-0.5
    query, key, value = (place.randn(B, 1, H, D) for _ in range(3))
    caches = [place.randn(B, H, S, D) for _ in range(2)]
    position = torch.tensor(length - 1, device=place.device)
    mask = (torch.arange(S, device=place.device) < length).view(1, 1, 1, S)

    def with_stock_write(attend: Attention) -> Attention:
        def layer(key_cache: torch.Tensor, value_cache: torch.Tensor) -> torch.Tensor:
            stock_write(key, value, key_cache, value_cache, position)
            return attend(query, key_cache, value_cache, scale)

        return layer

    exact = append_attention_reference(
        *(t.double() for t in (query, key, value)), *(c.double() for c in caches), position, scale=scale
    )
    stock = with_stock_write(default_attention(mask))
    expected = stock(*(c.clone() for c in caches))
    ours = append_attention(query, key, value, *(c.clone() for c in caches), position, scale=scale)
    check("append_attention", ours, exact, expected)

    touched = 2 * B * H * length * D * query.element_size()  # of a call of ours; stock's SDPA reads all slots
    rotated = place.clones(caches, touched)
    attentions = {name: sdpa(BACKENDS[name], mask) for name in ("cudnn", "efficient", "math")}
    attentions["flex"] = flex(place, S, position + 1)
    variants = {"stock": stock, "compiled": place.compile(stock)}
    variants |= {name: with_stock_write(attend) for name, attend in attentions.items()}
    ours_us = place.measure([lambda c=c: append_attention(query, key, value, *c, position, scale=scale) for c in rotated])
    times = time_alternatives(place, variants, rotated, exact, expected)
    return {
        "benchmark": "append_attention",
        "B": B,
        "length": length,
        "ours_us": ours_us[0],
        "spread_us": ours_us[1],
        **times,
        "MB": touched / 1e6,
        "ours_GB/s": touched / ours_us[0] / 1e3,
        "stock/ours": times["stock_us"] / ours_us[0],
    }


def bench(place: Place, shape: Shape, B: int) -> list[Row]:
    return [bench_length(place, shape, B, length) for length in LENGTHS if length <= shape.slots]


def main() -> None:
    args = parser_for(__doc__, "large-v3", "1,8,32").parse_args()
    measure_named(args, "append_attention", {"append_attention": bench}, shapes_on)


if __name__ == "__main__":
    main()
