"""Looks at the model that are taken while it decodes: what has changed since its graphs were captured is seen all the same.

Without a GPU a stand-in takes the place of the encoder's graph, and steps are launched instead of replayed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_early import StandIn, captured, generate
from torch import nn
from transformers import LogitsProcessor, WhisperForConditionalGeneration
from whisper_models import FRAMES, Recorder, mel, tiny_whisper

from whisper_triton import accelerate, accelerated, decode_loop, generation, late, model_state
from whisper_triton.decoder import DecoderStep
from whisper_triton.encoder import CapturedEncoder
from whisper_triton.late import LATE, ChangedError, LateLooks, end_lateness, is_so, take_late_looks

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels", "eager_steps", "kept_steps")


@pytest.fixture
def kept_steps(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, steps that are kept as captured ones are, where `eager_steps` alone would have them captured in each call."""
    if device.type == "cpu":
        capture = DecoderStep._capture
        monkeypatch.setattr(DecoderStep, "_capture", lambda self, run: (object(), capture(self, run)[1]))


def warm(model: Any, features: torch.Tensor, **kwargs: Any) -> Any:
    """Accelerated, with a step and a graph of the encoder kept for these features. Returns the tokens."""
    if features.device.type == "cpu":
        encoder = captured(model, len(features)).encoder
        # As of a graph, its weights' memory stays, and its modules, whatever the model gets in their place.
        kept = copy.deepcopy(encoder, {id(parameter): parameter for parameter in encoder.parameters()})
        encoder._whisper_triton.graphs[len(features), 2 * FRAMES].encoder = kept
    accelerate(model)
    return [generate(model, features, **kwargs)[0] for _ in range(2)][1]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in a call, in order: looks, passes of the decoder, and calls made anew."""
    seen: list[str] = []

    def noted(owner: Any, name: str, what: str) -> None:
        function = getattr(owner, name)

        def note(*args: Any, **kwargs: Any) -> Any:
            seen.append(what)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, note)

    noted(CapturedEncoder, "fits", "look at the encoder")
    noted(StandIn, "fits", "look at the encoder")
    noted(model_state, "fingerprint", "look at the decoder")
    noted(generation, "fingerprint", "look at the decoder")
    claim = DecoderStep._claim

    def of_one_token(step: DecoderStep, new_tokens: int) -> None:
        seen.extend(["pass"] * (new_tokens == 1))  # a prompt is the modules' on a CPU
        claim(step, new_tokens)

    monkeypatch.setattr(DecoderStep, "_claim", of_one_token)
    noted(late, "ChangedError", "anew")
    return seen


def looks(events: list[str]) -> list[int]:
    """How many passes stood before each look."""
    return [events[:i].count("pass") for i, event in enumerate(events) if event.startswith("look")]


class TestWhenLooksAreTaken:
    """Of a model in fp16, whose prompts are steps too."""

    @pytest.mark.parametrize(("new_tokens", "before"), [(40, 16), (5, 4)])
    def test_once_steps_are_queued(self, new_tokens: int, before: int, device: torch.device, events: list[str]) -> None:
        """The prompt's pass and the first steps, of which a short window has fewer. The first token is the prompt's."""
        model, features = tiny_whisper(device, seed=3, dtype=torch.float16), mel(2, device).half()
        kwargs = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        wanted = warm(model, features, **kwargs)
        events.clear()
        assert generate(model, features, **kwargs)[0] == wanted
        found = looks(events)
        assert len(found) == 2
        assert set(found) == {before}
        assert "anew" not in events

    def test_of_a_large_decoder_sooner(self, device: torch.device, events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decode_loop, "LARGE", 0)
        model, features = tiny_whisper(device, seed=3, dtype=torch.float16), mel(2, device).half()
        kwargs = {"max_new_tokens": 40, "min_new_tokens": 40}
        warm(model, features, **kwargs)
        events.clear()
        generate(model, features, **kwargs)
        assert set(looks(events)) == {4}

    def test_while_a_language_is_waited_for(self, device: torch.device, events: list[str]) -> None:
        model = tiny_whisper(device, seed=3, dtype=torch.float16, is_multilingual=True)
        features, kwargs = mel(2, device).half(), {"max_new_tokens": 30, "min_new_tokens": 30, "task": "transcribe"}
        wanted = warm(model, features, **kwargs)
        events.clear()
        assert generate(model, features, **kwargs)[0] == wanted
        # The last two by the prompt, which asks for the states and the step again.
        assert looks(events) == [1, 1, 17, 17]

    def test_before_modules_run(self, device: torch.device, events: list[str]) -> None:
        """Hooks and forward passes of the user's may be in them: here in fp32, where the prompt is theirs."""
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        warm(model, features, max_new_tokens=30)
        events.clear()
        generate(model, features, max_new_tokens=30)
        assert looks(events) == [0, 0]

    def test_before_a_number_is_drawn(self, device: torch.device, events: list[str]) -> None:
        model, features = tiny_whisper(device, seed=3, dtype=torch.float16), mel(2, device).half()
        kwargs = {"temperature": 0.7, "max_new_tokens": 20, "min_new_tokens": 20}
        warm(model, features, **kwargs)
        events.clear()
        generate(model, features, **kwargs)
        assert set(looks(events)) == {0}

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"monitor_progress": lambda seen: None},
            {"num_beams": 2},
            {"custom_generate": lambda model, input_ids, **kwargs: model._sample(input_ids, **kwargs)},
        ],
        ids=["a callback", "beams", "a loop of the user's"],
    )
    def test_in_time_where_others_may_look_on(self, kwargs: dict[str, Any], device: torch.device, events: list[str]) -> None:
        model, features = tiny_whisper(device, seed=3), mel(1, device)
        warm(model, features)
        events.clear()
        generate(model, features, **kwargs)
        found = looks(events)
        assert len(found) >= 2
        assert set(found) == {0}

    def test_in_time_before_stocks_loop(self, device: torch.device, events: list[str]) -> None:
        """Which calls a logits processor of the user's."""
        model, features, recorder = tiny_whisper(device, seed=3), mel(1, device), Recorder()
        warm(model, features)
        events.clear()
        recorder.__class__ = type("Seen", (Recorder,), {"__call__": lambda self, ids, scores: events.append("user") or scores})
        generate(model, features, logits_processor=[recorder])
        assert "user" in events
        assert not any(event.startswith("look") for event in events[events.index("user") :])


