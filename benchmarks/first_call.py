"""What the first `generate` of a process takes, and whether another prompt or more tokens have it compile anew.

    python benchmarks/first_call.py --model large-v3,turbo --batch 1

Each variant in a fresh process: `accelerate` where Triton has no kernels in its cache, again where it has those of that run,
stock static with `torch.compile` where no cache has anything, and stock dynamic. Random weights in the published shapes or a
real checkpoint, greedy, one 30 s window of noise. Seconds until the tokens are there, of four calls, one after the other:
`first_s` with `accelerate` itself, but without imports and the loading of the model; `second_s` with the same arguments;
`other_prompt_s` with five tokens before the prompt; `longer_s` with 200 new tokens in place of 64, for which ours needs
graphs over more slots too. The tokens of all four are checked as benchmarks/generate.py checks them before a row is made.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar
from unittest import mock

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration
from whisper_triton.benchmarks.generate import NEW_TOKENS, TokenCheck, settings, synchronize
from whisper_triton.benchmarks.harness import Place, Row
from whisper_triton.benchmarks.models import get_model
from whisper_triton.benchmarks.tasks import measure_named, names_of, parser_for
from whisper_triton.kernels._dispatch import failed_gpus, why_reference

import whisper_triton

# Each with the folder of its caches: the second of ours finds there what the first has left.
FILLS, CACHED = "accelerate, nothing cached", "accelerate, kernels cached"
VARIANTS = {
    FILLS: "ours",
    CACHED: "ours",
    "stock static+compile, nothing cached": "compiled",
    "stock dynamic": "dynamic",
}
LONGER = 200
PROMPT = 5
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}

Result = TypeVar("Result")


class Checked(NamedTuple):
    """A model to check by; the processes load their own by its name."""

    name: str
    stock: WhisperForConditionalGeneration
    exact: WhisperForConditionalGeneration  # in float64


def load(name: str, place: Place) -> Checked:
    stock = get_model(name, place.dtype, place.device)
    return Checked(name, stock, copy.deepcopy(stock).double())


def features_of(place: Place, config: WhisperConfig, B: int) -> torch.Tensor:
    """The same in every process."""
    torch.manual_seed(0)
    return place.randn(B, config.num_mel_bins, 2 * config.max_source_positions)


def calls_of(model: WhisperForConditionalGeneration, new_tokens: int, longer: int) -> dict[str, dict[str, object]]:
    """The arguments of each call, in the order in which they are made."""
    usual = settings(model, new_tokens)
    prompt = torch.arange(1, 1 + PROMPT, device=model.device)
    return {
        "first": usual,
        "second": usual,
        "other_prompt": usual | {"prompt_ids": prompt},
        "longer": settings(model, longer),
    }


def run_calls(
    place: Place, name: str, B: int, variant: str, new_tokens: int, longer: int
) -> dict[str, tuple[float, list[list[int]]]]:
    """Seconds and tokens of each call, in a process that has made none."""
    model = get_model(name, place.dtype, place.device)
    features = features_of(place, model.config, B)
    static = {"cache_implementation": "static"} if "static" in variant else {}
    found = {}
    synchronize(place)
    start = time.perf_counter()
    if variant.startswith("accelerate"):
        whisper_triton.accelerate(model)
    for call, kwargs in calls_of(model, new_tokens, longer).items():
        tokens = model.generate(features, **kwargs, **static)
        synchronize(place)
        found[call] = time.perf_counter() - start, tokens.tolist()
        start = time.perf_counter()
    for gpu in failed_gpus():  # or references would be timed as kernels
        raise SystemExit(f"{variant}: {why_reference(torch.device('cuda', gpu))}")
    return found


def in_new_process(place: Place, folder: Path, function: Callable[..., Result], *args: object) -> Result:
    """What `function` returns in a process whose compilers keep what they build in `folder`."""
    caches = {variable: str(folder / name) for variable, name in CACHES.items()}
    # On a CPU, as in record.py, a process that has imported all it needs is copied.
    context = multiprocessing.get_context("spawn" if place.is_gpu else "fork")
    with mock.patch.dict(os.environ, caches), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def bench(place: Place, models: Checked, B: int, *, variants: Sequence[str] = tuple(VARIANTS)) -> list[Row]:
    """A row a variant."""
    lengths = (NEW_TOKENS, LONGER) if place.is_gpu else (4, 8)
    features = features_of(place, models.stock.config, B)
    calls = calls_of(models.stock, *lengths)
    checks = {call: TokenCheck(models.stock, models.exact, features, kwargs) for call, kwargs in calls.items()}
    rows = []
    # What `torch.compile` has started may outlive its process for a moment, and still write.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for variant in variants:
            found = in_new_process(place, Path(folder, VARIANTS[variant]), run_calls, place, models.name, B, variant, *lengths)
            for call, (_, tokens) in found.items():
                checks[call](f"{variant}, {call} call", torch.tensor(tokens, device=place.device))
            times = {f"{call}_s": seconds for call, (seconds, _) in found.items()}
            facts = {"B": B, "variant": variant, "new_tokens": lengths[0], "longer_tokens": lengths[1]}
            rows.append({"benchmark": "first_call", **facts, **times})
    return rows


def main() -> None:
    parser = parser_for(__doc__, "large-v3", batch="1")
    told = "separated by semicolons; all by default"
    parser.add_argument("--variants", type=names_of(VARIANTS), default=tuple(VARIANTS), help=told)
    args = parser.parse_args()
    variants = args.variants
    if CACHED in variants and FILLS not in variants[: variants.index(CACHED)]:
        parser.error(f"what {CACHED!r} finds is what {FILLS!r} before it leaves")
    chosen = functools.partial(bench, variants=variants)
    measure_named(args, "first_call", {"first_call": chosen}, lambda place: functools.partial(load, place=place))


if __name__ == "__main__":
    main()
