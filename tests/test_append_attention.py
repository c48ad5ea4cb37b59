"""`append_attention`: its error, the slots it writes and reads, and what must not matter to a result."""

import importlib
from collections.abc import Callable

import pytest
import torch
from attention_cases import (
    BAD_ATTENTION,
    BAD_CACHES,
    CALLS,
    DTYPES,
    HEAD_DIMS,
    LARGE_CALLS,
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
    twin,
)
from counts import KERNEL_CALLS, count
from hypothesis import given, settings
from hypothesis import strategies as st
from whisper_triton.kernels._paced_append import covers_append

from whisper_triton.kernels import _paced, append_attention, append_attention_reference, update_kv_cache

# Not `from whisper_triton.kernels import append_attention`, which is the function.
module = importlib.import_module("whisper_triton.kernels.append_attention")

OP = torch.ops.whisper_triton.append_attention.default
SHAPE = Shape(B=2, T=2, H=3, D=32, S=8, length=6)
SCALE = 0.2  # no power of two


def arguments(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """New states, and caches into whose first `length` slots they just fit."""
    query, key, value = random_states(shape, dtype, device, 3)
    position = shape.length - shape.T
    key_cache, value_cache = random_caches(shape, dtype, device, [position] * shape.B)
    return {
        "query": query,
        "key": key,
        "value": value,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "cache_position": torch.tensor(position, device=device),
    }


def assert_right(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    *,
    factor: float = 2,
    attend: Callable[..., torch.Tensor] = append_attention,
) -> torch.Tensor:
    """The caches are as `update_kv_cache` leaves them, the result is as near to float64 as SDPA's, all else is as before."""
    inputs = query, key, value, cache_position
    before = [storage(tensor) for tensor in inputs]
    wanted = twin(key_cache), twin(value_cache)
    update_kv_cache(key, value, *wanted, cache_position)
    lengths = (cache_position.expand(len(query)) + query.shape[1]).tolist()
    exact = sdpa(query.double(), wanted[0].double(), wanted[1].double(), lengths, scale=SCALE)
    pytorch = sdpa(query, *wanted, lengths, scale=SCALE)

    referenced = twin(key_cache), twin(value_cache)
    reference = append_attention_reference(query, key, value, *referenced, cache_position, scale=SCALE)
    with poisoned_allocations():
        out = attend(query, key, value, key_cache, value_cache, cache_position, scale=SCALE)
    for result in (out, reference):
        assert_close_as_pytorch(result, exact, pytorch, factor)
    assert out.is_contiguous()
    for caches in ((key_cache, value_cache), referenced):
        assert all(torch.equal(storage(cache), storage(expected)) for cache, expected in zip(caches, wanted, strict=True))
    for tensor, bits_before in zip(inputs, before, strict=True):
        assert torch.equal(storage(tensor), bits_before)
    return out


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    *,
    tiles: module.Tiles | module.PacedTiles,
    scale: float = SCALE,
    read_ahead: bool = False,
    ended: torch.Tensor | None = None,
) -> torch.Tensor:
    """`append_attention` with tiles of the test's choice."""
    out = query.new_empty(query.shape)
    module._launch(query, key, value, key_cache, value_cache, cache_position, out, scale, read_ahead, ended, tiles)
    return out


# --- right results


@pytest.mark.parametrize("shape", [SHAPE, Shape(3, 16, 2, 80, 70, 65), Shape(1, 1, 2, 64, 9, 1)], ids=str)
def test_the_float64_reference_equals_sdpa(shape: Shape, device: torch.device) -> None:
    call = arguments(shape, torch.float64, device)
    result = append_attention_reference(**call, scale=SCALE)
    caches = call["key_cache"], call["value_cache"]
    torch.testing.assert_close(result, sdpa(call["query"], *caches, [shape.length] * shape.B, scale=SCALE))


