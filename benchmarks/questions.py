"""What the files on the open questions share: what is compiled as stock compiles it, and columns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from whisper_triton.benchmarks.harness import Place, Row

# `reduce-overhead` compiles or warms up what it sees first, records it when it sees it again, and then replays it.
PASSES = ("first", "second", "third")


def compiled(function: Callable, place: Place, fullgraph: bool = True, **options: object) -> Callable:
    """`function` compiled as stock's `generate` compiles a step: reduce-overhead, and for any size once a second one is seen.

    On a CPU only traced. Forgets what was compiled before: variants share code, and a function is compiled only so many times.
    """
    torch._dynamo.reset()
    options = (options or {"mode": "reduce-overhead"}) if place.is_gpu else {"backend": "eager"}
    return torch.compile(function, fullgraph=fullgraph, **options)


def keep_still(*tensors: torch.Tensor) -> None:
    """Marks what stays where it is, as stock marks its static caches: a compiled function then does not copy it."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


def side_by_side(**ways: tuple[float, float]) -> Row:
    """The columns that compare two ways, each (median, spread) in microseconds, and the first's time over the second's."""
    (first, a), (second, b) = ways.items()
    return {
        f"{first}_us": a[0],
        f"{first}_spread_us": a[1],
        f"{second}_us": b[0],
        f"{second}_spread_us": b[1],
        f"{first}/{second}": a[0] / b[0],
    }
