"""Cross keys and values of all layers: our one launch against cuBLAS's two products a layer, with and without the copies.

    python benchmarks/project_cross_kv.py
    python benchmarks/project_cross_kv.py --tune

By default the shapes of large-v3: 32 layers, 20 heads of 64, 1500 frames. Milliseconds a window in a CUDA graph; a window
touches more than the L2 holds. `layers_ms` is F.linear twice and `update_kv_cache` a layer, `compiled_ms` F.linear and a copy
into the cache under torch.compile, `cublas_ms` the F.linear alone, whose results are not where attention reads them. `--tune`
times tiles instead, for `choose_tiles` of the kernel's file.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from whisper_triton.benchmarks.harness import Place, Row, check, measure, print_table
from whisper_triton.benchmarks.models import Shape, shapes_on
from whisper_triton.benchmarks.tasks import measure_named, parser_for

from whisper_triton.kernels import CrossTable, cross_table, project_cross_kv, update_kv_cache

project = sys.modules["whisper_triton.kernels.project_cross_kv"]


def inputs(place: Place, shape: Shape, B: int) -> tuple[torch.Tensor, CrossTable]:
    C, L, size = shape.d_model, shape.decoder_layers, (B, shape.heads, shape.frames, shape.head_dim)
    weights = [[place.randn(C, C, scale=C**-0.5) for _ in range(L)] for _ in range(2)]
    biases = [place.randn(C) for _ in range(L)]
    caches = [[torch.full(size, torch.nan, device=place.device, dtype=place.dtype) for _ in range(L)] for _ in range(2)]
    return place.randn(B, shape.frames, C), cross_table(*weights, biases, *caches)


def check_layers(name: str, call: Callable[[], object], states: torch.Tensor, table: CrossTable) -> None:
    """Refuses a call that leaves keys or values of the first or last layer further from float64 than twice PyTorch's."""
    for cache in (*table.key_caches, *table.value_caches):
        cache.fill_(torch.nan)
    call()
    for i in (0, len(table.key_weights) - 1):
        for part, weight, bias, cache in (
            ("keys", table.key_weights[i], None, table.key_caches[i]),
            ("values", table.value_weights[i], table.value_biases[i], table.value_caches[i]),
        ):
            exact = F.linear(states[-1:].double(), weight.double(), None if bias is None else bias.double())
            result = cache[-1:].transpose(1, 2).reshape(exact.shape)
            check(f"{name}: {part} of layer {i}", result, exact, F.linear(states[-1:], weight, bias))


def linear(states: torch.Tensor, table: CrossTable, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    return F.linear(states, table.key_weights[i]), F.linear(states, table.value_weights[i], table.value_biases[i])


def layer_by_layer(states: torch.Tensor, table: CrossTable, position: torch.Tensor) -> None:
    _, H, _, D = table.key_caches[0].shape
    for i in range(len(table.key_weights)):
        key, value = (x.view(*states.shape[:2], H, D) for x in linear(states, table, i))
        update_kv_cache(key, value, table.key_caches[i], table.value_caches[i], position)


def copied(states: torch.Tensor, table: CrossTable) -> None:
    """The same in what PyTorch has of its own."""
    _, H, _, D = table.key_caches[0].shape
    for i, caches in enumerate(zip(table.key_caches, table.value_caches, strict=True)):
        for x, cache in zip(linear(states, table, i), caches, strict=True):
            cache.copy_(x.view(*states.shape[:2], H, D).transpose(1, 2))


def cublas(states: torch.Tensor, table: CrossTable) -> None:
    for i in range(len(table.key_weights)):
        linear(states, table, i)


def bench(place: Place, shape: Shape, B: int) -> list[Row]:
    states, table = inputs(place, shape, B)
    position = torch.tensor(0, device=place.device)
    calls = {
        "ours": partial(project_cross_kv, states, table),
        "layers": partial(layer_by_layer, states, table, position),
        "compiled": partial(place.compile(copied), states, table),
    }
    for name, call in calls.items():
        check_layers(f"project_cross_kv, {name}", call, states, table)
    calls["cublas"] = partial(cublas, states, table)  # whose products are those of `layers`
    times = {name: place.measure([call]) for name, call in calls.items()}
    row: Row = {"benchmark": "project_cross_kv", "B": B}
    for name, (median, spread) in times.items():
        row |= {f"{name}_ms": median / 1000, f"{'' if name == 'ours' else name + '_'}spread_ms": spread / 1000}
    tera = 4 * shape.decoder_layers * B * shape.frames * shape.d_model**2 / 1e12
    row |= {f"{name}_TFLOP/s": 1000 * tera / row[f"{name}_ms"] for name in ("ours", "cublas")}
    return [row | {"layers/ours": row["layers_ms"] / row["ours_ms"]}]


def tune(place: Place, shape: Shape, B: int) -> list[Row]:
    """The time of every tile that fits, the fastest first; prints the first few."""
    states, table = inputs(place, shape, B)
    dtype = place.dtype
    if dtype == torch.float32:
        shapes = itertools.product((64, 128), (64, 128), (16, 32), (8,), (4, 8), (3,))
    else:
        shapes = itertools.product((64, 128, 256), (128, 256), (32, 64), (8, 16), (4, 8), (3, 4))
    rows = []
    for tiles in itertools.starmap(project.Tiles, shapes):
        stage = (tiles.BLOCK_M + tiles.BLOCK_N) * tiles.BLOCK_K * dtype.itemsize
        registers = tiles.BLOCK_M * tiles.BLOCK_N // (32 * tiles.num_warps)  # of the sums alone, a thread
        if not (16 if dtype == torch.float32 else 64) <= registers <= 128 or stage * tiles.num_stages > 227 << 10:
            continue
        try:
            call = partial(project._launch, states, *table, tiles=tiles)
            check_layers("project_cross_kv", call, states, table)
            ms = measure([call], replays=10)[0] / 1000
        except Exception as error:  # a tile that does not fit is not a candidate
            print(f"  {tuple(tiles)}: {type(error).__name__}", flush=True)
            continue
        rows.append({"benchmark": "tune_project_cross_kv", "B": B, "tiles": str(tuple(tiles)), "ms": ms})
    rows.sort(key=lambda row: row["ms"])
    print_table(rows[:12])
    return rows


def main() -> None:
    parser = parser_for(__doc__, "large-v3", "1,2,4,8")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--tune", action="store_true", help="time tiles instead")
    args = parser.parse_args()
    if args.tune and args.device == "cpu":
        parser.error("--tune needs a GPU: without one there are no tiles to time")
    name, chosen = ("tune_project_cross_kv", tune) if args.tune else ("project_cross_kv", bench)
    measure_named(args, name, {name: chosen}, shapes_on, dtype=getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