@pytest.mark.parametrize(("shape", "dtype"), in_every_dtype(*CALLS))
def test_the_error_is_within_twice_that_of_sdpa(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    assert_right(**arguments(shape, dtype, device))


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=dtype_name)
@pytest.mark.parametrize("form", ["one for each", "every second of a vector", "one for all, expanded", "one of a vector"])
def test_every_sequence_may_have_its_own_position(form: str, dtype: torch.dtype, T: int, device: torch.device) -> None:
    shape = Shape(B=3, T=T, H=2, D=64, S=70, length=70)
    position = {
        "one for each": torch.tensor([67, 0, 33], dtype=dtype, device=device),
        "every second of a vector": torch.tensor([5, -9, 64, -9, 67], dtype=dtype, device=device)[::2],
        "one for all, expanded": torch.tensor(40, dtype=dtype, device=device).expand(3),
        "one of a vector": torch.tensor([0, 65, 0], dtype=dtype, device=device)[1],
    }[form]
    states = random_states(shape, torch.float32, device, 3)
    caches = random_caches(shape, torch.float32, device, position.expand(3).tolist())
    assert_right(*states, *caches, position)


@pytest.mark.parametrize("position", range(-3, SHAPE.S + 2))
@pytest.mark.parametrize("T", [1, 3])
def test_the_caches_are_those_of_the_reference_at_every_position(position: int, T: int, device: torch.device) -> None:
    # From the first slot to the last and past both ends, where tokens are dropped.
    call = arguments(SHAPE._replace(T=T, length=SHAPE.S), torch.float16, device)
    call["cache_position"].fill_(position)
    expected = {name: twin(tensor) for name, tensor in call.items()}
    append_attention(**call, scale=SCALE)
    append_attention_reference(**expected, scale=SCALE)
    for name, tensor in call.items():
        assert torch.equal(storage(tensor), storage(expected[name])), name


@pytest.mark.parametrize("inside", [1, 2, 3])
@pytest.mark.parametrize("attend", [append_attention, append_attention_reference], ids=["kernel", "reference"])
def test_tokens_before_the_last_slot_are_right_though_later_ones_are_dropped(
    attend: Callable[..., torch.Tensor], inside: int, device: torch.device
) -> None:
    call = arguments(SHAPE._replace(T=4, length=SHAPE.S + 4 - inside), torch.float32, device)
    fitting = {name: tensor[:, :inside] if name in ("query", "key", "value") else twin(tensor) for name, tensor in call.items()}
    expected = append_attention_reference(**fitting, scale=SCALE)
    torch.testing.assert_close(attend(**call, scale=SCALE)[:, :inside], expected)


