"""What stands in for a configuration in `generate` is copied as the configuration is."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, WhisperForConditionalGeneration
from whisper_models import mel, tiny_whisper

from whisper_triton import accelerate
from whisper_triton.stand_ins import ConfigStandIn, stand_in

pytest_plugins = ["whisper_fixtures"]


def config() -> GenerationConfig:
    """One with everything that is copied in a way of its own."""
    config = copy.deepcopy(tiny_whisper(is_multilingual=True).generation_config)
    config.empty, config.mixed, config.pairs = [], [1, [2]], {1: "one", (2,): 2}
    config.named, config.kept_dtype = {"dtype": torch.float16, "inner": {"dtype": torch.float32}}, torch.float16
    config.token, config._eos_token_tensor = torch.tensor([3, 4]), torch.tensor([5])
    config._commit_hash, config._mask_length = "abc", 7
    return config


def plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in attributes.items()}


def test_its_copies_are_those_of_the_configuration():
    one = config()
    copied, wanted = copy.deepcopy(stand_in(one)), copy.deepcopy(one)
    assert type(copied) is GenerationConfig
    assert plain(vars(copied)) == plain(vars(wanted))
    assert plain(stand_in(one).to_dict()) == plain(one.to_dict())


def test_nothing_of_a_copy_is_the_configurations():
    one = config()
    before = copy.deepcopy(one)
    for copied in (vars(copy.deepcopy(stand_in(one))), stand_in(one).to_dict()):
        for name, value in copied.items():
            if isinstance(value, list | dict | torch.Tensor):
                assert value is not getattr(one, name), name
        copied["mixed"][1].append(3)
        copied["named"]["inner"]["dtype"] = None
    assert plain(vars(one)) == plain(vars(before))


def test_what_is_one_object_stays_one():
    one = config()
    one.me, one.same, one.inside = one, one.empty, [one.empty]
    one.update = MethodType(lambda self, **kwargs: GenerationConfig.update(self, **kwargs), one)
    for copied in (copy.deepcopy(stand_in(one)), copy.deepcopy(one)):
        assert copied.me is copied
        assert copied.same is copied.empty is copied.inside[0]
        assert copied.update.__self__ is copied


class Own(GenerationConfig):
    """A user's class, which may be copied in its own way."""


@pytest.mark.parametrize("value", [None, {"max_length": 3}, Own()])
def test_what_may_be_copied_otherwise_stays_itself(value):
    assert stand_in(value) is value


def test_a_configuration_with_a_method_of_its_own_stays_itself():
    one = GenerationConfig()
    assert isinstance(stand_in(one), ConfigStandIn)
    one.to_dict = dict
    assert stand_in(one) is one


def test_where_the_class_is_patched_it_is_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(GenerationConfig, "to_dict", lambda self: {})
    one = GenerationConfig()
    assert stand_in(one) is one


@pytest.mark.usefixtures("reference_kernels")
def test_a_class_that_prepares_the_configuration_itself_is_asked(device: torch.device):
    class Brief(WhisperForConditionalGeneration):
        def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
            return super()._prepare_generation_config(*args, **(kwargs | {"max_new_tokens": 3}))

    model = tiny_whisper(device, seed=3)
    model.__class__ = Brief
    features = mel(1, device)
    stock = model.generate(features)
    accelerate(model)
    for _ in range(2):  # the second knows that there are no settings in the model's configuration
        assert torch.equal(model.generate(features), stock)
