"""`generate` of an accelerated model given what does not fit: stock's error or result, and afterwards it works as before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_inputs import bits_of, tensors_in
from transformers import WhisperForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput
from whisper_models import FRAMES, SOT, VOCABULARY, mel, tensors_of, tiny_whisper

from whisper_triton import accelerate, build_static_cache
from whisper_triton.attention import STATE

pytest_plugins = ["whisper_fixtures"]
pytestmark = [pytest.mark.usefixtures("reference_kernels"), pytest.mark.filterwarnings("ignore")]

Model = WhisperForConditionalGeneration
# What `generate` is given besides two windows and max_new_tokens=4; "input_features" replaces them. Called with the model, so
# that a cache or an encoder's output can be made for it.
Arguments = Callable[[Model], dict[str, Any]]


def features(change: Callable[[torch.Tensor], Any]) -> Arguments:
    return lambda model: {"input_features": change(mel(2, model.device))}


def given(**kwargs: Any) -> Arguments:
    return lambda model: kwargs


def ids(*rows: list[int], dtype: torch.dtype = torch.int64) -> Arguments:
    return lambda model: {"decoder_input_ids": torch.tensor(rows, dtype=dtype, device=model.device)}


def encoded(batch_size: int, frames: int) -> Arguments:
    def make(model: Model) -> dict[str, Any]:
        states = torch.randn(batch_size, frames, 64, generator=torch.Generator().manual_seed(0)).to(model.device)
        return {"input_features": None, "encoder_outputs": BaseModelOutput(last_hidden_state=states)}

    return make


def filled(value: float, rows: int) -> Arguments:
    return features(lambda x: torch.cat([torch.full_like(x[:rows], value), x[rows:]]))


BAD: dict[str, Arguments] = {
    # the features
    "no features": given(input_features=None),
    "features as text": given(input_features="speech.wav"),
    "features as a list": features(torch.Tensor.tolist),
    "features as an array": features(lambda x: x.cpu().numpy()),
    "features without batch": features(lambda x: x[0]),
    "features of four dims": features(lambda x: x[None]),
    "a mel bin less": features(lambda x: x[:, 1:]),
    "a mel bin more": features(lambda x: torch.cat([x, x[:, :1]], 1)),
    "a frame less": features(lambda x: x[..., 1:]),
    "half a window": features(lambda x: x[..., :FRAMES]),
    "no frame": features(lambda x: x[..., :0]),
    "no window": features(lambda x: x[:0]),
    "features in float64": features(torch.Tensor.double),
    "features in fp16": features(torch.Tensor.half),
    "whole numbers": features(torch.Tensor.int),
    "complex features": features(lambda x: x.to(torch.complex64)),
    "features on meta": features(lambda x: x.to("meta")),
    "sparse features": features(torch.Tensor.to_sparse),
    "transposed in memory": features(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "one window seen twice": features(lambda x: x[:1].expand(2, -1, -1)),
    "NaN everywhere": filled(torch.nan, 2),
    "NaN in one window": filled(torch.nan, 1),
    "infinite features": filled(torch.inf, 1),
    "minus infinity": filled(-torch.inf, 2),
    "features beyond fp32's squares": filled(1e30, 1),
    "silence": filled(0.0, 2),
    # the prompt
    "a token past the vocabulary": ids([VOCABULARY], [SOT]),
    "a token below the vocabulary": ids([-1], [SOT]),
    "tokens as floats": ids([SOT], [SOT], dtype=torch.float32),
    "tokens of one row": ids([SOT]),
    "tokens of three rows": ids([SOT], [SOT], [SOT]),
    "no token": ids([], []),
    "a prompt of all positions": ids([SOT] * 64, [SOT] * 64),
    "a prompt past the positions": ids([SOT] * 65, [SOT] * 65),
    "prompt ids as a list": given(prompt_ids=[1, 2]),
    "prompt ids past the vocabulary": lambda model: {"prompt_ids": torch.tensor([VOCABULARY], device=model.device)},
    "prompt ids of two dims": lambda model: {"prompt_ids": torch.ones(2, 2, dtype=torch.int64, device=model.device)},
    "a prompt of 200": lambda model: {"prompt_ids": torch.ones(200, dtype=torch.int64, device=model.device)},
    # how much
    "no new token": given(max_new_tokens=0),
    "less than no token": given(max_new_tokens=-1),
    "tokens past the positions": given(max_new_tokens=1000),
    "tokens as text": given(max_new_tokens="3"),
    "half a token": given(max_new_tokens=2.5),
    "a length of none": given(max_new_tokens=None, max_length=0),
    "a length below the prompt": given(max_new_tokens=None, max_length=1),
    "more at least than at most": given(min_new_tokens=30),
    # how
    "no beam": given(num_beams=0),
    "minus one beam": given(num_beams=-1),
    "two greedy sequences": given(num_return_sequences=2),
    "a negative temperature": given(do_sample=True, temperature=-1.0),
    "a temperature of none": given(do_sample=True, temperature=0.0),
    "top-k of none": given(do_sample=True, top_k=0),
    "top-k below none": given(do_sample=True, top_k=-5),
    "top-p of two": given(do_sample=True, top_p=2.0),
    "a penalty of none": given(repetition_penalty=0.0),
    "a language of a model that has one": given(language="de"),
    "a task of a model that has one": given(task="translate"),
    "no language of this world": given(language="klingon"),
    "a task nobody knows": given(task="sing"),
    "tokens to suppress past the vocabulary": given(suppress_tokens=[9999]),
    "tokens to suppress as text": given(suppress_tokens="none"),
    "an argument nobody knows": given(colour="red"),
    "a cache nobody knows": given(cache_implementation="marble"),
    "a configuration as a dict": given(generation_config={}),
    "processors that are none": given(logits_processor=[None]),
    "criteria that are none": given(stopping_criteria=3),
    "a streamer that is none": given(streamer=3),
    "an assistant that is none": given(assistant_model="small"),
    "a mask of one row": given(attention_mask=torch.ones(1, 2 * FRAMES)),
    "a decoder mask that is too long": given(decoder_attention_mask=torch.ones(2, 9)),
    # what it is to decode over
    "a cache as a list": given(past_key_values=[]),
    "a cache of the decoder alone": lambda model: {"past_key_values": DynamicCache()},
    "stock's static cache of another batch": lambda model: {
        "past_key_values": EncoderDecoderCache(*(StaticCache(model.config, max_cache_len=n) for n in (64, FRAMES)))
    },
    "states of one window": encoded(1, FRAMES),
    "states of a frame less": encoded(2, FRAMES - 1),
    "states without a frame": encoded(2, 0),
    "states of another width": given(input_features=None, encoder_outputs=BaseModelOutput(torch.ones(2, 9, 3))),
}


def outcome(model: Model, make: Arguments) -> tuple[Any, ...]:
    """What came of a call: an error's type and message, or the tensors."""
    torch.manual_seed(0)
    kwargs = {"input_features": mel(2, model.device), "max_new_tokens": 4}
    try:
        return tuple(tensors_of(model.generate(**(kwargs | make(model)))).items())
    except Exception as error:
        return type(error), str(error)