@settings(max_examples=20)
@given(data=st.data(), shape=small_shapes())
def test_a_query_that_looks_for_one_key_returns_its_value_bit_for_bit(
    data: st.DataObject, shape: Shape, device: torch.device
) -> None:
    count(KERNEL_CALLS)
    dtype = data.draw(small_dtypes(shape.T), "dtype")
    tiles = module.Tiles(data.draw(st.sampled_from([16, 32]), "keys a tile"), 4, 2)
    room = st.integers(0, shape.S - shape.T)
    positions = data.draw(st.lists(room, min_size=shape.B, max_size=shape.B), "positions")
    codes = needles(shape.S, shape.D, dtype, device)
    values = torch.randn(shape.cache, device=device).to(dtype)
    query, key, value, expected = (torch.empty(shape.states, dtype=dtype, device=device) for _ in range(4))
    cache_layout = data.draw(layouts, "cache layout")
    empty = torch.full(shape.cache, torch.nan, dtype=dtype, device=device)
    key_cache, value_cache = lay_out(empty, cache_layout), lay_out(empty, cache_layout)
    for b, position in enumerate(positions):
        key_cache[b, :, :position] = codes[:position]
        value_cache[b, :, :position] = values[b, :, :position]
        for t in range(shape.T):
            slot = data.draw(st.integers(0, position + t), "slot")
            query[b, t] = 64 * codes[slot]
            key[b, t] = codes[position + t]
            value[b, t] = values[b, :, position + t]
            expected[b, t] = values[b, :, slot]
    with poisoned_allocations():
        out = launch(
            query=lay_out(query, data.draw(layouts, "query layout")),
            key=lay_out(key, data.draw(layouts, "key layout")),
            value=lay_out(value, data.draw(layouts, "value layout")),
            key_cache=key_cache,
            value_cache=value_cache,
            cache_position=torch.tensor(positions, device=device),
            tiles=tiles,
            scale=1.0,
        )
    assert torch.equal(bits(out), bits(expected))
    for b, position in enumerate(positions):
        length = position + shape.T
        assert torch.equal(key_cache[b, :, :length], codes[:length].expand(shape.H, length, shape.D))
        assert torch.equal(value_cache[b, :, :length], values[b, :, :length])
        assert key_cache[b, :, length:].isnan().all()
        assert value_cache[b, :, length:].isnan().all()


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("state_layout", LAYOUTS)
@pytest.mark.parametrize("cache_layout", LAYOUTS)
def test_any_strides_are_read_and_written(state_layout: str, cache_layout: str, T: int, device: torch.device) -> None:
    names = [*LAYOUTS]
    call = arguments(SHAPE._replace(T=T), torch.float16, device)
    tensors = [tensor for name, tensor in call.items() if name != "cache_position"]
    # No two of a kind have the same strides.
    first = [names.index(state_layout)] * 3 + [names.index(cache_layout)] * 2
    turn = [0, 1, 2, 0, 1]
    turned = [names[(i + by) % len(names)] for i, by in zip(first, turn, strict=True)]
    assert_right(*map(lay_out, tensors, turned), call["cache_position"])


# --- how it is launched


@pytest.mark.parametrize("tile", [16, 32, 64, 128])
def test_any_number_of_keys_a_tile_gives_the_right_result(tile: int, device: torch.device) -> None:
    for T in (1, 4):
        call = arguments(Shape(B=1, T=T, H=2, D=32, S=160, length=150), torch.float32, device)
        with poisoned_allocations():
            out = launch(**call, tiles=module.Tiles(tile, 4, 2))
        caches = call["key_cache"], call["value_cache"]
        exact = sdpa(call["query"].double(), *(cache.double() for cache in caches), [150], scale=SCALE)
        assert_close_as_pytorch(out, exact, sdpa(call["query"], *caches, [150], scale=SCALE))


@pytest.mark.parametrize("D", [64, 80])
@pytest.mark.parametrize("T", [1, 2, 16])
def test_all_of_the_result_is_written_and_nothing_beside_it(T: int, D: int, device: torch.device) -> None:
    call = arguments(Shape(2, T, 3, D, 40, 40), torch.float16, device)
    with GuardedAllocations() as guarded:
        launch(**call, tiles=module.Tiles(16, 4, 2))
    guarded.check()


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_tiles_are_powers_of_two(D: int, itemsize: int) -> None:
    for B in (1, 8, 64, 1000):
        for T in range(1, 17):
            tiles = module.choose_tiles(B, T, 20, D, itemsize)
            assert tiles.BLOCK_S >= 16
            assert tiles.BLOCK_S.bit_count() == 1
            assert tiles.num_warps in (1, 2, 4, 8)


# --- what must not matter


