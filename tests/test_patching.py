"""`accelerate` and `restore`: in place, reversible without a trace, and invisible to all that uses a model."""

import copy
import gc
import inspect
import io
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    StoppingCriteria,
    StoppingCriteriaList,
    WhisperForAudioClassification,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
    WhisperModel,
    pipeline,
)
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.whisper.modeling_whisper import WhisperAttention
from whisper_models import assert_generates_as_stock, assert_same, mel, tensors_of, tiny_whisper

from whisper_triton import accelerate, accelerated, build_static_cache, is_accelerated, restore
from whisper_triton.attention import TritonAttention
from whisper_triton.encoded import ENCODED
from whisper_triton.generation import OVERRIDES

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels")


def traces(model: nn.Module) -> dict[str, Any]:
    """All that `accelerate` might touch: classes, attributes, parameters, hooks and configurations."""
    found: dict[str, Any] = {"config": model.config.to_dict(), "vars of config": copy.copy(vars(model.config))}
    found["generation config"] = model.generation_config.to_dict()
    for name, module in model.named_modules():
        attributes = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        found[name] = (type(module), sorted(vars(module)), {key: id(value) for key, value in attributes.items()})
        found[f"{name} hooks"] = (list(module._forward_hooks.values()), list(module._forward_pre_hooks.values()))
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            # On a GPU an encoder's graph packs weights: what counts is that each has memory of its own again.
            memory = tensor.data_ptr() if tensor.device.type == "cpu" else tensor.untyped_storage().nbytes()
            found[f"{name}.{key}"] = (id(tensor), memory)
    return found


