"""Runs the kernels in Gluon without a GPU, their PTX in the emulator of ptx.py, and prints a JSON line a case.

Each goes through its launcher, on small CPU tensors, against the float64 reference, with the suite's bound: twice the error of
PyTorch in the same dtype. Unused slots and results nobody wrote are NaN. The last cases damage the PTX, which must be noticed.
A script, because nothing is compiled where `TRITON_INTERPRET=1` is set, as the suite does:

    TRITON_CACHE_DIR=/tmp/emulated PYTHONPATH=. python tests/run_emulated.py [words of which a case's name has one]
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from attention_cases import Shape, poisoned_allocations, random_caches, random_states, relative_error, sdpa, storage, twin
from ptx import emulate
from ptx_memory import Fault
from test_cross_attention import check_clusters
from test_skinny_linear import double, make
from whisper_triton.kernels._clustered_attention import clustered_attention
from whisper_triton.kernels._clustered_cross import CrossTiles
from whisper_triton.kernels._linear_tiles import Tiles as LinearTiles
from whisper_triton.kernels._paced_append import PacedTiles
from whisper_triton.kernels._paced_attention import paced_attention
from whisper_triton.kernels._paced_stream import StreamTiles, paced_stream

from whisper_triton.kernels import _cluster

append, decode, linear, update = (
    importlib.import_module(f"whisper_triton.kernels.{name}")
    for name in ("append_attention", "decode_attention", "skinny_linear", "update_kv_cache")
)

CPU = torch.device("cpu")
SCALE = 0.2  # of attention's scores: no power of two
Judged = tuple[float, float]  # an error and its bound
Case = tuple[str, Callable[[], Judged]]


def judge(result: torch.Tensor, exact: torch.Tensor, pytorch: torch.Tensor) -> Judged:
    yardstick = max(relative_error(pytorch, exact), relative_error(exact.to(result.dtype), exact))
    return relative_error(result, exact), 2 * yardstick


def run_linear(B: int, K: int, N: int, tiles: LinearTiles, parts: int, dtype: torch.dtype, link: str) -> Judged:
    """`link`: what surrounds the product, as in a layer of Whisper's decoder."""
    x, weights, biases, norm, residual = make(B, K, N, parts, dtype, CPU)
    around = {
        "norm, scale": {"layer_norm": norm, "scale": 0.125},
        "norm, gelu": {"layer_norm": norm, "gelu": True},
        "residual": {"residual": residual},
        "norm, no bias": {"layer_norm": norm},
        "scale": {"scale": 0.125},
        "no bias": {"scale": 0.125},
    }[link]
    biases = (None,) * parts if "no bias" in link else biases
    exact = linear.skinny_linear_reference(
        double(x), double(weights), double(biases), **{name: double(value) for name, value in around.items()}
    )
    # As test_skinny_linear.py has it: PyTorch's own layers, each result rounded.
    y = torch.nn.functional.layer_norm(x, (K,), norm.weight, norm.bias, norm.eps) if "layer_norm" in around else x
    outs = [torch.nn.functional.linear(y, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    outs[0] = outs[0] * around.get("scale", 1.0)
    stock = torch.cat(outs, -1)
    stock = torch.nn.functional.gelu(stock) if "gelu" in around else stock
    stock = stock + residual if "residual" in around else stock
    with poisoned_allocations():
        out = linear._launch(
            x, list(weights), list(biases), *around.get("layer_norm", (None, None, 0.0)), around.get("scale", 1.0),
            around.get("gelu", False), around.get("residual"), [int(number) for number in tiles],
        )  # fmt: skip
    return judge(out, exact, stock)


def run_attention(
    B: int, H: int, D: int, S: int, dtype: torch.dtype, has_ended: bool, attend: Callable[..., torch.Tensor] = paced_attention
) -> Judged:
    """With `has_ended` every second sequence has, and its keys and values are NaN."""
    shape = Shape(B=B, T=1, H=H, D=D, S=S, length=S)
    (query,), caches = random_states(shape, dtype, CPU, 1), random_caches(shape, dtype, CPU, [S] * B)
    counters, ended = torch.zeros(B * H, dtype=torch.int32), torch.arange(B) % 2 if has_ended else None
    exact = decode.decode_attention_reference(query.double(), *(c.double() for c in caches), scale=SCALE, ended=ended)
    stock = sdpa(query, *caches, [S] * B, scale=SCALE)
    if has_ended:
        stock[ended != 0] = 0
        for cache in caches:
            cache[ended != 0] = torch.nan
    with poisoned_allocations():
        out = attend(query, *caches, SCALE * decode.LOG2E, counters, ended)
    if counters.any():
        raise Fault(f"counters are {counters.tolist()} afterwards")
    return judge(out, exact, stock)


def by_stream(tiles: StreamTiles) -> Callable[..., torch.Tensor]:
    """By programs that go on."""
    return functools.partial(paced_stream, tiles=tiles)


def by_clusters(read_ahead: bool) -> Callable[..., torch.Tensor]:
    def attend(
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        qk_scale: float,
        counters: torch.Tensor,
        ended: torch.Tensor | None,
    ) -> torch.Tensor:
        return clustered_attention(query, key_cache, value_cache, qk_scale, ended, read_ahead)

    return attend


def run_equal_rows(B: int, H: int, S: int, tiles: StreamTiles) -> Judged:
    """How many elements of equal sequences' results differ: these are rounding alone, as each key is there twice, with opposite
    values.
    """
    shape = Shape(B=1, T=1, H=H, D=64, S=S // 2, length=S // 2)
    (query,), caches = random_states(shape, torch.float16, CPU, 1), random_caches(shape, torch.float16, CPU, [S // 2])
    keys, values = (cache.repeat(1, 1, 2, 1) for cache in caches)
    values[:, :, S // 2 :] *= -1
    tensors = (tensor.expand(B, *tensor.shape[1:]).contiguous() for tensor in (query, keys, 1e3 * values))
    out = paced_stream(*tensors, SCALE * decode.LOG2E, torch.zeros(B * H, dtype=torch.int32), None, tiles)
    if not out.any():
        raise Fault("nothing is rounded")
    return float((out != out[:1]).sum()), 0.0


def run_append(
    tiles: PacedTiles,
    positions: list[int],
    D: int,
    dtype: torch.dtype,
    read_ahead: bool,
    ended: list[int] | None = None,
) -> Judged:
    """A sequence a position, each over 2 heads and 160 slots; what has ended has NaN in the slots before its position."""
    B, H, S = len(positions), 2, 160
    shape = Shape(B=B, T=1, H=H, D=D, S=S, length=S)
    query, key, value = random_states(shape, dtype, CPU, 3)
    caches = random_caches(shape, dtype, CPU, [min(max(position, 0), S) for position in positions])
    place = torch.tensor(positions if B > 1 else positions[0])
    flags = None if ended is None else torch.tensor(ended, dtype=torch.int32)
    wanted = [twin(cache) for cache in caches]
    update.update_kv_cache_reference(key, value, *wanted, place)
    lengths = [position + 1 for position in positions]
    rows = [b for b in range(B) if 0 < lengths[b] <= S]  # of which a result has a meaning
    tensors = [tensor[rows] for tensor in (query, *wanted)]
    exact = sdpa(*(tensor.double() for tensor in tensors), [lengths[b] for b in rows], scale=SCALE) if rows else None
    stock = sdpa(*tensors, [lengths[b] for b in rows], scale=SCALE) if rows else None
    for i, b in enumerate(rows):
        if ended is not None and ended[b]:  # it sees its new token alone
            exact[i], stock[i] = value[b], value[b]
            for cache in (*caches, *wanted):
                cache[b, :, : positions[b]] = torch.nan
    with poisoned_allocations():
        out = query.new_empty(query.shape)
    append._launch(query, key, value, *caches, place, out, SCALE, read_ahead, flags, tiles)
    for cache, expected in zip(caches, wanted, strict=True):
        if changed := int((storage(cache) != storage(expected)).sum()):
            raise Fault(f"{changed} elements of a cache are not as the reference leaves them")
    return judge(out[rows], exact, stock) if rows else (0.0, 0.0)


def linear_cases() -> Iterator[Case]:
    half, brain = torch.float16, torch.bfloat16
    for K, N, numbers, parts, dtype, link in (
        (512, 48, (8, 1, 4, False, 2), 3, half, "norm, scale"),
        (512, 48, (8, 1, 4, False, 2), 3, half, "scale"),
        (512, 48, (16, 1, 4, False, 2), 1, half, "norm, gelu"),
        (1280, 16, (4, 1, 2, False, 8), 1, half, "residual"),
        (384, 16, (8, 1, 2, False, 1), 1, half, "norm, no bias"),
        (64, 16, (8, 1, 8, False, 9), 1, half, "residual"),
        (512, 48, (8, 1, 4, False, 2), 3, brain, "norm, scale"),
    ):
        tiles = LinearTiles(*numbers)
        run = functools.partial(run_linear, 1, K, N, tiles, parts, dtype, link)
        yield f"linear {K=} {N=} {parts=} {link} {tuple(tiles)} {dtype}", run
    for B in (2, 8, 9, 17):
        # Rows of weights that do not fill their tiles, and some that do. 17 rows: two programs share them.
        for K, N, numbers, parts, dtype, link in (
            (512, 51, (16, 1, 4, True, 2), 3, half, "norm, scale"),
            (256, 70, (64, 1, 8, True, 1), 1, half, "norm, gelu"),
            (1024, 48, (32, 1, 4, True, 3), 1, half, "residual"),
            (1024, 48, (32, 4, 4, True, 2), 1, half, "residual"),
            *([(512, 51, (16, 1, 16, True, 2), 3, brain, "norm, scale")] if B == 9 else []),
        ):
            tiles = LinearTiles(*numbers)
            run = functools.partial(run_linear, B, K, N, tiles, parts, dtype, link)
            yield f"rows {B=} {K=} {N=} {parts=} {link} {tuple(tiles)} {dtype}", run
    for B, K, N, numbers, dtype in (
        (1, 512, 100, (16, 1, 4), half),
        (8, 512, 100, (16, 1, 4), half),
        (9, 256, 161, (32, 1, 8), brain),
        (17, 1280, 100, (16, 1, 4), half),
    ):
        tiles = LinearTiles(*numbers, USE_DOT=True, PACE=2, PROGRAMS=1)
        for link in ("norm, no bias", "no bias"):
            run = functools.partial(run_linear, B, K, N, tiles, 1, dtype, link)
            yield f"rows in many tiles {B=} {K=} {N=} {link} {tuple(tiles)} {dtype}", run
    tiles = LinearTiles(16, 1, 4, True, 2)
    yield "rows of two programs B=35", functools.partial(run_linear, 35, 256, 20, tiles, 1, half, "norm, gelu")


def attention_cases() -> Iterator[Case]:
    for B, H, D, S, dtype, has_ended in (
        (1, 2, 64, 1500, torch.float16, False),
        (1, 1, 64, 513, torch.float16, False),
        (1, 1, 32, 513, torch.float16, False),
        (2, 1, 64, 1500, torch.float16, True),
        (2, 2, 32, 513, torch.float16, True),
        (2, 1, 64, 513, torch.bfloat16, False),
    ):
        run = functools.partial(run_attention, B, H, D, S, dtype, has_ended)
        yield f"attention {B=} {H=} {D=} {S=} {has_ended=} {dtype}", run
    for (
        B,
        H,
        D,
        S,
        dtype,
        has_ended,
        tiles,
    ) in (  # on three multiprocessors, one of whose programs may have part of a head or many
        (1, 2, 64, 1500, torch.float16, False, StreamTiles(4, 16, 2, 4)),
        (1, 1, 64, 513, torch.float16, False, StreamTiles(2, 8, 6, 8)),
        (9, 2, 64, 513, torch.bfloat16, True, StreamTiles(4, 8, 3, 1)),
        (3, 2, 64, 600, torch.float16, True, StreamTiles(4, 4, 2, 2)),
        (2, 2, 32, 700, torch.float16, False, StreamTiles(2, 16, 4, 1)),
        (1, 1, 128, 530, torch.float16, False, StreamTiles(4, 8, 2, 40)),
    ):
        run = functools.partial(run_attention, B, H, D, S, dtype, has_ended, by_stream(tiles))
        yield f"stream {B=} {H=} {D=} {S=} {has_ended=} {tuple(tiles)} {dtype}", run
    for B, H, D, S, dtype, has_ended, read_ahead in (
        (1, 2, 64, 1500, torch.float16, False, True),
        (2, 1, 64, 1499, torch.bfloat16, True, False),
        (3, 1, 32, 513, torch.float16, True, True),
        (1, 2, 128, 600, torch.float16, False, False),
    ):
        run = functools.partial(run_attention, B, H, D, S, dtype, has_ended, by_clusters(read_ahead))
        yield f"attention by clusters {B=} {H=} {D=} {S=} {has_ended=} {read_ahead=} {dtype}", run
    yield "stream of equal rows", functools.partial(run_equal_rows, 5, 3, 600, StreamTiles(2, 8, 3, 4))


def append_cases() -> Iterator[Case]:
    half, inside, paced = torch.float16, [0, 1, 63, 64, 130], PacedTiles(32, 4, 3)
    for (tiles, D, dtype), read_ahead in itertools.product(
        (
            (PacedTiles(16, 2, 1), 64, half),
            (paced, 64, half),
            (PacedTiles(64, 4, 2), 32, half),
            (paced, 32, half),
            (paced, 64, torch.bfloat16),
        ),
        (True, False),
    ):
        if read_ahead or (D == 64 and dtype == half):
            run = functools.partial(run_append, tiles, inside, D, dtype, read_ahead)
            yield f"append {tiles} {D=} {read_ahead=} {dtype}", run
    for ended in ([0, 1, 0, 1, 1], [0] * 5):
        yield f"append {ended=}", functools.partial(run_append, paced, inside, 64, half, True, ended)
    for position in inside:
        yield f"append one {position=}", functools.partial(run_append, PacedTiles(32, 4, 4), [position], 64, half, True)
    outside = [-1, -4, 160, 161, 2**32 + 3, 2**62, -(2**62), 159]
    yield f"append {outside=}", functools.partial(run_append, paced, outside, 64, half, True)


def cross_cases() -> Iterator[Case]:
    half, brain, four, eight = torch.float16, torch.bfloat16, CrossTiles(4, 4), CrossTiles(8, 1)
    for arguments in (
        (1, 2, 1500, 256, half, four),
        (1, 2, 1499, 1280, half, eight),
        (1, 8, 1, 512, brain, four),
        (2, 2, 300, 256, half, eight),
        (3, 1, 513, 256, brain, four),
    ):
        yield f"cross {' '.join(map(str, arguments))}", judged(check_clusters, *arguments)
    for D in (32, 128):
        yield f"cross {D=} swapped", judged(check_clusters, 1, 2, 500, 256, half, four, D=D, layout="swapped")
    yield "cross memory refused", run_refused


def run_refused() -> Judged:
    """0 where clusters say so that the driver does not give them their shared memory."""
    with mock.patch.object(_cluster, "set_attribute", return_value=1):
        try:
            check_clusters(1, 1, 100, 256, torch.float16, CrossTiles(4, 4), CPU)
        except RuntimeError as error:
            return float("cannot have its" not in str(error)), 0.0
    return 1.0, 0.0


def judged(check: Callable[..., None], *arguments: object, **others: object) -> Callable[[], Judged]:
    """A check that raises what is wrong, as those that return an error and its bound."""

    def run() -> Judged:
        try:
            check(*arguments, CPU, **others)
        except AssertionError as error:
            raise Fault(str(error)) from error
        return 0.0, 0.0

    return run


def replaced(pattern: str, by: str, ptx: str) -> str:
    """`ptx` with the first match replaced.

    Raises:
        ValueError: there is none.
    """
    ptx, count = re.subn(pattern, by, ptx, count=1)
    if not count:
        raise ValueError(f"no {pattern}")
    return ptx


def run_damaged(pattern: str, by: str, run: Callable[[], Judged]) -> Judged:
    """0 where `run` notices that the first `pattern` in the PTX is replaced, 1 where it does not."""
    with emulate(functools.partial(replaced, pattern, by)):
        try:
            error, bound = run()
        except Fault:
            return 0.0, 0.0
    return float(error <= bound), 0.0


def damaged_cases() -> Iterator[Case]:
    one_row = functools.partial(run_linear, 1, 512, 48, LinearTiles(8, 1, 4, PACE=2), 3, torch.float16, "scale")
    tiles = LinearTiles(16, 1, 4, True, 1, PROGRAMS=1)
    in_tiles = functools.partial(run_linear, 2, 512, 100, tiles, 1, torch.float16, "no bias")
    streamed = functools.partial(run_attention, 1, 2, 64, 600, torch.float16, False, by_stream(StreamTiles(4, 8, 3, 1)))
    appended = functools.partial(run_append, PacedTiles(32, 4, 3), [130], 64, torch.float16, True)
    crossed = judged(check_clusters, 1, 1, 100, 256, torch.float16, CrossTiles(4, 4))
    for name, pattern, by, run in (
        ("source offset", r"(cp\.async\.cg[^,]*, \[ %rd\d+ \+ )0", r"\g<1>16", one_row),
        ("target offset", r"(cp\.async\.cg\S* \[ %r\d+ \+ )0", r"\g<1>16", one_row),
        ("far offset", r"(cp\.async\.cg[^,]*, \[ %rd\d+ \+ )0", r"\g<1>1048576", one_row),
        ("too weak a wait", r"cp\.async\.wait_group\s+0", "cp.async.wait_group 1", one_row),
        ("too weak a wait in a loop", r"cp\.async\.wait_group\s+2", "cp.async.wait_group 3", appended),
        ("too weak a wait between pieces", r"cp\.async\.wait_group\s+2", "cp.async.wait_group 3", streamed),
        ("too many bytes expected", r"(expect_tx[^;]*, )256;", r"\g<1>260;", crossed),
        ("too few bytes expected", r"(expect_tx[^;]*, )256;", r"\g<1>252;", crossed),
        ("no wait for what is sent", r"mbarrier\.try_wait[^;]*;", "setp.eq.u32 p, 0, 0;", crossed),
        ("sent to another program", r"(mapa\.shared::cluster\.u32 a, %r\d+, )0;", r"\g<1>1;", crossed),
        ("too weak a wait between tiles", r"cp\.async\.wait_group\s+1(?=[^0-9])", "cp.async.wait_group 2", in_tiles),
        ("not all have begun", r"barrier\.cluster\.wait\.aligned;", "", crossed),
        ("another lane", r"(shfl\.sync\.bfly\.b32[^,]*,[^,]*, )16", r"\g<1>8", one_row),
    ):
        yield f"damaged: {name}", functools.partial(run_damaged, pattern, by, run)


def report(name: str, run: Callable[[], Judged]) -> bool:
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        error, bound = run()
    except Exception as failure:
        error, bound = f"{type(failure).__name__}: {failure}", None
    ok = bound is not None and error <= bound
    seconds = round(time.perf_counter() - start, 2)
    print(json.dumps({"name": name, "error": error, "bound": bound, "ok": ok, "seconds": seconds}), flush=True)
    return ok


def main() -> None:
    torch.set_num_threads(1)
    words = sys.argv[1:] or [""]
    results = []
    # Those that fill a place again which has just been read.
    again = [case for case in (*linear_cases(), *attention_cases()) if case[0].startswith(("stream", "rows in many tiles"))]
    early = [("copies at once: " + name, run) for name, run in (*append_cases(), *again)]
    for options, cases in (
        ({}, [*linear_cases(), *attention_cases(), *append_cases(), *cross_cases()]),
        ({"early": True}, early),
        (None, [*damaged_cases()]),
    ):
        chosen = [case for case in cases if any(word in case[0] for word in words)]
        if options is None:
            results += [report(*case) for case in chosen]
        else:
            with emulate(**options):
                results += [report(*case) for case in chosen]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