@pytest.mark.parametrize("T", [1, 3])
def test_what_lies_in_unused_slots_does_not_matter(T: int, device: torch.device) -> None:
    call = arguments(Shape(B=2, T=T, H=2, D=64, S=100, length=40), torch.float16, device)
    expected = append_attention(**call, scale=SCALE)
    for filler in (0.0, torch.inf, -torch.inf, 60000.0):
        for cache in ("key_cache", "value_cache"):
            call[cache][:, :, 40 - T :] = filler
        assert torch.equal(bits(append_attention(**call, scale=SCALE)), bits(expected)), filler


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("T", [1, 3])
def test_the_other_sequences_of_a_batch_do_not_matter(T: int, device: torch.device) -> None:
    call = arguments(Shape(B=3, T=T, H=2, D=64, S=100, length=90), torch.float16, device)
    call["cache_position"] = torch.tensor([20, 50, 87], device=device)
    tiles = module.Tiles(32, 4, 2)
    expected = launch(**call, tiles=tiles)[1:2]
    alone = launch(**{name: tensor[1:2] for name, tensor in call.items()}, tiles=tiles)
    assert torch.equal(bits(alone), bits(expected))
    for positions, others in (([87, 50, 20], 1.0), ([0, 50, 100], torch.nan)):
        for name, tensor in call.items():
            if name != "cache_position":
                tensor[::2] = others
        call["cache_position"] = torch.tensor(positions, device=device)
        assert torch.equal(bits(launch(**call, tiles=tiles)[1:2]), bits(expected))


@pytest.mark.parametrize("T", [1, 3])
def test_reading_ahead_does_not_matter(T: int, device: torch.device) -> None:
    results = []
    for attend in (append_attention, append_attention_reference):
        call = arguments(SHAPE._replace(T=T), torch.float16, device)
        ahead = {name: twin(tensor) for name, tensor in call.items()}
        results.append((attend(**call, scale=SCALE), attend(**ahead, scale=SCALE, read_ahead=True)))
        for name, tensor in call.items():
            assert torch.equal(storage(tensor), storage(ahead[name])), name
    for expected, result in results:
        assert torch.equal(bits(result), bits(expected))


@pytest.mark.parametrize(("T", "times"), [(1, 2), (3, 2), pytest.param(1, 50, marks=pytest.mark.gpu)])
def test_the_result_is_the_same_in_every_run(T: int, times: int, device: torch.device) -> None:
    call = arguments(Shape(2, T, 6, 64, 448, 100), torch.float16, device)
    first = append_attention(**call, scale=SCALE)
    for _ in range(times - 1):
        assert torch.equal(bits(append_attention(**call, scale=SCALE)), bits(first))


# --- as an op of PyTorch


def test_the_op_keeps_the_rules_of_torch_library(device: torch.device) -> None:
    for dtype, T in ((torch.float16, 1), (torch.float32, 2)):
        call = arguments(SHAPE._replace(T=T), dtype, device)
        ended = None if T == 1 else torch.zeros(SHAPE.B, dtype=torch.int64, device=device)
        torch.library.opcheck(OP, (*call.values(), torch.zeros_like(call["query"]), SCALE, T == 2, ended))


def assert_compiles(device: torch.device, **options: object) -> None:
    """A whole-graph `torch.compile` of two layers equals eager bit for bit at every position, and compiles once."""

    def step(query, key, value, key_cache, value_cache, cache_position):
        out = append_attention(query, key, value, key_cache, value_cache, cache_position, scale=SCALE)
        cache_position += 1
        # The second layer reads what the first wrote.
        return append_attention(out, key, value, key_cache, value_cache, cache_position, scale=SCALE)

    call = arguments(SHAPE._replace(T=1, length=1), torch.float16, device)
    eager = {name: twin(tensor) for name, tensor in call.items()}
    torch._dynamo.reset()  # what another backend compiled of the same code would count as a recompilation
    compiled_step = torch.compile(step, fullgraph=True, **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for position in range(SHAPE.S - 1):
            assert torch.equal(bits(compiled_step(**call)), bits(step(**eager))), position
    for name, tensor in call.items():
        assert torch.equal(storage(tensor), storage(eager[name])), name


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
        *bad_positions("cache_position"),
        BadInput("fewer keys", {"key": lambda t: t[:, :1]}, r"differ in shape: \(2, 2, 3, 32\), \(2, 1, 3, 32\)"),
        BadInput("fewer values", {"value": lambda t: t[:1]}, r"differ in shape: .* \(1, 2, 3, 32\)$"),
        BadInput("key in fp16", {"key": torch.Tensor.half}, r"key is torch\.float16 .* expected torch\.float32"),
    ],
    ids=lambda bad: bad.name,
)
def test_bad_input_is_refused_and_the_caches_stay_as_they_were(bad: BadInput, device: torch.device) -> None:
    assert_refused(append_attention, arguments(SHAPE, torch.float32, device), bad, scale=SCALE)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), in_every_dtype(*LARGE_CALLS))
