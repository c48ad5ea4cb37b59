"""`decode_attention`: its error, the slots it reads, how it splits them, and what must not matter to a result."""

import importlib

import pytest
import torch
from attention_cases import (
    BAD_ATTENTION,
    BAD_CACHES,
    CALLS,
    CROSS_CALLS,
    DTYPES,
    HEAD_DIMS,
    LARGE_CALLS,
    LARGE_CROSS_CALLS,
    LAYOUTS,
    BadInput,
    GuardedAllocations,
    Shape,
    assert_close_as_pytorch,
    assert_refused,
    bad_positions,
    bits,
    captured,
    dtype_name,
    gpu_factor,
    in_every_dtype,
    lay_out,
    layouts,
    needles,
    needs_gluon,
    on_two_streams,
    poisoned_allocations,
    random_caches,
    random_states,
    sdpa,
    small_dtypes,
    small_shapes,
    storage,
)
from counts import KERNEL_CALLS, count
from hypothesis import given, settings
from hypothesis import strategies as st
from whisper_triton.kernels._checks import MAX_STRIDE, check_caches
from whisper_triton.kernels._clustered_attention import covers_clusters
from whisper_triton.kernels._paced import SHARED_MEMORY
from whisper_triton.kernels._paced_attention import covers_attention
from whisper_triton.kernels._paced_stream import choose_stream_tiles

from whisper_triton.kernels import _attend, _paced, decode_attention, decode_attention_reference

# Not `from whisper_triton.kernels import decode_attention`, which is the function.
module = importlib.import_module("whisper_triton.kernels.decode_attention")

OP = torch.ops.whisper_triton.decode_attention.default
SHAPE = Shape(B=2, T=2, H=3, D=32, S=8, length=8)
SPLIT_SHAPE = Shape(B=2, T=1, H=2, D=32, S=200, length=200)
SCALE = 0.2  # no power of two


def arguments(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """A query, caches that hold `length` keys, and that length as a tensor."""
    (query,) = random_states(shape, dtype, device, 1)
    key_cache, value_cache = random_caches(shape, dtype, device, [shape.length] * shape.B)
    length = torch.tensor(shape.length, device=device)
    return {"query": query, "key_cache": key_cache, "value_cache": value_cache, "kv_length": length}


def assert_right(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_length: torch.Tensor | None,
    *,
    is_causal: bool = True,
    read_ahead: bool = False,
    factor: float = 2,
) -> torch.Tensor:
    """The kernel's result is as near to float64 as SDPA's, lies as `out_proj` reads it, and no input changed."""
    tensors = [tensor for tensor in (query, key_cache, value_cache, kv_length) if tensor is not None]
    before = [storage(tensor) for tensor in tensors]
    with poisoned_allocations():
        out = decode_attention(
            query, key_cache, value_cache, kv_length, scale=SCALE, is_causal=is_causal, read_ahead=read_ahead
        )
    states = query, key_cache, value_cache
    lengths = [key_cache.shape[2]] * len(query) if kv_length is None else kv_length.expand(len(query)).tolist()
    exact = decode_attention_reference(*(t.double() for t in states), kv_length, scale=SCALE, is_causal=is_causal)
    assert_close_as_pytorch(out, exact, sdpa(*states, lengths, scale=SCALE, is_causal=is_causal), factor)
    assert out.is_contiguous()
    for tensor, bits_before in zip(tensors, before, strict=True):
        assert torch.equal(storage(tensor), bits_before)
    return out


# --- right results


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "not-causal"])
@pytest.mark.parametrize("shape", [SHAPE, Shape(3, 16, 2, 80, 70, 65), Shape(1, 1, 2, 64, 9, 1)], ids=str)
def test_the_float64_reference_equals_sdpa(shape: Shape, is_causal: bool, device: torch.device) -> None:
    query, *caches, length = arguments(shape, torch.float64, device).values()
    expected = sdpa(query, *caches, [shape.length] * shape.B, scale=SCALE, is_causal=is_causal)
    result = decode_attention_reference(query, *caches, length, scale=SCALE, is_causal=is_causal)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(("shape", "dtype"), in_every_dtype(*CALLS))
