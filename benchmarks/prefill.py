"""What stands between the encoder and the first token: cross keys and values of all layers, and the prompt's pass.

    python benchmarks/prefill.py --model large-v3 --batch 1,8

Random weights in the published shapes, fp16, a prompt of 4 tokens over the states of 1500 frames. Milliseconds of the wall
clock from the emptied cache to the logits on the device, the host's work included, which is what the modules wait for. `stock`
is the model as transformers has it with its dynamic cache; `layer by layer` our modules, each layer projecting its own keys and
values (what served every prompt before); `now` one projection and the prompt's graph where there is one (`captured`), as
`generate` runs them. `project_ms` and `prompt_ms` are their parts on the GPU alone. Logits are checked first against a float64
run: at most 1.25 times as far from it as stock's (fp32: 2).
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch
from transformers import WhisperForConditionalGeneration
from whisper_triton.benchmarks.harness import Place, Row, relative_error, time_calls, time_graph
from whisper_triton.benchmarks.models import in_float64, models_on
from whisper_triton.benchmarks.tasks import measure_named, number_to, parser_for

import whisper_triton
from whisper_triton.bench import MOST_NEW_TOKENS
from whisper_triton.cache import CACHE_NAME
from whisper_triton.decoder import DecoderStep
from whisper_triton.kernels import project_cross_kv


def wall_ms(call: Callable[[], object]) -> float:
    return time_calls([call], rounds=1, warm_up=0)[0] / 1000


def bench(place: Place, model: WhisperForConditionalGeneration, B: int, *, T: int, calls: int) -> list[Row]:
    ids = torch.randint(0, min(50000, model.config.vocab_size), (B, T), device=place.device)
    states = place.randn(B, model.config.max_source_positions, model.config.d_model)

    def forward(**kwargs: object) -> torch.Tensor:
        outputs = (states.to(model.dtype),)
        return model(encoder_outputs=outputs, decoder_input_ids=ids, use_cache=True, **kwargs).logits[:, -1]

    with in_float64(model):
        exact = forward()
    yardstick = relative_error(forward(), exact)
    stock_ms = [wall_ms(forward) for _ in range(calls + 2)][2:]
    with whisper_triton.accelerated(model):
        step = DecoderStep(model, B, states.shape[1])
        is_captured = place.is_gpu and step.takes(model, T)

        def layer_by_layer() -> torch.Tensor:
            step.cache.reset()
            return forward(**{CACHE_NAME: step.cache})

        def now() -> torch.Tensor:
            step.cache.reset()
            step.project(states)
            return step(model, ids)[:, -1] if is_captured else forward(**{CACHE_NAME: step.cache})

        bound = 2 if place.dtype == torch.float32 else 1.25
        for call in (layer_by_layer, now):
            if not (error := relative_error(call(), exact)) <= bound * yardstick:
                raise SystemExit(f"{call.__name__} is wrong at batch {B}: relative error {error:.2e}, stock's {yardstick:.2e}")
        times: dict[str, list[float]] = {"layer by layer": [], "now": []}
        for _ in range(calls):
            times["layer by layer"].append(wall_ms(layer_by_layer))
            times["now"].append(wall_ms(now))
        row: Row = {"benchmark": "prefill", "B": B, "T": T, "captured": is_captured}
        for variant, measured in (("stock", stock_ms), *times.items()):
            row |= {f"{variant}_ms": statistics.median(measured), f"{variant}_spread_ms": (max(measured) - min(measured)) / 2}
        row["project_ms"] = place.measure([lambda: project_cross_kv(states, step.projections.table)])[0] / 1000
        if is_captured:
            step.cache.reset()
            row["prompt_ms"] = time_graph(step.passes[T].graph, 1)[0] / 1000
    return [row]


def main() -> None:
    parser = parser_for(__doc__, "large-v3")
    parser.add_argument("--tokens", type=number_to(MOST_NEW_TOKENS), default=4, help="of the prompt")
    parser.add_argument("--calls", type=number_to(), default=20, help="timed calls a variant")
    args = parser.parse_args()
    measure_named(args, "prefill", {"prefill": functools.partial(bench, T=args.tokens, calls=args.calls)}, models_on)


if __name__ == "__main__":
    main()