def other_weight(module: Any, name: str) -> None:
    module.register_parameter(name, nn.Parameter(-getattr(module, name).detach()))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a weight of the encoder": lambda model: other_weight(model.model.encoder.conv1, "weight"),
    "a weight of the decoder": lambda model: other_weight(model.model.decoder.layers[1].fc1, "weight"),
    "moved": lambda model: setattr(model.model.decoder.layers[0].fc2.weight, "data", -model.model.decoder.layers[0].fc2.weight),
    "written": lambda model: model.model.decoder.layers[0].fc2.weight.data.mul_(-1),
    "fewer layers": lambda model: setattr(model.model.decoder, "layers", model.model.decoder.layers[:1]),
    "a hook": lambda model: model.model.decoder.layers[1].register_forward_hook(
        lambda layer, args, output: -output if isinstance(output, torch.Tensor) else (-output[0], *output[1:])
    ),
    "a hook in the encoder": lambda model: model.model.encoder.layers[1].register_forward_hook(
        lambda layer, args, output: -output if isinstance(output, torch.Tensor) else (-output[0], *output[1:])
    ),
    "a forward pass": lambda model: setattr(model.model.decoder.layers[1], "forward", lambda x, *args, **kwargs: -x),
    "another projection": lambda model: setattr(
        model, "proj_out", copy.deepcopy(model.proj_out).requires_grad_(False).apply(lambda m: m.weight.mul_(-1))
    ),
}