def test_the_error_over_a_self_cache_is_within_twice_that_of_sdpa(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    assert_right(**arguments(shape, dtype, device))


@pytest.mark.parametrize(("shape", "dtype"), in_every_dtype(*CROSS_CALLS))
def test_the_error_over_the_cross_cache_is_within_twice_that_of_sdpa(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    assert_right(**{**arguments(shape, dtype, device), "kv_length": None}, is_causal=False, read_ahead=True)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=dtype_name)
@pytest.mark.parametrize("form", ["one for each", "every second of a vector", "one for all, expanded", "one of a vector"])
def test_every_sequence_may_have_its_own_length(form: str, dtype: torch.dtype, T: int, device: torch.device) -> None:
    shape = Shape(B=3, T=T, H=2, D=64, S=70, length=70)
    lengths = {
        "one for each": torch.tensor([70, 4, 33], dtype=dtype, device=device),
        "every second of a vector": torch.tensor([5, -9, 65, -9, 70], dtype=dtype, device=device)[::2],
        "one for all, expanded": torch.tensor(40, dtype=dtype, device=device).expand(3),
        "one of a vector": torch.tensor([0, 66, 0], dtype=dtype, device=device)[1],
    }[form]
    (query,) = random_states(shape, torch.float32, device, 1)
    assert_right(query, *random_caches(shape, torch.float32, device, lengths.expand(3).tolist()), lengths)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "not-causal"])
@pytest.mark.parametrize("T", [1, 2, 16])
def test_without_a_length_all_slots_are_seen(T: int, is_causal: bool, device: torch.device) -> None:
    shape = Shape(B=2, T=T, H=2, D=64, S=37, length=37)
    assert_right(**{**arguments(shape, torch.float16, device), "kv_length": None}, is_causal=is_causal)


@pytest.mark.parametrize("T", [2, 7, 16])
def test_tokens_that_are_not_causal_all_see_every_key(T: int, device: torch.device) -> None:
    out = assert_right(**arguments(Shape(2, T, 2, 64, 50, 41), torch.float16, device), is_causal=False)
    assert out.isfinite().all()


@pytest.mark.parametrize("T", [1, 4])
def test_a_length_past_the_last_slot_counts_as_all_slots(T: int, device: torch.device) -> None:
    query, *caches, all_slots = arguments(SHAPE._replace(T=T), torch.float32, device).values()
    expected = decode_attention(query, *caches, all_slots, scale=SCALE)
    for length in (SHAPE.S + 1, 10_000, (1 << 31) - 1):
        out = decode_attention(query, *caches, torch.tensor(length, device=device), scale=SCALE)
        assert torch.equal(bits(out), bits(expected)), length


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("length", [0, -1, -100, -(1 << 32) + 5, -(1 << 62)])
def test_a_query_without_any_key_gives_zero(length: int, T: int, splits: int, device: torch.device) -> None:
    shape = SHAPE._replace(T=T, length=0)
    query, *caches, _ = arguments(shape, torch.float16, device).values()
    lengths = torch.tensor([length, 2], device=device)  # and the other sequence's are not disturbed
    for cache in caches:
        cache[1, :, :2] = torch.randn(shape.H, 2, shape.D, dtype=cache.dtype, device=device)
    with poisoned_allocations():
        out = launch(query, *caches, lengths, tiles=module.Tiles(16, splits, 4, 2))
    for result in (out, decode_attention_reference(query, *caches, lengths, scale=SCALE)):
        assert not result[0].any()
        seen = max(0, T - 2)  # tokens of the second sequence that come before its first key
        assert not result[1, :seen].any()
        assert result[1, seen:].all()
        assert result.isfinite().all()


