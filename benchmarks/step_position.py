"""One decoding step by position: ours reads the slots in use, stock's compiled step all of its static cache at any position.

    python benchmarks/step_position.py --model large-v3 --batch 1,8 --positions 20,100,200,300,420

Milliseconds of a step around each position, both in one run, as benchmarks/decoder_step.py measures and checks them: ours a
graph replay, stock's the step under `torch.compile`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from transformers import WhisperForConditionalGeneration
from whisper_triton.benchmarks.decoder_step import MODES, prepare, stock_step, time_step
from whisper_triton.benchmarks.harness import Place, Row, measure_on_cpu, time_device
from whisper_triton.benchmarks.models import check, check_logits, models_on, step_input
from whisper_triton.benchmarks.tasks import measure_named, parser_for

import whisper_triton

POSITIONS = (20, 100, 200, 300, 420)
OURS, COMPILED = "accelerate", "stock compiled"


@torch.no_grad()
def time_compiled(
    model: WhisperForConditionalGeneration, B: int, place: Place, positions: Sequence[int], mode: str
) -> list[tuple[float, float]]:
    """(median, spread) in ms of stock's compiled step at each position; exits if it is wrong."""
    given = step_input(model, B)
    torch.compiler.reset()
    step, cache = stock_step(model, given, lambda function: place.compile(function, mode=mode))
    check_logits("stock's compiled step", step()[:, -1].clone(), given, bound=2)
    times = []
    for position in positions:
        for layer in cache.self_attention_cache.layers:
            layer.cumulative_length.fill_(max(5, position - 30))
        median, spread = time_device(step) if place.is_gpu else measure_on_cpu([step])
        times.append((median / 1000, spread / 1000))
    return times


def bench(
    place: Place,
    model: WhisperForConditionalGeneration,
    B: int,
    *,
    positions: Sequence[int] = POSITIONS,
    mode: str = "reduce-overhead",
) -> list[Row]:
    """A row a variant and position."""
    check(model, B)
    found = {COMPILED: time_compiled(model, B, place, positions, mode)}
    with whisper_triton.accelerated(model):
        step = prepare(model, B)
        found[OURS] = [time_step(model, step, position) for position in positions]
    return [
        {"benchmark": "step_position", "B": B, "variant": name, "position": position, "ms": ms, "spread_ms": spread}
        for name, times in found.items()
        for position, (ms, spread) in zip(positions, times, strict=True)
    ]


def main() -> None:
    parser = parser_for(__doc__, "large-v3")
    parser.add_argument("--positions", default=",".join(map(str, POSITIONS)), help="slots in use, separated by commas")
    parser.add_argument("--compile", default="reduce-overhead", choices=MODES[:2], help="mode of stock's torch.compile")
    args = parser.parse_args()
    positions = [int(position) for position in args.positions.split(",")]
    chosen = functools.partial(bench, positions=positions, mode=args.compile)
    measure_named(args, "step_position", {"step_position": chosen}, models_on)


if __name__ == "__main__":
    main()
