"""What it costs a `generate` call to detect the language, as it does by default, beside a call that is told it.

    python benchmarks/detect_language.py --model large-v3,turbo --batch 1,8

Random weights in the published shapes, greedy, 64 new tokens from one window: stock dynamic and `accelerate`, calls of both
kinds in turns. Stock encodes the window once more and decodes the start token, kernel by kernel and without a cache; ours
replays a step that an earlier call has left, and the window's states and cross keys and values are then there. Milliseconds
of whole calls. The last calls' tokens are checked as benchmarks/generate.py checks them, after the prompt that stock detects.
"""

from __future__ import annotations

import functools

from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.tokenization_whisper import LANGUAGES
from whisper_triton.benchmarks.generate import NEW_TOKENS, Models, TokenCheck, Variant, settings
from whisper_triton.benchmarks.harness import Place, Row, median_and_spread
from whisper_triton.benchmarks.tasks import measure_named, number_to, parser_for

VARIANTS = ("stock dynamic", "accelerate")
FIRST_LANGUAGE = 50259  # "<|en|>", in the vocabularies of 51,865 and 51,866 tokens; the tasks come after all languages


def make_multilingual(model: WhisperForConditionalGeneration) -> None:
    """Has random weights know languages; a checkpoint says itself which it knows."""
    config = model.generation_config
    if getattr(config, "lang_to_id", None) is None:
        config.is_multilingual = True
        config.lang_to_id = {f"<|{code}|>": FIRST_LANGUAGE + i for i, code in enumerate(LANGUAGES)}
        config.task_to_id = {task: FIRST_LANGUAGE + len(LANGUAGES) + i for i, task in enumerate(("translate", "transcribe"))}


def bench(place: Place, models: Models, B: int, *, calls: int | None = None) -> list[Row]:
    """A row a variant."""
    for model in (models.stock, models.ours):
        make_multilingual(model)
    calls, new_tokens = (calls or 10, NEW_TOKENS) if place.is_gpu else (calls or 2, 4)
    config = models.stock.config
    features = place.randn(B, config.num_mel_bins, 2 * config.max_source_positions)
    checks, running = {}, {}
    for detects in (False, True):
        checks[detects] = TokenCheck(models.stock, models.exact, features, settings(models.stock, new_tokens, detects))
        for name in VARIANTS:
            running[name, detects] = Variant(name, models.runners[name], features, new_tokens, place, detects)
    for _ in range(calls):
        for variant in running.values():
            variant.time_once()
    for (name, detects), variant in running.items():
        checks[detects](name, variant.tokens)
    rows = []
    for name in VARIANTS:
        row: Row = {"benchmark": "detect_language", "B": B, "variant": name, "new_tokens": new_tokens}
        told, detected = (running[name, detects].times for detects in (False, True))
        pairs = [after - before for before, after in zip(told, detected, strict=True)]  # of one round
        for kind, times in (("told", told), ("detected", detected), ("detection", pairs)):
            median, spread = median_and_spread(times)
            row |= {f"{kind}_ms": 1000 * median, f"{kind}_spread_ms": 1000 * spread}
        rows.append(row)
    return rows


def main() -> None:
    parser = parser_for(__doc__, "large-v3")
    parser.add_argument("--calls", type=number_to(), help="timed calls a variant and kind; 10 unless given, on a CPU 2")
    args = parser.parse_args()
    chosen = functools.partial(bench, calls=args.calls)
    measure_named(args, "detect_language", {"detect_language": chosen}, lambda place: functools.partial(Models, place=place))


if __name__ == "__main__":
    main()
