"""The encoder: our captured chain against stock's, eager and compiled, and the floor, by model and batch.

    python benchmarks/encoder.py --model large-v3 --batch 1,8
    python benchmarks/encoder.py --model large-v3 --batch 1 --compile none --profile
    python benchmarks/encoder.py --model large-v3 --batch 8 --compile none --at-once 1,2,4,8

Random weights in the published shapes, fp16, one window of 30 s a sequence. Milliseconds: `ours` is a graph replay, `call` the
encoder of an accelerated model with all that surrounds the replay, `eager` and `compiled` stock's. The floor is the
floating-point operations of all products over the rate of a large one measured in the same run. States are checked first
against a float64 run of stock: at most 1.25 times as far from it as stock in fp16. `sdpa_*` are microseconds of one layer's
attention by backend, on the strided views that the chain hands it. `--profile` prints where a replay's time goes, by kernel;
`--at-once` tries how many sequences go through the chain together, where the package chooses by their size.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from whisper_triton.benchmarks.alternatives import BACKENDS, Attention, time_alternatives
from whisper_triton.benchmarks.harness import Place, Row, check, relative_error, time_graph
from whisper_triton.benchmarks.models import models_on
from whisper_triton.benchmarks.questions import compiled
from whisper_triton.benchmarks.tasks import measure_named, numbers, parser_for

import whisper_triton
from whisper_triton import fused_encoder
from whisper_triton.encoder import CapturedEncoder

MODES = ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "none")
SHOWN = ("cudnn", "flash", "efficient")
Encode = Callable[[torch.Tensor], torch.Tensor]  # (B, mel bins, frames) to (B, frames / 2, C)
CHECKED = 2  # sequences: a float64 run of more takes its time


@functools.cache
def matmul_rate(place: Place) -> float:
    """TFLOP/s of a large product."""
    size = 8192 if place.is_gpu else 512
    a, b = (place.randn(size, size) for _ in range(2))
    return 2 * size**3 / place.measure([lambda: a @ b] * 3)[0] / 1e6


def tera_operations(encoder: WhisperEncoder, B: int) -> float:
    """TFLOP of all matrix products, convolutions and attention included."""
    config = encoder.config
    T, C, F = config.max_source_positions, config.d_model, config.encoder_ffn_dim
    convolutions = 2 * 2 * T * C * 3 * config.num_mel_bins + 2 * T * C * 3 * C
    layer = 2 * T * (4 * C * C + 2 * C * F) + 4 * T * T * C
    return B * (convolutions + config.encoder_layers * layer) / 1e12


def sdpa_times(encoder: WhisperEncoder, B: int, place: Place) -> dict[str, float | None]:
    """Microseconds of one layer's attention, by backend; None where it does not take such views, or is wrong."""
    config = encoder.config
    heads = config.encoder_attention_heads
    shape = (B, config.max_source_positions, 3, heads, config.d_model // heads)
    inputs = [[place.randn(*shape)] for _ in range(4)]

    def attend(qkv: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))

    def by(backend: SDPBackend) -> Attention:
        def attend_by(qkv: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return attend(qkv)

        return attend_by

    some = inputs[0][0][:CHECKED]
    return time_alternatives(
        place, {f"sdpa_{name}": by(BACKENDS[name]) for name in SHOWN}, inputs, attend(some.double()), attend(some)
    )


def print_profile(graph: torch.cuda.CUDAGraph, lines: int = 16) -> None:
    """What a replay's time is made of: total microseconds and launches by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    kernels = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    events = sorted(kernels, key=lambda event: -event.device_time_total)
    print(f"{sum(event.device_time_total for event in events):9.1f} us in {sum(event.count for event in events)} launches")
    for event in events[:lines]:
        print(f"{event.device_time_total:9.1f} us {event.count:4d} x {event.key[:110]}")


def check_ours(encode: Encode, features: torch.Tensor, exact: torch.Tensor, yardstick: float) -> float:
    """The relative error of the states of some sequences; exits if it is too great, or if two calls differ.

    In fp32, where errors are of the order of the sums alone, twice stock's instead of 1.25 times.
    """
    states = encode(features)
    error = relative_error(states[:CHECKED], exact)
    if not error <= (2 if features.dtype == torch.float32 else 1.25) * yardstick:
        raise SystemExit(f"the encoder is wrong: relative error {error:.2e}, stock's {yardstick:.2e}")
    if not torch.equal(encode(features), states):
        raise SystemExit("the encoder is wrong: two calls differ")
    return error


def bench(
    place: Place,
    model: WhisperForConditionalGeneration,
    B: int,
    *,
    mode: str = "reduce-overhead",
    at_once: Sequence[int] | None = None,
    has_profile: bool = False,
) -> list[Row]:
    """A row for each of `at_once`, by default the package's choice."""
    encoder = model.model.encoder
    stock = copy.deepcopy(encoder)
    features = place.randn(B, encoder.num_mel_bins, 2 * encoder.config.max_source_positions)
    rate = matmul_rate(place)
    floor = 1000 * tera_operations(encoder, B) / rate
    exact = copy.deepcopy(stock).double()(features[:CHECKED].double()).last_hidden_state
    plain = stock(features).last_hidden_state[:CHECKED]
    yardstick = relative_error(plain, exact)
    beside: Row = time_call("eager", lambda: stock(features), place)
    if mode != "none":
        traced = compiled(stock, place, fullgraph=False, mode=mode)
        check("stock's compiled encoder", traced(features).last_hidden_state[:CHECKED], exact, plain)
        beside |= time_call("compiled", lambda: traced(features), place) | {"mode": mode}
    beside |= sdpa_times(encoder, B, place)
    choose, rows = fused_encoder.sequences_at_once, []
    for count in dict.fromkeys(min(B, count) for count in at_once or [choose(encoder)]):
        row: Row = {"benchmark": "encoder", "B": B, "at_once": count, "floor_ms": floor}
        with whisper_triton.accelerated(model), mock.patch.object(fused_encoder, "sequences_at_once", return_value=count):
            # What is captured, where there are no graphs.
            encode = (lambda x: encoder(x).last_hidden_state) if place.is_gpu else fused_encoder.FusedEncoder(encoder)
            error = check_ours(encode, features, exact, yardstick)
            row |= time_ours(encode, encoder, features, place) | beside
            if has_profile:
                print_profile(graph_of(encoder, features).graph)
        if mode != "none":
            row["compiled/ours"] = row["compiled_ms"] / row["ours_ms"]
        row |= {"share_%": 100 * floor / row["ours_ms"], "TFLOP/s": rate}
        rows.append(row | {"error": f"{error:.1e}", "stock_error": f"{yardstick:.1e}"})
    return rows


def time_call(name: str, call: Callable[[], object], place: Place) -> Row:
    """Milliseconds of a call as a caller sees it: what the host needs between launches included."""
    median, spread = place.time([call])
    return {f"{name}_ms": median / 1000, f"{name}_spread_ms": spread / 1000}


def graph_of(encoder: WhisperEncoder, features: torch.Tensor) -> CapturedEncoder:
    """What an accelerated encoder has captured for these features."""
    return encoder._whisper_triton.graphs[features.shape[0], features.shape[2]]


def time_ours(encode: Encode, encoder: WhisperEncoder, features: torch.Tensor, place: Place) -> Row:
    """A replay alone, and a call of the accelerated encoder."""
    if place.is_gpu:
        captured = graph_of(encoder, features)
        median, spread = time_graph(captured.graph, 1)
        row: Row = {"graph_MB": captured.nbytes / 1e6}
    else:
        median, spread = place.measure([lambda: encode(features)])
        row = {}
    return {"ours_ms": median / 1000, "spread_ms": spread / 1000} | row | time_call("call", lambda: encoder(features), place)


def main() -> None:
    parser = parser_for(__doc__, "large-v3")
    parser.add_argument("--compile", default="reduce-overhead", choices=MODES, help="mode of stock's torch.compile, or none")
    parser.add_argument("--at-once", type=numbers, help="sequences, separated by commas; by default the package's choice")
    parser.add_argument("--profile", action="store_true", help="print the time by kernel")
    args = parser.parse_args()
    if args.profile and args.device == "cpu":
        parser.error("--profile needs a GPU: without one there is no replay to look into")
    chosen = functools.partial(bench, mode=args.compile, at_once=args.at_once, has_profile=args.profile)
    measure_named(args, "encoder", {"encoder": chosen}, models_on)


if __name__ == "__main__":
    main()
