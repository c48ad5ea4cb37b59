"""What a decoder step gains from clusters of programs (kernels/_cluster.py), each link judged by the time of the whole step.

    python benchmarks/tune_clusters.py --model large-v3,medium --batch 1,8

For one row self-attention with its q/k/v projection and cross-attention with its query's, each in one launch, alone and
together; for more rows cross-attention, whose states are joined within a cluster, with the projection and without, and the
linear layers, whose K the programs of a cluster share, one link after the other on top of the best before. Each kernel is
checked against a float64 run before it is timed, and what does not run is told and left out. Each model and batch size has a
process of its own, and the best is timed once more beside the chain as it is. What comes out is for whisper_triton/fused.py and
skinny_linear.py to choose.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from transformers import WhisperForConditionalGeneration
from whisper_triton.benchmarks.decoder_step import POSITION, prepare, time_step
from whisper_triton.benchmarks.harness import Row, parse, write_rows
from whisper_triton.benchmarks.models import SHAPES, build_model, check
from whisper_triton.kernels._cluster import ClusterTiles
from whisper_triton.kernels._clustered_cross import Projection, clustered_cross
from whisper_triton.kernels._clustered_rows import RowTiles, clustered_rows
from whisper_triton.kernels._clustered_self import clustered_self
from whisper_triton.kernels._linear_call import LinearCall
from whisper_triton.kernels.decode_attention import LOG2E
from whisper_triton.kernels.skinny_linear import skinny_linear

import whisper_triton
from whisper_triton import fused
from whisper_triton.fused import FusedDecoder
from whisper_triton.kernels import _clustered_cross, _clustered_rows, _clustered_self

LONG = 420  # a position late in a cache


class Choice(NamedTuple):
    """The tiles of each link by clusters; without any, the chain as it is."""

    own: ClusterTiles | None = None
    cross: ClusterTiles | None = None
    projects: bool = True  # cross-attention its query
    rows: tuple[tuple[str, RowTiles], ...] = ()  # of linear layers of several rows, by link

    def kernels(self) -> tuple[object, ...]:
        """What of it may change a result: not how copies are paced."""
        own, cross = (tiles and tiles.num_warps for tiles in (self.own, self.cross))
        return own, cross, self.projects, tuple((link, *tiles[:-1]) for link, tiles in self.rows)


def link_of(weights: tuple[torch.Tensor, ...], has_norm: bool) -> str:
    """Which link of a layer a call of `skinny_linear` is."""
    N, K = weights[0].shape
    if N != K:
        return "LM head" if N > 16384 else "fc1" if N > K else "fc2"
    return "q/k/v" if len(weights) == 3 else "cross query" if has_norm else "out"


@contextmanager
def clustered(choice: Choice, B: int) -> Iterator[None]:
    """The chain with these links by clusters, for whoever captures a step of B rows within the block."""
    stock_own, stock_cross, rows = FusedDecoder._self_attention, FusedDecoder._cross_attention, dict(choice.rows)

    def self_attention(
        self: FusedDecoder, x: torch.Tensor, layer: object, cache: object, position: torch.Tensor, T: int, ended: object
    ) -> torch.Tensor:
        if choice.own is None or x.shape[0] > 1:
            return stock_own(self, x, layer, cache, position, T, ended)
        module = layer.module.self_attn
        parts = module.q_proj, module.k_proj, module.v_proj
        weights, biases = [part.weight for part in parts], [part.bias for part in parts]
        caches = cache.keys, cache.values
        out = clustered_self(x, weights, biases, *layer.self_norm, module.scaling, *caches, position, LOG2E, choice.own)
        return linear(out.view(x.shape), (module.out_proj.weight,), (module.out_proj.bias,), residual=x)

    def cross_attention(
        self: FusedDecoder, x: torch.Tensor, layer: object, cache: object, T: int, ended: torch.Tensor | None
    ) -> torch.Tensor:
        if choice.cross is None or T > 1:
            return stock_cross(self, x, layer, cache, T, ended)
        module = layer.module.encoder_attn
        if choice.projects:
            projection = Projection(module.q_proj.weight, module.q_proj.bias, *layer.cross_norm, module.scaling)
            out = clustered_cross(x, projection, cache.keys, cache.values, LOG2E, ended, choice.cross)
            return linear(out.view(x.shape), (module.out_proj.weight,), (module.out_proj.bias,), residual=x)

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **others: object) -> torch.Tensor:
            return clustered_cross(query, None, keys, values, LOG2E, ended, choice.cross)

        with mock.patch.object(fused, "decode_attention", attend):
            return stock_cross(self, x, layer, cache, T, ended)

    def linear(
        x: torch.Tensor, weights: tuple[torch.Tensor, ...], biases: tuple[torch.Tensor | None, ...], **around: object
    ) -> torch.Tensor:
        norm = around.get("layer_norm")
        tiles = rows.get(link_of(weights, norm is not None)) if x.shape[0] == B else None  # a prompt has more
        if tiles is None:
            return skinny_linear(x, weights, biases, **around)
        others = around.get("scale", 1.0), around.get("gelu", False), around.get("residual")
        call = LinearCall(x, list(weights), list(biases), *(norm or (None, None, 0.0)), *others)
        return clustered_rows(call, tiles)

    with (
        mock.patch.object(fused, "skinny_linear", linear),
        mock.patch.object(FusedDecoder, "_self_attention", self_attention),
        mock.patch.object(FusedDecoder, "_cross_attention", cross_attention),
    ):
        yield


LINEAR = ("fc2", "cross query", "q/k/v", "fc1", "out", "LM head")


def candidates(B: int, K: int) -> Iterator[list[Choice]]:
    """What is tried, group by group; within one, tiles of the same links."""
    if B == 1:
        tiles = [ClusterTiles(*cut) for cut in itertools.product((4, 8), (2, 4, 6))]
        yield [Choice(cross=cut) for cut in tiles]
        yield [Choice(own=cut) for cut in tiles]
        yield [Choice(*cuts) for cuts in itertools.product(tiles, tiles) if cuts[0].PACE == 2 and cuts[1].PACE in (2, 4)]
        return
    tiles = [ClusterTiles(*cut) for cut in itertools.product((4, 8), (2, 4))]
    yield [Choice(cross=cut, projects=projects) for projects in (False, True) if not projects or B <= 4 for cut in tiles]
    for link in LINEAR:
        cuts = [
            RowTiles(*cut) for cut in ((32, 4, 4, 2), (64, 4, 4, 2), (16, 4, 4, 5), (32, 2, 4, 2), (32, 2, 4, 5), (64, 2, 4, 2))
        ]
        yield [Choice(rows=((link, cut),)) for cut in cuts if cut.block_k(4 * K if link == "fc2" else K)]


def compile_links(task: tuple[str, int, Choice]) -> None:
    """Builds what a choice launches, in a process of its own: Triton keeps it on the disk. What fails is met again."""
    name, B, choice = task
    C, H = SHAPES[name].d_model, SHAPES[name].heads

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.float16, device="cuda")

    with suppress(Exception), ExitStack() as stack:
        for module in (_clustered_cross, _clustered_rows, _clustered_self):
            stack.enter_context(mock.patch.object(module, "launch_clusters", build))
        x, square, vector = empty(B, C), empty(C, C), empty(C)
        norm = vector, vector, 1e-5
        own, cross = empty(1, H, 448, C // H), empty(B, H, 1500, C // H)
        if choice.cross is not None:
            projection = Projection(square, vector, *norm, 0.125) if choice.projects else None
            query = x if choice.projects else x.view(B, 1, H, C // H)
            clustered_cross(query, projection, cross, cross, LOG2E, None, choice.cross)
        if choice.own is not None:
            position = torch.zeros((), dtype=torch.int64, device="cuda")
            biases = [vector, None, vector]
            clustered_self(x, [square] * 3, biases, *norm, 0.125, own, own, position, LOG2E, choice.own)
        for link, tiles in choice.rows:
            N, K = {"fc1": (4 * C, C), "fc2": (C, 4 * C), "LM head": (SHAPES[name].vocabulary, C)}.get(link, (C, C))
            weights, biases = [empty(N, K)], [None if link == "LM head" else empty(N)]
            if link == "q/k/v":
                weights, biases = weights * 3, [vector, None, vector]
            has_norm, scale = link not in ("fc2", "out"), 0.125 if link in ("q/k/v", "cross query") else 1.0
            around = *(norm if has_norm else (None, None, 0.0)), scale, link == "fc1", None if has_norm else empty(B, N)
            clustered_rows(LinearCall(empty(B, K), weights, biases, *around), tiles)


def build(
    kernel: object, grid: tuple[int, ...], exchanged: int, num_warps: int, num_ctas: int, is_alone: bool, **arguments: object
) -> None:
    """In place of `launch_clusters`: without the launch."""
    sizes = {"NUM_WARPS": num_warps, "NUM_CTAS": num_ctas, "num_warps": num_warps, "num_ctas": num_ctas}
    kernel.warmup(grid=grid, **arguments, **sizes, launch_pdl=True)


class Tuner:
    """The times of one model's step of B rows, as they are measured."""

    def __init__(self, name: str, model: WhisperForConditionalGeneration, B: int) -> None:
        self.name, self.model, self.B = name, model, B
        self.rows: list[Row] = []
        self.errors: dict[object, tuple[float, float]] = {}

    def time(self, choice: Choice) -> float:
        with clustered(choice, self.B):
            kernels = choice.kernels()
            if kernels not in self.errors:
                self.errors[kernels] = check(self.model, self.B)
            with whisper_triton.accelerated(self.model):
                step = prepare(self.model, self.B)
                ms, long_ms = (time_step(self.model, step, place)[0] for place in (POSITION, LONG))
        self.rows.append({"model": self.name, "B": self.B, **choice._asdict(), "ms": ms, "long_ms": long_ms})
        ours, stock = self.errors[kernels]
        print(f"{self.name} {self.B}: {ms:.4f} {long_ms:.4f} ms, {choice}; error {ours:.1e} ({stock:.1e})", flush=True)
        return ms

    def tune(self) -> None:
        best, kept = self.time(Choice()), Choice()
        for group in candidates(self.B, self.model.config.d_model):
            start = kept
            for choice in group:
                if self.B > 1 and choice.rows:
                    choice = start._replace(rows=start.rows + choice.rows)
                try:
                    ms = self.time(choice)
                except (ValueError, RuntimeError, SystemExit) as error:  # it is no candidate; a fault of the GPU's ends all
                    torch.cuda.synchronize()
                    print(f"{self.name} {self.B}: {choice}: {type(error).__name__}: {error!s:.200}", flush=True)
                    continue
                if ms < 0.998 * best:
                    best, kept = ms, choice
        pairs = [(self.time(Choice()), self.time(kept)) for _ in range(3)]
        print(f"{self.name} {self.B}: as it is and best, three times: {pairs}, {kept}", flush=True)


def tune_in_a_process(name: str, B: int, output: Path) -> None:
    tuner = Tuner(name, build_model(name), B)
    try:
        tuner.tune()
    finally:
        write_rows(output.with_suffix(f".{name}.{B}.jsonl"), tuner.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="large-v3", help=f"of {', '.join(SHAPES)}; several separated by commas")
    parser.add_argument("--batch", default="1,8", help="batch sizes, separated by commas")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "rows" / "tune_clusters.jsonl")
    args = parse(parser)
    names, batches = args.model.split(","), [int(B) for B in args.batch.split(",")]
    tasks = [
        (name, B, choice)
        for name, B in itertools.product(names, batches)
        for group in candidates(B, SHAPES[name].d_model)
        for choice in group
    ]
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count())) as pool:
        pool.map(compile_links, tasks, chunksize=2)
    for name, B in itertools.product(names, batches):
        process = multiprocessing.get_context("spawn").Process(target=tune_in_a_process, args=(name, B, args.output))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
