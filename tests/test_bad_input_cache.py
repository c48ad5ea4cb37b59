"""The static caches against what does not fit them: refused with a reason; keys, values, positions and flags stay."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bad_inputs import bits_of
from test_cache import Decoding, all_layers
from whisper_models import FRAMES, SOT, tiny_whisper

from whisper_triton import StaticEncoderDecoderCache, accelerate, accelerated, build_static_cache, is_accelerated, restore

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels")

B, H, D, S = 2, 2, 32, 8  # H and D are the tiny models'


def state(cache: StaticEncoderDecoderCache) -> list[Any]:
    """All that a cache is made of, tensors bit for bit."""
    tensors = [t for layer in all_layers(cache) for t in (layer.keys, layer.values, layer.cumulative_length)]
    host = [layer.host_length for layer in cache.self_attention_cache.layers]
    return [[bits_of(t).tolist() for t in tensors], host, dict(cache.is_updated)]


@pytest.fixture
def cache(device: torch.device) -> StaticEncoderDecoderCache:
    """Of two sequences, with five tokens in eight slots and a window's cross keys and values."""
    cache = build_static_cache(tiny_whisper(device), B, max_cache_len=S)
    for i in range(2):
        cache.self_attention_cache.update(*torch.randn(2, B, H, 5, D, device=device), i)
        cache.cross_attention_cache.update(*torch.randn(2, B, H, FRAMES, D, device=device), i)
        cache.is_updated[i] = True
    return cache


def states(*shape: int, **options: Any) -> torch.Tensor:
    return torch.randn(*shape, **options)


# Keys and values, and what the refusal says.
UPDATES: dict[str, tuple[Callable[[], tuple[Any, Any]], str]] = {
    "None": (lambda: (None, None), "must be tensors, got NoneType"),
    "arrays": (lambda: (np.zeros((B, H, 1, D)),) * 2, "must be tensors, got ndarray"),
    "no values": (lambda: (states(B, H, 1, D), None), "must be tensors, got Tensor and NoneType"),
    "three dims": (lambda: (states(H, 1, D), states(H, 1, D)), r"must be \(B, H, T, D\)"),
    "five dims": (lambda: (states(1, B, H, 1, D), states(1, B, H, 1, D)), r"must be \(B, H, T, D\)"),
    "no token": (lambda: (states(B, H, 0, D), states(B, H, 0, D)), "not empty"),
    "no sequence": (lambda: (states(0, H, 1, D), states(0, H, 1, D)), "not empty"),
    "fewer values": (lambda: (states(B, H, 2, D), states(B, H, 1, D)), "of one shape"),
    "one sequence": (lambda: (states(1, H, 1, D), states(1, H, 1, D)), r"do not fit keys \(1, 2, 1, 32\)"),
    "three sequences": (lambda: (states(3, H, 1, D), states(3, H, 1, D)), r"do not fit keys \(3, 2, 1, 32\)"),
    "another head": (lambda: (states(B, 3, 1, D), states(B, 3, 1, D)), r"do not fit keys \(2, 3, 1, 32\)"),
    "a narrower head": (lambda: (states(B, H, 1, 16), states(B, H, 1, 16)), r"do not fit keys \(2, 2, 1, 16\)"),
    "fp16": (lambda: (states(B, H, 1, D).half(), states(B, H, 1, D).half()), "keys are torch.float16"),
    "fp16 values": (lambda: (states(B, H, 1, D), states(B, H, 1, D).half()), "values are torch.float16"),
    "integers": (lambda: (states(B, H, 1, D).int(), states(B, H, 1, D).int()), "keys are torch.int32"),
    "meta": (lambda: (states(B, H, 1, D, device="meta"),) * 2, "on meta"),
    "a token more than fits": (lambda: (states(B, H, 4, D), states(B, H, 4, D)), "8 slots, 5 of them in use: 4 more"),
}
FRAMES_ONLY = "a token more than fits"


