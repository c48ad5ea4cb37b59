"""Which tiles suit the links of a decoder step on this GPU, each judged by the time of the whole step.

    python benchmarks/tune_step.py --model large-v3 --batch 1

A link timed alone says little: what counts is how it overlaps with its neighbours. So this takes one link after the other,
tries its candidates in the captured step, and keeps the best before it goes on. `choose_tiles` in kernels/skinny_linear.py
and `split_tiles` in whisper_triton/fused.py are set from its output.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from decoder_step import POSITION
from generate import SHAPES, build_model
from harness import time_graph, write_rows
from transformers import WhisperForConditionalGeneration
from whisper_triton.kernels.decode_attention import Tiles as AttentionTiles
from whisper_triton.kernels.skinny_linear import Tiles

import whisper_triton
from whisper_triton import fused
from whisper_triton.decoder import DecoderStep

append = sys.modules["whisper_triton.kernels.append_attention"]
decode = sys.modules["whisper_triton.kernels.decode_attention"]
skinny = sys.modules["whisper_triton.kernels.skinny_linear"]

chosen: dict[tuple[object, ...], object] = {}


def overridable(module: object, name: str, key: Callable[..., tuple[object, ...]]) -> None:
    """Makes a module's choice of tiles ask `chosen` first, by the link that `key` makes of its arguments."""
    stock = getattr(module, name)
    setattr(module, name, lambda *args: chosen.setdefault(key(*args), stock(*args)))


def step_ms(model: WhisperForConditionalGeneration, B: int) -> float:
    step = DecoderStep(model, B, model.config.max_source_positions)
    step.cache.is_updated.update(dict.fromkeys(step.cache.is_updated, True))
    step(model, torch.full((B, 1), 1000, device="cuda"))
    step.cache.get_seq_length().fill_(POSITION - 16)
    return time_graph(step.graph, 1, replays=20)[0] / 1000


def candidates(link: tuple[object, ...], B: int) -> list[object]:
    if link[0] == "append":
        return [append.Tiles(keys, warps, 2) for keys, warps in ((128, 4), (64, 4), (64, 2), (32, 2), (32, 1), (128, 8))]
    if link[0] == "cross":
        cuts = ((256, 6, 8), (128, 6, 8), (128, 12, 4), (128, 6, 4), (64, 12, 2), (64, 12, 4), (64, 8, 4), (32, 12, 2))
        if B > 1:
            cuts += ((32, 6, 1), (32, 4, 2), (128, 1, 4), (128, 2, 4), (64, 2, 2), (64, 3, 2), (64, 1, 4))
        return [AttentionTiles(keys, splits, warps, 2) for keys, splits, warps in cuts]
    if B == 1:
        rows = (16, 32, 64) if link[1] > 16384 else (4, 8, 16)
        return [Tiles(n, 1, warps) for n, warps in itertools.product(rows, (2, 4, 8))]
    splits = (2, 4, 5, 10) if link[2] > 2048 else (1,)
    return [Tiles(n, k, warps) for n, k, warps in itertools.product((16, 32, 64), splits, (4, 8))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="large-v3", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "rows" / "tune_step.jsonl")
    args = parser.parse_args()
    overridable(skinny, "choose_tiles", lambda B, *rest: ("linear", *rest))
    overridable(append, "choose_tiles", lambda *args: ("append",))
    overridable(fused, "split_tiles", lambda heads: ("cross",))
    overridable(decode, "choose_tiles", lambda *args: ("cross",))
    model = whisper_triton.accelerate(build_model(args.model))
    best, rows = step_ms(model, args.batch), []
    print(f"{best:.4f} ms at the start", flush=True)
    for link in list(chosen):
        kept = chosen[link]
        for tiles in candidates(link, args.batch):
            chosen[link] = tiles
            try:
                ms = step_ms(model, args.batch)
            except Exception as error:  # a tile that does not fit is not a candidate
                print(f"  {link} {tuple(tiles)}: {type(error).__name__}", flush=True)
                continue
            rows.append({"model": args.model, "B": args.batch, "link": list(link), "tiles": list(tiles), "step_ms": ms})
            if ms < 0.998 * best:
                best, kept = ms, tiles
        chosen[link] = kept
        print(f"{best:.4f} ms with {link} as {tuple(kept)}", flush=True)
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
