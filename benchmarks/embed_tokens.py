"""The decoder's input of one step: our launch against PyTorch's, eager and compiled.

    python benchmarks/embed_tokens.py

By default the shapes of large-v3, fp16. Microseconds in a CUDA graph. A row a sequence is read: what it takes is a launch.
"""

from __future__ import annotations

import torch
from whisper_triton.benchmarks.harness import Place, Row
from whisper_triton.benchmarks.models import Shape, shapes_on
from whisper_triton.benchmarks.tasks import measure_named, parser_for

from whisper_triton.kernels import embed_tokens, embed_tokens_reference

CALLS = 32  # of one measurement, each with other tokens


def bench(place: Place, shape: Shape, B: int) -> list[Row]:
    tokens, positions = place.randn(shape.vocabulary, shape.d_model), place.randn(shape.slots, shape.d_model)
    position = torch.tensor(shape.slots // 2, device=place.device)
    ids = [torch.randint(0, shape.vocabulary, (B, 1), device=place.device) for _ in range(CALLS)]
    variants = {"ours": embed_tokens, "eager": embed_tokens_reference, "compiled": place.compile(embed_tokens_reference)}
    row: Row = {"benchmark": "embed_tokens", "B": B}
    expected = embed_tokens_reference(ids[0], tokens, positions, position)
    for name, variant in variants.items():
        if not torch.equal(variant(ids[0], tokens, positions, position), expected):
            raise SystemExit(f"embed_tokens, {name}, is wrong at batch {B}")
        row[f"{name}_us"], spread = place.measure([lambda v=variant, i=i: v(i, tokens, positions, position) for i in ids])
        if name == "ours":
            row["spread_us"] = spread
    return [row | {"best/ours": min(row["eager_us"], row["compiled_us"]) / row["ours_us"]}]


def main() -> None:
    measure_named(parser_for(__doc__, "large-v3").parse_args(), "embed_tokens", {"embed_tokens": bench}, shapes_on)


if __name__ == "__main__":
    main()
