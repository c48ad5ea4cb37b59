"""What stands between the encoder and the first token: cross keys and values of all layers, and the prompt's pass.

    python benchmarks/prefill.py --model large-v3 --batch 1,8

Random weights in the published shapes, fp16, a prompt of 4 tokens over the states of 1500 frames. Milliseconds of the wall
clock from the emptied cache to the logits on the device, the host's work included, which is what the modules wait for. `stock`
is the model as transformers has it with its dynamic cache; `layer by layer` our modules, each layer projecting its own keys and
values (what served every prompt before); `now` one projection and the prompt's graph where there is one (`captured`), as
`generate` runs them. `project_ms` and `prompt_ms` are their parts on the GPU alone. Logits are checked first against a float64
run: at most 1.25 times as far from it as stock's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import WhisperForConditionalGeneration
from whisper_triton.benchmarks.harness import capture, print_table, relative_error, time_graph, write_rows
from whisper_triton.benchmarks.models import SHAPES, build_model

import whisper_triton
from whisper_triton.decoder import DecoderStep
from whisper_triton.kernels import project_cross_kv


def wall_ms(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def bench(model: WhisperForConditionalGeneration, name: str, B: int, T: int, calls: int) -> dict[str, object]:
    ids = torch.randint(0, 50000, (B, T), device="cuda")
    states = torch.randn(B, model.config.max_source_positions, model.config.d_model, device="cuda", dtype=model.dtype)

    def forward(**kwargs: object) -> torch.Tensor:
        return model(encoder_outputs=(states,), decoder_input_ids=ids, use_cache=True, **kwargs).logits[:, -1]

    model.double()
    states = states.double()
    exact = forward()
    model.half()
    states = states.half()
    step = DecoderStep(whisper_triton.accelerate(model), B, states.shape[1])

    def stock() -> torch.Tensor:
        whisper_triton.restore(model)
        return forward()

    def layer_by_layer() -> torch.Tensor:
        step.cache.reset()
        return forward(past_key_values=step.cache)

    def now() -> torch.Tensor:
        step.cache.reset()
        step.project(states)
        return step(model, ids)[:, -1] if step.takes(model, T) else forward(past_key_values=step.cache)

    yardstick = relative_error(stock(), exact)
    whisper_triton.accelerate(model)
    for call in (layer_by_layer, now):
        if not (error := relative_error(call(), exact)) <= 1.25 * yardstick:
            raise SystemExit(f"{call.__name__} is wrong at batch {B}: relative error {error:.2e}, stock's {yardstick:.2e}")
    whisper_triton.restore(model)
    stock_ms = [wall_ms(forward) for _ in range(calls + 2)][2:]
    whisper_triton.accelerate(model)
    times: dict[str, list[float]] = {"layer by layer": [], "now": []}
    for _ in range(calls):
        times["layer by layer"].append(wall_ms(layer_by_layer))
        times["now"].append(wall_ms(now))
    row: dict[str, object] = {"benchmark": "prefill", "model": name, "B": B, "T": T, "captured": step.takes(model, T)}
    for variant, measured in (("stock", stock_ms), *times.items()):
        row |= {f"{variant}_ms": statistics.median(measured), f"{variant}_spread_ms": (max(measured) - min(measured)) / 2}
    row["project_ms"] = time_graph(capture([lambda: project_cross_kv(states, step.projections)]), 1)[0] / 1000
    if step.takes(model, T):
        step.cache.reset()
        row["prompt_ms"] = time_graph(step.passes[T].graph, 1)[0] / 1000
    whisper_triton.restore(model)
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="large-v3", help=f"of {', '.join(SHAPES)}; several separated by commas")
    parser.add_argument("--batch", default="1,8", help="batch sizes, separated by commas")
    parser.add_argument("--tokens", type=int, default=4, help="of the prompt")
    parser.add_argument("--calls", type=int, default=20, help="timed calls a variant")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "rows" / "prefill.jsonl")
    args = parser.parse_args()
    rows = []
    for name in args.model.split(","):
        model = build_model(name)
        rows += [bench(model, name, B, args.tokens, args.calls) for B in map(int, args.batch.split(","))]
        del model
    print_table(rows)
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