@pytest.mark.bad_input
@pytest.mark.parametrize("part", ["self_attention_cache", "cross_attention_cache"])
@pytest.mark.parametrize("what", UPDATES)
def test_states_that_do_not_fit_are_refused(
    cache: StaticEncoderDecoderCache, part: str, what: str, device: torch.device
) -> None:
    make, message = UPDATES[what]
    before = state(cache)
    message = "the encoder gave 4 frames" if (what, part) == (FRAMES_ONLY, "cross_attention_cache") else message
    for i in (0, 1):  # the layer that moves the position and one that does not
        with pytest.raises(ValueError, match=message), torch.device(device):
            getattr(cache, part).update(*make(), i)
    assert state(cache) == before


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("order", "error"),
    [
        pytest.param(order, error, id=str(order))
        for order, error in (
            (None, ValueError),
            ([1, 0], ValueError),
            (torch.tensor(1), ValueError),
            (torch.tensor([1]), ValueError),  # it would put one sequence into every row
            (torch.tensor([1, 0, 1]), ValueError),
            (torch.tensor([[1, 0]]), ValueError),
            (torch.tensor([1.0, 0.0]), ValueError),
            (torch.tensor([True, False]), ValueError),
            (torch.tensor([], dtype=torch.int64), ValueError),
            (torch.tensor([0, 2]), IndexError),
            (torch.tensor([-1, 0]), IndexError),
        )
    ],
)
def test_a_wrong_order_of_beams_is_refused(
    cache: StaticEncoderDecoderCache, order: Any, error: type[Exception], device: torch.device
) -> None:
    if error is IndexError and device.type == "cuda":
        pytest.skip("an index out of range is an assertion on the device, after which the process has no GPU any more")
    before = state(cache)
    with pytest.raises(error, match=r"beam_idx must be \(2,\)" if error is ValueError else "out of range"):
        cache.reorder_cache(order)  # whose device does not matter
    assert state(cache) == before


@pytest.mark.bad_input
@pytest.mark.parametrize("call", ["crop", "batch_repeat_interleave", "batch_select_indices"])
def test_what_a_static_cache_cannot_do_is_refused_by_name(cache: StaticEncoderDecoderCache, call: str) -> None:
    before = state(cache)
    with pytest.raises(TypeError, match=f"`{call}` is only defined for dynamic cache"):
        getattr(cache, call)(1)
    assert state(cache) == before


def one(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


LAYER = (one(B, H, 1, D), one(B, H, 1, D), one(B, H, FRAMES, D), one(B, H, FRAMES, D))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        pytest.param(layers, message, id=f"{i}")
        for i, (layers, message) in enumerate(
            [
                (None, "a legacy cache is"),
                ([], "a legacy cache is"),
                ((LAYER[:3],), "a legacy cache is"),
                ((("a", "b", "c", "d"),), "a legacy cache is"),
                (((None,) * 4,), "a legacy cache is"),
                ((tuple(t[0] for t in LAYER),), "a legacy cache is"),
                ((LAYER, tuple(t[:1] for t in LAYER)), "layers or their keys and values differ"),
                (((one(B, H, 1, D), one(B, H, 1, 16), *LAYER[2:]),), "layers or their keys and values differ"),
                (((one(1, H, 1, D), one(1, H, 1, D), *LAYER[2:]),), "layers or their keys and values differ"),
                (((*LAYER[:2], *(t.half() for t in LAYER[2:])),), "layers or their keys and values differ"),
                ((tuple(t.repeat(1, 1, 9, 1) for t in LAYER[:2]) + LAYER[2:],), "8 slots, 0 of them in use: 9 more"),
            ]
        )
    ],
)
def test_what_is_no_legacy_cache_is_refused(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StaticEncoderDecoderCache.from_legacy_cache(layers, S)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param(arguments, error, id=str(arguments))
        for arguments, error in (
            ({"batch_size": 1.0}, TypeError),
            ({"batch_size": "1"}, TypeError),
            ({"batch_size": True}, TypeError),
            ({"batch_size": torch.tensor(1)}, TypeError),
            ({"batch_size": None}, TypeError),
            ({"batch_size": 1, "max_cache_len": 8.5}, TypeError),
            ({"batch_size": 1, "num_frames": [8]}, TypeError),
            ({"batch_size": 0}, ValueError),
            ({"batch_size": -3}, ValueError),
            ({"batch_size": 1, "max_cache_len": 0}, ValueError),
            ({"batch_size": 1, "num_frames": -1}, ValueError),
        )
    ],
)
def test_a_cache_of_no_size_is_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="must be a whole number, got" if error is TypeError else "at least 1, got"):
        build_static_cache(tiny_whisper(), **arguments)
    assert build_static_cache(tiny_whisper(), np.int64(1)).get_max_length() == 64


