"""Whole `generate` calls: stock dynamic, stock static with torch.compile, that with our attention by name, and `accelerate`.

    python benchmarks/generate.py --model large-v3 --batch 1,8
    whisper-triton bench generate --model medium,large-v3 --batch 1,2,4,8

Random weights in the published shapes (no download) or a real checkpoint, greedy, 64 new tokens from one 30 s window of
noise, encoder included. RTFx is seconds of audio a second, `extra_GB` the most memory that two calls took beyond the models,
`first_s` the first call, which holds what compiling costs. What is timed is checked first: a step's logits against a float64
run, and each variant's tokens by the float64 logits along their own path, in which each must be the greatest but for what
stock's rounding in this dtype can turn: those of the first call, and of the last that was timed, for what is captured may
run from the second on. With random weights rounding turns near ties, after which tokens differ for good,
stock's own too, so the share that equals the first variant's is only reported.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, WhisperForConditionalGeneration
from whisper_triton.benchmarks.harness import Place, Row, median_and_spread
from whisper_triton.benchmarks.models import check, get_model
from whisper_triton.benchmarks.tasks import measure_named, names_of, number_to, parser_for

import whisper_triton
from whisper_triton.bench import MOST_NEW_TOKENS

NEW_TOKENS = 64
BY_NAME = "attention by name, static+compile"
VARIANTS = ("stock static+compile", BY_NAME, "stock dynamic", "accelerate")
CHECKED = 2  # sequences at a time: so a float64 run of a large batch stays small in memory
SECONDS_A_FRAME = 0.02


def synchronize(place: Place) -> None:
    if place.is_gpu:
        torch.cuda.synchronize()


def settings(model: WhisperForConditionalGeneration, new_tokens: int, detects: bool = False) -> dict[str, object]:
    """The arguments of every `generate` here. A multilingual model is told the language, unless it `detects` it, which costs
    stock a run of the encoder, and any a pass of the decoder.
    """
    told: dict[str, object] = {}
    if model.generation_config.is_multilingual:
        told = {"task": "transcribe"} | ({} if detects else {"language": "en"})
    return {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False, **told}


class Variant:
    """One way to generate: a model of its own, so that what it has compiled stays while others are timed."""

    def __init__(
        self,
        name: str,
        model: WhisperForConditionalGeneration,
        features: torch.Tensor,
        new_tokens: int,
        place: Place,
        detects: bool = False,
    ) -> None:
        self.name, self.model, self.features, self.new_tokens, self.place = name, model, features, new_tokens, place
        self.kwargs = settings(model, new_tokens, detects) | ({"cache_implementation": "static"} if "static" in name else {})
        self.extra_GB = None
        if place.is_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()  # the models', and what other variants keep
        start = time.perf_counter()
        self.tokens = self.generate()
        synchronize(place)
        self.first_s = time.perf_counter() - start
        self.generate()
        if place.is_gpu:
            self.extra_GB = (torch.cuda.max_memory_allocated() - before) / 1e9
        self.times: list[float] = []

    def generate(self) -> torch.Tensor:
        return self.model.generate(self.features, **self.kwargs)

    def time_once(self) -> None:
        start = time.perf_counter()
        self.tokens = self.generate()
        synchronize(self.place)
        self.times.append(time.perf_counter() - start)

    def row(self, expected: torch.Tensor) -> Row:
        B = self.features.shape[0]
        median, spread = median_and_spread(self.times)
        audio = B * SECONDS_A_FRAME * self.features.shape[-1] / 2  # an encoder's frame is two of the features'
        return {
            "B": B,
            "variant": self.name,
            "tok/s": B * self.new_tokens / median,
            "ms/token": 1000 * median / self.new_tokens,
            "RTFx": audio / median,
            "ms": 1000 * median,
            "spread_ms": 1000 * spread,
            "min_ms": 1000 * min(self.times),
            "max_ms": 1000 * max(self.times),
            "first_s": self.first_s,
            "extra_GB": self.extra_GB,
            "equal_tokens": (self.tokens == expected).float().mean().item(),
            "new_tokens": self.new_tokens,
        }


class Recorder(LogitsProcessor):
    """Keeps the prompt that `generate` begins with, and which tokens its rules leave at each step."""

    def __init__(self) -> None:
        self.prompt: torch.Tensor | None = None  # (B, P)
        self.allowed: list[torch.Tensor] = []  # (B, vocabulary) each

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.prompt = input_ids.clone() if self.prompt is None else self.prompt
        self.allowed.append(scores > float("-inf"))
        return scores


class TokenCheck:
    """Whether tokens are what greedy search with these arguments of `generate` chooses after each other, by float64 logits."""

    def __init__(
        self,
        stock: WhisperForConditionalGeneration,
        exact: WhisperForConditionalGeneration,
        features: torch.Tensor,
        kwargs: dict[str, object],
    ) -> None:
        self.stock, self.exact, self.features = stock, exact, features
        recorder = Recorder()
        stock.generate(features, logits_processor=[recorder], **kwargs)
        self.prompt, self.allowed = recorder.prompt, torch.stack(recorder.allowed, dim=1)  # (B, tokens, vocabulary)

    @torch.no_grad()
    def logits(self, model: WhisperForConditionalGeneration, features: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Those that each of the tokens after the prompt is chosen by."""
        out = model(features.to(model.dtype), decoder_input_ids=ids, use_cache=False)
        return out.logits[:, self.prompt.shape[1] - 1 :].double()

    def __call__(self, name: str, tokens: torch.Tensor) -> None:
        """Exits if one of `tokens` is further below the greatest than twice the error of stock's logits in its dtype."""
        if tokens.shape != self.allowed.shape[:2]:
            raise SystemExit(f"{name} is wrong: {tuple(tokens.shape)} tokens for {tuple(self.allowed.shape[:2])}")
        parts = (tensor.split(CHECKED) for tensor in (self.features, self.prompt, self.allowed, tokens))
        for features, prompt, allowed, chosen in zip(*parts, strict=True):
            ids = torch.cat([prompt, chosen[:, :-1]], dim=1)
            exact, stock = (self.logits(model, features, ids) for model in (self.exact, self.stock))
            best = exact.masked_fill(~allowed, float("-inf")).amax(-1)
            below = (best - exact.gather(-1, chosen[..., None])[..., 0]).max().item()
            error = (stock - exact).abs().max().item()
            if not below <= 2 * error:
                raise SystemExit(f"{name} is wrong: a token's logit is {below:.2e} below the best, stock's error {error:.2e}")


