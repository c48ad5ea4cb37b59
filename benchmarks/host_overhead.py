"""What the host takes of a `generate` call whose arguments repeat: where the GPU waits, before, between and after its work.

    python benchmarks/host_overhead.py --model large-v3,turbo --batch 1,8

Random weights in the published shapes, greedy, 64 new tokens from one window, called over and over: stock dynamic, and
`accelerate`. Milliseconds. `ms` is the wall clock's, of calls that nothing is put into; `busy_ms` the GPU's work in such a
call and `host_ms` the rest. Ours is a few launches, most of them of graphs, which keep the GPU busy from their first kernel to
their last: so its work is the time between CUDA events around each, from other calls (with the launch itself, where the GPU
waits for it). Of what is launched kernel by kernel, PyTorch's profiler tells in yet another call when at least one runs.

From those other calls too, on the GPU's clock: `before_ms` from the call to the encoder, `between_ms` from the encoder to the
first pass of the decoder, without the projection of the cross keys and values, `after_ms` from the last pass to the return.
Together they are `around_ms`: configuration copies, processor building, checks, and the small kernels that these launch. What
stock prepares while the encoder's graph runs beside it counts only as far as it outlasts the encoder, in `between_ms`. On a
CPU only these four are measured, by the clock, around the model's own passes: nothing is captured there.

Tokens are checked as benchmarks/generate.py checks them, those of the last call of each kind too.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperModel
from whisper_triton.benchmarks.generate import NEW_TOKENS, Models, Variant, synchronize, time_variants
from whisper_triton.benchmarks.harness import Place, Row, median_and_spread
from whisper_triton.benchmarks.tasks import measure_named, number_to, parser_for

from whisper_triton.decoder import DecoderStep
from whisper_triton.encoder import CapturedEncoder

VARIANTS = ("stock dynamic", "accelerate")
ENCODER, PROJECTION, PASS = "encoder", "projection", "pass"


class Clock:
    """Marks points of time: the GPU's, as it comes to them, or on a CPU the host's."""

    def __init__(self, place: Place) -> None:
        self.is_gpu = place.is_gpu

    def mark(self) -> Any:
        if not self.is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        """Between two marks; waits for the GPU."""
        if not self.is_gpu:
            return 1000 * (end - start)
        end.synchronize()
        return start.elapsed_time(end)


class Stage(NamedTuple):
    """A part of a call that the GPU works on, and the marks around it."""

    name: str
    is_one_launch: bool  # or one graph: the GPU is at work all the time
    start: Any
    end: Any


class Stages:
    """Has the stages of calls marked, for a block: in classes, for what is put around a model itself may change its path."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.found = clock, []

    def marked(self, name: str, is_one_launch: bool, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = self.clock.mark()
            result = function(*args, **kwargs)
            self.found.append(Stage(name, is_one_launch, start, self.clock.mark()))
            return result

        return call

    @contextmanager
    def marking(self) -> Iterator[None]:
        advance = DecoderStep.advance

        def marked_advance(step: DecoderStep, *args: Any, **kwargs: Any) -> Callable[[], torch.Tensor]:
            return self.marked(PASS, True, advance(step, *args, **kwargs))

        start_encoder = CapturedEncoder.start

        def marked_start(graph: CapturedEncoder, features: torch.Tensor) -> torch.Tensor:
            start = self.clock.mark()  # in the stream that the graph's own waits for
            states = start_encoder(graph, features)
            with torch.cuda.stream(graph.stream):
                self.found.append(Stage(ENCODER, True, start, self.clock.mark()))
            return states

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(DecoderStep, "advance", marked_advance))
            stack.enter_context(mock.patch.object(CapturedEncoder, "start", marked_start))
            for owner, method, name, is_one_launch in (
                (WhisperEncoder, "forward", ENCODER, False),
                (WhisperModel, "forward", PASS, False),  # all but the LM head; our loop wants the class around it as it is
                # What stands in its place where it can be replayed.
                (DecoderStep, "__call__", PASS, True),
                (DecoderStep, "project", PROJECTION, True),
            ):
                function = self.marked(name, is_one_launch, getattr(owner, method))
                stack.enter_context(mock.patch.object(owner, method, function))
            yield


