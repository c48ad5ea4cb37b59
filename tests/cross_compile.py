"""Builds the kernels for every GPU that they claim to run on, without a GPU, and prints what became of each as JSON.

`test_cross_compile.py` runs this as a script, because nothing is compiled where `TRITON_INTERPRET=1` is set. The
launchers are called as always, on CPU tensors, under a driver that names a target and launches nothing. So tiles,
constants and what Triton itself makes of the arguments (equal to 1, divisible by 16) are those of a real launch.

The tests build a selection. Every call for every target, after a change of tiles (some minutes):

    TRITON_CACHE_DIR=/tmp/cross PYTHONPATH=. python tests/cross_compile.py all > builds.json

With `prompts` nothing is built: it prints what would be, by the number of a prompt's tokens.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from whisper_triton.kernels._clustered_cross import CrossTiles
from whisper_triton.kernels._cross_table import cross_table
from whisper_triton.kernels._linear_call import LinearCall
from whisper_triton.kernels._linear_tiles import choose_tiles

from whisper_triton.kernels import _attend, _cluster, _dispatch, _paced, _paced_rows, _paced_stream

update, decode, append, cross, linear, embed, project, norm, gelu, select = (
    importlib.import_module(f"whisper_triton.kernels.{name}")
    for name in (
        "update_kv_cache",
        "decode_attention",
        "append_attention",
        "cross_attention",
        "skinny_linear",
        "embed_tokens",
        "project_cross_kv",
        "add_layer_norm",
        "bias_gelu",
        "select_token",
    )
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (64, 32, 80, 96, 128)


class Call(NamedTuple):
    """A launch, and what the selection and the tests need to know of it."""

    name: str
    launch: Callable[[], object]
    read_ahead: bool = False
    is_heavy: bool = False  # holds the most in registers, of the calls of this dtype and head dim
    is_odd: bool = False  # no stride and no address is a multiple of 16 bytes


class CompileOnly:
    """A driver of Triton's: `target` is the GPU at hand, and launching does nothing."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return [*TARGETS].index(self.target)  # a kernel keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, src: object, metadata: object) -> Callable[..., None]:
        return lambda *arguments: None

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": sys.maxsize}

    def load_binary(self, *arguments: object) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, sys.maxsize


