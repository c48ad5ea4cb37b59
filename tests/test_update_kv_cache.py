"""`update_kv_cache`: what lands in which slot, and that nothing else changes."""

import pytest
import torch
from attention_cases import (
    BAD_CACHES,
    CALLS,
    DTYPES,
    LARGE_CALLS,
    LARGE_CROSS_CALLS,
    LAYOUTS,
    BadInput,
    Shape,
    assert_refused,
    bad_positions,
    captured,
    dtype_name,
    lay_out,
    layouts,
    on_two_streams,
    random_caches,
    random_states,
    small_shapes,
    storage,
    twin,
)
from counts import KERNEL_CALLS, count
from hypothesis import given, settings
from hypothesis import strategies as st
from whisper_triton.kernels._checks import share_memory

from whisper_triton.kernels import decode_attention, update_kv_cache, update_kv_cache_reference

OP = torch.ops.whisper_triton.update_kv_cache.default
SHAPE = Shape(B=2, T=2, H=3, D=32, S=8, length=8)


def write_slot_by_slot(states: torch.Tensor, cache: torch.Tensor, positions: list[int]) -> None:
    """The definition, in Python."""
    for b, position in enumerate(positions):
        for t in range(states.shape[1]):
            if 0 <= position + t < cache.shape[2]:
                cache[b, :, position + t] = states[b, t]


def assert_writes(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
) -> None:
    """Kernel and reference leave the caches, and all memory around them, as writing slot by slot does."""
    expected = twin(key_cache), twin(value_cache)
    positions = cache_position.expand(key.shape[0]).tolist()
    write_slot_by_slot(key, expected[0], positions)
    write_slot_by_slot(value, expected[1], positions)
    inputs = [storage(states) for states in (key, value)]
    for update in (update_kv_cache, update_kv_cache_reference):
        written = twin(key_cache), twin(value_cache)
        assert update(key, value, *written, cache_position) is None
        for cache, wanted in zip(written, expected, strict=True):
            assert torch.equal(storage(cache), storage(wanted)), update.__name__
    for states, before in zip((key, value), inputs, strict=True):
        assert torch.equal(storage(states), before)


def arguments(shape: Shape, dtype: torch.dtype, device: torch.device, position: int) -> dict[str, torch.Tensor]:
    """Random states and caches that are full up to `position`."""
    key, value = random_states(shape, dtype, device, 2)
    key_cache, value_cache = random_caches(shape, dtype, device, [max(0, min(position, shape.S))] * shape.B)
    return {
        "key": key,
        "value": value,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "cache_position": torch.tensor(position, device=device),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", CALLS, ids=str)
def test_new_tokens_land_in_their_slots_and_nowhere_else(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    assert_writes(**arguments(shape, dtype, device, shape.length - shape.T))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_cross_cache_is_filled_in_one_call(dtype: torch.dtype, device: torch.device) -> None:
    assert_writes(**arguments(Shape(1, 1500, 2, 64, 1500, 1500), dtype, device, 0))


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("position", [0, 5, 7, 8, 9, 1 << 31, 1 << 32, -1, -2, -3, -(1 << 32)])
def test_tokens_outside_the_slots_are_dropped(position: int, T: int, device: torch.device) -> None:
    assert_writes(**arguments(SHAPE._replace(T=T), torch.float16, device, position))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=dtype_name)
@pytest.mark.parametrize("form", ["one for each", "every second of a vector", "one for all, expanded"])
def test_every_sequence_may_have_its_own_position(form: str, dtype: torch.dtype, device: torch.device) -> None:
    shape = SHAPE._replace(B=3)
    position = {
        "one for each": torch.tensor([6, 0, 7], dtype=dtype, device=device),
        "every second of a vector": torch.tensor([6, -9, 0, -9, 7], dtype=dtype, device=device)[::2],
        "one for all, expanded": torch.tensor(4, dtype=dtype, device=device).expand(3),
    }[form]
    assert_writes(**{**arguments(shape, torch.float32, device, 0), "cache_position": position})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=dtype_name)
def test_one_position_serves_all_sequences(dtype: torch.dtype, device: torch.device) -> None:
    for position in (torch.tensor(3, dtype=dtype, device=device), torch.tensor([9, 3, 9], dtype=dtype, device=device)[1]):
        assert_writes(**{**arguments(SHAPE._replace(B=3), torch.float32, device, 3), "cache_position": position})


