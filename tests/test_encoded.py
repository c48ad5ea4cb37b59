"""`generate` encodes a window once, whatever asks for it again, and never takes one window's states for another's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from whisper_models import Recorder, counted, mel, tensors_of, tiny_whisper

from whisper_triton import accelerate, accelerated
from whisper_triton.encoded import ENCODED, Encoded

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels")


def sequences(output: Any) -> list[list[int]]:
    return (output if isinstance(output, torch.Tensor) else output["sequences"]).tolist()


def generate(model: Any, features: torch.Tensor, **kwargs: Any) -> tuple[Any, list[int]]:
    torch.manual_seed(0)
    with counted(model) as sizes:
        return model.generate(features, **kwargs), sizes


EVERYTHING = {"no_speech_threshold": 0.6, "logprob_threshold": -0.01, "temperature": (0.0, 0.0), "task": "transcribe"}


class TestOneEncodeAWindow:
    def test_language_no_speech_and_two_temperatures(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3, is_multilingual=True), mel(3, device)
        stock, passes = generate(model, features, max_new_tokens=12, **EVERYTHING)
        assert len(passes) > 4
        with accelerated(model):
            ours, passes = generate(model, features, max_new_tokens=12, **EVERYTHING)
        assert sequences(ours) == sequences(stock)
        assert passes == [3]

    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
    def test_rows_of_a_batch_that_fall_back(self, device: torch.device, mode: Callable[[], Any]) -> None:
        """Those whose tokens compress too well, one of them not, at each of three temperatures."""
        model, features = tiny_whisper(device, seed=3), mel(5, device)
        kwargs = {"compression_ratio_threshold": 0.88, "temperature": (0.0, 0.0, 0.0), "max_new_tokens": 40}
        stock, passes = generate(model, features, **kwargs)
        assert len(passes) == 3
        assert 1 <= passes[1] < 5
        with accelerated(model), mode():
            ours, passes = generate(model, features, **kwargs)
        assert sequences(ours) == sequences(stock)
        assert passes == [5]

    def test_several_sequences_of_each(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3, is_multilingual=True), mel(2, device)
        kwargs = {"num_return_sequences": 2, "do_sample": True, "top_k": 1, "max_new_tokens": 8, "task": "transcribe"}
        stock, passes = generate(model, features, **kwargs)
        assert passes == [2, 4]
        with accelerated(model):
            ours, passes = generate(model, features, **kwargs)
        assert sequences(ours) == sequences(stock)
        assert passes == [2]


class Doubled(nn.Linear):
    """A layer of the user's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class TestWindowsApart:
    def test_long_audio(self, device: torch.device) -> None:
        """Windows follow each other; rows of a batch end and drop out, until one is left."""
        lengths = [250, 120, 210]
        model, features = tiny_whisper(device, seed=3, is_multilingual=True), mel(len(lengths), device, seconds=2.5)
        mask = (torch.arange(250)[None] < torch.tensor(lengths)[:, None]).long().to(device)
        kwargs = {"attention_mask": mask, "return_timestamps": True, "return_segments": True, **EVERYTHING}
        stock, stocks_passes = generate(model, features, **kwargs)
        with accelerated(model):
            ours, passes = generate(model, features, **kwargs)
        mine, theirs = tensors_of(ours), tensors_of(stock)
        assert mine.keys() == theirs.keys()
        assert all(mine[path].tolist() == theirs[path].tolist() for path in theirs if not theirs[path].is_floating_point())
        windows = max(len(segments) for segments in stock["segments"])
        assert windows > 3
        assert len(passes) <= windows < len(stocks_passes) / 3
        assert min(passes) <= min(stocks_passes)

    def test_calls_know_nothing_of_each_other(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        with accelerated(model):
            first, passes = generate(model, features, max_new_tokens=8)
            assert passes == [2]
            model.model.encoder.layer_norm.weight.data *= -1
            second, passes = generate(model, features, max_new_tokens=8)
        assert passes == [2]
        assert sequences(first) != sequences(second)
        assert ENCODED.get() is None

    @pytest.mark.parametrize(
        "change",
        [
            lambda encoder: setattr(encoder.layers[0], "fc1", Doubled(64, 64)),
            lambda encoder: setattr(encoder.conv1, "forward", lambda x, forward=encoder.conv1.forward: forward(x)),
            lambda encoder: encoder.layers[1].train(),
        ],
        ids=["a module of the user's", "a forward pass of the user's", "training"],
    )
    def test_what_is_not_known_to_repeat_itself_is_run_again(self, change: Callable, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3, is_multilingual=True)
        change(model.model.encoder)
        model.to(device)
        with accelerated(model):
            _, passes = generate(model, mel(1, device), task="transcribe", max_new_tokens=4)
        assert passes == [1, 1]

    @pytest.mark.parametrize("moved", [False, True])
    def test_weights_changed_between_two_temperatures_are_seen(self, moved: bool, device: torch.device) -> None:
        """By a logits processor, as a callback of the user's might."""

        class Change(Recorder):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                weight = model.model.encoder.layer_norm.weight
                if not self.scores:
                    if moved:
                        weight.data = weight.data * -1
                    else:
                        weight.mul_(-1)
                return super().__call__(input_ids, scores)

        results, kwargs = [], {"compression_ratio_threshold": 0.0, "temperature": (0.0, 0.0)}
        for prepare in (lambda model: model, accelerate):
            model = prepare(tiny_whisper(device, seed=3))
            with torch.no_grad():
                output, passes = generate(model, mel(1, device), max_new_tokens=8, logits_processor=[Change()], **kwargs)
            results.append(sequences(output))
            assert passes == [1, 1]
        assert results[0] == results[1]

    def test_a_hook_that_writes_into_the_states_is_given_new_ones(self, device: torch.device) -> None:
        def negate(encoder: Any, args: Any, output: Any) -> None:
            output.last_hidden_state.mul_(-1)

        results = []
        for prepare in (lambda model: model, accelerate):
            model = prepare(tiny_whisper(device, seed=3, is_multilingual=True))
            model.model.encoder.register_forward_hook(negate)
            with torch.no_grad():
                results.append(sequences(model.generate(mel(1, device), task="transcribe", max_new_tokens=8)))
        assert results[0] == results[1]

    def test_hooks_inside_see_every_pass(self, device: torch.device) -> None:
        model, calls = tiny_whisper(device, seed=3, is_multilingual=True), []
        model.model.encoder.layers[0].register_forward_hook(lambda *args: calls.append(1))
        with accelerated(model):
            model.generate(mel(1, device), task="transcribe", max_new_tokens=4)
        assert len(calls) == 2


class TestEncoded:
    def encoded(self, device: torch.device) -> tuple[Encoded, torch.nn.Module, torch.Tensor, torch.Tensor]:
        encoded, encoder = Encoded(), torch.nn.Identity()
        features, states = mel(4, device), torch.arange(4.0, device=device)[:, None]
        encoded.keep(encoder, features, states)
        return encoded, encoder, features, states

    @pytest.mark.parametrize("rows", [[0], [3, 1], [2, 2, 0, 1, 3], [0, 1, 2, 3]])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_rows_are_found_wherever_they_stand(self, rows: list[int], dtype: torch.dtype, device: torch.device) -> None:
        encoded, encoder, features, states = self.encoded(device)
        encoded.keep(encoder, features.to(dtype), states)
        assert encoded.states_of(encoder, features.to(dtype)[rows])[:, 0].tolist() == rows

    def test_another_row_is_not_found(self, device: torch.device) -> None:
        encoded, encoder, features, states = self.encoded(device)
        assert torch.equal(encoded.states_of(encoder, features), states)
        assert torch.equal(encoded.states_of(encoder, features.clone()), states)
        other = features[:2].clone()
        other[1, 3, 5] += 1e-6
        assert encoded.states_of(encoder, other) is None
        same_sum = features[:2].roll(1, 2)  # the same numbers in other places
        assert encoded.states_of(encoder, same_sum) is None
        assert encoded.states_of(encoder, features[:2].half()) is None
        assert encoded.states_of(encoder, features[:, :, :50]) is None
        assert encoded.states_of(torch.nn.Identity(), features) is None

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_what_is_written_into_the_features_changes_nothing(self, mode: type, device: torch.device) -> None:
        """Inference mode counts no versions, and neither do writes through `.data`."""
        with mode():
            encoded, encoder, features, states = self.encoded(device)
            given = features.clone()
            features.data += 1
            assert encoded.states_of(encoder, features) is None
            assert torch.equal(encoded.states_of(encoder, given), states)

    def test_states_are_kept_without_a_copy_until_they_are_written_into(self, device: torch.device) -> None:
        encoded, encoder, features, states = self.encoded(device)
        given = encoded.states_of(encoder, features)
        assert given is states
        given[1].mul_(2)
        assert encoded.states_of(encoder, features) is None
        assert encoded.states_of(encoder, features[:1]) is None

    def test_states_of_inference_mode_are_copied(self, device: torch.device) -> None:
        with torch.inference_mode():
            encoded, encoder, features, states = self.encoded(device)
            wanted = states.clone()
            states += 1
            encoded.states_of(encoder, features).mul_(2)
            assert torch.equal(encoded.states_of(encoder, features), wanted)


class TestKeptEarly:
    """Features that are the caller's, and states that are not there yet."""

    def encoded(self, device: torch.device) -> tuple[Encoded, torch.nn.Module, torch.Tensor, torch.Tensor, list[int]]:
        encoded, encoder, joined = Encoded(), torch.nn.Identity(), []
        features, states = mel(4, device), torch.arange(4.0, device=device)[:, None]
        graph = SimpleNamespace(parameters=[], fits=lambda encoder: True, join=lambda: joined.append(1))
        encoded.keep_early(encoder, features, states, graph)
        return encoded, encoder, features, states, joined

    def test_the_whole_is_known_by_its_place(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        encoded, encoder, features, states, joined = self.encoded(device)
        monkeypatch.setattr(torch, "equal", lambda *tensors: pytest.fail("waits for the device"))
        assert encoded.states_of(torch.nn.Identity(), features) is None
        assert not joined
        assert encoded.states_of(encoder, features) is states
        assert encoded.states_of(encoder, features[:, :, :100]) is states
        copy = encoded.copy_of(features)
        assert encoded.states_of(encoder, copy) is states
        assert len(joined) == 3

    def test_all_else_by_what_it_holds(self, device: torch.device) -> None:
        encoded, encoder, features, states, joined = self.encoded(device)
        assert encoded.states_of(encoder, features[:2])[:, 0].tolist() == [0, 1]
        assert encoded.states_of(encoder, features[2:])[:, 0].tolist() == [2, 3]
        assert encoded.states_of(encoder, features.clone()) is states
        assert len(joined) == 3
        assert encoded.states_of(encoder, features.flip(0)) is None
        repeated = features.as_strided(features.shape, (0, *features.stride()[1:]))  # the first row four times
        assert encoded.states_of(encoder, repeated) is None
        assert encoded.copy_of(features.clone()) is None

    @pytest.mark.parametrize("through", [lambda features: features, lambda features: features[1, 2:], torch.Tensor.detach])
    def test_a_write_into_the_features_is_seen(self, through: Callable, device: torch.device) -> None:
        encoded, encoder, features, _, _ = self.encoded(device)
        through(features).mul_(2)
        assert encoded.copy_of(features) is None
        assert encoded.states_of(encoder, features) is None

    def test_their_copy_stands_alone(self, device: torch.device) -> None:
        encoded, encoder, features, states, _ = self.encoded(device)
        copy = encoded.copy_of(features)
        features.zero_()
        assert encoded.states_of(encoder, copy) is states
        assert encoded.states_of(encoder, features) is None
        copy.mul_(2)
        assert encoded.states_of(encoder, copy) is None