def attention_calls(dtype: torch.dtype, D: int) -> Iterator[Call]:
    """Every tile that is chosen for few or many sequences, and arguments that Triton specialises: 1, odd strides."""
    position, positions = torch.tensor(0), torch.zeros(64, dtype=torch.int32)

    def states(B: int, T: int, H: int) -> torch.Tensor:
        return torch.empty(B, T, 3, H, D, dtype=dtype)[:, :, 1]

    def caches(B: int, H: int, S: int) -> list[torch.Tensor]:
        # `empty` commits no memory: only addresses and strides are looked at.
        return [torch.empty(B, H, S, D, dtype=dtype) for _ in range(2)]

    def odd(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty(*tensor.shape[:-1], D + 3)[..., 1 : D + 1]

    def call(op: str, sizes: str, launch: Callable[[], object], **kwargs: bool) -> Call:
        ahead = " ahead" if kwargs.get("read_ahead") else ""
        return Call(f"{op} {sizes} D={D} {str(dtype).removeprefix('torch.')}{ahead}", launch, **kwargs)

    def decode_call(B: int, T: int, H: int, S: int, length: torch.Tensor | None = None, **kwargs: bool) -> Call:
        tensors, ahead = (states(B, T, H), *caches(B, H, S)), kwargs.get("read_ahead", False)
        launch = partial(decode._launch, *tensors, length, 1.0, length is not None, ahead)
        return call("decode", f"{B=} {T=} {H=} {S=}", launch, **kwargs)

    def append_call(B: int, T: int, H: int, S: int, place: torch.Tensor = position, **kwargs: bool) -> Call:
        tensors, ahead = [states(B, T, H) for _ in range(3)] + caches(B, H, S), kwargs.get("read_ahead", False)
        launch = partial(append._launch, *tensors, place, torch.empty(B, T, H, D, dtype=dtype), 1.0, ahead)
        return call("append", f"{B=} {T=} {H=} {S=}", launch, **kwargs)

    for T in (1, 4):
        tiles_of = {}
        for B in range(1, 65):
            tiles = decode.choose_tiles(B, T, 20, 1500, D, dtype.itemsize)
            tiles_of.setdefault((tiles.BLOCK_S, tiles.num_warps, tiles.NUM_SPLITS > 1), B)
        heaviest = max(tiles_of, key=lambda tiles: tiles[0] / tiles[1])
        for tiles, B in tiles_of.items():
            yield decode_call(B, T, 20, 1500, read_ahead=B % 2 == 1, is_heavy=tiles == heaviest)
        yield decode_call(1, T, 20, 448, position)
        yield decode_call(1, T, 1, 1500, positions[0])
        yield append_call(1, T, 20, 448, is_heavy=True)
        yield append_call(1, T, 20, 448, read_ahead=True)
        yield append_call(64, T, 20, 448, positions)
        yield append_call(1, T, 1, 1)
        yield call("append", f"ended {T=}", partial(append_call(8, T, 20, 448).launch, ended=positions[:8].long()))
        ended = {"counters": torch.zeros(160, dtype=torch.int32), "ended": positions[:8].long()}
        launch = partial(decode_call(8, T, 20, 1500, read_ahead=True).launch, **ended)
        yield call("decode", f"ended {T=}", launch, read_ahead=True)
        tensors = [odd(tensor) for tensor in (*(states(3, T, 6) for _ in range(3)), *caches(3, 6, 447))]
        out = torch.empty(3, T, 6, D, dtype=dtype)
        launch = partial(append._launch, *tensors, positions[1:4], out, 1.0, False)
        yield call("append", f"odd {T=}", launch, is_odd=True)
        query, *odd_caches = (odd(tensor) for tensor in (states(3, T, 6), *caches(3, 6, 1499)))
        launch = partial(decode._launch, query, *odd_caches, positions[1:4], 1.0, True, False)
        yield call("decode", f"odd {T=}", launch, is_odd=True)
    for B, T, H in ((1, 1, 20), (8, 4, 6), (1, 1500, 1)):
        tensors = states(B, T, H), states(B, T, H), *caches(B, H, 1500)
        yield call("update", f"{B=} {T=} {H=}", partial(update._launch, *tensors, positions[:B]))
    tensors = [odd(tensor) for tensor in (states(3, 4, 6), states(3, 4, 6), *caches(3, 6, 447))]
    yield call("update", "odd", partial(update._launch, *tensors, position), is_odd=True)


def linear_calls(B: int, has_copies: bool = False, C: int = 1280) -> Iterator[Call]:
    """The embedding and linear layers of a step of B rows, as whisper_triton/fused.py launches them, fp16, of a decoder of C
    columns (large-v3's by default).
    """

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.float16)

    def linear_call(link: str, x: object, N: int, K: int, parts: int = 1, bias: bool = True, **around: object) -> Call:
        weights, biases = [tensor(N, K) for _ in range(parts)], [tensor(N) if bias else None] * parts
        norm = around.get("layer_norm", (None, None, 0.0))
        tiles = [int(number) for number in choose_tiles(B, N, K, parts, "layer_norm" in around, has_copies)]
        others = around.get("scale", 1.0), around.get("gelu", False), around.get("residual")
        launch = partial(linear._launch, x, weights, biases, *norm, *others, tiles)
        return Call(f"linear {link} {B=} {has_copies=} {C=}", launch, read_ahead=True)  # of the weights, which no kernel writes

    norm = linear.LayerNorm(tensor(C), tensor(C), 1e-5)
    x, residual = tensor(B, C), tensor(B, C)
    yield linear_call("q/k/v", x, C, C, parts=3, layer_norm=norm, scale=0.125)
    yield linear_call("out", x, C, C, residual=residual)
    yield linear_call("cross query", x, C, C, layer_norm=norm, scale=0.125)
    yield linear_call("fc1", x, 4 * C, C, layer_norm=norm, gelu=True)
    yield linear_call("fc2", tensor(B, 4 * C), C, 4 * C, residual=residual)
    yield linear_call("logits", x, 51866, C, bias=False, layer_norm=norm)
    for T in (1, 4):
        ids = torch.zeros(B, T, dtype=torch.int64)
        embeddings = tensor(51866, C), tensor(448, C)
        yield Call(f"embed {B=} {T=}", partial(embed._launch, ids, *embeddings, torch.tensor(0)))


