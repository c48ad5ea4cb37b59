"""Which tiles suit the links of a decoder step on this GPU, each judged by the time of the whole step.

    python benchmarks/tune_step.py --model large-v3 --batch 1,2,4,8,16,32

A link timed alone says little: what counts is how it overlaps with its neighbours. So this takes one link after the other,
tries its candidates in the captured step, and keeps the best before it goes on; `--links` leaves others as they are. Where
clusters are not asked for, or lose, cross-attention is launched without them, and has links of its own. The tables of
`choose_tiles` in kernels/_linear_tiles.py, decode_attention.py and append_attention.py, of `choose_attention_tiles` in
_paced_attention.py, `choose_stream_tiles` in _paced_stream.py, `choose_append_tiles` in _paced_append.py and
`choose_cross_tiles` in _clustered_cross.py are set from its output.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from transformers import WhisperForConditionalGeneration
from whisper_triton.benchmarks.decoder_step import POSITION
from whisper_triton.benchmarks.harness import parse, time_graph, write_rows
from whisper_triton.benchmarks.models import SHAPES, build_model
from whisper_triton.benchmarks.tasks import numbers
from whisper_triton.kernels._clustered_cross import CrossTiles, clustered_cross
from whisper_triton.kernels._linear_call import LinearCall
from whisper_triton.kernels._linear_tiles import MANY_OUTPUTS, Tiles
from whisper_triton.kernels._paced import ROWS, has_paced_copies, why_given_up
from whisper_triton.kernels._paced_append import PacedTiles as PacedAppendTiles
from whisper_triton.kernels._paced_attention import AttentionTiles as PacedTiles
from whisper_triton.kernels._paced_stream import StreamTiles
from whisper_triton.kernels.append_attention import Tiles as AppendTiles
from whisper_triton.kernels.decode_attention import Tiles as AttentionTiles
from whisper_triton.kernels.skinny_linear import LayerNorm, skinny_linear

import whisper_triton
from whisper_triton.decoder import DecoderStep
from whisper_triton.kernels import _clustered_cross, _paced_attention

append = sys.modules["whisper_triton.kernels.append_attention"]
decode = sys.modules["whisper_triton.kernels.decode_attention"]
skinny = sys.modules["whisper_triton.kernels.skinny_linear"]

LINEAR = ("q/k/v", "out", "cross query", "fc1", "fc2", "LM head")
LINKS = (*LINEAR, "append", "cross", "paced cross", "stream", "clustered cross")
CLUSTERS = ("clustered cross",)
LATE = 420  # a position late in a cache: `late_ms` is told beside the time at POSITION, which alone chooses
Link = tuple[object, ...]
chosen: dict[Link, object] = {}


def name_of(link: Link) -> str:
    """One of LINKS; several cuts of a linear layer, of prompts for instance, have the same."""
    if link[0] != "linear":
        return str(link[0])
    _, N, K, parts, has_norm, _ = link
    if N != K:
        return "LM head" if N > MANY_OUTPUTS else "fc1" if N > K else "fc2"
    return "q/k/v" if parts == 3 else "cross query" if has_norm else "out"


def overridable(module: object, key: Callable[..., Link], name: str = "choose_tiles") -> None:
    """Makes the function of a module that chooses tiles ask `chosen` first, by the link that `key` makes of its arguments."""
    stock = getattr(module, name)

    def choose(*args: object) -> object:
        return chosen.setdefault(key(*args), stock(*args))

    setattr(module, name, choose)


def step_ms(model: WhisperForConditionalGeneration, B: int, position: int = POSITION) -> float:
    step = DecoderStep(model, B, model.config.max_source_positions)
    step.cache.is_updated.update(dict.fromkeys(step.cache.is_updated, True))
    step(model, torch.full((B, 1), 1000, device="cuda"))
    if reason := why_given_up(model.device):
        raise SystemExit(f"from here on the plain kernels would be measured: {reason}")
    step.cache.get_seq_length().fill_(position - 10)
    return time_graph(step.graph, 1, replays=20)[0] / 1000


def linear_candidates(B: int, N: int, K: int, has_norm: bool, has_copies: bool) -> list[Tiles]:
    tiles = []
    if B == 1:  # rows of weights a warp, warps a program
        cuts = ((1, 2, 4), (2, 4, 8)) if K <= 2048 else ((1, 2), (1, 2, 4, 8))
        cuts = ((2, 4), (4, 8, 16)) if N > MANY_OUTPUTS else cuts
        tiles += [Tiles(rows * warps, 1, warps) for rows, warps in itertools.product(*cuts)]
        if has_copies and N <= MANY_OUTPUTS:
            paced = itertools.product((1, 2, 4), (4, 8), (1, 2, 4, 8))
            tiles += [Tiles(rows * warps, 1, warps, PACE=pace) for rows, warps, pace in paced if pace <= K // 256]
    else:
        splits = (1, 2, 4, 5) if K > 2048 and not has_norm else (1,)
        cuts = [*itertools.product((16, 32, 64), splits, (4, 8))]
        tiles += [Tiles(n, k, w, True) for n, k, w in cuts]
        if has_copies:
            paced = itertools.product(cuts, (1, 2, 3, 4, 8))
            tiles += [Tiles(n, k, w, True, pace) for (n, k, w), pace in paced if pace <= K // k // 256]
    if has_copies and N > MANY_OUTPUTS and B <= 32 and K % 256 == 0:
        many = itertools.product((16, 32), (4, 8), (1, 2, 3, 4))
        tiles += [Tiles(n, 1, w, True, K // 256, programs) for n, w, programs in many]
    return tiles


def candidates(link: Link, B: int) -> list[object]:
    if link[0] == "append":
        tiles = [AppendTiles(keys, warps, 2) for keys, warps in ((128, 4), (64, 4), (64, 2), (32, 2), (32, 1), (128, 8))]
        if has_paced_copies(torch.device("cuda", 0), torch.float16):
            cuts = itertools.product((32, 64, 128), (2, 4, 8), (1, 2, 4))
            tiles += [PacedAppendTiles(*cut) for cut in cuts if cut[0] // cut[1] <= 32 and cut[0] * cut[2] <= 256]
        return tiles
    if link[0] == "clustered cross":
        return [None, *(CrossTiles(*cut) for cut in itertools.product((4, 8), (1, 2, 3, 4, 5, 6, 8)))]
    if link[0] == "stream":
        cuts = ((2, 4, 4), (2, 8, 8), (4, 4, 8), (4, 8, 4), (4, 16, 4), (8, 4, 2))  # warps, rows of each, programs
        return [None, *(StreamTiles(*cut[:2], pace, cut[2]) for cut in cuts for pace in (2, 3, 4, 6, 8))]
    if link[0] == "paced cross":
        cuts = itertools.product((64, 96, 128, 160, 192, 256), (2, 4, 8), (1, 2, 3, 4))
        return [PacedTiles(*cut) for cut in cuts if cut[0] % (ROWS * cut[1]) == 0]
    if link[0] == "cross":
        cuts = [
            (256, 6, 8),
            (128, 12, 4),
            (128, 12, 8),
            (64, 24, 4),
            (64, 24, 2),
            (64, 8, 4),
            (128, 6, 8),
            (128, 4, 8),
            (64, 6, 4),
        ]
        if B > 1:
            cuts += [
                (32, 6, 1),
                (64, 6, 2),
                (32, 4, 2),
                (128, 1, 4),
                (128, 2, 4),
                (128, 3, 4),
                (64, 3, 2),
                (64, 1, 4),
                (64, 2, 2),
            ]
        return [AttentionTiles(keys, splits, warps, 2) for keys, splits, warps in cuts]
    return linear_candidates(B, *link[1:3], *link[4:])


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float16, device="cuda")


def compile_link(task: tuple[str, int, Link, object]) -> None:
    """Compiles what `task` launches, as whisper_triton/fused.py would: Triton keeps it on the disk."""
    name, B, link, tiles = task
    if link[0] == "linear":
        return compile_linear(B, link, tiles)
    C, H = SHAPES[name].d_model, SHAPES[name].heads
    with suppress(Exception):  # the measurement meets it again
        if link[0] == "append":
            states, cache = empty(B, 1, 3, H, C // H), empty(B, H, 448, C // H)
            position = torch.tensor(0, device="cuda")
            tensors = *states.unbind(2), cache, cache.clone(), position, empty(B, 1, H, C // H)
            append._launch(*tensors, 1.0, True, None, tiles)
        elif tiles is not None:
            cache, vector = empty(B, H, 1500, C // H), empty(C)
            call = LinearCall(empty(B, C), [empty(C, C)], [vector], vector, vector, 1e-5, 0.125, False, None)
            clustered_cross(call, cache, cache, 1.0, None, tiles)


def compile_linear(B: int, link: Link, tiles: Tiles) -> None:
    _, N, K, parts, has_norm, _ = link
    is_head = N > MANY_OUTPUTS
    biases = (None,) if is_head else (empty(N), None, empty(N)) if parts == 3 else (empty(N),)
    with suppress(Exception):  # the measurement meets it again
        skinny_linear(
            empty(B, K),
            tuple(empty(N, K) for _ in range(parts)),
            biases,
            layer_norm=LayerNorm(empty(K), empty(K), 1e-5) if has_norm else None,
            scale=0.125 if has_norm and N == K else 1.0,
            gelu=has_norm and N == 4 * K,
            residual=None if has_norm else empty(B, N),
            tiles=tiles,
        )


def told(tiles: tuple[object, ...] | None) -> str:
    return "none" if tiles is None else str(tuple(tiles))


def tune(model: WhisperForConditionalGeneration, name: str, B: int, names: list[str]) -> list[dict[str, object]]:
    chosen.clear()
    if CLUSTERS[0] not in names:
        chosen[CLUSTERS] = None
    best, rows, done = step_ms(model, B), [], set()
    print(f"{name} batch {B}: {best:.4f} ms at the start, {step_ms(model, B, LATE):.4f} at {LATE}", flush=True)
    while links := [link for link in chosen if name_of(link) in names and link not in done]:
        link = CLUSTERS if CLUSTERS in links else links[0]
        done.add(link)
        known, kept, seen = list(chosen), chosen[link], []
        for tiles in candidates(link, B):
            chosen[link] = tiles
            try:
                ms = step_ms(model, B)
                late_ms = step_ms(model, B, LATE) if link[0] == "append" else None
            except Exception as error:  # a tile that does not fit is not a candidate
                print(f"  {link} {told(tiles)}: {type(error).__name__}", flush=True)
                continue
            seen.append((ms, f"{told(tiles)}{'' if late_ms is None else f' {late_ms:.4f}'}"))
            rows.append({"model": name, "B": B, "link": list(link), "tiles": told(tiles), "step_ms": ms, "late_ms": late_ms})
            if ms < 0.998 * best:
                best, kept = ms, tiles
        chosen[link] = kept
        if kept is not None:  # what was launched without it only
            for other in set(chosen).difference(known):
                del chosen[other]
        nearest = ", ".join(f"{ms:.4f} {tiles}" for ms, tiles in sorted(seen)[:6])
        print(f"  {best:.4f} ms with {link} as {told(kept)}; {nearest}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="large-v3", help=f"of {', '.join(SHAPES)}; several separated by commas")
    parser.add_argument("--batch", type=numbers, default="1", help="batch sizes, separated by commas")
    parser.add_argument("--links", default=",".join(LINKS), help="separated by commas; all by default")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "rows" / "tune_step.jsonl")
    args = parse(parser)
    links = args.links.split(",")
    if unknown := set(links).difference(LINKS):
        parser.error(f"--links takes {', '.join(LINKS)}, got {', '.join(sorted(unknown))}")
    tasks, has_copies = [], has_paced_copies(torch.device("cuda", 0), torch.float16)
    for name in args.model.split(","):
        C, vocabulary = SHAPES[name][0], SHAPES[name][5]
        shapes = [(C, C, 3, True), (C, C, 1, False), (C, C, 1, True), (4 * C, C, 1, True), (C, 4 * C, 1, False)]
        linear = [("linear", *shape, has_copies) for shape in (*shapes, (vocabulary, C, 1, True))]
        for B, link in itertools.product(args.batch, [*linear, ("append",), ("clustered cross",)]):
            tasks += [(name, B, link, tiles) for tiles in candidates(link, B) if name_of(link) in links]
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count())) as pool:
        pool.map(compile_link, tasks, chunksize=2)
    overridable(skinny, lambda B, *rest: ("linear", *rest))
    overridable(append, lambda *args: ("append",))
    overridable(decode, lambda *args: ("cross",))
    overridable(_paced_attention, lambda *args: ("paced cross",), "choose_attention_tiles")
    overridable(decode, lambda *args: ("stream",), "choose_stream_tiles")
    overridable(_clustered_cross, lambda *args: ("clustered cross",), "choose_cross_tiles")
    rows = []
    for name in args.model.split(","):
        model = whisper_triton.accelerate(build_model(name))
        for B in args.batch:
            rows += tune(model, name, B, links)
        del model
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