@settings(max_examples=20)
@given(data=st.data(), shape=small_shapes(), is_causal=st.booleans())
def test_a_query_that_looks_for_one_key_returns_its_value_bit_for_bit(
    data: st.DataObject, shape: Shape, is_causal: bool, device: torch.device
) -> None:
    count(KERNEL_CALLS)
    dtype = data.draw(small_dtypes(shape.T), "dtype")
    tiles = module.Tiles(data.draw(st.sampled_from([16, 32]), "keys a tile"), data.draw(st.integers(1, 4), "splits"), 4, 2)
    lengths = data.draw(st.lists(st.integers(shape.T, shape.S), min_size=shape.B, max_size=shape.B), "lengths")
    codes = needles(shape.S, shape.D, dtype, device)
    query = torch.empty(shape.states, dtype=dtype, device=device)
    expected = torch.empty_like(query)
    values = torch.randn(shape.cache, device=device).to(dtype)
    for b, length in enumerate(lengths):
        for t in range(shape.T):
            visible = length - (shape.T - 1 - t if is_causal else 0)
            slot = data.draw(st.integers(0, visible - 1), "slot")
            query[b, t] = 64 * codes[slot]
            expected[b, t] = values[b, :, slot]
    cache_layout = data.draw(layouts, "cache layout")
    key_cache, value_cache = (
        lay_out(torch.full(shape.cache, torch.nan, dtype=dtype, device=device), cache_layout) for _ in range(2)
    )
    for b, length in enumerate(lengths):
        key_cache[b, :, :length] = codes[:length]
        value_cache[b, :, :length] = values[b, :, :length]
    with poisoned_allocations():
        out = module._launch(
            lay_out(query, data.draw(layouts, "query layout")),
            key_cache,
            value_cache,
            torch.tensor(lengths, device=device),
            1.0,
            is_causal,
            False,
            tiles=tiles,
        )
    assert torch.equal(bits(out), bits(expected))


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("query_layout", LAYOUTS)
@pytest.mark.parametrize("cache_layout", LAYOUTS)
def test_any_strides_are_read(query_layout: str, cache_layout: str, T: int, device: torch.device) -> None:
    query, key_cache, value_cache, length = arguments(SHAPE._replace(T=T), torch.float16, device).values()
    value_layout = {"contiguous": "swapped"}.get(cache_layout, "contiguous")  # values differ from keys
    caches = lay_out(key_cache, cache_layout), lay_out(value_cache, value_layout)
    assert_right(lay_out(query, query_layout), *caches, length)


# --- how the keys are split