@pytest.mark.parametrize("cache_layout", LAYOUTS)
@pytest.mark.parametrize("state_layout", LAYOUTS)
def test_any_strides_are_read_and_written(state_layout: str, cache_layout: str, device: torch.device) -> None:
    # Keys and values differ in their strides too.
    others = dict(zip(LAYOUTS, [*LAYOUTS][1:] + [*LAYOUTS][:1], strict=True))
    states = torch.randn(2, *SHAPE.states, dtype=torch.float16, device=device)
    caches = torch.randn(2, *SHAPE.cache, dtype=torch.float16, device=device)
    assert_writes(
        lay_out(states[0], state_layout),
        lay_out(states[1], others[state_layout]),
        lay_out(caches[0], cache_layout),
        lay_out(caches[1], others[cache_layout]),
        torch.tensor(5, device=device),
    )


@settings(max_examples=30)
@given(data=st.data(), shape=small_shapes(max_tokens=48), dtype=st.sampled_from(DTYPES))
def test_any_shapes_strides_and_positions(data: st.DataObject, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    count(KERNEL_CALLS)
    positions = data.draw(st.lists(st.integers(-shape.T - 1, shape.S + 1), min_size=shape.B, max_size=shape.B), "positions")
    states = torch.randn(2, *shape.states, device=device).to(dtype)
    caches = torch.randn(2, *shape.cache, device=device).to(dtype)
    names = [data.draw(layouts, "layout") for _ in range(4)]
    tensors = [lay_out(values, name) for values, name in zip((*states, *caches), names, strict=True)]
    assert_writes(*tensors, torch.tensor(positions, device=device))


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_caches_may_take_turns_in_one_buffer(dim: int, device: torch.device) -> None:
    buffer = torch.zeros(*SHAPE.cache[:dim], 2, *SHAPE.cache[dim:], device=device)
    key, value = random_states(SHAPE, torch.float32, device, 2)
    update_kv_cache(key, value, *buffer.unbind(dim), torch.tensor(3, device=device))
    for states, cache in zip((key, value), buffer.unbind(dim), strict=True):
        expected = torch.zeros_like(cache)
        write_slot_by_slot(states, expected, [3] * SHAPE.B)
        assert torch.equal(cache, expected)


@st.composite
def strides_of(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor that does not overlap itself, its dimensions but the last in any order and with gaps."""
    strides, reached = [1] * len(shape), shape[-1]
    for dim in draw(st.permutations(range(len(shape) - 1))):
        strides[dim] = reached * draw(st.integers(1, 2)) + draw(st.integers(0, 3))
        reached = strides[dim] * shape[dim]
    return tuple(strides)


@settings(max_examples=300)
@given(data=st.data(), shape=st.tuples(*[st.integers(1, 3)] * 3, st.sampled_from([1, 2, 4])))
def test_whether_two_caches_share_an_element(data: st.DataObject, shape: tuple[int, ...]) -> None:
    buffer = torch.zeros(1 << 15, dtype=torch.float16)
    strides = data.draw(strides_of(shape))
    others = data.draw(st.one_of(st.just(strides), strides_of(shape)))
    views = [buffer.as_strided(shape, one, data.draw(st.integers(0, 60))) for one in (strides, others)]
    seen = [
        set(torch.arange(len(buffer)).as_strided(v.shape, v.stride(), v.storage_offset()).flatten().tolist()) for v in views
    ]
    assert share_memory(*views) == share_memory(*reversed(views)) == bool(seen[0] & seen[1])


def test_the_op_keeps_the_rules_of_torch_library(device: torch.device) -> None:
    for dtype, T in ((torch.float16, 1), (torch.float32, 2)):
        torch.library.opcheck(OP, tuple(arguments(SHAPE._replace(T=T), dtype, device, 3).values()))


def assert_compiles(device: torch.device, **options: object) -> None:
    """A whole-graph `torch.compile` of write-then-read equals eager at every position and compiles once."""

    def step(key, value, key_cache, value_cache, cache_position):
        update_kv_cache(key, value, key_cache, value_cache, cache_position)
        cache_position += 1
        return decode_attention(key, key_cache, value_cache, cache_position, scale=1.0)

    given = arguments(SHAPE._replace(T=1), torch.float32, device, 0)
    eager = {name: twin(tensor) for name, tensor in given.items()}
    torch._dynamo.reset()  # what another backend compiled of the same code would count as a recompilation
    compiled_step = torch.compile(step, fullgraph=True, **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(SHAPE.S):
            assert torch.equal(compiled_step(**given), step(**eager))
    for name, tensor in given.items():
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
        *bad_positions("cache_position"),
        BadInput("key not dense", {"key": lambda t: t.transpose(2, 3)}, r"key must be dense .* got strides"),
        BadInput("fewer values", {"value": lambda t: t[:, :1]}, r"\(2, 2, 3, 32\) and value \(2, 1, 3, 32\) differ"),
    ],
    ids=lambda bad: bad.name,
)
def test_bad_input_is_refused_and_the_caches_stay_as_they_were(bad: BadInput, device: torch.device) -> None:
    assert_refused(update_kv_cache, arguments(SHAPE, torch.float32, device, 3), bad)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", LARGE_CALLS, ids=str)
def test_large_batches(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    assert_writes(**arguments(shape, dtype, device, shape.length - shape.T))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [shape for shape in LARGE_CROSS_CALLS if shape.T == 1], ids=str)
def test_large_cross_caches(shape: Shape, device: torch.device) -> None:
    key, value = torch.randn(2, *shape._replace(T=shape.S).states, dtype=torch.float16, device=device)
    caches = torch.empty(2, *shape.cache, dtype=torch.float16, device=device).fill_(torch.nan)
    update_kv_cache(key, value, *caches, torch.tensor(0, device=device))
    assert torch.equal(caches[0], key.transpose(1, 2))
    assert torch.equal(caches[1], value.transpose(1, 2))


@pytest.mark.gpu
def test_a_cache_past_two_to_the_31_elements(device: torch.device) -> None:
    shape = Shape(B=48, T=2, H=20, D=128, S=20000, length=20000)  # 4.6 GiB a cache: element offsets leave 32 bits
    key, value = torch.randn(2, *shape.states, dtype=torch.float16, device=device)
    caches = torch.zeros(2, *shape.cache, dtype=torch.float16, device=device)
    update_kv_cache(key, value, *caches, torch.tensor(shape.S - shape.T, device=device))
    for states, cache in zip((key, value), caches, strict=True):
        assert torch.equal(cache[:, :, -shape.T :], states.transpose(1, 2))
        assert not cache[:, :, : -shape.T].any()


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 5])
def test_a_captured_graph_follows_the_position_on_the_device(T: int, device: torch.device) -> None:
    given = arguments(SHAPE._replace(T=T), torch.float16, device, 0)
    expected = {name: twin(tensor) for name, tensor in given.items()}

    def step() -> None:
        update_kv_cache(**given)
        given["cache_position"].add_(1)

    graph, _ = captured(step)
    given["cache_position"].zero_()
    for cache in ("key_cache", "value_cache"):
        given[cache].copy_(expected[cache])
    for position in range(SHAPE.S + 2):  # two more than there are slots
        new = torch.randn(2, *given["key"].shape, dtype=torch.float16, device=device)
        given["key"].copy_(new[0])
        given["value"].copy_(new[1])
        graph.replay()
        for states, cache in zip(new, ("key_cache", "value_cache"), strict=True):
            write_slot_by_slot(states, expected[cache], [position] * SHAPE.B)
            assert torch.equal(storage(given[cache]), storage(expected[cache])), (cache, position)


@pytest.mark.gpu
def test_two_streams_do_not_disturb_each_other(device: torch.device) -> None:
    shape = Shape(B=8, T=16, H=20, D=64, S=448, length=448)
    calls = [arguments(shape, torch.float16, device, position) for position in (0, 400)]
    expected = [{name: twin(tensor) for name, tensor in call.items()} for call in calls]
    on_two_streams((lambda: update_kv_cache(**calls[0]), lambda: update_kv_cache(**calls[1])), times=100)
    for call, wanted in zip(calls, expected, strict=True):
        update_kv_cache_reference(**wanted)
        for name, tensor in call.items():
            assert torch.equal(storage(tensor), storage(wanted[name])), name
