"""Calls of `generate` that were drawn at random, or are like them, and once came out differently from stock's."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, StoppingCriteriaList, WhisperForConditionalGeneration
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import MaxLengthCriteria
from whisper_models import EOS, NO_TIMESTAMPS, SOT, START_OF_PREVIOUS, assert_same, mel, tiny_whisper

from whisper_triton import accelerated, model_state

ROOT = Path(__file__).parents[1]

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels", "eager_steps")


def assert_as_stock(model: WhisperForConditionalGeneration, features: torch.Tensor, **kwargs: Any) -> None:
    stock = model.generate(features, **kwargs)
    exact = copy.deepcopy(model).double().generate(features.double(), **kwargs)
    with accelerated(model):
        for _ in range(2):  # the second call finds the buffers of the first
            assert_same(model.generate(features, **kwargs), stock, exact)


def test_a_length_of_the_users_beyond_the_calls(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_state, "MIN_SLOTS", 8)
    criteria = StoppingCriteriaList([MaxLengthCriteria(40)])
    assert_as_stock(tiny_whisper(device, seed=3), mel(2, device), max_new_tokens=4, stopping_criteria=criteria)


def test_a_prompt_that_fills_the_cache_before_a_last_token(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, loops: list[int]
) -> None:
    monkeypatch.setattr(model_state, "MIN_SLOTS", 8)
    prompt = torch.tensor([START_OF_PREVIOUS, *[7] * 5], device=device)  # eight tokens with the usual two
    assert_as_stock(tiny_whisper(device, seed=3), mel(2, device), prompt_ids=prompt, max_new_tokens=1)
    assert loops == [0, 0]


@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_inference_mode_in_one_call_and_not_in_another(modes: tuple[Any, Any], device: torch.device) -> None:
    model, features = tiny_whisper(device, seed=3), mel(1, device)
    stock = model.generate(features, max_new_tokens=8)
    with accelerated(model):
        for mode in modes:
            with mode():
                assert torch.equal(model.generate(features, max_new_tokens=8), stock)


def test_a_threshold_without_a_pad_token(device: torch.device, loops: list[int]) -> None:
    model = tiny_whisper(device, seed=3)
    model.model.decoder.embed_tokens.weight.data[EOS] *= 4  # so that one row ends before the other
    model.generation_config.pad_token_id = None
    for threshold in (-2.0, -4.0):
        kwargs = {"logprob_threshold": threshold, "temperature": (0.0, 0.5), "top_k": 1}
        assert_as_stock(model, mel(2, device), **kwargs)
    assert loops


def test_a_subclass_with_a_forward_pass_of_its_own(device: torch.device, loops: list[int]) -> None:
    class Contrary(WhisperForConditionalGeneration):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = -output.logits
            return output

    model = tiny_whisper(device, seed=3)
    model.__class__ = Contrary
    assert_as_stock(model, mel(2, device))
    assert not loops


def test_a_class_whose_forward_pass_was_replaced(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = WhisperForConditionalGeneration.forward

    def contrary(self: WhisperForConditionalGeneration, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = -output.logits
        return output

    monkeypatch.setattr(WhisperForConditionalGeneration, "forward", contrary)
    assert_as_stock(tiny_whisper(device, seed=3), mel(2, device))


@pytest.mark.parametrize(
    "name", ["prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_has_unfinished_sequences"]
)
def test_a_method_of_the_loops_that_was_replaced(name: str, device: torch.device, loops: list[int]) -> None:
    model, calls = tiny_whisper(device, seed=3), []
    stock = getattr(model, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return stock(*args, **kwargs)

    setattr(model, name, counted)
    with accelerated(model):
        model.generate(mel(1, device), max_new_tokens=8, min_new_tokens=8)
    assert len(calls) >= 7
    assert not loops


def test_the_classs_generate_hands_out_a_cache_that_stays(device: torch.device) -> None:
    model, prompt = tiny_whisper(device, seed=3), torch.tensor([[SOT, NO_TIMESTAMPS]] * 2, device=device)
    with accelerated(model):
        kwargs = {"decoder_input_ids": prompt, "return_dict_in_generate": True, "max_new_tokens": 9}
        cache = GenerationMixin.generate(model, mel(2, device), **kwargs).past_key_values
        keys = cache.self_attention_cache.layers[0].keys
        before = keys.clone()
        model.generate(mel(2, device, seed=9), max_new_tokens=12)
    assert type(cache) is EncoderDecoderCache
    assert torch.equal(keys, before)


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_tensor_in_place_of_the_encoders_outputs(cache: str | None, device: torch.device) -> None:
    model = tiny_whisper(device, seed=3)
    states = model.model.encoder(mel(1, device)).last_hidden_state.detach()
    kwargs = {"encoder_outputs": states, "max_new_tokens": 8, "cache_implementation": cache, "disable_compile": True}
    stock = model.generate(**kwargs)
    with accelerated(model):
        assert torch.equal(model.generate(**kwargs), stock)


def test_a_subclass_that_changes_nothing_has_our_loop(device: torch.device, loops: list[int]) -> None:
    class Plain(WhisperForConditionalGeneration):
        pass

    model = tiny_whisper(device, seed=3)
    model.__class__ = Plain
    assert_as_stock(model, mel(2, device))
    assert len(loops) == 2


BEFORE_THE_IMPORT = """
import functools
from transformers import WhisperForConditionalGeneration as Whisper

forward = Whisper.forward

@functools.wraps(forward)
def contrary(self, *args, **kwargs):
    output = forward(self, *args, **kwargs)
    output.logits = -output.logits
    return output

Whisper.forward = contrary

from whisper_triton.coverage import has_stocks_forward, has_stocks_loop
from whisper_models import tiny_whisper

print(has_stocks_forward(tiny_whisper()), has_stocks_loop(tiny_whisper(), {}))
"""


def test_a_class_whose_forward_pass_was_replaced_before_the_import() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    command = [sys.executable, "-c", BEFORE_THE_IMPORT]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "False False\n"


def test_one_prompt_for_several_rows_fails_as_stock_does(device: torch.device) -> None:
    model, prompt = tiny_whisper(device, seed=3), torch.tensor([[SOT, NO_TIMESTAMPS]], device=device)
    with pytest.raises((AttributeError, IndexError)) as stock:
        model.generate(mel(3, device), decoder_input_ids=prompt, max_new_tokens=8)
    with accelerated(model), pytest.raises(stock.type):
        model.generate(mel(3, device), decoder_input_ids=prompt, max_new_tokens=8)