def split_of(clock: Clock, start: Any, stages: Sequence[Stage], end: Any) -> dict[str, float]:
    """What of a call lies where, in ms; `work` is all of its stages. Exits if it has not gone through all of them."""
    encoders, passes = ([stage for stage in stages if stage.name == name] for name in (ENCODER, PASS))
    if len(encoders) != 1 or len(passes) < 2:
        raise SystemExit(f"a call ran {len(encoders)} encoders and {len(passes)} passes of the decoder that could be seen")
    projections = sum(clock.ms(stage.start, stage.end) for stage in stages if stage.name == PROJECTION)
    found = {
        "before": clock.ms(start, encoders[0].start),
        "between": clock.ms(encoders[0].end, passes[0].start) - projections,
        "after": clock.ms(passes[-1].end, end),
    }
    work = sum(clock.ms(stage.start, stage.end) for stage in stages)
    return found | {"around": sum(found.values()), "work": work}


def busy_ms(call: Callable[[], object]) -> float:
    """The time in which at least one kernel or copy of a call runs, by PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = (event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return covered([(event.time_range.start, event.time_range.end) for event in on_gpu]) / 1000


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """The length of what the intervals cover."""
    total, last = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


def measure(variant: Variant, calls: int) -> Row:
    """The columns of a variant whose calls have been timed."""
    place, clock, splits = variant.place, Clock(variant.place), []
    for _ in range(calls):
        stages = Stages(clock)
        with stages.marking():
            synchronize(place)
            start = clock.mark()
            variant.tokens = variant.generate()
            end = clock.mark()
        splits.append(split_of(clock, start, stages.found, end))
    is_launched_at_once = all(stage.is_one_launch for stage in stages.found)
    parts = {name: median_and_spread([split[name] for split in splits]) for name in splits[0]}
    ms, spread = (1000 * value for value in median_and_spread(variant.times))
    row: Row = {"variant": variant.name, "new_tokens": variant.new_tokens, "ms": ms, "spread_ms": spread}
    if place.is_gpu:
        busy = parts["work"][0] if is_launched_at_once else busy_ms(variant.generate)
        row |= {"busy_ms": busy, "host_ms": ms - busy}
    for name in ("before", "between", "after", "around"):
        row |= {f"{name}_ms": parts[name][0], f"{name}_spread_ms": parts[name][1]}
    return row


def bench(place: Place, models: Models, B: int, *, calls: int | None = None, new_tokens: int | None = None) -> list[Row]:
    """A row a variant, whose calls are timed in turns."""
    calls = calls or (10 if place.is_gpu else 2)
    new_tokens = new_tokens or (NEW_TOKENS if place.is_gpu else 4)
    config = models.stock.config
    features = place.randn(B, config.num_mel_bins, 2 * config.max_source_positions)
    running, check_tokens = time_variants(VARIANTS, models, features, new_tokens, calls, place)
    rows = [{"benchmark": "host_overhead", "B": B, **measure(variant, calls)} for variant in running]
    for variant in running:
        check_tokens(f"{variant.name}'s last call with marks", variant.tokens)
    return rows


def main() -> None:
    parser = parser_for(__doc__, "large-v3")
    parser.add_argument("--calls", type=number_to(), help="calls a variant and kind; 10 unless given, on a CPU 2")
    args = parser.parse_args()
    chosen = functools.partial(bench, calls=args.calls)
    measure_named(args, "host_overhead", {"host_overhead": chosen}, lambda place: functools.partial(Models, place=place))


if __name__ == "__main__":
    main()