def test_the_error_in_large_batches(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    assert_right(**arguments(shape, dtype, device), factor=gpu_factor(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("T", [1, 4])
def test_a_captured_graph_follows_the_position_on_the_device(T: int, dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(B=2, T=T, H=20, D=64, S=448, length=T)
    call = arguments(shape, dtype, device)
    expected = {name: twin(tensor) for name, tensor in call.items()}

    def step() -> torch.Tensor:
        out = append_attention(**call, scale=SCALE)
        call["cache_position"].add_(T)
        return out

    graph, out = captured(step)
    for name, tensor in call.items():
        tensor.copy_(expected[name])
    for position in range(0, shape.S, T):
        for name in ("query", "key", "value"):
            call[name].copy_(torch.randn(shape.states, dtype=dtype, device=device))
            expected[name].copy_(call[name])
        graph.replay()
        append_attention_reference(**expected, scale=SCALE)
        expected["cache_position"] += T
        for name, tensor in call.items():
            assert torch.equal(storage(tensor), storage(expected[name])), (name, position)
        caches, lengths = (expected["key_cache"], expected["value_cache"]), [position + T] * shape.B
        exact = sdpa(call["query"].double(), *(cache.double() for cache in caches), lengths, scale=SCALE)
        assert_close_as_pytorch(out, exact, sdpa(call["query"], *caches, lengths, scale=SCALE), gpu_factor(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("B", [1, 32])
def test_a_captured_chain_waits_for_each_query_and_each_cache(B: int, T: int, device: torch.device) -> None:
    # Launches overlap on Hopper. Each query here is the result of the launch before it, and so are new keys and values;
    # layers share their caches two by two, so that some read at once what the launch before wrote.
    shape = Shape(B=B, T=T, H=20, D=64, S=448, length=T)
    layers = [arguments(shape, torch.float16, device) for _ in range(4)]
    first = layers[0]["query"]
    caches = [layer[name] for layer in layers for name in ("key_cache", "value_cache")]
    empty = [cache.clone() for cache in caches]
    position = layers[0]["cache_position"]

    def reset() -> None:
        for cache, content in zip(caches, empty, strict=True):
            cache.copy_(content)
        position.zero_()

    def step(synchronize: bool = False) -> torch.Tensor:
        states = first
        for layer in layers:
            for _ in range(2):
                # A scale that leaves few keys with weight, so that the result depends on the query.
                states = append_attention(
                    states, states, layer["value"], layer["key_cache"], layer["value_cache"], position, scale=4.0
                )
                if synchronize:
                    torch.cuda.synchronize()
        position.add_(T)
        return states

    graph, out = captured(step)
    queries = torch.randn(20, *shape.states, dtype=torch.float16, device=device)
    results = []
    for replay in (True, False):
        reset()
        for query in queries:
            first.copy_(query)
            if replay:
                graph.replay()
            results.append((out if replay else step(synchronize=True)).clone())
    for i in range(len(queries)):
        assert torch.equal(bits(results[i]), bits(results[len(queries) + i])), i


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 4])
def test_two_streams_do_not_disturb_each_other(T: int, device: torch.device) -> None:
    shape = Shape(B=8, T=T, H=20, D=64, S=448, length=448)
    calls = [arguments(shape, torch.float16, device) for _ in range(2)]
    expected = [append_attention(**call, scale=SCALE) for call in calls]
    results: list[list[torch.Tensor]] = [[], []]
    on_two_streams(
        (
            lambda: results[0].append(append_attention(**calls[0], scale=SCALE)),
            lambda: results[1].append(append_attention(**calls[1], scale=SCALE)),
        ),
        times=100,
    )
    for outs, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(bits(out), bits(wanted)) for out in outs)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("position", [2**32 + 3, -(2**32) + 3, 2**62, -4, -(2**62)])
def test_a_position_far_outside_writes_nothing(position: int, T: int, device: torch.device) -> None:
    call = arguments(SHAPE._replace(T=T), torch.float32, device)
    call["cache_position"] = torch.tensor(position, device=device)
    before = {name: storage(call[name]).clone() for name in ("key_cache", "value_cache")}
    append_attention(**call, scale=SCALE)
    for name, buffer in before.items():
        assert torch.equal(storage(call[name]), buffer), name


@pytest.mark.parametrize("T", [1, 4])
def test_of_what_has_ended_no_key_is_read_and_all_is_written(T: int, device: torch.device) -> None:
    call = arguments(SHAPE._replace(B=3, T=T, length=7), torch.float16, device)
    other = {name: tensor.clone() for name, tensor in call.items()}
    whole = append_attention(**call, scale=SCALE)
    position = other["cache_position"].flatten()[0].item()
    for cache in ("key_cache", "value_cache"):
        other[cache][1, :, :position] = torch.nan
    out = append_attention(**other, scale=SCALE, ended=torch.tensor([0, 1, 0], dtype=torch.int32, device=device))
    assert torch.equal(bits(out[::2]), bits(whole[::2]))
    assert out.isfinite().all()
    for cache in ("key_cache", "value_cache"):
        assert torch.equal(bits(other[cache][:, :, position : position + T]), bits(call[cache][:, :, position : position + T]))


def test_a_token_before_slot_0_is_dropped_for_those_after_it_too(device: torch.device) -> None:
    call = arguments(SHAPE._replace(T=4), torch.float32, device)
    inside = call | {name: call[name][:, 2:] for name in ("query", "key", "value")}
    inside["cache_position"] = torch.tensor(0, device=device)
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor.clone() for name, tensor in inside.items()}
    single = {name: tensor.clone() for name, tensor in inside.items()}
    out = append_attention(**(call | {"cache_position": torch.tensor(-2, device=device)}), scale=SCALE)
    assert_close_as_pytorch(
        out[:, 2:], append_attention_reference(**exact, scale=SCALE), append_attention_reference(**single, scale=SCALE)
    )


# --- paced copies: kernels/_paced_append.py

PACED_TILES = [
    module.PacedTiles(16, 2, 1),
    module.PacedTiles(32, 4, 3),
    module.PacedTiles(16, 1, 2),
    module.PacedTiles(128, 8, 2),
]


def paced_launch(tiles: module.PacedTiles, device: torch.device, **options: object) -> Callable[..., torch.Tensor]:
    """`launch` by paced copies and nothing else: skips where there are none."""
    if not _paced.has_paced_copies(device, torch.float16):
        pytest.skip("not this GPU's")

    def run(*args: torch.Tensor, **call: object) -> torch.Tensor:
        out = launch(*args, **call, tiles=tiles, **options)
        assert not _paced._given_up
        return out

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.parametrize(
    ("tiles", "dtype"), [(PACED_TILES[1], torch.bfloat16), *((tiles, torch.float16) for tiles in PACED_TILES)], ids=str
)
def test_paced_copies(tiles: module.PacedTiles, dtype: torch.dtype, D: int, read_ahead: bool, device: torch.device) -> None:
    attend, factor = paced_launch(tiles, device, read_ahead=read_ahead), gpu_factor(dtype)
    for position in (0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 65, 128, 256, 300, 447):
        call = arguments(Shape(B=1, T=1, H=3, D=D, S=448, length=position + 1), dtype, device)
        assert_right(**call, factor=factor, attend=attend)
    places = [0, 447, 20, 130, 64]
    shape = Shape(B=5, T=1, H=2, D=D, S=448, length=448)
    caches = random_caches(shape, dtype, device, places)
    assert_right(
        *random_states(shape, dtype, device, 3), *caches, torch.tensor(places, device=device), factor=factor, attend=attend
    )


@pytest.mark.gpu
@pytest.mark.parametrize("S", [1, 2, 63, 64, 65, 1500])
def test_paced_copies_over_caches_of_any_length(S: int, device: torch.device) -> None:
    call = arguments(Shape(B=1, T=1, H=1, D=64, S=S, length=S), torch.float16, device)
    assert_right(**call, factor=gpu_factor(torch.float16), attend=paced_launch(PACED_TILES[1], device))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_paced_copies_beside_states_of_any_strides(layout: str, device: torch.device) -> None:
    call = arguments(Shape(B=2, T=1, H=3, D=64, S=100, length=90), torch.float16, device)
    call |= {name: lay_out(call[name], layout) for name in ("query", "key", "value")}
    call |= {name: lay_out(call[name], "swapped") for name in ("key_cache", "value_cache")}  # (B, S, H, D)
    assert_right(**call, factor=gpu_factor(torch.float16), attend=paced_launch(PACED_TILES[1], device))


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", PACED_TILES, ids=str)
def test_paced_copies_write_all_of_the_result_and_nothing_beside_it(tiles: module.PacedTiles, device: torch.device) -> None:
    attend = paced_launch(tiles, device)
    with GuardedAllocations() as guarded:
        attend(**arguments(Shape(2, 1, 3, 64, 40, 40), torch.float16, device))
    guarded.check()


@pytest.mark.gpu
@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize("tiles", PACED_TILES, ids=str)
def test_paced_copies_leave_caches_alone_outside_and_read_none_that_has_ended(
    tiles: module.PacedTiles, read_ahead: bool, device: torch.device
) -> None:
    attend = paced_launch(tiles, device, read_ahead=read_ahead)
    shape = Shape(B=3, T=1, H=2, D=64, S=100, length=81)
    for position in (-1, -4, 100, 101, 2**32 + 3, 2**62, -(2**62)):
        call = arguments(shape, torch.float16, device) | {"cache_position": torch.tensor(position, device=device)}
        before = {name: storage(call[name]) for name in ("key_cache", "value_cache")}
        attend(**call)
        for name, buffer in before.items():
            assert torch.equal(storage(call[name]), buffer), (name, position)
    for dtype in (torch.int32, torch.int64):
        call = arguments(shape, torch.float16, device)
        other = {name: twin(tensor) for name, tensor in call.items()}
        whole = attend(**call)
        for cache in ("key_cache", "value_cache"):
            other[cache][1, :, :80] = torch.nan
        out = attend(**other, ended=torch.tensor([0, 1, 0], dtype=dtype, device=device))
        assert torch.equal(bits(out[::2]), bits(whole[::2]))
        assert torch.equal(bits(out[1]), bits(call["value"][1]))
        for cache in ("key_cache", "value_cache"):
            assert torch.equal(bits(other[cache][:, :, 80:]), bits(call[cache][:, :, 80:]))


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 32])
@pytest.mark.parametrize("tiles", PACED_TILES, ids=str)
def test_paced_copies_in_a_captured_chain(tiles: module.PacedTiles, B: int, device: torch.device) -> None:
    # Each query and key is the result of the launch before it; the position advances on the device.
    shape = Shape(B=B, T=1, H=20, D=64, S=448, length=1)
    ahead = (False, False, True, True)  # PyTorch's kernel, which advances the position, is not the one before these
    launches = [paced_launch(tiles, device, read_ahead=is_ahead) for is_ahead in ahead]
    layers = [arguments(shape, torch.float16, device) for _ in ahead]
    states, position = layers[0]["query"], layers[0]["cache_position"]
    caches = [(layer["key_cache"], layer["value_cache"]) for layer in layers]
    empty = [[cache.clone() for cache in pair] for pair in caches]

    def step(synchronize: bool = False) -> torch.Tensor:
        out = states
        for attend, pair, layer in zip(launches, caches, layers, strict=True):
            # A scale that leaves few keys with weight, so that the result depends on the query.
            out = attend(out, out, layer["value"], *pair, position, scale=4.0)
            if synchronize:
                torch.cuda.synchronize()
        position.add_(1)
        return out

    graph, out = captured(step)
    queries = torch.randn(shape.S, *shape.states, dtype=torch.float16, device=device)
    results = []
    for replay in (True, False):
        for pair, contents in zip(caches, empty, strict=True):
            for cache, content in zip(pair, contents, strict=True):
                cache.copy_(content)
        position.zero_()
        for query in queries:
            states.copy_(query)
            if replay:
                graph.replay()
            results.append((out if replay else step(synchronize=True)).clone())
    for i in range(shape.S):
        assert torch.equal(bits(results[i]), bits(results[shape.S + i])), i