def assert_same_outcome(ours: tuple[Any, ...], stock: tuple[Any, ...]) -> None:
    if isinstance(stock[0], type) or isinstance(ours[0], type):
        assert isinstance(ours[0], type)
        assert isinstance(stock[0], type)
        assert ours == stock or ours[0] is ValueError, ours  # from our own checks, which come earlier
        assert ours[1]  # it says something
    else:
        for (path, found), (expected_path, expected) in zip(ours, stock, strict=True):
            assert path == expected_path
            assert torch.equal(found, expected), path


def everything(model: Model) -> list[torch.Tensor]:
    return [bits_of(tensor) for tensor in tensors_in(model.state_dict())]


@pytest.fixture(scope="module")
def models(device: torch.device) -> tuple[Model, Model]:
    """The same model, accelerated and stock."""
    return accelerate(tiny_whisper(device, seed=3)), tiny_whisper(device, seed=3)


@pytest.fixture(scope="module")
def good(models: tuple[Model, Model]) -> tuple[Any, ...]:
    return outcome(models[1], given())


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.mark.bad_input
@pytest.mark.parametrize("what", BAD)
def test_stocks_error_or_stocks_result(
    what: str, models: tuple[Model, Model], good: tuple[Any, ...], eager_steps: None
) -> None:
    ours, stock = models
    before = everything(ours)
    assert_same_outcome(outcome(ours, BAD[what]), outcome(stock, BAD[what]))
    assert all(map(torch.equal, everything(ours), before))
    assert getattr(ours, STATE).in_use is None
    assert ours.config._attn_implementation == "whisper_triton"
    assert_same_outcome(outcome(ours, given()), good)


@pytest.mark.bad_input
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_cache_of_ours_for_another_batch_is_refused_and_left_alone(
    models: tuple[Model, Model], good: tuple[Any, ...], batch_size: int, used: bool, eager_steps: None
) -> None:
    model = models[0]
    cache = build_static_cache(model, batch_size)
    if used:
        model.generate(mel(batch_size, model.device), max_new_tokens=2, past_key_values=cache)
    layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    before = [bits_of(t) for layer in layers for t in (layer.keys, layer.values, layer.cumulative_length)]
    found = outcome(model, given(past_key_values=cache))
    assert isinstance(found[0], type)
    assert issubclass(found[0], ValueError | RuntimeError)
    after = [bits_of(t) for layer in layers for t in (layer.keys, layer.values, layer.cumulative_length)]
    assert all(map(torch.equal, after, before))
    assert_same_outcome(outcome(model, given()), good)
