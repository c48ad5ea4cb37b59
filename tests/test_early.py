"""The encoder started before stock's `generate` has begun: the same results from one pass, and stock's own way wherever the
encoder may in the end be asked for something else.

Without a GPU a stand-in takes the place of the captured graph, whose states are NaN until they are joined.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from whisper_models import FRAMES, MEL_BINS, Recorder, counted, mel, tensors_of, tiny_whisper

from whisper_triton import accelerate, is_accelerated, restore
from whisper_triton.encoded import ENCODED, Encoded
from whisper_triton.encoder import CapturedEncoder, fingerprint
from whisper_triton.graphs import places_of

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels")
Whisper = WhisperForConditionalGeneration
STOCKS_SEGMENT = Whisper._get_input_segment


class StandIn:
    """A captured graph that is none."""

    nbytes = 0
    fits, has_its_memory = CapturedEncoder.fits, CapturedEncoder.has_its_memory

    def __init__(self, encoder: WhisperEncoder) -> None:
        self.encoder, self.fingerprint, self.parameters = encoder, fingerprint(encoder), list(encoder.parameters())
        self.device = self.parameters[0].device
        self._places = places_of(self.parameters)
        self.started: list[torch.Tensor] = []
        self.results: list[tuple[torch.Tensor, torch.Tensor]] = []

    def start(self, features: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.started.append(features)
        states = WhisperEncoder.forward(self.encoder, features).last_hidden_state
        self.results.append((torch.full_like(states, torch.nan), states))
        return self.results[-1][0]

    def join(self) -> None:
        for given, states in self.results:
            given.data.copy_(states)  # which counts no version, as what was queued before does not
        self.results.clear()

    def wait(self) -> None:
        pass

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return WhisperEncoder.forward(self.encoder, features).last_hidden_state


def captured(model: Any, *batch_sizes: int) -> StandIn:
    """Accelerates `model` as if its encoder had been captured for these batch sizes."""
    encoder = accelerate(model).model.encoder
    graph = StandIn(encoder)
    encoder._whisper_triton.graphs.update({(size, 2 * FRAMES): graph for size in batch_sizes})
    return graph


def generate(model: Any, *args: Any, **kwargs: Any) -> tuple[list[Any], list[int]]:
    """The tokens, and the batch size of each pass of the encoder."""
    torch.manual_seed(0)
    with counted(model) as passes:
        output = model.generate(*args, **({"max_new_tokens": 5} | kwargs))
    return [tensor.tolist() for tensor in tensors_of(output).values() if not tensor.is_floating_point()], passes


@pytest.fixture
def no_waiting(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = torch.equal

    def equal(*tensors: torch.Tensor) -> bool:  # tables of addresses lie on the host, and wait for nobody
        if device.type in {tensor.device.type for tensor in tensors}:
            pytest.fail("contents were compared, which waits for the device")
        return compare(*tensors)

    monkeypatch.setattr(torch, "equal", equal)


class TestOnePass:
    @pytest.mark.usefixtures("no_waiting")
    @pytest.mark.parametrize(
        ("batch_size", "kwargs"),
        [
            (1, {}),
            (3, {"return_timestamps": True, "return_segments": True}),
            (2, {"attention_mask": torch.ones(2, 2 * FRAMES)}),
            (1, {"num_beams": 2}),
            (1, {"cache_implementation": "static"}),
        ],
    )
    def test_the_encoder_runs_once_and_nothing_waits_for_it(
        self, batch_size: int, kwargs: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, features = tiny_whisper(device, seed=3), mel(batch_size, device)
        stock, _ = generate(model, features, **kwargs)
        graph = captured(model, batch_size)
        before: list[int] = []
        prepare = Whisper._retrieve_total_input_frames

        def watched(*args: Any, **kwargs: Any) -> Any:
            before.append(len(graph.started))
            return prepare(*args, **kwargs)

        monkeypatch.setattr(Whisper, "_retrieve_total_input_frames", staticmethod(watched))
        ours, passes = generate(model, input_features=features, **kwargs)
        assert (ours, before, passes[0]) == (stock, [1], batch_size)
        assert len(graph.started) == 1
        assert graph.started[0] is features
        if "return_timestamps" not in kwargs:  # a window ends where its last timestamp says so
            assert len(passes) == 1

    @pytest.mark.usefixtures("no_waiting")
    def test_a_detected_language_sees_it_through_a_view(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3, is_multilingual=True), mel(2, device)
        kwargs = {"task": "transcribe", "no_speech_threshold": 0.6, "logprob_threshold": -10.0, "temperature": (0.0,)}
        stock, passes = generate(model, features, **kwargs)
        assert len(passes) == 3
        captured(model, 2)
        assert generate(model, features, **kwargs) == (stock, [2])

    def test_rows_that_fall_back_or_come_twice_are_told_by_what_they_hold(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(5, device)
        fallback = {"compression_ratio_threshold": 0.88, "temperature": (0.0, 0.0), "max_new_tokens": 40}
        several = {"num_return_sequences": 2, "do_sample": True, "top_k": 1}
        wanted = [generate(model, features, **kwargs) for kwargs in (fallback, several)]
        assert len(wanted[0][1]) == 2
        captured(model, 5)
        for (stock, _), kwargs in zip(wanted, (fallback, several), strict=True):
            assert generate(model, features, **kwargs) == (stock, [5])

    def test_features_of_any_strides(self, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3)
        features = mel(4, device).transpose(1, 2).contiguous().transpose(1, 2)[1:3]
        stock, _ = generate(model, features)
        captured(model, 2)
        assert generate(model, features) == (stock, [2])

    def test_calls_inside_each_other_and_in_threads(self, device: torch.device) -> None:
        model, seeds = tiny_whisper(device, seed=3), (1, 2, 3)
        wanted = [model.generate(mel(1, device, seed=seed), max_new_tokens=5).tolist() for seed in seeds]
        graph, inner = captured(model, 1), []

        def ask(seen: torch.Tensor) -> None:
            inner.append(model.generate(mel(1, device, seed=2), max_new_tokens=5).tolist())

        assert model.generate(mel(1, device), max_new_tokens=5, monitor_progress=ask).tolist() == wanted[0]
        assert inner == [wanted[1]]
        assert len(graph.started) == 2
        with ThreadPoolExecutor(3) as pool:
            results = pool.map(lambda seed: model.generate(mel(1, device, seed=seed), max_new_tokens=5).tolist(), seeds)
        assert list(results) == wanted
        assert len(graph.started) == 5


class TestWhatChangesMeanwhile:
    """By a callback before the first window: the encoder is asked again, as stock would be then."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda model, features: features.mul_(-1),
            lambda model, features: features[0].zero_(),
            lambda model, features: model.model.encoder.layer_norm.weight.detach().mul_(-1),
            lambda model, features: setattr(
                model.model.encoder.conv1, "weight", nn.Parameter(-model.model.encoder.conv1.weight.detach())
            ),
            lambda model, features: model.model.encoder.layers[0].register_forward_hook(lambda layer, args, output: -output),
            lambda model, features: setattr(model, "_get_input_segment", lambda **kwargs: -STOCKS_SEGMENT(**kwargs)),
        ],
        ids=["features", "a row", "a weight", "another weight", "a hook", "the segment"],
    )
    def test_is_seen(self, change: Callable[[Any, torch.Tensor], Any], device: torch.device) -> None:
        results = []
        for prepare in (lambda model: None, lambda model: captured(model, 2)):
            model, features = tiny_whisper(device, seed=3), mel(2, device)
            prepare(model)
            unchanged, _ = generate(model, features)
            results.append(generate(model, features, monitor_progress=lambda seen, m=model, f=features: change(m, f)))
            assert results[-1][0] != unchanged
        assert results[0] == (results[1][0], [2])
        assert results[1][1] == [2, 2]

    def test_features_are_the_callers_again_once_the_window_is_cut_out(self, device: torch.device) -> None:
        """Stock's windows are copies: what a logits processor writes into the features, a second temperature does not see."""

        class Clear(Recorder):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                features.zero_()
                return scores

        model, kwargs = tiny_whisper(device, seed=3), {"compression_ratio_threshold": 0.0, "temperature": (0.0, 0.0)}
        features = mel(1, device)
        stock, _ = generate(model, features, logits_processor=[Clear()], **kwargs)
        captured(model, 1)
        features = mel(1, device)
        assert generate(model, features, logits_processor=[Clear()], **kwargs) == (stock, [1])

    def test_the_first_window_alone_is_known(self, device: torch.device) -> None:
        model, features = accelerate(tiny_whisper(device, seed=3)), mel(2, device)
        frames = 2 * FRAMES

        def segment(start: int = 0, left: int = frames, rows: int = 2) -> torch.Tensor:
            kwargs = {"num_segment_frames": frames, "cur_bsz": rows, "batch_idx_map": [0, 1]}
            args = features, torch.tensor([0, start]), torch.tensor([frames, left])
            ours = model._get_input_segment(*args, **kwargs)
            assert torch.equal(ours, STOCKS_SEGMENT(*args, **kwargs))
            return ours

        with started(model, features) as encoded:
            found = [segment(start=40), segment(left=60), segment(rows=1), segment(), segment()]
            assert [encoded._kept.features is each for each in found] == [False, False, False, True, False]
        segment()


