"""Cross-attention of one decode step: our kernel against SDPA's backends, FlexAttention and our reference compiled, by batch.

    python benchmarks/decode_attention.py
    whisper-triton bench kernels --only decode_attention --model medium --batch 1,8

By default the shapes of large-v3: 20 heads, 1500 frames, head dim 64, fp16. Microseconds a layer in a CUDA graph, caches
rotated past the L2. `ours_us` joins the splits of a head in a second launch, where there are any; `joined_us` has the head's
last program do it, for which the caller hands in counters. `floor_us` is the bytes of keys and values over the bandwidth
measured in the same run.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention
from whisper_triton.benchmarks.alternatives import BACKENDS, best, flex, sdpa, time_alternatives
from whisper_triton.benchmarks.harness import Place, Row, check
from whisper_triton.benchmarks.models import Shape, shapes_on
from whisper_triton.benchmarks.tasks import measure_named, parser_for

from whisper_triton.kernels import decode_attention, decode_attention_reference

BATCHES = "1,2,3,4,5,6,7,8,10,12,14,16,20,24,28,32,40,48,56,64"
CHECKED = 2  # sequences


def bench(place: Place, shape: Shape, B: int) -> list[Row]:
    H, S, D = shape.heads, shape.frames, shape.head_dim
    scale = D**-0.5
    query = place.randn(B, 1, H, D)
    key, value = (place.randn(B, H, S, D) for _ in range(2))
    few = (query[:CHECKED], key[:CHECKED], value[:CHECKED])
    exact = decode_attention_reference(*(t.double() for t in few), scale=scale)
    stock = scaled_dot_product_attention(few[0].transpose(1, 2), *few[1:], scale=scale).transpose(1, 2)
    counters = torch.zeros(B * H, dtype=torch.int32, device=place.device)
    check("decode_attention", decode_attention(query, key, value, scale=scale, read_ahead=True)[:CHECKED], exact, stock)
    joined = decode_attention(query, key, value, scale=scale, read_ahead=True, counters=counters)
    check("decode_attention with counters", joined[:CHECKED], exact, stock)

    def ours(**kwargs: object) -> tuple[float, float]:
        return place.measure([lambda c=c: decode_attention(query, *c, scale=scale, **kwargs) for c in caches])

    caches = place.clones([key, value])
    ahead, plain, joined = ours(read_ahead=True), ours(), ours(read_ahead=True, counters=counters)
    reference = place.compile(lambda q, k, v: decode_attention_reference(q, k, v, scale=scale))
    attentions = {name: sdpa(backend) for name, backend in BACKENDS.items()} | {"flex": flex(place, S)}
    variants = {name: lambda q, k, v, attend=attend: attend(q, k, v, scale) for name, attend in attentions.items()}
    times = time_alternatives(place, variants | {"compiled": reference}, [(query, *c) for c in caches], exact, stock)
    size = key.nbytes + value.nbytes
    return [
        {
            "benchmark": "decode_attention",
            "B": B,
            "ours_us": ahead[0],
            "spread_us": ahead[1],
            "not_ahead_us": plain[0],
            "joined_us": joined[0],
            "joined_spread_us": joined[1],
            **times,
            "floor_us": place.floor_us(size),
            "ours_GB/s": size / ahead[0] / 1e3,
            "best_sdpa/ours": best({name: times[f"{name}_us"] for name in BACKENDS}) / ahead[0],
            "bandwidth_GB/s": place.bandwidth,
        }
    ]


def main() -> None:
    args = parser_for(__doc__, "large-v3", BATCHES).parse_args()
    measure_named(args, "decode_attention", {"decode_attention": bench}, shapes_on)


if __name__ == "__main__":
    main()