class TestAccelerate:
    def test_it_returns_the_model_itself(self) -> None:
        model = tiny_whisper()
        assert not is_accelerated(model)
        assert accelerate(model) is model
        assert is_accelerated(model)

    def test_twice_is_as_good_as_once(self) -> None:
        model = tiny_whisper()
        before = traces(model)
        once = traces(accelerate(model))
        assert traces(accelerate(model)) == once
        assert traces(restore(model)) == before

    def test_print_shows_it(self) -> None:
        model = tiny_whisper()
        before = repr(model)
        assert repr(accelerate(model)) == before.replace("WhisperAttention", "TritonAttention") != before
        assert repr(restore(model)) == before

    def test_another_model_and_the_classes_stay_as_they_are(self) -> None:
        other = tiny_whisper()
        before = traces(other)
        methods = [dict(vars(owner)) for owner in (WhisperAttention, WhisperForConditionalGeneration)]
        accelerate(tiny_whisper()).generate(mel(1), max_new_tokens=3)
        assert traces(other) == before
        assert [dict(vars(owner)) for owner in (WhisperAttention, WhisperForConditionalGeneration)] == methods

    @pytest.mark.parametrize(
        "make",
        [
            lambda: WhisperModel(tiny_whisper().config),
            lambda: WhisperForCausalLM(tiny_whisper().config),
            lambda: WhisperForAudioClassification(tiny_whisper().config),
            lambda: nn.Linear(2, 2),
            lambda: "openai/whisper-tiny",
            lambda: None,
        ],
    )
    def test_anything_else_is_refused_by_type(self, make: Callable[[], Any]) -> None:
        thing = make()
        with pytest.raises(TypeError, match=f"takes a WhisperForConditionalGeneration, got {type(thing).__name__}"):
            accelerate(thing)

    def test_it_survives_a_change_of_dtype(self, device: torch.device) -> None:
        model, features = accelerate(tiny_whisper(device, seed=3)), mel(2, device)
        model.generate(features, max_new_tokens=8)
        assert model.bfloat16().generate(features.bfloat16(), max_new_tokens=8).shape == (2, 8)
        stock = tiny_whisper(device, seed=3).bfloat16().float().generate(features, max_new_tokens=8)
        assert model.float().generate(features, max_new_tokens=8).tolist() == stock.tolist()

    @pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
    def test_another_attention_chosen_afterwards_is_stocks(self, device: torch.device, attn_implementation: str) -> None:
        model, features = accelerate(tiny_whisper(device, seed=3)), mel(2, device)
        model.set_attn_implementation(attn_implementation)
        stock = tiny_whisper(device, seed=3, attn_implementation=attn_implementation)
        kwargs = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
        ours, wanted = model.generate(features, **kwargs), stock.generate(features, **kwargs)
        assert all(map(torch.equal, ours.logits, wanted.logits))

    @pytest.mark.parametrize("how", ["by name", "of another's configuration"])
    def test_attention_weights_of_a_model_that_has_our_attention_already(self, how: str, device: torch.device) -> None:
        stock, name = tiny_whisper(device, seed=3, attn_implementation="eager"), "whisper_triton"
        if how == "by name":
            model = tiny_whisper(device, seed=3, attn_implementation=name)
        else:  # of one that is no more
            model = type(stock)(accelerate(copy.deepcopy(stock)).config).to(device).eval()
            model.load_state_dict(stock.state_dict())
            gc.collect()
        assert model.config._attn_implementation == name
        inputs = {"input_features": mel(2, device), "decoder_input_ids": torch.tensor([[5, 6, 7]] * 2, device=device)}
        with torch.no_grad():
            wanted, ours = (one(**inputs, output_attentions=True) for one in (stock, accelerate(model)))
        for kind in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
            assert len(ours[kind]) == len(wanted[kind]) > 0
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours[kind], wanted[kind], strict=True))

    def test_a_generate_inside_a_generate_does_not_disturb_it(self, device: torch.device) -> None:
        """On a GPU both would else share one captured step and its cache."""
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        stock = model.generate(features, max_new_tokens=10).tolist()
        inner = model.generate(features.flip(0), max_new_tokens=4).tolist()

        class Disturb(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
                found.append(model.generate(features.flip(0), max_new_tokens=4).tolist())
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        found: list[Any] = []
        with accelerated(model):
            ours = model.generate(features, max_new_tokens=10, stopping_criteria=StoppingCriteriaList([Disturb()]))
        assert ours.tolist() == stock
        assert found == [inner] * 10


class TestRestore:
    @pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
    def test_another_attention_chosen_meanwhile_stays(self, device: torch.device, attn_implementation: str) -> None:
        model, features = accelerate(tiny_whisper(device, seed=3)), mel(2, device)
        model.set_attn_implementation(attn_implementation)
        restore(model)
        assert model.config._attn_implementation == attn_implementation
        stock = tiny_whisper(device, seed=3, attn_implementation=attn_implementation)
        kwargs = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
        ours, wanted = model.generate(features, **kwargs), stock.generate(features, **kwargs)
        assert all(map(torch.equal, ours.logits, wanted.logits))

    @pytest.mark.parametrize("attn_implementation", ["sdpa", "eager", "whisper_triton"])
    def test_it_leaves_no_trace(self, device: torch.device, attn_implementation: str) -> None:
        model = tiny_whisper(device, attn_implementation=attn_implementation)
        before = traces(model)
        accelerate(model)
        assert model.config._attn_implementation == "whisper_triton"
        model.generate(mel(2, device), max_new_tokens=5)
        model.generate(mel(1, device, seconds=2), max_new_tokens=5, return_timestamps=True, num_beams=2)
        assert traces(model) != before
        assert restore(model) is model
        assert traces(model) == before
        assert not is_accelerated(model)

    def test_a_model_that_is_not_accelerated_stays_as_it_is(self) -> None:
        model = tiny_whisper()
        before = traces(model)
        assert traces(restore(model)) == before

    def test_it_undoes_what_return_token_timestamps_left(self, device: torch.device) -> None:
        model = accelerate(tiny_whisper(device))
        model.generate(mel(1, device), return_token_timestamps=True, max_new_tokens=5)
        assert restore(model).config._attn_implementation == "sdpa"

    def test_a_method_kept_from_the_accelerated_model_is_stocks_afterwards(self, device: torch.device, tmp_path: Path) -> None:
        """As a forward pass is that was compiled in between."""
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        stock = model.generate(features, max_new_tokens=5).tolist()
        accelerate(model)
        generate, forward, save_pretrained = model.generate, model.forward, model.save_pretrained
        model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
        restore(model)
        assert model.generate(features, max_new_tokens=5).tolist() == stock
        assert generate(features, max_new_tokens=5).tolist() == stock
        save_pretrained(tmp_path)
        assert WhisperForConditionalGeneration.from_pretrained(tmp_path).config._attn_implementation == "sdpa"

    def test_the_context_manager_restores_after_an_error_too(self) -> None:
        model = tiny_whisper()
        before = traces(model)
        with accelerated(model) as entered:
            assert entered is model
            assert is_accelerated(model)
        assert traces(model) == before
        with pytest.raises(ZeroDivisionError), accelerated(model):
            _ = 1 / 0
        assert traces(model) == before

    def test_the_context_manager_leaves_a_model_accelerated_that_was(self) -> None:
        model = accelerate(tiny_whisper())
        before = traces(model)
        with accelerated(model), accelerated(model):
            pass
        assert traces(model) == before


class TestCheckpoints:
    def test_the_state_dict_holds_the_same_tensors_under_the_same_names(self) -> None:
        model = tiny_whisper()
        before, parameters = model.state_dict(), dict(model.named_parameters())
        accelerate(model)
        assert {name: t.data_ptr() for name, t in model.state_dict().items()} == {
            name: t.data_ptr() for name, t in before.items()
        }
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        model.load_state_dict(before)

    @pytest.mark.parametrize("output_attentions", [False, True])
    def test_saved_files_are_the_same_byte_for_byte(self, tmp_path: Path, output_attentions: bool) -> None:
        model = tiny_whisper(attn_implementation="eager")
        model.config.output_attentions = output_attentions
        model.save_pretrained(tmp_path / "stock")
        accelerate(model).save_pretrained(tmp_path / "ours")
        stock = {path.name: path.read_bytes() for path in (tmp_path / "stock").iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors"} <= set(stock)
        assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == stock

    def test_a_saved_model_loads_as_a_stock_one(self, device: torch.device, tmp_path: Path) -> None:
        model, features = accelerate(tiny_whisper(device, seed=3)), mel(2, device)
        model.save_pretrained(tmp_path)
        loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path).to(device)
        assert not is_accelerated(loaded)
        assert loaded.config._attn_implementation == "sdpa"
        assert repr(loaded) == repr(restore(copy.deepcopy(model)))
        assert loaded.generate(features, max_new_tokens=8).tolist() == model.generate(features, max_new_tokens=8).tolist()

    def test_a_deep_copy_is_accelerated_and_on_its_own(self, device: torch.device) -> None:
        model, features = accelerate(tiny_whisper(device, seed=3)), mel(2, device)
        tokens = model.generate(features, max_new_tokens=8).tolist()
        twin = copy.deepcopy(model)
        assert is_accelerated(twin)
        assert twin.generate.__self__ is twin
        assert twin.generate(features, max_new_tokens=8).tolist() == tokens
        for parameter in twin.parameters():
            parameter.data.mul_(1.5)
        assert twin.generate(features, max_new_tokens=8).tolist() != tokens
        restore(twin)
        assert is_accelerated(model)
        assert model.generate(features, max_new_tokens=8).tolist() == tokens

    def test_a_pickled_model_works_and_restores(self, device: torch.device) -> None:
        model, features = accelerate(tiny_whisper(device, seed=3)), mel(2, device)
        tokens = model.generate(features, max_new_tokens=8).tolist()
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert loaded.generate(features, max_new_tokens=8).tolist() == tokens
        restore(loaded)
        assert not is_accelerated(loaded)
        assert repr(loaded) == repr(restore(model))
        assert loaded.generate(features, max_new_tokens=8).tolist() == tokens


class TestGuests:
    """What others have put into a model stays where it is and goes on working."""

    def test_hooks(self, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3)
        seen: list[str] = []
        handles = [
            module.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
            for module in model.modules()
            if isinstance(module, WhisperAttention)
        ]
        model.model.decoder.layers[0].fc2.register_forward_hook(lambda module, args, output: output * 0.5)
        assert_generates_as_stock(model, mel(2, device), max_new_tokens=12, distinct=4)
        stock, ours = seen.count("WhisperAttention"), seen.count("TritonAttention")
        assert stock == 2 * ours == 2 * (3 + 12 * 4)  # stock ran in float32 and float64
        for handle in handles:
            handle.remove()
        assert not any(module._forward_hooks for module in model.modules() if isinstance(module, WhisperAttention))

    def test_replaced_submodules(self, device: torch.device) -> None:
        """As adapters and quantised layers do."""

        class Adapter(nn.Module):
            def __init__(self, base: nn.Linear) -> None:
                super().__init__()
                self.base, self.down, self.up = base, nn.Linear(64, 4), nn.Linear(4, 64)

            def forward(self, states: torch.Tensor) -> torch.Tensor:
                return self.base(states) + self.up(self.down(states))

        model = tiny_whisper(seed=3)
        adapters = set()
        for layer in model.model.decoder.layers:
            for module in (layer.self_attn, layer.encoder_attn):
                for name in ("q_proj", "v_proj"):
                    adapter = Adapter(getattr(module, name))
                    setattr(module, name, adapter)
                    adapters.add(adapter)
        model.to(device)
        assert_generates_as_stock(model, mel(2, device), max_new_tokens=12, distinct=4)
        accelerate(model)
        assert {module for module in model.modules() if isinstance(module, Adapter)} == adapters

    def test_a_subclass_of_the_attention_module(self, device: torch.device) -> None:
        class Louder(WhisperAttention):
            def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
                out, weights = super().forward(*args, **kwargs)
                return out * 1.5, weights

        model = tiny_whisper(device, seed=3)
        model.model.decoder.layers[0].self_attn.__class__ = Louder
        assert_generates_as_stock(model, mel(2, device), max_new_tokens=12)
        accelerate(model)
        assert type(model.model.decoder.layers[0].self_attn) is Louder
        assert type(model.model.decoder.layers[0].encoder_attn) is TritonAttention
        assert type(restore(model).model.decoder.layers[0].self_attn) is Louder

    def test_a_forward_pass_of_the_users_own(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        stock = model.generate(features, max_new_tokens=5).tolist()
        inner, runs = model.forward, []

        def forward(*args: Any, **kwargs: Any) -> Any:
            runs.append(1)
            return inner(*args, **kwargs)

        model.forward = forward
        before = traces(model)
        with accelerated(model):
            assert model.forward is forward
            assert model.generate(features, max_new_tokens=5).tolist() == stock
        assert len(runs) == 5
        assert traces(model) == before


def test_a_call_that_stock_refuses_leaves_nothing_behind(device):
    model = accelerate(tiny_whisper(device))
    with pytest.raises(AttributeError):
        model.generate(mel(1, device), generation_config={"max_new_tokens": 4})
    assert (model._whisper_triton.owner, ENCODED.get()) == (None, None)


class TestTokenTimestamps:
    def test_they_are_stocks(self, device: torch.device) -> None:
        """Stock sets eager attention for them, and for good: so each run has a model of its own."""
        results = []
        for prepare, dtype in ((accelerate, torch.float32), (restore, torch.float32), (restore, torch.float64)):
            model = prepare(tiny_whisper(device, seed=3, dtype=dtype))
            results.append(
                model.generate(
                    mel(2, device, seconds=2).to(dtype),
                    return_timestamps=True,
                    return_token_timestamps=True,
                    attention_mask=torch.ones(2, 200, dtype=torch.int64, device=device),
                )
            )
        assert_same(*results)
        assert results[1]["token_timestamps"].unique().numel() > 4

    def test_they_do_not_end_the_acceleration(self, device: torch.device, calls: Counter[str]) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        stock = model.generate(features, max_new_tokens=8).tolist()
        accelerate(model)
        for _ in range(2):
            model.generate(features, return_token_timestamps=True, max_new_tokens=8)
            assert model.config._attn_implementation == "whisper_triton"
        assert not calls
        with accelerated(copy.deepcopy(model)) as fresh:  # on a GPU only the first step of a model calls, then a graph does
            assert fresh.generate(features, max_new_tokens=8).tolist() == stock
        assert set(calls) == {"append_attention", "decode_attention"} or device.type == "cuda"

    def test_an_error_in_generate_does_not_end_it_either(self, device: torch.device) -> None:
        class Broken(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
                raise RuntimeError(f"attention is {model.config._attn_implementation}")

        model = accelerate(tiny_whisper(device))
        criteria = StoppingCriteriaList([Broken()])
        with pytest.raises(RuntimeError, match="attention is eager"):
            model.generate(mel(1, device), return_token_timestamps=True, stopping_criteria=criteria)
        assert model.config._attn_implementation == "whisper_triton"


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"cache_implementation": "offloaded_static", "disable_compile": True}, "cache_implementation='offloaded_static'"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True"),
        ({"return_token_timestamps": True}, "output_attentions=True"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_takes_stocks_cache_says_so_once(
    device: torch.device, kwargs: dict[str, Any], reason: str, fallbacks: Callable[[], list[str]]
) -> None:
    if "offloaded" in kwargs.get("cache_implementation", "") and device.type == "cpu":
        pytest.skip("transformers offloads from a GPU only")
    model, features = tiny_whisper(device, seed=3), mel(1, device)
    stock = model.generate(features, max_new_tokens=4, **kwargs)
    with accelerated(model):
        for _ in range(2):
            ours = model.generate(features, max_new_tokens=4, **kwargs)
            for path, tensor in tensors_of(stock).items():
                assert tensor.is_floating_point() or torch.equal(tensors_of(ours)[path], tensor), path
    assert fallbacks().count(f"generate runs over stock's cache, one kernel at a time: {reason}") == 1


def test_an_assistant_and_a_cache_of_the_users_say_so_too(device: torch.device, fallbacks: Callable[[], list[str]]) -> None:
    model, features = accelerate(tiny_whisper(device, seed=3)), mel(1, device)
    model.generate(features, max_new_tokens=2, assistant_model=accelerate(tiny_whisper(device, seed=5)))
    model.generate(features, max_new_tokens=2, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    said = [line.rpartition(": ")[2] for line in fallbacks() if line.startswith("generate runs over stock's cache")]
    assert said == ["assisted_generation", "the model is another's assistant"]
    assert fallbacks()[-1] == "steps are not replayed: generate runs over the cache that it was given"


def test_of_a_cache_of_ours_that_is_given_nobody_says_that_it_is_stocks(
    device: torch.device, calls: Counter[str], fallbacks: Callable[[], list[str]]
) -> None:
    model, features = tiny_whisper(device, seed=3), mel(2, device)
    stock = model.generate(features, max_new_tokens=4)
    accelerate(model)
    for _ in range(2):
        cache = build_static_cache(model, 2, is_compileable=False)
        assert torch.equal(model.generate(features, max_new_tokens=4, past_key_values=cache), stock)
        assert cache.check_length() > 0
    assert set(calls) == {"append_attention", "decode_attention"}
    assert fallbacks() == ["steps are not replayed: generate runs over the cache that it was given"]


@pytest.mark.usefixtures("eager_steps")
def test_steps_that_no_graph_covers_say_so_once(device: torch.device, fallbacks: Callable[[], list[str]]) -> None:
    kwargs = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 4}
    model = accelerate(tiny_whisper(device, seed=3, decoder_ffn_dim=448))  # which the chain does not take: modules are quicker
    features = mel(1, device)
    for _ in range(2):
        model.generate(features, **kwargs)
    said = ["tokens are chosen in stock's loop: output_hidden_states is given"]
    said.append("steps are launched one kernel at a time: output_hidden_states is set")
    assert fallbacks() == said
    model.generate(features, max_new_tokens=4)
    assert fallbacks() == said


@pytest.mark.usefixtures("eager_steps")
@pytest.mark.parametrize(
    ("kwargs", "windows"),
    [
        ({"chunk_length_s": 6, "generate_kwargs": {"num_beams": 1}}, 2),
        ({"return_timestamps": "word"}, 0),  # with five beams, as a pipeline searches unless it is told otherwise
    ],
    ids=["chunks of six seconds", "words"],
)
def test_a_pipeline_transcribes_as_with_stock(
    tiny_en: tuple, speech: np.ndarray, device: torch.device, loops: list[int], kwargs: dict[str, Any], windows: int
) -> None:
    model, processor = tiny_en
    transcribe = pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
        device=device,
    )
    attn_implementation = model.config._attn_implementation
    try:
        stock = transcribe({"raw": speech, "sampling_rate": 16000}, **kwargs)
    finally:
        model.config._attn_implementation = attn_implementation  # which stock leaves at eager after word timestamps
    before = traces(model)
    with accelerated(model):
        ours = transcribe({"raw": speech, "sampling_rate": 16000}, **kwargs)
    assert ours == stock
    assert len(loops) == windows
    assert traces(model) == before
    assert "sun rises" in ours["text"]
    assert "thousands of years" in ours["text"]
    if "return_timestamps" in kwargs:
        assert [chunk["text"].strip() for chunk in ours["chunks"]] == ours["text"].split()


def test_the_models_methods_keep_their_signatures(device: torch.device) -> None:
    model = tiny_whisper(device)
    before = {name: inspect.signature(getattr(model, name)) for name in OVERRIDES}
    accelerate(model)
    assert {name: inspect.signature(getattr(model, name)) for name in OVERRIDES} == before


class TestModelsThatAreNotAlone:
    def test_another_class_does_not_change_the_signature_of_the_first_models_methods(self, device: torch.device) -> None:
        class Other(WhisperForConditionalGeneration):
            def generate(self, foo: int = 1, **kwargs: Any) -> Any:
                return super().generate(**kwargs)

        first = accelerate(tiny_whisper(device))
        signature = inspect.signature(first.generate)
        accelerate(Other(first.config))
        assert inspect.signature(first.generate) == signature

    def test_models_with_one_config_are_all_restored(self, device: torch.device) -> None:
        first = tiny_whisper(device)
        second = WhisperForConditionalGeneration(first.config).to(device)
        assert second.config is first.config
        for model in (first, second):
            accelerate(model)
        restore(first)
        assert first.config._attn_implementation == "whisper_triton"  # the second needs it
        restore(second)
        assert first.config._attn_implementation == "sdpa"

    @pytest.mark.parametrize("keep", [slice(0, 2), slice(0, 4, 2)], ids=["the first layers", "every second layer"])
    def test_a_model_with_layers_taken_out_generates_as_stock(self, keep: slice, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3, decoder_layers=4)
        model.model.decoder.layers = model.model.decoder.layers[keep]
        features = mel(1, device)
        stock = model.generate(features, max_new_tokens=8)
        with accelerated(model):
            assert torch.equal(model.generate(features, max_new_tokens=8), stock)

    def test_a_pickled_model_says_that_it_is_not_accelerated_and_can_be(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(1, device)
        stock = model.generate(features, max_new_tokens=8)
        loaded = pickle.loads(pickle.dumps(accelerate(model)))
        assert not is_accelerated(loaded)
        assert torch.equal(loaded.generate(features, max_new_tokens=8), stock)
        assert is_accelerated(accelerate(loaded))
        assert torch.equal(loaded.generate(features, max_new_tokens=8), stock)
        restore(loaded)
        assert loaded.config._attn_implementation == "sdpa"
        assert torch.equal(loaded.generate(features, max_new_tokens=8), stock)

    def test_a_shorter_static_cache_is_no_reason_to_compile_anew(self, device: torch.device) -> None:
        sizes = {}
        for name, plug_in in (("stock", lambda model: model), ("ours", accelerate)):
            model = plug_in(tiny_whisper(device, seed=3))
            for length in (20, 10):
                model.generate(mel(1, device), cache_implementation="static", max_new_tokens=length, disable_compile=True)
                sizes.setdefault(name, []).append(model._previous_max_cache_length)
        assert sizes["ours"] == sizes["stock"]
        assert sizes["ours"][0] == sizes["ours"][1]


class TestSettingsInTheModelsConfiguration:
    """transformers refuses settings of `generate` there: looked for once, and again when the configuration has changed."""

    def test_they_are_looked_for_once(self, device: torch.device) -> None:
        model = accelerate(tiny_whisper(device))
        features, before = mel(1, device), sorted(vars(model.config))
        with mock.patch.object(type(model.config), "_get_generation_parameters", autospec=True, return_value={}) as look:
            calls = []
            for _ in range(3):
                model.generate(features, max_new_tokens=2)
                calls.append(look.call_count)
        assert calls[0] >= 1
        assert calls[0] == calls[1] == calls[2]
        assert sorted(vars(model.config)) == before

    def test_one_that_comes_later_is_refused_as_by_stock(self, device: torch.device) -> None:
        model, stock = accelerate(tiny_whisper(device)), tiny_whisper(device)
        features = mel(1, device)
        expected = model.generate(features, max_new_tokens=2)
        messages = []
        for one in (model, stock):
            one.config.top_p = 0.5
            with pytest.raises(ValueError, match="top_p") as error:
                one.generate(features, max_new_tokens=2)
            messages.append(str(error.value))
            del one.config.top_p
        assert messages[0] == messages[1]
        assert torch.equal(model.generate(features, max_new_tokens=2), expected)