@contextmanager
def started(model: Any, features: torch.Tensor) -> Iterator[Encoded]:
    """As within a call of `generate` that has started the encoder."""
    encoded = Encoded()
    encoded.keep_early(model.model.encoder, features, features.clone(), StandIn(model.model.encoder))
    token = ENCODED.set(encoded)
    yield encoded
    ENCODED.reset(token)


class OwnSegment(Whisper):
    def _get_input_segment(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return -STOCKS_SEGMENT(*args, **kwargs)


def own_class(model: Any) -> None:
    model.__class__ = OwnSegment


def own_segment(model: Any) -> None:
    model._get_input_segment = lambda *args, **kwargs: -STOCKS_SEGMENT(*args, **kwargs)


class Wrapped(nn.Module):
    """An encoder that is none of transformers'."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2, self.inner = encoder.conv1, encoder.conv2, encoder

    def forward(self, input_features: torch.Tensor, **kwargs: Any) -> Any:
        return self.inner(input_features, **kwargs)


def own_forward(model: Any) -> None:
    encoder = model.model.encoder
    encoder.forward = lambda *args, **kwargs: type(encoder).forward(encoder, *args, **kwargs)


def other_data(model: Any) -> None:
    first, second = model.model.encoder.layers[:2]
    second.fc1.weight.data = first.fc1.weight.data


class TestWhatIsLeftToStock:
    @pytest.mark.parametrize(
        "change",
        [
            own_class,
            own_segment,
            lambda model: model.model.encoder.register_forward_pre_hook(lambda encoder, args: None),
            lambda model: setattr(model.config, "_attn_implementation", "sdpa"),
            restore,
            lambda model: setattr(model.model, "encoder", Wrapped(model.model.encoder)),
            own_forward,
            lambda model: model.double().float(),
            other_data,
        ],
        ids=[
            "a class's segment",
            "an instance's segment",
            "a hook before",
            "attention",
            "restored",
            "another encoder",
            "a forward pass of the user's",
            "weights that have moved",
            "a weight that has",
        ],
    )
    def test_models_that_are_not_as_they_were(self, change: Callable[[Any], Any], device: torch.device) -> None:
        results = []
        for prepare in (lambda model: None, lambda model: captured(model, 1)):
            model = tiny_whisper(device, seed=3)
            graph = prepare(model)
            change(model)
            results.append(generate(model, mel(1, device)))
        assert results[0] == results[1]
        assert graph.started == []

    @pytest.mark.parametrize(
        "change",
        [
            lambda encoder: encoder.layers[1].register_forward_hook(lambda layer, args, output: -output),
            lambda encoder: encoder.layers[1].train(),
            lambda encoder: setattr(encoder.conv1, "weight", nn.Parameter(-encoder.conv1.weight.detach())),
            lambda encoder: setattr(encoder, "layers", encoder.layers[:1]),
        ],
        ids=["a hook inside", "training", "another weight", "fewer layers"],
    )
    def test_a_pass_that_the_graph_no_longer_is(self, change: Callable[[Any], Any], device: torch.device) -> None:
        """It may have been started, as its weights are where they were; nobody sees its states."""
        results = []
        for prepare in (lambda model: None, lambda model: captured(model, 1)):
            model = tiny_whisper(device, seed=3)
            graph = prepare(model)
            change(model.model.encoder)
            results.append(generate(model, mel(1, device)))
        assert len(graph.started) == 1
        assert results[1] == (results[0][0], [1, 1])  # the first pass is the stand-in's

    def test_a_segment_of_the_users_own_from_before(self, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3)
        own_segment(model)
        stock, _ = generate(model, mel(1, device))
        graph = captured(model, 1)
        assert generate(model, mel(1, device)) == (stock, [1])
        assert graph.started == []

    def test_hooks_after_the_encoder_are_run(self, device: torch.device) -> None:
        model, shapes = tiny_whisper(device, seed=3), []
        model.model.encoder.register_forward_hook(lambda encoder, args, output: shapes.append(output[0].isnan().any().item()))
        captured(model, 1)
        assert generate(model, mel(1, device))[1] == [1]
        assert shapes == [False]

    @pytest.mark.parametrize("frames", [2 * FRAMES - 1, 2 * FRAMES + 1, 4 * FRAMES])
    def test_features_of_another_length(self, frames: int, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), torch.randn(1, MEL_BINS, frames, device=device)
        kwargs = {"return_timestamps": True} if frames > 2 * FRAMES else {}
        stock, _ = generate(model, features, **kwargs)
        graph = captured(model, 1)
        assert generate(model, features, **kwargs)[0] == stock
        assert not any(started is features for started in graph.started)

    @pytest.mark.parametrize("mode", ["inference", "autocast"])
    def test_modes(self, mode: str, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(1, device)
        graph = captured(model, 1)
        with torch.inference_mode() if mode == "inference" else torch.autocast(device.type, torch.bfloat16):
            generate(model, features)
        assert graph.started == []

    def test_features_of_inference_mode(self, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3)
        graph = captured(model, 1)
        with torch.inference_mode():
            features = mel(1, device).clone()
        generate(model, features)
        assert graph.started == []

    @pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
    def test_what_no_graph_hands_out(self, device: torch.device, name: str) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        stocks_settings = model.generation_config.to_dict()
        stock = generate(model, features, return_dict_in_generate=True, **{name: True})[0]
        graph = captured(model, 2)
        assert generate(model, features, return_dict_in_generate=True, **{name: True})[0] == stock
        setattr(model.generation_config, name, True)
        assert generate(model, features, return_dict_in_generate=True)[0] == stock
        settings, model.generation_config = model.generation_config, GenerationConfig(**stocks_settings)
        assert generate(model, features, return_dict_in_generate=True, generation_config=settings)[0] == stock
        assert graph.started == []

    def test_encoder_outputs(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(1, device)
        stock, _ = generate(model, features)
        graph = captured(model, 1)
        with torch.no_grad():
            outputs = BaseModelOutput(model.model.encoder(features).last_hidden_state)
        for args in ((), (features,)):
            assert generate(model, *args, encoder_outputs=outputs) == (stock, [])
        assert graph.started == []

    @pytest.mark.bad_input
    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [
            ((), {}),
            (("features",), {}),
            (([[0.0]],), {}),
            ((mel(1).to("meta"),), {}),
            ((mel(1).double(),), {}),
            ((mel(1)[0],), {}),
            ((mel(1),), {"input_features": mel(1)}),
            ((mel(1),), {"nonsense": 1}),
            ((mel(1),), {"language": "nowhere"}),
            ((mel(1),), {"generation_config": 3}),
            ((mel(1),), {"max_new_tokens": 500}),
        ],
    )
    def test_wrong_arguments_meet_stocks_errors(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
    ) -> None:
        model = tiny_whisper(device, seed=3, is_multilingual=True)
        args = tuple(arg.to(device) if isinstance(arg, torch.Tensor) and arg.device.type == "cpu" else arg for arg in args)
        errors = []
        for prepare in (lambda model: None, lambda model: captured(model, 1)):
            prepare(model)
            with pytest.raises(Exception) as error:  # noqa: PT011
                model.generate(*args, **kwargs)
            errors.append((type(error.value), str(error.value)))
        assert errors[0] == errors[1]
        assert ENCODED.get() is None

    def test_states_are_dropped_with_an_error(self, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3, is_multilingual=True)
        graph = captured(model, 1)
        with pytest.raises(ValueError, match="nowhere"):
            model.generate(mel(1, device), language="nowhere")
        assert len(graph.started) == 1
        assert ENCODED.get() is None
        stock, _ = generate(tiny_whisper(device, seed=3, is_multilingual=True), mel(1, device, seed=2), language="en")
        assert generate(model, mel(1, device, seed=2), language="en") == (stock, [1])


class TestTheOverride:
    @pytest.mark.parametrize("kind", [Whisper, OwnSegment])
    def test_copied_pickled_and_restored(self, kind: type, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(1, device)
        model.__class__ = kind
        stock, _ = generate(model, features)
        captured(model, 1)
        twin = copy.deepcopy(model)
        assert twin._get_input_segment.__self__ is twin
        assert generate(twin, features)[0] == stock
        loaded = pickle.loads(pickle.dumps(model))
        assert not is_accelerated(loaded)
        accelerate(loaded)
        assert is_accelerated(loaded)
        assert generate(loaded, features)[0] == stock
        for each in (model, twin, loaded):
            assert "_get_input_segment" not in vars(restore(each))


@pytest.mark.gpu
class TestOnAGPU:
    @pytest.mark.parametrize("B", [1, 3])
    @pytest.mark.parametrize("kwargs", [{}, {"task": "transcribe"}])
    def test_one_replay_gives_stocks_tokens(
        self, B: int, kwargs: dict[str, Any], device: torch.device, request: pytest.FixtureRequest
    ) -> None:
        model = tiny_whisper(device, seed=3, is_multilingual=bool(kwargs))
        features = [mel(B, device, seed=seed) for seed in range(4)]
        wanted = [generate(model, each, **kwargs)[0] for each in features]
        accelerate(model)
        generate(model, features[0], **kwargs)  # captures
        request.getfixturevalue("no_waiting")
        for each, stock in zip(features, wanted, strict=True):
            assert generate(model, each, **kwargs) == (stock, [B])

    def graph(self, model: Any, features: torch.Tensor) -> CapturedEncoder:
        with torch.no_grad():
            accelerate(model).model.encoder(features)
        return model.model.encoder._whisper_triton.graphs[len(features), 2 * FRAMES]

    def keep_busy(self, graph: CapturedEncoder) -> None:
        torch.cuda.synchronize()
        with torch.cuda.stream(graph.stream):
            torch.cuda._sleep(1_000_000_000)  # cycles: half a second

    def test_the_callers_stream_does_not_wait_until_it_joins(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        graph = self.graph(model, features)
        wanted = graph(features)
        self.keep_busy(graph)
        states = graph.start(features)
        torch.ones(1).to(device)
        torch.cuda.current_stream().synchronize()
        assert not graph._done.query()
        graph.join()
        assert torch.equal(states, wanted)

    def test_memory_of_states_that_nobody_joined_is_not_given_away(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        graph = self.graph(model, features)
        self.keep_busy(graph)
        shape = graph.start(features).shape  # and dropped
        others = [torch.full(shape, 7.0, device=device) for _ in range(16)]
        torch.cuda.synchronize()
        assert all((other == 7).all() for other in others)

    def test_a_graph_that_is_no_longer_a_pass_is_given_up_once_it_has_run(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        graph = self.graph(model, features)
        generate(model, features)
        changed = tiny_whisper(device, seed=3)
        for each in (model, changed):
            each.model.encoder.conv1.weight = nn.Parameter(-each.model.encoder.conv1.weight.detach())
        self.keep_busy(graph)
        assert generate(model, features)[0] == generate(changed, features)[0]
        assert graph._done.query()
        assert graph not in model.model.encoder._whisper_triton.graphs.values()

    def test_restored_while_a_graph_runs(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3, is_multilingual=True), mel(2, device)
        stock, _ = generate(model, features, language="en")
        graph = self.graph(model, features)
        generate(model, features, language="en")
        self.keep_busy(graph)
        with pytest.raises(ValueError, match="nowhere"):
            model.generate(features, language="nowhere")
        restore(model)
        assert graph._done.query()
        assert generate(model, features, language="en")[0] == stock

    def test_a_call_after_one_that_stock_refused(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3, is_multilingual=True), mel(2, device)
        stock, _ = generate(model, features, language="en")
        accelerate(model)
        for _ in range(3):
            assert generate(model, features, language="en")[0] == stock
            with pytest.raises(ValueError, match="nowhere"):
                model.generate(mel(2, device, seed=5), language="nowhere")