def project_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Every tile that is chosen, and a call in which nothing is a multiple of 16 bytes or of a tile."""

    def project_call(name: str, H: int, D: int, C: int, odd: int = 0, **kwargs: bool) -> Call:
        states = torch.empty(2, 1500, C + odd, dtype=dtype)[..., odd:]
        L = 1 if odd else 2
        weights = [torch.empty(H * D * C + odd, dtype=dtype)[odd:].view(H * D, C) for _ in range(L)]
        caches = [[torch.empty(2, H, 1500, D + odd, dtype=dtype)[..., odd:] for _ in range(L)] for _ in range(2)]
        biases = [torch.empty(H * D + odd, dtype=dtype)[odd:] for _ in range(L)]
        table = cross_table(weights, weights, biases, *caches)
        return Call(f"project {name} {str(dtype).removeprefix('torch.')}", partial(project._launch, states, *table), **kwargs)

    yield project_call("large-v3", 20, 64, 1280, is_heavy=True)
    yield project_call("tiny", 6, 64, 384)
    yield project_call("odd", 5, 80, 403, odd=1, is_odd=True)


def encoder_calls() -> Iterator[Call]:
    """What stands between the matrix products of the encoder: widths of tiny and large-v3, and an odd one."""
    for C, R, dtype in (
        (384, 1, torch.float16),
        (1280, 1500, torch.float16),
        (1280, 1500, torch.float32),
        (99, 3, torch.float16),
    ):
        x, residual, vector = (torch.empty(*shape, dtype=dtype) for shape in ((3000, C), (R, C), (C,)))
        sizes, is_odd = f"{C=} {R=} {str(dtype).removeprefix('torch.')}", C % 8 != 0
        yield Call(f"norm {sizes}", partial(norm._launch, x, residual, vector, vector, 1e-5, 64504.0), is_odd=is_odd)
        yield Call(f"gelu {sizes}", partial(gelu._launch, x, vector), is_odd=is_odd)


def select_calls() -> Iterator[Call]:
    """The choice of the next token over Whisper's vocabulary, and over one that fits one program."""
    for B, V, dtype in ((1, 51866, torch.float16), (8, 51865, torch.bfloat16), (3, 1000, torch.float32)):
        *integers, host_ends = [torch.zeros(B, dtype=torch.int64) for _ in range(5)]
        ids, next_ids = torch.zeros(B, 448, dtype=torch.int64), torch.zeros(B, 1, dtype=torch.int64)
        limits = torch.zeros(len(select.TokenLimits._fields), dtype=torch.int64)
        rules = select.TokenRules(torch.zeros(V, dtype=torch.uint8), limits, torch.tensor(0.0))
        state = select.TokenState(ids, torch.zeros(B, 448), *integers, next_ids, host_ends)
        for top_k in (False, True):
            launch = partial(select._launch, torch.empty(B, V, dtype=dtype), rules, state, top_k, select.BLOCK_V)
            yield Call(f"select {B=} {V=} {top_k=}", launch, is_heavy=True)


