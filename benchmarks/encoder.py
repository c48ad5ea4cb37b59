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

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from whisper_triton.benchmarks.harness import measure, print_table, relative_error, time_graph, write_rows
from whisper_triton.benchmarks.models import SHAPES, build_model

import whisper_triton
from whisper_triton import fused_encoder

MODES = ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "none")
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CHECKED = 2  # sequences: a float64 run of more takes its time


def matmul_rate(size: int = 8192) -> float:
    """TFLOP/s of a large fp16 product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    return 2 * size**3 / measure([lambda: a @ b] * 3)[0] / 1e6


def tera_operations(encoder: WhisperEncoder, B: int) -> float:
    """TFLOP of all matrix products, convolutions and attention included."""
    config = encoder.config
    T, C, F = config.max_source_positions, config.d_model, config.encoder_ffn_dim
    convolutions = 2 * 2 * T * C * 3 * config.num_mel_bins + 2 * T * C * 3 * C
    layer = 2 * T * (4 * C * C + 2 * C * F) + 4 * T * T * C
    return B * (convolutions + config.encoder_layers * layer) / 1e12


def time_calls(call: Callable[[], object], count: int = 20) -> float:
    """Milliseconds of a call as a caller sees it: what the host needs between launches included."""
    for _ in range(3):
        call()
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def sdpa_times(encoder: WhisperEncoder, B: int) -> dict[str, float | None]:
    """Microseconds of one layer's attention, by backend; None where it does not take such views."""
    config = encoder.config
    heads = config.encoder_attention_heads
    times: dict[str, float | None] = {}
    for name, backend in BACKENDS.items():
        qkv = [
            torch.randn(B, config.max_source_positions, 3, heads, config.d_model // heads, device="cuda", dtype=encoder.dtype)
            for _ in range(4)
        ]
        calls = [lambda t=t: scaled_dot_product_attention(*t.permute(2, 0, 3, 1, 4).unbind(0)) for t in qkv]
        try:
            with sdpa_kernel(backend):
                times[f"sdpa_{name}_us"] = measure(calls)[0]
        except RuntimeError:
            times[f"sdpa_{name}_us"] = None
    return times


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


def bench(name: str, B: int, rate: float, mode: str, has_profile: bool, at_once: int | None) -> dict[str, object]:
    model = build_model(name)
    encoder = model.model.encoder
    if at_once is not None:
        fused_encoder.sequences_at_once = lambda encoder: at_once
    stock = copy.deepcopy(encoder)
    features = torch.randn(B, encoder.num_mel_bins, 2 * encoder.config.max_source_positions, device="cuda", dtype=model.dtype)
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(features[:CHECKED].double()).last_hidden_state
        whisper_triton.accelerate(model)
        ours = encoder(features).last_hidden_state
        errors = [relative_error(t[:CHECKED], exact) for t in (ours, stock(features).last_hidden_state)]
        if not errors[0] <= 1.25 * errors[1]:
            raise SystemExit(f"{name} is wrong at batch {B}: relative error {errors[0]:.2e}, stock's {errors[1]:.2e}")
        if not torch.equal(encoder(features).last_hidden_state, ours):
            raise SystemExit(f"{name} at batch {B}: two replays differ")
        captured = next(iter(encoder._whisper_triton.graphs.values()))
        ms, spread = (us / 1000 for us in time_graph(captured.graph, 1))
        floor = 1000 * tera_operations(encoder, B) / rate
        row: dict[str, object] = {
            "benchmark": "encoder",
            "model": name,
            "B": B,
            "at_once": min(B, fused_encoder.sequences_at_once(encoder)),
            "floor_ms": floor,
            "ours_ms": ms,
            "spread_ms": spread,
            "call_ms": time_calls(lambda: encoder(features)),
            "eager_ms": time_calls(lambda: stock(features)),
        }
        if mode != "none":
            compiled = torch.compile(stock, mode=mode)
            row |= {"compiled_ms": time_calls(lambda: compiled(features)), "mode": mode}
            row["compiled/ours"] = row["compiled_ms"] / ms
        row |= {"share_%": 100 * floor / ms, "TFLOP/s": rate, "graph_MB": captured.nbytes / 1e6}
        row |= {"error": f"{errors[0]:.1e}", "stock_error": f"{errors[1]:.1e}"} | sdpa_times(encoder, B)
        if has_profile:
            print(f"{name}, batch {B}")
            print_profile(captured.graph)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="large-v3", help=f"of {', '.join(SHAPES)}; several separated by commas")
    parser.add_argument("--batch", default="1,8", help="batch sizes, separated by commas")
    parser.add_argument("--compile", default="reduce-overhead", choices=MODES, help="mode of stock's torch.compile, or none")
    parser.add_argument("--at-once", help="sequences at once, separated by commas; by default the package's choice")
    parser.add_argument("--profile", action="store_true", help="print the time by kernel")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "rows" / "encoder.jsonl")
    args = parser.parse_args()
    rate = matmul_rate()
    print(f"a large product runs at {rate:.0f} TFLOP/s")
    choices = [None] if args.at_once is None else [int(n) for n in args.at_once.split(",")]
    rows = []
    for name in args.model.split(","):
        for B, at_once in itertools.product(map(int, args.batch.split(",")), choices):
            rows.append(bench(name, B, rate, args.compile, args.profile, at_once))
            torch.compiler.reset()
            torch.cuda.empty_cache()
    print_table(rows)
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