def own_detection(model: Any, seen: list[Any]) -> None:
    def detect(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append("asked")
        return type(model).detect_language(model, *args, **kwargs)

    model.detect_language = detect


class OwnFallback(WhisperForConditionalGeneration):
    seen: list[Any]

    def generate_with_fallback(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().generate_with_fallback(*args, **kwargs)
        except BaseException as error:
            self.seen.append(type(error))
            raise
        finally:
            self.seen.append("decoded")


def own_class(model: Any, seen: list[Any]) -> None:
    model.__class__, model.seen = OwnFallback, seen


def sums(seen: list[Any]) -> Callable[..., None]:
    """A hook that notes what it is given."""
    return lambda module, args, *rest: seen.append([x.double().sum().item() for x in args if isinstance(x, torch.Tensor)])


def own_processor(model: Any, seen: list[Any]) -> LogitsProcessor:
    processor = Recorder()
    processor.set_begin_index = seen.append
    return processor


ONLOOKERS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "a hook before the model": lambda model, seen: model.register_forward_pre_hook(sums(seen)),
    "a hook before the encoder": lambda model, seen: model.model.encoder.register_forward_pre_hook(sums(seen)),
    "a hook of a decoder layer": lambda model, seen: model.model.decoder.layers[1].register_forward_hook(sums(seen)),
    "a method of the user's": own_detection,
    "a class of the user's": own_class,
    "a hook of an encoder layer": lambda model, seen: model.model.encoder.layers[0].register_forward_hook(sums(seen)),
    "a hook of the final norm": lambda model, seen: model.model.decoder.layer_norm.register_forward_hook(sums(seen)),
    "a logits processor": own_processor,
}
THRESHOLDS = {"no_speech_threshold": 0.6, "logprob_threshold": -10.0, "temperature": (0.0,), "language": "en"}


class TestChanges:
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    @pytest.mark.parametrize(
        "kwargs",
        [
            {"language": "en", "max_new_tokens": 20},
            {"task": "transcribe", "max_new_tokens": 20},
            {"language": "en", "max_new_tokens": 20, "temperature": 1.0, "top_k": 1},
            {"language": "en", "max_new_tokens": 12, "return_timestamps": True, "return_segments": True},
            {"language": "en", "max_new_tokens": 12, "return_timestamps": True, "seconds": 3},
        ],
        ids=["greedy", "a language to detect", "sampled", "segments", "long"],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_between_two_calls_are_seen(
        self, change: Callable[[Any], Any], kwargs: dict[str, Any], dtype: torch.dtype, device: torch.device
    ) -> None:
        """In fp32 stock's tokens, in fp16 those of a model that has not been called before."""
        model, kwargs = tiny_whisper(device, seed=3, is_multilingual=True, dtype=dtype), kwargs.copy()
        features = mel(1, device, seconds=kwargs.pop("seconds", 1)).to(dtype)  # the encoder of a long one is not started early
        other = copy.deepcopy(model)
        unchanged = warm(model, features, **kwargs)
        with torch.no_grad():
            change(model), change(other)
        wanted, _ = generate(other if dtype == torch.float32 else accelerate(other), features, **kwargs)
        assert wanted != unchanged
        for _ in range(3):
            assert generate(model, features, **kwargs)[0] == wanted

    @pytest.mark.parametrize("at", [1, 2, 3])
    @pytest.mark.parametrize("temperature", [0.0, 0.8])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_in_any_window_the_call_is_made_anew(
        self, at: int, temperature: float, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As another thread may change it. PyTorch's generator is drawn from once all the same."""
        model, features = tiny_whisper(device, seed=3, dtype=dtype), mel(1, device, seconds=3).to(dtype)
        kwargs = {"return_timestamps": True, "max_new_tokens": 12, "temperature": temperature}
        wanted = warm(model, features, **kwargs)
        drawn = torch.get_rng_state(), [torch.cuda.get_rng_state()] if device.type == "cuda" else []
        taken, take = [], LateLooks.take

        def changed(looks: LateLooks) -> None:
            taken.append(len(looks.put_off))
            take(looks)
            if len([each for each in taken if each]) == at:
                raise ChangedError

        monkeypatch.setattr(LateLooks, "take", changed)
        assert generate(model, features, **kwargs)[0] == wanted
        assert len([each for each in taken if each]) == at  # none is put off any more
        assert torch.equal(torch.get_rng_state(), drawn[0])
        assert all(torch.equal(torch.cuda.get_rng_state(), state) for state in drawn[1])

    def test_what_is_sampled_is_as_if_it_had_been_seen_at_once(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(3, device)
        kwargs = {"max_new_tokens": 20, "top_k": 0, "temperature": (0.0, 0.6), "logprob_threshold": 0.0}
        other = copy.deepcopy(model)
        warm(model, features, **kwargs)
        for each in (model, other):
            other_weight(each.model.decoder.layers[1].fc1, "weight")
        wanted, _ = generate(accelerate(other), features, **kwargs)
        assert generate(model, features, **kwargs)[0] == wanted

    @pytest.mark.parametrize("put", ONLOOKERS.values(), ids=ONLOOKERS)
    @pytest.mark.parametrize(
        "kwargs", [{"task": "transcribe"}, {"language": "en"}, THRESHOLDS], ids=["detected", "told", "thresholds"]
    )
    def test_who_looks_on_sees_what_a_first_call_shows(
        self, put: Callable[[Any, list[Any]], None], kwargs: dict[str, str], device: torch.device
    ) -> None:
        """As often, too. In fp16, whose launched steps, here in the place of replays, run no modules."""
        features = mel(2, device).half()
        seen: list[list[Any]] = []
        for prepare in (accelerate, lambda model: warm(model, features, **kwargs)):
            model, of_one = tiny_whisper(device, seed=3, is_multilingual=True, dtype=torch.float16), []
            prepare(model)
            other_weight(model.model.encoder.conv1, "weight")
            other_weight(model.model.decoder.layers[1].fc1, "weight")
            processor = put(model, of_one)
            around = {"logits_processor": [processor]} if isinstance(processor, LogitsProcessor) else {}
            of_one.append(generate(model, features, **kwargs, **around)[0])
            seen.append(of_one)
        assert len(seen[0]) > 1 or (put is own_detection and "language" in kwargs)
        assert seen[0] == seen[1]

    def test_who_has_a_method_of_the_class_sees_each_call_once(
        self, device: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen, kind = [], WhisperForConditionalGeneration
        method = kind.generate_with_fallback
        counted = lambda *args, **kwargs: seen.append(1) or method(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(kind, "generate_with_fallback", counted)
        model, features = tiny_whisper(device, seed=3, dtype=torch.float16), mel(2, device).half()
        warm(model, features)
        other_weight(model.model.decoder.layers[1].fc1, "weight")
        seen.clear()
        generate(model, features)
        assert seen == [1]

    def test_dropout_is_drawn_once(self, device: torch.device) -> None:
        """By an encoder that its modules run."""
        results, features = [], mel(2, device).half()
        for earlier_calls in (0, 2):
            model = accelerate(tiny_whisper(device, seed=3, dtype=torch.float16))
            model.model.encoder.train()
            for module in (model.model.encoder, *model.model.encoder.layers):
                module.dropout = 0.5
            for _ in range(earlier_calls):
                generate(model, features)
            other_weight(model.model.decoder.layers[1].fc1, "weight")
            results.append((generate(model, features)[0], torch.get_rng_state().tolist()))
        assert results[0] == results[1]

    def test_a_write_by_a_hook_of_the_model_is_seen(self, device: torch.device) -> None:
        """Before the first pass of a call that has started the encoder."""
        results, features = [], mel(2, device)
        for prepare in (lambda model: None, lambda model: warm(model, features, task="transcribe")):
            model = tiny_whisper(device, seed=3, is_multilingual=True)
            prepare(model)
            weight, written = model.model.encoder.conv1.weight, []

            def write(*args: Any, weight: Any = weight, written: list[int] = written) -> None:
                if not written:
                    written.append(1), weight.detach().mul_(-1)

            model.register_forward_pre_hook(write)
            results.append(generate(model, features, task="transcribe")[0])
        assert results[0] == results[1]

    def test_weights_changed_by_a_logits_processor_are_seen(self, device: torch.device) -> None:
        """Between two temperatures, which are no more late: stock's loop has run, and calls are not made anew."""

        class Change(Recorder):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                if not self.scores:
                    self.weight.detach().mul_(-1)
                return super().__call__(input_ids, scores)

        results, features = [], mel(1, device)
        kwargs = {"compression_ratio_threshold": 0.0, "temperature": (0.0, 0.0)}
        for prepare in (lambda model: None, lambda model: warm(model, features)):
            model, change = tiny_whisper(device, seed=3), Change()
            prepare(model)
            change.weight = model.model.encoder.layer_norm.weight
            tokens, _ = generate(model, features, logits_processor=[change], **kwargs)
            results.append((tokens, len(change.scores)))
        assert results[0] == results[1]

    def test_a_number_of_layers_that_no_longer_fits_the_cache_is_seen(self, device: torch.device) -> None:
        """Which no module tells of."""
        outcomes, features = [], mel(1, device).half()
        for prepare in (lambda model: None, lambda model: warm(model, features)):
            model = tiny_whisper(device, seed=3, dtype=torch.float16)
            prepare(model)
            for attention in (model.model.decoder.layers[1].self_attn, model.model.decoder.layers[1].encoder_attn):
                attention.layer_idx = 0
            try:
                outcomes.append(generate(model, features)[0])
            except Exception as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]

    def test_of_weights_that_have_moved_in_time(self, device: torch.device, events: list[str]) -> None:
        """Their memory may be others'; a bias of the LM head too."""
        model, features = tiny_whisper(device, seed=3, dtype=torch.float16), mel(2, device).half()
        model.proj_out.bias = nn.Parameter(torch.zeros(model.proj_out.out_features, dtype=torch.float16, device=device))
        warm(model, features)
        step = model._whisper_triton.steps[2]
        assert step.has_its_memory()
        model.proj_out.bias.data = model.proj_out.bias.data.clone()
        assert not step.has_its_memory()
        events.clear()
        generate(model, features)
        assert ("look at the decoder", 0) in zip(
            [event for event in events if event.startswith("look")], looks(events), strict=True
        )

    def test_calls_inside_others_take_theirs_in_time(self, device: torch.device, events: list[str]) -> None:
        model, features = tiny_whisper(device, seed=3, dtype=torch.float16), mel(2, device).half()
        wanted, inner = warm(model, features), []
        events.clear()
        ask = lambda seen: inner.append((generate(model, features)[0], looks(events)))  # noqa: E731
        assert generate(model, features, monitor_progress=ask)[0] == wanted
        assert inner == [(wanted, [0, 0])]

    def test_hooks_of_the_encoder_see_each_pass_once(self, device: torch.device) -> None:
        model, features, seen = tiny_whisper(device, seed=3), mel(1, device), []
        warm(model, features)
        other_weight(model.model.encoder.conv1, "weight")
        model.model.encoder.register_forward_hook(lambda encoder, args, output: seen.append(output[0].clone()))
        generate(model, features)
        with torch.no_grad():
            states = type(model.model.encoder).forward(model.model.encoder, features).last_hidden_state
        assert len(seen) == 1
        torch.testing.assert_close(seen[0], states)

    def test_nothing_is_captured_of_a_changed_model(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(1, device)
        warm(model, features)
        step = model._whisper_triton.steps[1]
        kept = step._selecting.copy()
        other_weight(model.model.decoder.layers[1].fc1, "weight")
        generate(model, features, temperature=1.0, top_k=3)  # another graph than the one that the step has
        assert step._selecting == kept
        assert len(model._whisper_triton.steps[1]._selecting) == 1


class TestLateLooks:
    def test_outside_of_a_call_they_are_taken_at_once(self) -> None:
        assert LATE.get() is None
        assert is_so(lambda: True)
        assert not is_so(lambda: False)
        take_late_looks(), end_lateness()

    def test_each_is_taken_once(self) -> None:
        token, found = LATE.set(LateLooks()), [True, False]
        try:
            assert is_so(lambda: found.pop(0))
            take_late_looks(), take_late_looks()
            assert is_so(lambda: found.pop(0))
            with pytest.raises(ChangedError):
                end_lateness()
            take_late_looks()
            end_lateness()
            assert LATE.get() is None
            assert not is_so(lambda: False)
        finally:
            LATE.reset(token)

    def test_a_call_leaves_none(self, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3)
        warm(model, mel(1, device))
        assert LATE.get() is None
        with pytest.raises(ValueError, match="500"):
            model.generate(mel(1, device), max_new_tokens=500)
        assert LATE.get() is None


@pytest.mark.gpu
class TestOnAGPU:
    def test_a_model_that_has_been_away(self, device: torch.device) -> None:
        """Its weights' memory is given back, and taken by others."""
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        stock, _ = generate(model, features, max_new_tokens=20)
        with accelerated(model):
            for _ in range(3):
                assert generate(model, features, max_new_tokens=20)[0] == stock
                model.to("cpu")
                torch.cuda.empty_cache()
                others = [torch.full((1 << 18,), torch.nan, device=device) for _ in range(8)]
                model.to(device)
                del others
            assert generate(model, features, max_new_tokens=20)[0] == stock

    @pytest.mark.parametrize(
        ("kwargs", "of_a_row"),
        [({}, 0), ({"logprob_threshold": -9.0, "temperature": (0.0, 0.4)}, 1)],
        ids=["tokens", "thresholds"],
    )
    def test_rows_are_looked_at_on_the_host(self, kwargs: dict[str, Any], of_a_row: int, device: torch.device) -> None:
        """However many there are, in as many copies from the device, or two more; for thresholds stock makes one of each."""
        model, copies = accelerate(tiny_whisper(device, seed=3)), []
        kwargs = {"max_new_tokens": 12} | kwargs
        for B in (1, 6):
            for _ in range(3):
                generate(model, mel(B, device), **kwargs)
            with torch.profiler.profile() as profile:
                model.generate(mel(B, device), **kwargs)
                torch.cuda.synchronize()
            copies.append(sum("DtoH" in event.name for event in profile.events()))
        assert 0 < copies[0] <= copies[1] <= copies[0] + 2 + 5 * of_a_row