def launch(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_length: torch.Tensor | None,
    *,
    tiles: module.Tiles,
    is_causal: bool = True,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    return module._launch(query, key_cache, value_cache, kv_length, SCALE, is_causal, False, counters, tiles=tiles)


@pytest.mark.parametrize("length", [1, 65, 200])
@pytest.mark.parametrize("splits", [2, 7, 16])
def test_any_number_of_splits_gives_the_right_result(splits: int, length: int, device: torch.device) -> None:
    # With 16 keys a tile there are programs with no key, with one tile, with several, and with a last one half full.
    for T in (1, 5):
        shape = SPLIT_SHAPE._replace(B=1, T=min(T, length), length=length)
        query, *caches, kv_length = arguments(shape, torch.float16, device).values()
        with poisoned_allocations():
            out = launch(query, *caches, kv_length, tiles=module.Tiles(16, splits, 4, 2))
        exact = decode_attention_reference(query.double(), *(c.double() for c in caches), kv_length, scale=SCALE)
        assert_close_as_pytorch(out, exact, sdpa(query, *caches, [length] * shape.B, scale=SCALE))


@pytest.mark.parametrize(("tile", "splits", "length"), [(16, 7, 200), (32, 7, 200), (64, 4, 200), (16, 5, 3), (256, 1, 200)])
def test_the_last_program_of_a_head_joins_the_splits_as_a_second_launch_would(
    tile: int, splits: int, length: int, device: torch.device
) -> None:
    """Tiles of which a split takes several, one, or none; the counters are left as they were found."""
    call = arguments(SPLIT_SHAPE._replace(length=length), torch.float16, device)
    tiles, counters = module.Tiles(tile, splits, 4, 2), torch.zeros(9, dtype=torch.int32, device=device)
    expected = launch(**call, tiles=tiles)
    with poisoned_allocations():
        for _ in range(2):
            assert torch.equal(bits(launch(**call, tiles=tiles, counters=counters)), bits(expected))
    assert not counters.any()


def test_counters_that_do_not_fit_are_refused(device: torch.device) -> None:
    call = arguments(SPLIT_SHAPE, torch.float16, device)
    enough = torch.zeros(8, dtype=torch.int32, device=device)
    for counters in (enough[:3], enough.float(), enough[::2]):
        with pytest.raises(ValueError, match="counters"):
            decode_attention(**call, scale=SCALE, counters=counters)


@pytest.mark.parametrize("tile", [16, 32, 64, 128])
def test_any_number_of_keys_a_tile_gives_the_right_result(tile: int, device: torch.device) -> None:
    for T in (1, 4):
        query, *caches, kv_length = arguments(SPLIT_SHAPE._replace(T=T, length=150), torch.float32, device).values()
        with poisoned_allocations():
            out = launch(query, *caches, kv_length, tiles=module.Tiles(tile, 2, 4, 2))
        exact = decode_attention_reference(query.double(), *(c.double() for c in caches), kv_length, scale=SCALE)
        assert_close_as_pytorch(out, exact, sdpa(query, *caches, [150] * 2, scale=SCALE))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("D", [64, 80])
@pytest.mark.parametrize("T", [1, 2, 16])
def test_all_of_the_result_is_written_and_nothing_beside_it(T: int, D: int, splits: int, device: torch.device) -> None:
    call = arguments(Shape(2, T, 2, D, 40, 40), torch.float16, device)
    with GuardedAllocations() as guarded:
        launch(**call, tiles=module.Tiles(16, splits, 4, 2))
    guarded.check()


@pytest.mark.parametrize("T", [1, 2, 16])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_tiles_are_powers_of_two_and_every_split_can_have_keys(D: int, itemsize: int, T: int) -> None:
    for B in (1, 2, 3, 8, 32, 64, 1000):
        for H in (1, 6, 20):
            for S in (1, 15, 64, 448, 512, 513, 1500, 4000):
                tiles = module.choose_tiles(B, T, H, S, D, itemsize)
                assert tiles.BLOCK_S >= 16
                assert tiles.BLOCK_S.bit_count() == 1
                assert 1 <= tiles.NUM_SPLITS <= -(-S // tiles.BLOCK_S)
                assert tiles.num_warps in (1, 2, 4, 8)


def test_one_sequence_is_split_and_a_large_batch_or_a_self_cache_is_not() -> None:
    assert module.choose_tiles(1, 1, 20, 1500, 64, 2).NUM_SPLITS > 1
    assert module.choose_tiles(64, 1, 20, 1500, 64, 2).NUM_SPLITS == 1
    for T in (1, 2, 16):
        assert module.choose_tiles(1, T, 20, 448, 64, 2).NUM_SPLITS == 1


def test_a_tile_of_one_query_fits_the_registers_of_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def elements(dtype: torch.dtype, D: int, T: int = 1, odd: int = 0) -> int:
        query, cache = torch.empty(1, T, 2, D, dtype=dtype), torch.empty(1, 2, 40, D + odd, dtype=dtype)[..., :D]
        tile = _attend.fit_registers(128, 4, query, cache, cache)
        return tile["BLOCK_S"] * D // (32 * tile["num_warps"])

    for capability in ((0, 0), (8, 0), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(_attend, "capability", lambda device, found=capability: found)
        assert elements(torch.float16, 64) == (32 if capability == (10, 0) else 64)
        assert elements(torch.bfloat16, 64) == elements(torch.float32, 128) == elements(torch.float16, 128) == 32
        assert elements(torch.float16, 64, odd=1) == elements(torch.float32, 128, odd=1) == 16
        assert elements(torch.bfloat16, 64, T=2) == 64  # a tile for tensor cores is the launcher's choice alone


# --- what must not matter


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("T", [1, 3])
def test_what_lies_in_unused_slots_does_not_matter(T: int, splits: int, device: torch.device) -> None:
    call = arguments(SPLIT_SHAPE._replace(T=T, length=70), torch.float16, device)
    tiles = module.Tiles(32, splits, 4, 2)
    expected = launch(**call, tiles=tiles)
    for filler in (-torch.inf, 60000.0):
        for cache in ("key_cache", "value_cache"):
            call[cache][:, :, 70:] = filler
        assert torch.equal(bits(launch(**call, tiles=tiles)), bits(expected)), filler


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("T", [1, 3])
def test_the_other_sequences_of_a_batch_do_not_matter(T: int, splits: int, device: torch.device) -> None:
    shape = SPLIT_SHAPE._replace(B=3, T=T)
    tiles = module.Tiles(32, splits, 4, 2)
    query, *caches, _ = arguments(shape, torch.float16, device).values()
    lengths = torch.tensor([200, 90, 33], device=device)
    expected = launch(query, *caches, lengths, tiles=tiles)[1:2]
    alone = launch(query[1:2], *(cache[1:2] for cache in caches), lengths[1:2], tiles=tiles)
    assert torch.equal(bits(alone), bits(expected))
    for others in (torch.tensor([3, 90, 200], device=device), torch.tensor([0, 90, 500], device=device)):
        for tensor in (query, *caches):
            tensor[::2] = torch.nan if others[0] == 0 else tensor[::2].flip(0)
        assert torch.equal(bits(launch(query, *caches, others, tiles=tiles)[1:2]), bits(expected))


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("with_length", [False, True])
@pytest.mark.parametrize("T", [1, 3])
def test_of_what_has_ended_nothing_is_read(T: int, with_length: bool, counted: bool, device: torch.device) -> None:
    call = arguments(SPLIT_SHAPE._replace(B=3, T=T), torch.float16, device)
    if not with_length:
        call["kv_length"] = None
    for cache in ("key_cache", "value_cache"):
        call[cache] = call[cache].nan_to_num()  # of unused slots, which are read without a length
    counters = torch.zeros(3 * SPLIT_SHAPE.H, dtype=torch.int32, device=device) if counted else None
    whole = decode_attention(**call, scale=SCALE, is_causal=False, counters=counters)
    for cache in ("key_cache", "value_cache"):
        call[cache][1] = torch.nan
    ended = torch.tensor([0, 7, 0], device=device)
    out = decode_attention(**call, scale=SCALE, is_causal=False, counters=counters, ended=ended)
    assert not out[1].any()
    assert counters is None or not counters.any()
    assert torch.equal(bits(out[::2]), bits(whole[::2]))
    reference = decode_attention_reference(**call, scale=SCALE, is_causal=False, ended=ended)
    assert not reference[1].any()
    assert torch.equal(reference[::2], decode_attention_reference(**call, scale=SCALE, is_causal=False)[::2])


@pytest.mark.parametrize("T", [1, 3])
def test_reading_ahead_does_not_matter(T: int, device: torch.device) -> None:
    call = arguments(SHAPE._replace(T=T), torch.float16, device)
    ahead = decode_attention(**call, scale=SCALE, read_ahead=True)
    assert torch.equal(bits(ahead), bits(decode_attention(**call, scale=SCALE)))
    reference = decode_attention_reference(**call, scale=SCALE, read_ahead=True)
    assert torch.equal(bits(reference), bits(decode_attention_reference(**call, scale=SCALE)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=dtype_name)
def test_the_default_dtype_does_not_matter(dtype: torch.dtype, device: torch.device) -> None:
    call = arguments(SPLIT_SHAPE, torch.float32, device)
    tiles = module.Tiles(32, 4, 4, 2)
    expected = launch(**call, tiles=tiles)
    torch.set_default_dtype(dtype)
    try:
        result = launch(**call, tiles=tiles)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(bits(result), bits(expected))


@pytest.mark.parametrize(("T", "times"), [(1, 2), (3, 2), pytest.param(1, 50, marks=pytest.mark.gpu)])
def test_the_result_is_the_same_in_every_run(T: int, times: int, device: torch.device) -> None:
    call = arguments(Shape(1, T, 6, 64, 600, 600), torch.float16, device)
    first = decode_attention(**call, scale=SCALE)
    for _ in range(times - 1):
        assert torch.equal(bits(decode_attention(**call, scale=SCALE)), bits(first))


# --- as an op of PyTorch


def test_the_op_keeps_the_rules_of_torch_library(device: torch.device) -> None:
    for dtype, T, has_length in ((torch.float16, 1, True), (torch.float32, 2, False)):
        query, *caches, length = arguments(SHAPE._replace(T=T), dtype, device).values()
        counters = torch.zeros(SHAPE.B * SHAPE.H, dtype=torch.int32, device=device) if has_length else None
        ended = None if has_length else torch.zeros(SHAPE.B, dtype=torch.int64, device=device)
        given = (length if has_length else None, SCALE, has_length, not has_length, counters, ended)
        torch.library.opcheck(OP, (query, *caches, *given))


def assert_compiles(device: torch.device, **options: object) -> None:
    """A whole-graph `torch.compile` equals eager bit for bit at every length, and compiles once."""

    def step(query, key_cache, value_cache, kv_length):
        return decode_attention(query, key_cache, value_cache, kv_length, scale=SCALE)

    call = arguments(SHAPE._replace(T=1), torch.float16, device)
    torch._dynamo.reset()  # what another backend compiled of the same code would count as a recompilation
    compiled_step = torch.compile(step, fullgraph=True, **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in range(1, SHAPE.S + 1):
            call["kv_length"].fill_(length)
            assert torch.equal(bits(compiled_step(**call)), bits(step(**call))), length


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    assert_compiles(device, backend="aot_eager")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_with_inductor(mode: str, device: torch.device) -> None:
    assert_compiles(device, mode=mode)


@pytest.mark.parametrize(
    "bad",
    [
        *BAD_CACHES,
        *BAD_ATTENTION,
        *bad_positions("kv_length"),
        BadInput("query in fp16", {"query": torch.Tensor.half}, r"key_cache is torch\.float32 .* expected torch\.float16"),
    ],
    ids=lambda bad: bad.name,
)
def test_bad_input_is_refused(bad: BadInput, device: torch.device) -> None:
    assert_refused(decode_attention, arguments(SHAPE, torch.float32, device), bad, scale=SCALE)


@pytest.mark.parametrize(("slots", "is_refused"), [(1, False), (2, True)])
def test_slots_too_far_apart_are_refused(slots: int, is_refused: bool) -> None:
    cache = torch.empty_strided((1, 1, slots, 32), (1 << 25, 1 << 25, MAX_STRIDE, 1), device="meta")
    states = torch.empty(1, 1, 1, 32, device="meta")
    if is_refused:
        with pytest.raises(ValueError, match=f"less than {MAX_STRIDE} elements apart"):
            check_caches(states, cache, cache)
    else:
        check_caches(states, cache, cache)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), in_every_dtype(*LARGE_CALLS))
def test_the_error_over_a_large_self_cache(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    assert_right(**arguments(shape, dtype, device), factor=gpu_factor(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), in_every_dtype(*LARGE_CROSS_CALLS))
def test_the_error_over_a_large_cross_cache(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    call = {**arguments(shape, dtype, device), "kv_length": None}
    assert_right(**call, is_causal=False, read_ahead=True, factor=gpu_factor(dtype))


@pytest.mark.gpu
def test_a_cache_past_two_to_the_31_elements(device: torch.device) -> None:
    shape = Shape(B=48, T=1, H=20, D=128, S=20000, length=20000)  # element offsets leave 32 bits
    query = torch.randn(shape.states, dtype=torch.float16, device=device)
    caches = torch.randn(2, *shape.cache, dtype=torch.float16, device=device)
    out = decode_attention(query, *caches, scale=SCALE)
    last = slice(shape.B - 1, shape.B)
    expected = decode_attention_reference(query[last].double(), *(c[last].double() for c in caches), scale=SCALE)
    pytorch = sdpa(query[last], *(c[last] for c in caches), [shape.S], scale=SCALE)
    assert_close_as_pytorch(out[last], expected, pytorch, factor=gpu_factor(torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("T", "S"), [(1, 448), (1, 1500), (4, 448), (4, 1500)])
def test_a_captured_graph_follows_the_length_on_the_device(T: int, S: int, dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(B=2, T=T, H=20, D=64, S=S, length=S)
    query, *caches, length = arguments(shape, dtype, device).values()
    graph, out = captured(lambda: decode_attention(query, *caches, length, scale=SCALE))
    for n in (T, 63, 64, 65, 447, S):
        query.copy_(torch.randn(shape.states, dtype=dtype, device=device))
        length.fill_(n)
        graph.replay()
        exact = decode_attention_reference(query.double(), *(c.double() for c in caches), length, scale=SCALE)
        pytorch = sdpa(query, *caches, [n] * shape.B, scale=SCALE)
        assert_close_as_pytorch(out, exact, pytorch, factor=gpu_factor(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(
    ("B", "D", "S"), [(1, 64, 1500), (1, 64, 513), (1, 64, 1536), (1, 128, 700), (4, 64, 1500), (3, 128, 600)]
)
def test_paced_copies(B: int, D: int, S: int, dtype: torch.dtype, device: torch.device) -> None:
    check_paced_copies(B, D, S, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(("B", "D"), [(7, 64), (8, 64), (16, 64), (23, 64), (32, 64), (16, 128), (8, 32)])
@pytest.mark.parametrize("S", [1500, 513, 1536])
def test_programs_go_on_from_piece_to_piece(B: int, D: int, S: int, dtype: torch.dtype, device: torch.device) -> None:
    assert choose_stream_tiles(B * 1280 // D, D) is not None
    check_paced_copies(B, D, S, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(
    ("B", "D", "S"), [(1, 64, 1500), (2, 64, 1499), (4, 64, 1500), (1, 64, 2048), (1, 128, 700), (3, 128, 2048), (2, 32, 513)]
)
def test_clusters(B: int, D: int, S: int, dtype: torch.dtype, read_ahead: bool, device: torch.device) -> None:
    check_paced_copies(B, D, S, dtype, device, counts=False, read_ahead=read_ahead)


@needs_gluon
def test_few_heads_of_a_wide_model_take_clusters(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_paced, "capability", lambda device: (9, 0))
    wide = Shape(B=1, T=1, H=20, D=64, S=1500, length=1500)

    def is_covered(dtype: torch.dtype = torch.float16, **other: int) -> bool:
        shape = wide._replace(**other)
        sizes = shape.states, shape.cache, shape.cache
        return covers_clusters(*(torch.empty(*size, dtype=dtype, device=device) for size in sizes))

    assert is_covered()
    assert is_covered(dtype=torch.bfloat16)
    assert is_covered(B=4)
    assert is_covered(H=12, D=128)
    for other in ({"B": 5}, {"T": 2}, {"H": 12}, {"S": 512}, {"S": 2049}, {"D": 80}, {"dtype": torch.float32}):
        assert not is_covered(**other), other


@pytest.mark.gpu
@pytest.mark.parametrize("B", [7, 8, 23, 32])
def test_equal_rows_are_attended_to_alike(B: int, device: torch.device) -> None:
    call = arguments(Shape(B=1, T=1, H=20, D=64, S=750, length=750), torch.float16, device)
    query = call["query"].repeat(B, 1, 1, 1)
    key_cache, value_cache = (call[name].repeat(B, 1, 2, 1) for name in ("key_cache", "value_cache"))
    # Each key is there twice, with opposite values: what comes out is rounding alone, which tells of the order of the sums.
    value_cache[:, :, 750:] *= -1
    counters = torch.zeros(B * 20, dtype=torch.int32, device=device)
    out = decode_attention(query, key_cache, 1e3 * value_cache, scale=SCALE, read_ahead=True, counters=counters)
    assert out.any()
    assert torch.equal(bits(out), bits(out[:1].expand_as(out)))


@pytest.mark.parametrize("B", [1, 2, 6, 7, 8, 15, 16, 32])
@pytest.mark.parametrize("D", [32, 64, 128])
def test_stream_tiles_fit_and_are_for_many_heads(B: int, D: int) -> None:
    tiles = choose_stream_tiles(B * 1280 // D, D)
    assert (tiles is None) == (B * 1280 // D < 128)
    if tiles is not None:
        piece = 4 * tiles.num_warps * tiles.ROWS * D  # bytes of keys and values
        assert tiles.ROWS >= 256 // D  # a row a thread at least
        assert tiles.PACE * piece + (1 << 10) <= SHARED_MEMORY // tiles.PROGRAMS


def check_paced_copies(
    B: int, D: int, S: int, dtype: torch.dtype, device: torch.device, counts: bool = True, read_ahead: bool = True
) -> None:
    """Over whole caches, as a step calls it, and with every second sequence ended, whose keys and values are NaN."""
    shape = Shape(B=B, T=1, H=1280 // D, D=D, S=S, length=S)
    query, *caches = (arguments(shape, dtype, device)[name] for name in ("query", "key_cache", "value_cache"))
    if not (covers_attention if counts else covers_clusters)(query, *caches):
        pytest.skip("not this GPU's")
    counters = torch.zeros(B * shape.H, dtype=torch.int32, device=device) if counts else None
    around = {"scale": SCALE, "read_ahead": read_ahead, "counters": counters}
    exact = decode_attention_reference(query.double(), *(c.double() for c in caches), scale=SCALE)
    pytorch = sdpa(query, *caches, [S] * B, scale=SCALE)
    for _ in range(2):
        with poisoned_allocations():
            out = decode_attention(query, *caches, **around)
        assert_close_as_pytorch(out, exact, pytorch, factor=gpu_factor(dtype))
        assert counters is None or not counters.any()
    ended = torch.arange(B, device=device) % 2
    for cache in caches:
        cache[ended != 0] = float("nan")
    with poisoned_allocations():
        some = decode_attention(query, *caches, **around, ended=ended)
    assert torch.equal(some, out * (ended == 0)[:, None, None, None])
    assert counters is None or not counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize(("read_ahead", "counts"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("B", [1, 32])
def test_a_captured_chain_waits_for_each_query(B: int, T: int, read_ahead: bool, counts: bool, device: torch.device) -> None:
    # Launches overlap on Hopper, and each query here is the result of the launch before it.
    shape = Shape(B=B, T=T, H=20, D=64, S=1500, length=1500)
    layers = [arguments(shape, torch.float16, device) for _ in range(8)]
    first = layers[0]["query"]
    counters = torch.zeros(B * 20, dtype=torch.int32, device=device) if counts else None

    def step(synchronize: bool = False) -> torch.Tensor:
        states = first
        for layer in layers:
            caches = layer["key_cache"], layer["value_cache"]
            # A scale that leaves few keys with weight, so that the result depends on the query.
            states = decode_attention(states, *caches, scale=4.0, is_causal=False, read_ahead=read_ahead, counters=counters)
            if synchronize:
                torch.cuda.synchronize()
        return states

    graph, out = captured(step)
    for _ in range(20):
        first.copy_(torch.randn(shape.states, dtype=torch.float16, device=device))
        graph.replay()
        assert torch.equal(bits(out), bits(step(synchronize=True)))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 4])
def test_two_streams_do_not_disturb_each_other(T: int, device: torch.device) -> None:
    shape = Shape(B=1, T=T, H=20, D=64, S=1500, length=1500)
    calls = [arguments(shape, torch.float16, device) for _ in range(2)]
    expected = [decode_attention(**call, scale=SCALE) for call in calls]
    results: list[list[torch.Tensor]] = [[], []]
    on_two_streams(
        (
            lambda: results[0].append(decode_attention(**calls[0], scale=SCALE)),
            lambda: results[1].append(decode_attention(**calls[1], scale=SCALE)),
        ),
        times=100,
    )
    for outs, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(bits(out), bits(wanted)) for out in outs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_row_of_a_large_batch_is_the_same_whatever_the_others_hold(dtype: torch.dtype, device: torch.device) -> None:
    query, *caches, _ = arguments(Shape(B=32, T=1, H=20, D=64, S=1500, length=1500), dtype, device).values()
    expected = decode_attention(query, *caches, scale=SCALE)
    for tensor in (query, *caches):
        tensor[1:] = torch.nan
    assert torch.equal(bits(decode_attention(query, *caches, scale=SCALE)[0]), bits(expected[0]))
