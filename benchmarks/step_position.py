"""One decoding step by position: ours reads the slots in use, stock's compiled step all of its static cache at any position.

    python benchmarks/step_position.py --model large-v3 --batch 1,8 --positions 20,100,200,300,420

Milliseconds of a step around each position, both in one run, as benchmarks/decoder_step.py measures and checks them: ours a
graph replay, stock's the step under `torch.compile`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from transformers import WhisperForConditionalGeneration
from whisper_triton.benchmarks.decoder_step import MODES, prepare, time_compiled, time_step
from whisper_triton.benchmarks.harness import Place, Row
from whisper_triton.benchmarks.models import check, models_on
from whisper_triton.benchmarks.tasks import measure_named, numbers, parser_for

import whisper_triton

POSITIONS = (20, 100, 200, 300, 420)
AFTER = 14  # positions that the timed steps go on to
OURS, COMPILED = "accelerate", "stock compiled"


def bench(
    place: Place,
    model: WhisperForConditionalGeneration,
    B: int,
    *,
    positions: Sequence[int] = POSITIONS,
    mode: str = "reduce-overhead",
) -> list[Row]:
    """A row a variant and position."""
    last = model.config.max_target_positions - 1 - AFTER
    if max(positions) > last:
        raise SystemExit(f"the last position whose surroundings the cache holds is {last}, got {max(positions)}")
    check(model, B)
    found = {COMPILED: time_compiled(model, B, place, mode, positions)}
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
    parser.add_argument("--positions", type=numbers, default=POSITIONS, help="slots in use, separated by commas")
    parser.add_argument("--compile", default="reduce-overhead", choices=MODES[:2], help="mode of stock's torch.compile")
    args = parser.parse_args()
    chosen = functools.partial(bench, positions=args.positions, mode=args.compile)
    measure_named(args, "step_position", {"step_position": chosen}, models_on)


if __name__ == "__main__":
    main()