def resources(files: dict[str, str], gpu: GPUTarget) -> dict[str, int]:
    """Registers and spilled bytes a thread, from what the assembler wrote."""
    by_kind = {Path(name).suffix: path for name, path in files.items()}
    if gpu.backend == "hip":
        text = Path(by_kind[".amdgcn"]).read_text()
        numbers = {
            name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1])
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        }
        spilled = max(4 * numbers["vgpr_spill_count"], numbers["private_segment_fixed_size"])
        return {"registers": numbers["vgpr_count"], "spilled": spilled}
    usage = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", by_kind[".cubin"]], capture_output=True, text=True, check=True
    ).stdout
    numbers = {name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {"registers": numbers["REG"], "spilled": numbers["STACK"] + numbers["LOCAL"]}


def before_wait(files: dict[str, str]) -> list[str] | None:
    """The global loads and stores above `griddepcontrol.wait`; None where nothing is waited for."""
    ptx = next((Path(path).read_text() for path in files.values() if path.endswith(".ptx")), "")
    start, wait, _ = ptx.partition("griddepcontrol.wait")
    return re.findall(r"\b(?:ld\.global|st\.global|cp\.async\.c[ag])", start) if wait else None


def build(task: tuple[str, int]) -> list[dict[str, object]]:
    """All that the call with this number compiles for the target and no call of this process did before."""
    target, number = task
    gpu, call = TARGETS[target], CALLS[number]
    driver.set_active(CompileOnly(target))
    capability = divmod(gpu.arch, 10) if gpu.backend == "cuda" else (0, 0)
    for module in (_dispatch, _attend, _paced, project):
        module.capability = lambda device: capability
    _paced.set_attribute = _cluster.set_attribute = lambda *arguments: 0  # of nothing that is loaded
    _paced_rows.multiprocessors = _paced_stream.multiprocessors = lambda device: 132
    built: list[dict[str, object]] = []

    def record(*, src, metadata, metadata_group, times, cache_hit) -> None:
        built.append(
            {
                "target": target,
                "call": call.name,
                "kernel": metadata["name"],
                "read_ahead": call.read_ahead,
                "is_odd": call.is_odd,
                "num_warps": metadata["num_warps"],
                "shared": metadata["shared"],
                "before_wait": before_wait(metadata_group),
                **resources(metadata_group, gpu),
            }
        )

    knobs.compilation.listener = record
    try:
        call.launch()
    except Exception:
        built.append({"target": target, "call": call.name, "error": traceback.format_exc()})
    return built


def paced_calls() -> Iterator[Call]:
    """What a step launches of `_paced.py`: of one row, and for each number of rows that a program may have."""
    for B in (1, 8, 16, 32):
        for C in (1280, 1024, 768) if B == 8 else (1280,):
            yield from (call for call in linear_calls(B, has_copies=True, C=C) if call.name.startswith("linear"))
    whispers = [(B, 64, H, can_end) for B, H in ((2, 20), (8, 16), (8, 20), (16, 20)) for can_end in (False, True)]
    for B, D, H, can_end in (*whispers, (1, 128, 12, False), (16, 128, 12, True)):
        query, cache = torch.empty(B, 1, H, D, dtype=torch.float16), torch.empty(B, H, 1500, D, dtype=torch.float16)
        counters, ended = torch.zeros(B * H, dtype=torch.int32), torch.zeros(B, dtype=torch.int64) if can_end else None
        launch = partial(decode._launch, query, cache, cache, None, 1.0, False, True, counters, ended)
        yield Call(f"decode paced {B=} {D=} {H=} {can_end=}", launch, read_ahead=True)
    for B, D, H, ahead in ((1, 64, 20, True), (4, 64, 20, False), (2, 128, 12, True)):
        query, cache = torch.empty(B, 1, H, D, dtype=torch.float16), torch.empty(B, H, 1500, D, dtype=torch.float16)
        ended = torch.zeros(B, dtype=torch.int64) if B > 1 else None
        launch = partial(decode._launch, query, cache, cache, None, 1.0, False, ahead, None, ended)
        yield Call(f"decode clustered {B=} {D=} {H=}", launch, read_ahead=ahead)
    for B, D, ahead, tiles in (
        (1, 64, True, append.PacedTiles(64, 4, 2)),
        (8, 64, False, append.PacedTiles(128, 4, 2)),
        (1, 128, True, append.PacedTiles(32, 2, 4)),
    ):
        states, caches = torch.empty(3, B, 1, 12, D, dtype=torch.float16), torch.empty(2, B, 12, 448, D, dtype=torch.float16)
        position, ended = torch.tensor(0), torch.zeros(B, dtype=torch.int64) if B > 1 else None
        tensors = *states, *caches, position, torch.empty_like(states[0])
        launch = partial(append._launch, *tensors, 1.0, ahead, ended, tiles)
        yield Call(f"append paced {B=} {D=} {tiles=}", launch, read_ahead=ahead)
    for B, H, tiles in ((1, 20, (4, 4)), (1, 16, (4, 4)), (8, 20, (4, 4))):
        C = 64 * H
        x, weight, vector = (torch.empty(*shape, dtype=torch.float16) for shape in ((B, C), (C, C), (C,)))
        cache, ended = torch.empty(B, H, 1500, 64, dtype=torch.float16), torch.zeros(B, dtype=torch.int64) if B > 1 else None
        call = LinearCall(x, [weight], [vector], vector, vector, 1e-5, 0.125, False, None)
        launch = partial(cross.clustered_cross, call, cache, cache, 1.0, ended, CrossTiles(*tiles))
        yield Call(f"cross clustered {B=} {H=} {tiles=}", launch, read_ahead=True)


SEVERAL_ROWS = [*linear_calls(8)]  # on tensor cores
PACED = [*paced_calls()] if _paced.HAS_GLUON else []
SELECT = [*select_calls()]
FIRST = [
    *SEVERAL_ROWS,
    *PACED,
    *linear_calls(1),
    *encoder_calls(),
    *project_calls(DTYPES[0]),
    *SELECT[:2],  # large-v3's vocabulary in fp16, with top-k and without
    *attention_calls(DTYPES[0], HEAD_DIMS[0]),
]
CALLS = [
    *FIRST,
    *(
        call
        for D in HEAD_DIMS
        for dtype in DTYPES
        if (dtype, D) != (DTYPES[0], HEAD_DIMS[0])
        for call in attention_calls(dtype, D)
    ),
    *SELECT[2:],
    *(call for dtype in DTYPES[1:] for call in project_calls(dtype)),
]


def can_run(number: int, target: str) -> bool:
    """Whether the call is ever made on the target: a chain of several rows is not where shared memory is short, paced copies
    are sm_90's.
    """
    if number < len(SEVERAL_ROWS):
        return target in ("sm_80", "sm_90", "sm_100")
    return number >= len(SEVERAL_ROWS) + len(PACED) or target == "sm_90"


def selection() -> Iterator[tuple[str, int]]:
    """The linear layers, the projection, the encoder's kernels, the choice of a token of large-v3 and the calls in fp16 with
    Whisper's head dim for every target, the heavy ones of the rest for one.
    """
    whisper = len(FIRST)
    heavy = [number for number, call in enumerate(CALLS) if number >= whisper and call.is_heavy]
    # Tiles of attention differ by batch and were measured on sm_90: elsewhere a third of them will do, and the heaviest.
    many = [
        number
        for number in range(whisper)
        if CALLS[number].name.startswith(("decode B=", "append")) and not (CALLS[number].is_heavy or CALLS[number].read_ahead)
    ]
    elsewhere = set(range(whisper)) - set(many) | set(many[::3])
    for i, target in enumerate(TARGETS):
        numbers = range(whisper) if target == "sm_90" else sorted(elsewhere)
        yield from ((target, number) for number in numbers if can_run(number, target))
        yield from ((target, number) for number in heavy[i :: len(TARGETS)])


def prompt_calls(B: int, T: int) -> Iterator[Call]:
    """What the chain launches for prompts of T tokens, by paced copies and without, and the attention of a model by name, whose
    self cache is as long as the call asks for.
    """
    yield from (call for has_copies in (False, True) for call in linear_calls(B * T, has_copies))
    states = torch.empty(B, T, 3, 20, 64, dtype=torch.float16)[:, :, 1]
    cross = torch.empty(B, 20, 1500, 64, dtype=torch.float16)
    position, out = torch.tensor(0), torch.empty(B, T, 20, 64, dtype=torch.float16)
    yield Call("cross", partial(decode._launch, states, cross, cross, None, 1.0, False, False))
    yield Call("embed", partial(embed._launch, torch.zeros(B, T, dtype=torch.int64), cross[0, 0], cross[0, 0], position))
    for S in (448, T + 64):
        caches = torch.empty(2, B, 20, S, 64, dtype=torch.float16)
        yield Call("append", partial(append._launch, states, states, states, *caches, position, out, 1.0, S == 448))
        yield Call("self", partial(decode._launch, states, *caches, position, 1.0, True, False))
        yield Call("update", partial(update._launch, states, states, *caches, position))


def prompts(B: int) -> dict[int, list[str]]:
    """For prompts of 2 to 16 tokens, up to 64 rows: every kernel that is built for them, with all that tells builds apart."""
    driver.set_active(CompileOnly("sm_90"))
    for module in (_dispatch, _attend, _paced):
        module.capability = lambda device: (9, 0)
    _paced_rows.multiprocessors = lambda device: 132
    asked: set[str] = set()

    def note(*, key: object, fn: object, **others: object) -> bool:
        asked.add(f"{fn.name} {key}")
        return True  # is not to be built

    knobs.runtime.jit_cache_hook = note
    found = {}
    for T in range(2, min(16, 64 // B) + 1):
        asked.clear()
        for call in prompt_calls(B, T):
            call.launch()
        found[T] = sorted(asked)
    return found


def main() -> None:
    if sys.argv[1:] == ["prompts"]:
        json.dump({B: prompts(B) for B in (1, 8)}, sys.stdout)
        return
    everything = ((target, number) for target in TARGETS for number in range(len(CALLS)) if can_run(number, target))
    tasks = everything if sys.argv[1:] == ["all"] else selection()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        built = [record for records in pool.imap_unordered(build, tasks, chunksize=4) for record in records]
    json.dump(built, sys.stdout)


if __name__ == "__main__":
    main()
