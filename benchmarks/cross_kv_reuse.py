"""What it costs stock to recompute the cross keys and values at each step, instead of once a window (`is_updated`).

    python benchmarks/cross_kv_reuse.py --model large-v3,distil-large-v3 --batch 1,8

`reuse` is stock's decoder with its static caches as it is: a layer projects the encoder's states once and then reads the cross
cache. `recompute`: before each step the flag of every layer is taken back, and the cross cache's position with it, so that each
layer projects them again and writes them over what is there. Equal for both: the stock model, random weights in the published
shapes, fp16, caches, a step at position 64; the position is put back before each step, by one launch.

How: `eager`, a step launched by the host, by the wall clock; `graph`, the same launches in a CUDA graph, if none waits for the
device; `compiled`, reduce-overhead; `generate`, a whole call of 64 new tokens from features, the encoder included, static
cache, compiled on a GPU; microseconds all. `--layers` cuts deeper decoders, and their encoders by the same factor, since
compiling takes long and layers are alike: only the LM head is out of proportion then, which makes the ratio a little too small.

A step's logits are checked first: at most twice as far from float64 as stock's without any cache. The tokens of `generate` are
checked as benchmarks/generate.py checks them, before and after it is timed; with random weights rounding may turn a near tie,
so the share that is equal in both ways is reported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from transformers import EncoderDecoderCache, StaticCache, WhisperForConditionalGeneration
from transformers.cache_utils import Cache, CacheLayerMixin
from whisper_triton.benchmarks.generate import NEW_TOKENS, TokenCheck, settings
from whisper_triton.benchmarks.harness import Place, Row, check, time_calls
from whisper_triton.benchmarks.models import get_model, in_float64
from whisper_triton.benchmarks.questions import compiled, keep_still, side_by_side
from whisper_triton.benchmarks.select_token import waits
from whisper_triton.benchmarks.tasks import measure_named, number_to, parser_for

from whisper_triton.cache import CACHE_NAME

POSITION = 64


def cut(model: WhisperForConditionalGeneration, layers: int) -> None:
    """Leaves at most `layers` of the decoder, and as large a part of the encoder."""
    encoder, decoder, config = model.model.encoder, model.model.decoder, model.config
    if len(decoder.layers) <= layers:
        return
    encoder.layers = encoder.layers[: -(-len(encoder.layers) * layers // len(decoder.layers))]
    decoder.layers = decoder.layers[:layers]
    config.encoder_layers, config.decoder_layers = len(encoder.layers), layers


def forget(cache: EncoderDecoderCache) -> None:
    """Has the next step compute again the cross keys and values that have been computed."""
    if any(cache.is_updated.values()):
        cache.is_updated.update(dict.fromkeys(cache.is_updated, False))
        torch._foreach_zero_([layer.cumulative_length for layer in initialised(cache.cross_attention_cache)])


def initialised(cache: Cache) -> list[CacheLayerMixin]:
    """The decoder's layers; stock's cache lists as many as the encoder has."""
    return [layer for layer in cache.layers if layer.is_initialized]


class Step:
    """A stock model that has decoded POSITION tokens over random states, and decodes the next one over and over."""

    def __init__(self, model: WhisperForConditionalGeneration, B: int) -> None:
        config, device = model.config, model.device
        self.model = model
        self.ids = torch.randint(0, min(50000, config.vocab_size), (B, POSITION + 1), device=device)
        self.token = self.ids[:, POSITION:].clone()
        self.states = torch.randn(B, config.max_source_positions, config.d_model, device=device, dtype=model.dtype)
        lengths = (config.max_target_positions, config.max_source_positions)
        self.cache = EncoderDecoderCache(*(StaticCache(config=config, max_cache_len=length) for length in lengths))
        self._decode(model.forward, self.ids[:, :POSITION])
        self.positions = [layer.cumulative_length for layer in initialised(self.cache.self_attention_cache)]
        self.start = [position.clone() for position in self.positions]
        keep_still(self.states, self.token)

    def _decode(self, forward: Callable, ids: torch.Tensor) -> torch.Tensor:
        kwargs = {"encoder_outputs": (self.states,), "decoder_input_ids": ids, CACHE_NAME: self.cache, "use_cache": True}
        return forward(**kwargs).logits[:, -1]

    def reuse(self, forward: Callable) -> torch.Tensor:
        torch._foreach_copy_(self.positions, self.start)
        return self._decode(forward, self.token)

    def recompute(self, forward: Callable) -> torch.Tensor:
        forget(self.cache)
        return self.reuse(forward)

    def without_cache(self) -> torch.Tensor:
        states = self.states.to(self.model.dtype)
        return self.model(encoder_outputs=(states,), decoder_input_ids=self.ids, use_cache=False).logits[:, -1]

    def spoil(self) -> None:
        """What of the cross cache is not computed again stays NaN."""
        for layer in initialised(self.cache.cross_attention_cache):
            layer.keys.fill_(torch.nan), layer.values.fill_(torch.nan)


def bench_step(place: Place, model: WhisperForConditionalGeneration, B: int) -> list[Row]:
    """A step, each way: first as it recomputes, from a spoilt cache, then as it reuses what that left."""
    step = Step(model, B)
    stock = step.without_cache()
    with in_float64(model):
        exact = step.without_cache()
    times: dict[str, dict[str, tuple[float, float]]] = {}
    for way in (step.recompute, step.reuse):
        name = way.__name__
        eager, traced = partial(way, model.forward), partial(way, compiled(model.forward, place))
        for how, call in (("eager", eager), ("compiled", traced)):
            if name == "recompute":
                step.spoil()
            check(f"{name}, {how}", call(), exact, stock)
            times.setdefault(how, {})[name] = place.time([call] * 4)
        if place.is_gpu and not waits(eager):
            times.setdefault("graph", {})[name] = place.measure([eager])
    return [{"how": how} | side_by_side(**found) for how, found in times.items() if len(found) == 2]


def bench_generate(place: Place, model: WhisperForConditionalGeneration, B: int) -> Row:
    """A whole call. `prepare_inputs_for_generation` runs before each step, outside what is compiled."""
    features = place.randn(B, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    told = settings(model, NEW_TOKENS if place.is_gpu else 3)
    check_tokens = TokenCheck(model, copy.deepcopy(model).double(), features, told)
    kwargs = told | {"cache_implementation": "static"}
    stock_prepare = model.prepare_inputs_for_generation

    def prepare(*args: object, **kwargs: object) -> dict[str, object]:
        inputs = stock_prepare(*args, **kwargs)
        forget(inputs[CACHE_NAME])
        return inputs

    def timed(way: str) -> tuple[torch.Tensor, tuple[float, float]]:
        found: list[torch.Tensor] = []

        def generate() -> None:
            found[:] = [model.generate(features, **kwargs)]

        torch._dynamo.reset()
        generate()
        check_tokens(f"{way}, generate", *found)
        rounds, warm_up = (5, 2) if place.is_gpu else (1, 0)
        time = time_calls([generate], rounds, warm_up)
        check_tokens(f"{way}, the last call of generate", *found)
        return found[0], time

    tokens, reuse = timed("reuse")
    model.prepare_inputs_for_generation = prepare
    again, recompute = timed("recompute")
    del model.prepare_inputs_for_generation
    equal = (tokens == again).float().mean().item()
    return {"how": "generate"} | side_by_side(recompute=recompute, reuse=reuse) | {"equal_tokens": equal}


def bench(place: Place, model: WhisperForConditionalGeneration, B: int) -> list[Row]:
    facts = {"benchmark": "cross_kv_reuse", "layers": len(model.model.decoder.layers), "B": B}
    return [facts | row for row in [*bench_step(place, model, B), bench_generate(place, model, B)]]


def main() -> None:
    parser = parser_for(__doc__, model="large-v3,distil-large-v3")
    parser.add_argument("--layers", type=number_to(), default=8, help="of the decoder, at most")
    args = parser.parse_args()

    def loader(place: Place) -> Callable[[str], WhisperForConditionalGeneration]:
        def load(name: str) -> WhisperForConditionalGeneration:
            model = get_model(name, place.dtype, place.device)
            cut(model, args.layers)
            return model

        return load

    measure_named(args, "cross_kv_reuse", {"cross_kv_reuse": bench}, loader)


if __name__ == "__main__":
    main()
