"""What a decoder step gains from attention by clusters of programs (kernels/_cluster.py), each by the time of the whole step.

    python benchmarks/tune_clusters.py --model large-v3,turbo,medium --batch 1,8

For one row self-attention with its q/k/v projection and cross-attention with its query's, each in one launch, alone and
together; for more rows cross-attention, whose states are joined within a cluster, with the projection and without, and fc2,
whose sums are. Each is checked against a float64 run before it is timed. What comes out is for whisper_triton/fused.py to
choose.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from whisper_triton.benchmarks.decoder_step import POSITION, prepare, time_step
from whisper_triton.benchmarks.harness import parse, write_rows
from whisper_triton.benchmarks.models import SHAPES, build_model, check
from whisper_triton.kernels._cluster import ClusterTiles
from whisper_triton.kernels._clustered_cross import Projection, clustered_cross
from whisper_triton.kernels._clustered_rows import RowTiles, clustered_rows
from whisper_triton.kernels._clustered_self import clustered_self
from whisper_triton.kernels.decode_attention import LOG2E
from whisper_triton.kernels.skinny_linear import skinny_linear

import whisper_triton
from whisper_triton import fused
from whisper_triton.fused import FusedDecoder

LONG = 420  # a position late in a cache


class Choice(NamedTuple):
    """The tiles of each link by clusters; None: the link as it is."""

    own: ClusterTiles | None = None
    cross: ClusterTiles | None = None
    projects: bool = True  # cross-attention its query
    fc2: RowTiles | None = None


@contextmanager
def clustered(own: ClusterTiles | None, cross: ClusterTiles | None, projects: bool, fc2: RowTiles | None) -> Iterator[None]:
    """The chain with these links by clusters, for whoever captures it within the block."""
    stock_own, stock_cross = FusedDecoder._self_attention, FusedDecoder._cross_attention

    def self_attention(
        self: FusedDecoder, x: torch.Tensor, layer: object, cache: object, position: torch.Tensor, T: int, ended: object
    ) -> torch.Tensor:
        if own is None or x.shape[0] > 1:
            return stock_own(self, x, layer, cache, position, T, ended)
        module = layer.module.self_attn
        parts = module.q_proj, module.k_proj, module.v_proj
        weights, biases = [part.weight for part in parts], [part.bias for part in parts]
        caches = cache.keys, cache.values
        out = clustered_self(x, weights, biases, *layer.self_norm, module.scaling, *caches, position, LOG2E, own)
        return skinny_linear(out.view(x.shape), (module.out_proj.weight,), (module.out_proj.bias,), residual=x)

    def cross_attention(
        self: FusedDecoder, x: torch.Tensor, layer: object, cache: object, T: int, ended: torch.Tensor | None
    ) -> torch.Tensor:
        if cross is None or T > 1:
            return stock_cross(self, x, layer, cache, T, ended)
        module = layer.module.encoder_attn
        if projects:
            projection = Projection(module.q_proj.weight, module.q_proj.bias, *layer.cross_norm, module.scaling)
            out = clustered_cross(x, projection, cache.keys, cache.values, LOG2E, ended, cross)
            return skinny_linear(out.view(x.shape), (module.out_proj.weight,), (module.out_proj.bias,), residual=x)

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **others: object) -> torch.Tensor:
            return clustered_cross(query, None, keys, values, LOG2E, ended, cross)

        with mock.patch.object(fused, "decode_attention", attend):
            return stock_cross(self, x, layer, cache, T, ended)

    def linear(
        x: torch.Tensor, weights: tuple[torch.Tensor, ...], biases: tuple[torch.Tensor, ...], **around: object
    ) -> torch.Tensor:
        N, K = weights[0].shape
        if fc2 is None or K < 4 * N or not 1 < x.shape[0] <= 32:
            return skinny_linear(x, weights, biases, **around)
        return clustered_rows(x, weights[0], biases[0], around["residual"], fc2)

    with (
        mock.patch.object(fused, "skinny_linear", linear),
        mock.patch.object(FusedDecoder, "_self_attention", self_attention),
        mock.patch.object(FusedDecoder, "_cross_attention", cross_attention),
    ):
        yield


def candidates(B: int) -> Iterator[Choice]:
    yield Choice()
    tiles = [ClusterTiles(*cut) for cut in itertools.product((4, 8), (1, 2, 4, 6))]
    yield from (Choice(cross=cut, projects=projects) for projects in (True, False) for cut in tiles if projects or B > 1)
    if B == 1:
        yield from (Choice(own=cut) for cut in tiles)
        yield from (Choice(*cuts) for cuts in itertools.product(tiles, tiles) if cuts[0].PACE == 2 and cuts[1].PACE in (2, 4))
    else:
        rows = [RowTiles(*cut) for cut in itertools.product((16, 32), (4, 8), (1, 2, 4))]
        yield from (Choice(fc2=cut) for cut in rows)
        yield from (Choice(None, cut, False, row) for cut, row in itertools.product(tiles, rows) if cut.PACE == 2 == row.PACE)
    yield Choice()  # again: how much a capture differs from another


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="large-v3", help=f"of {', '.join(SHAPES)}; several separated by commas")
    parser.add_argument("--batch", default="1,8", help="batch sizes, separated by commas")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "rows" / "tune_clusters.jsonl")
    args = parse(parser)
    rows = []
    for name in args.model.split(","):
        model = build_model(name)
        for B in map(int, args.batch.split(",")):
            errors: dict[object, tuple[float, float]] = {}  # paces change no result
            for choice in candidates(B):
                kernels = tuple(tiles[:-1] if isinstance(tiles, tuple) else tiles for tiles in choice)
                with clustered(*choice):
                    errors[kernels] = errors.get(kernels) or check(model, B)
                    with whisper_triton.accelerated(model):
                        step = prepare(model, B)
                        short, long = (time_step(model, step, place)[0] for place in (POSITION, LONG))
                rows.append({"model": name, "B": B, **choice._asdict(), "ms": short, "long_ms": long})
                ours, stock = errors[kernels]
                print(f"{name} {B}: {short:.4f} {long:.4f} ms, {choice}; error {ours:.1e} ({stock:.1e})", flush=True)
        del model
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