@needs_gluon
@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.parametrize("B", [1, 2, 8, 64])
def test_wide_models_take_paced_copies(B: int, D: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_paced, "capability", lambda device: (9, 0))
    heads = 1024 // D
    tiles = module.choose_tiles(B, 1, heads, D, 2, has_copies=True)
    assert isinstance(tiles, module.PacedTiles)
    call = arguments(Shape(B, 1, 1, D, 448, 1), torch.float16, device)
    assert covers_append(call["query"], call["key_cache"], call["value_cache"], tiles)
    for others in ((B, 4, heads, D, 2, True), (B, 1, heads - 1, D, 2, True), (B, 1, heads, D, 2, False)):
        assert isinstance(module.choose_tiles(*others), module.Tiles)


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "tiles"),
    [
        (SHAPE, torch.float16, "contiguous", (32, 4, 2)),  # several tokens
        (SHAPE._replace(T=1, D=80), torch.float16, "contiguous", (32, 4, 2)),
        (SHAPE._replace(T=1), torch.float32, "contiguous", (32, 4, 2)),
        (SHAPE._replace(T=1), torch.float16, "sliced", (32, 4, 2)),  # caches at odd addresses, with odd strides
        (SHAPE._replace(T=1), torch.float16, "contiguous", (16, 4, 2)),  # a piece of fewer copies than threads
        (SHAPE._replace(T=1), torch.float16, "contiguous", (96, 4, 2)),
        (SHAPE._replace(T=1), torch.float16, "contiguous", (128, 3, 2)),
        (SHAPE._replace(T=1), torch.float16, "contiguous", (32, 4, 0)),
        (SHAPE._replace(T=1, D=128), torch.float16, "contiguous", (128, 4, 4)),  # more than shared memory holds
    ],
)
def test_paced_tiles_that_do_not_fit_are_refused(
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    tiles: tuple[int, int, int],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_paced, "capability", lambda device: (9, 0))
    call = arguments(shape, dtype, device)
    call |= {name: lay_out(call[name], layout) for name in ("key_cache", "value_cache")}
    before = {name: storage(tensor) for name, tensor in call.items()}
    with pytest.raises(ValueError, match=r"paced copies are for .* got \(2, "):
        launch(**call, tiles=module.PacedTiles(*tiles))
    for name, tensor in call.items():
        assert torch.equal(storage(tensor), before[name]), name


def test_paced_tiles_are_refused_where_there_are_no_paced_copies() -> None:
    call = arguments(SHAPE._replace(T=1), torch.float16, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"on an H100 or H200, .* on cpu"):
        launch(**call, tiles=PACED_TILES[1])