class Models:
    """The models of one name, one for each way to run it, and one in float64."""

    def __init__(self, name: str, place: Place) -> None:
        self.stock = get_model(name, place.dtype, place.device)
        by_name, ours, self.exact = (copy.deepcopy(self.stock) for _ in range(3))
        self.exact.double()
        by_name.set_attn_implementation("whisper_triton")
        self.ours = whisper_triton.accelerate(ours)
        self.runners = dict(zip(VARIANTS, (self.stock, by_name, self.stock, self.ours), strict=True))


def time_variants(
    names: Sequence[str], models: Models, features: torch.Tensor, new_tokens: int, calls: int, place: Place
) -> tuple[list[Variant], TokenCheck]:
    """The variants, called in turns, and what their tokens were checked by: those of the first call and of the last."""
    check_tokens = TokenCheck(models.stock, models.exact, features, settings(models.stock, new_tokens))
    torch.compiler.reset()
    running = [Variant(name, models.runners[name], features, new_tokens, place) for name in names]
    for variant in running:
        check_tokens(variant.name, variant.tokens)
    for _ in range(calls):
        for variant in running:
            variant.time_once()
    for variant in running:
        check_tokens(f"{variant.name}'s last call", variant.tokens)
    return running, check_tokens


def bench(
    place: Place,
    models: Models,
    B: int,
    *,
    variants: tuple[str, ...] = VARIANTS,
    calls: int | None = None,
    new_tokens: int | None = None,
) -> list[Row]:
    """A row a variant, whose calls are timed in turns; their tokens are compared to the first's."""
    calls = calls or (10 if place.is_gpu else 2)
    new_tokens = new_tokens or (NEW_TOKENS if place.is_gpu else 8)
    whisper_triton.restore(models.ours)
    check(models.ours, B)
    whisper_triton.accelerate(models.ours)
    config = models.stock.config
    features = place.randn(B, config.num_mel_bins, 2 * config.max_source_positions)
    running, _ = time_variants(variants, models, features, new_tokens, calls, place)
    return [{"benchmark": "generate", **variant.row(running[0].tokens)} for variant in running]


def main() -> None:
    parser = parser_for(__doc__, "large-v3")
    told = "separated by semicolons; tokens are compared to the first's"
    parser.add_argument("--variants", type=names_of(VARIANTS), default=VARIANTS, help=told)
    parser.add_argument("--calls", type=number_to(), help="timed calls a variant, taken in turns; 10 unless given, on a CPU 2")
    parser.add_argument("--new-tokens", type=number_to(MOST_NEW_TOKENS), help=f"a call; {NEW_TOKENS} unless given, on a CPU 8")
    args = parser.parse_args()
    chosen = functools.partial(bench, variants=args.variants, calls=args.calls, new_tokens=args.new_tokens)
    measure_named(args, "generate", {"generate": chosen}, lambda place: functools.partial(Models, place=place))


if __name__ == "__main__":
    main()