@pytest.mark.bad_input
@pytest.mark.parametrize("sizes", [(0, 8, 8), (2, 0, 8), (2, 8, 0), (-1, 8, 8)])
def test_a_cache_made_by_hand_needs_sizes_too(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1, got num_layers="):
        StaticEncoderDecoderCache(*sizes, torch.device("cpu"))


@pytest.mark.bad_input
@pytest.mark.parametrize("size", [8.5, 8.0, "8", None, True, torch.tensor(8)], ids=repr)
@pytest.mark.parametrize("name", ["num_layers", "max_cache_len", "num_frames"])
def test_its_sizes_are_whole_numbers(name: str, size: Any) -> None:
    sizes = {"num_layers": 2, "max_cache_len": 8, "num_frames": 8, name: size}
    with pytest.raises(ValueError, match=re.escape(f"{name} must be a whole number, got {type(size).__name__} {size!r}")):
        StaticEncoderDecoderCache(**sizes, device=torch.device("cpu"))


@pytest.mark.bad_input
@pytest.mark.parametrize("slots", [8.5, "8", None], ids=repr)
def test_so_are_those_of_a_copy(cache: StaticEncoderDecoderCache, slots: Any) -> None:
    with pytest.raises(ValueError, match=f"max_cache_len must be a whole number, got .* {slots!r}"):
        StaticEncoderDecoderCache.from_legacy_cache(cache.to_legacy_cache(), slots)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "thing", [None, 3, "openai/whisper-tiny", torch.zeros(2), type(tiny_whisper), torch.nn.Linear], ids=str
)
@pytest.mark.parametrize("call", [accelerate, restore, is_accelerated, lambda thing: build_static_cache(thing, 1)])
def test_what_is_no_model_is_refused_by_its_type(call: Callable[[Any], Any], thing: Any) -> None:
    with pytest.raises(TypeError, match=f"takes a .*, got {type(thing).__name__}"):
        call(thing)
    with pytest.raises(TypeError, match="got"), accelerated(thing):
        pass


@pytest.mark.bad_input
@pytest.mark.parametrize("position", [-3, 9, 1 << 40])
def test_a_position_that_ran_away_on_the_device_shows_at_the_next_look(
    cache: StaticEncoderDecoderCache, position: int, device: torch.device
) -> None:
    """As after steps of a compiled graph, which the host does not count."""
    assert cache.check_length() == 5
    before = state(cache)[0]
    cache.get_seq_length().fill_(position)
    cache.self_attention_cache.update(*torch.randn(2, B, H, 2, D, device=device), 0)  # dropped
    with pytest.raises(ValueError, match=f"position is {position} and it has 8 slots: what fell outside"):
        cache.check_length()
    with pytest.raises(ValueError, match="was dropped"):
        cache.to_legacy_cache()
    cache.get_seq_length().fill_(5)
    assert state(cache)[0] == before


@pytest.mark.bad_input
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("tokens", [(7,), (7, 4)])
def test_a_step_that_fails_half_way_can_be_done_again(device: torch.device, layer: int, tokens: tuple[int, ...]) -> None:
    """The tokens that some layers have written already are not counted twice: there is room for as many as before."""
    decoding = Decoding(device, batch_size=B)
    caches = [build_static_cache(decoding.model, B, max_cache_len=2 + len(tokens)) for _ in range(2)]
    for cache in caches:
        decoding.step(cache, SOT, 5)

    def fail(*args: object) -> None:
        raise RuntimeError("in the middle")

    hook = decoding.model.model.decoder.layers[layer].fc2.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        decoding.step(caches[0], *tokens)
    hook.remove()
    if layer == 1:  # the last layer had moved the position
        assert caches[0].check_length() == 2 + len(tokens)
        return
    assert caches[0].check_length() == 2
    assert torch.equal(decoding.step(caches[0], *tokens), decoding.step(caches[1], *tokens))
    assert state(caches[0]) == state(caches[1])
