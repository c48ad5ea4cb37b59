"""`torch.compile(model.forward, fullgraph=True)` takes a decoding step whole, and once for all positions."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import WhisperForConditionalGeneration
from whisper_models import SOT, by_name, mel, tiny_whisper

from whisper_triton import StaticEncoderDecoderCache, accelerate, build_static_cache, restore

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# What transformers itself would compile is disabled: the tests compile the forward pass, and count.
KWARGS = {"cache_implementation": "static", "disable_compile": True, "max_new_tokens": 12}


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Compiled:
    """`model` with its forward pass compiled; `graphs[i]` is how many had been compiled after the i-th pass."""

    def __init__(self, model: WhisperForConditionalGeneration, backend: str = "eager") -> None:
        self.model = model
        self.graphs: list[int] = []
        self.counter = CompileCounterWithBackend(backend)
        forward = torch.compile(model.forward, fullgraph=True, backend=self.counter)

        def count(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self.graphs.append(self.counter.frame_count)
            return output

        model.forward = count

    def assert_one_graph_for_prompts_and_one_for_steps(self, passes: int) -> None:
        assert self.graphs == [1] + [2] * (passes - 1)
        assert not counters["graph_break"]


@pytest.mark.usefixtures("reference_kernels")
class TestGenerate:
    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    def test_no_graph_break_and_no_recompilation_from_the_second_step_on(self, device: torch.device, plug_in: Callable) -> None:
        model = tiny_whisper(device, seed=3)
        compiled = Compiled(plug_in(copy.deepcopy(model)), "aot_eager")  # what "eager" does, and autograd's tracing
        for seed in (1, 2):  # a second recording finds both graphs compiled
            features = mel(2, device, seed=seed)
            stock = model.generate(features, **KWARGS)
            assert compiled.model.generate(features, **KWARGS).tolist() == stock.tolist()
        compiled.assert_one_graph_for_prompts_and_one_for_steps(2 * 12)

    def test_beam_search(self, device: torch.device) -> None:
        """Reordering the cache keeps its tensors, so no step is compiled again."""
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        stock = model.generate(features, num_beams=3, **KWARGS)
        compiled = Compiled(accelerate(model))
        assert model.generate(features, num_beams=3, **KWARGS).tolist() == stock.tolist()
        compiled.assert_one_graph_for_prompts_and_one_for_steps(12)

    def test_a_model_accelerated_after_its_forward_pass_was_compiled(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        stock = model.generate(features, **KWARGS).tolist()
        compiled = Compiled(model)
        forward = model.forward
        for prepare in (lambda model: model, accelerate, restore):
            assert prepare(model).generate(features, **KWARGS).tolist() == stock
            assert model.forward is forward
        assert compiled.graphs[12:24] == [3] + [4] * 11


class Decoding:
    """Feeds tokens to a compiled model with a cache of ours, a pass at a time."""

    def __init__(self, model: WhisperForConditionalGeneration, batch_size: int = 1, slots: int = 20) -> None:
        self.compiled = Compiled(model)
        self.model, self.batch_size = model, batch_size
        self.cache: StaticEncoderDecoderCache = build_static_cache(model, batch_size, slots)
        with torch.no_grad():
            self.encoded = model.model.encoder(mel(batch_size, model.device))

    @torch.no_grad()
    def __call__(self, *tokens: int) -> torch.Tensor:
        ids = torch.tensor([tokens] * self.batch_size, device=self.model.device)
        return self.model(encoder_outputs=self.encoded, decoder_input_ids=ids, past_key_values=self.cache).logits

    def contents(self) -> list[torch.Tensor]:
        parts = (self.cache.self_attention_cache, self.cache.cross_attention_cache)
        return [tensor.clone() for part in parts for layer in part.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("plug_in", [accelerate, by_name])
def test_the_kernels_run_from_compiled_code(device: torch.device, plug_in: Callable) -> None:
    decoding = Decoding(plug_in(tiny_whisper(device)))
    logits = [decoding(SOT, 5)[:, -1:], decoding(7), decoding(9)]
    model = tiny_whisper(device)
    with torch.no_grad():
        ids = torch.tensor([[SOT, 5, 7, 9]], device=device)
        stock = model(encoder_outputs=decoding.encoded, decoder_input_ids=ids, use_cache=False).logits[:, 1:]
        exact = model.double()(mel(1, device).double(), decoder_input_ids=ids, use_cache=False).logits[:, 1:]
    assert (torch.cat(logits, dim=1) - exact).norm() <= 2 * (stock - exact).norm()
    decoding.compiled.assert_one_graph_for_prompts_and_one_for_steps(3)


@pytest.mark.usefixtures("reference_kernels")
class TestCache:
    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    def test_reset_and_another_window_compile_nothing(self, device: torch.device, plug_in: Callable) -> None:
        decoding = Decoding(plug_in(tiny_whisper(device)))
        first, lengths = [], []
        for tokens in ((SOT, 5), (7,), (9,)):
            first.append(decoding(*tokens))
            lengths.append(decoding.cache.get_seq_length().item())
        assert lengths == [2, 3, 4]
        decoding.cache.reset()
        again = [decoding(SOT, 5), decoding(7), decoding(9)]
        assert all(map(torch.equal, first, again))
        decoding.compiled.assert_one_graph_for_prompts_and_one_for_steps(6)

    def test_a_step_past_the_last_slot_writes_nothing(self, device: torch.device) -> None:
        """The host does not see the position of a compiled step, so the device drops what does not fit."""
        decoding = Decoding(accelerate(tiny_whisper(device)), slots=4)
        decoding(SOT, 5)
        decoding(7)
        decoding(9)
        full = decoding.contents()
        decoding(11)
        assert decoding.cache.get_seq_length().item() == 5
        assert all(map(torch.equal, decoding.contents(), full))
        decoding.compiled.assert_one_graph_for_prompts_and_one_for_steps(4)

    def test_a_prompt_of_another_length_is_compiled_anew(self, device: torch.device) -> None:
        """As with stock; here it shows that the counting counts."""
        decoding = Decoding(accelerate(tiny_whisper(device)))
        decoding(SOT, 5)
        decoding(7)
        decoding.cache.reset()
        decoding(SOT, 5, 8)
        assert decoding.compiled.graphs == [1, 2, 3]


PLUG_IN = {"accelerated": accelerate, "by name": by_name, "by name, a cache of ours": by_name}


def compiled_by_inductor(how: str, device: torch.device) -> Callable[[torch.Tensor], list[list[int]]]:
    """`generate` of a model whose forward pass is compiled: the usual example, as in the documentation of transformers."""
    if how == "by name" and Version(torch.__version__) < Version("2.13"):
        pytest.skip("stock's static cache allocates itself in the compiled pass, at which torch 2.11 crashes, with SDPA too")
    model = PLUG_IN[how](tiny_whisper(device, seed=3))
    model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    cache = build_static_cache(model, 2) if how == "by name, a cache of ours" else None

    def run(features: torch.Tensor) -> list[list[int]]:
        if cache is None:
            return model.generate(features, max_new_tokens=20, cache_implementation="static").tolist()
        cache.reset()
        return model.generate(features, max_new_tokens=20, past_key_values=cache).tolist()

    return run


@pytest.mark.usefixtures("reference_kernels")
def test_the_usual_example_without_a_gpu(device: torch.device) -> None:
    """Compiled too, by inductor, but neither kernels nor graphs are in it."""
    if device.type != "cpu":
        pytest.skip("there is a GPU, for the tests below")
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"inductor has nothing to compile with: {error}")
    generate, stock = compiled_by_inductor("by name", device), tiny_whisper(device, seed=3)
    for seed in (1, 2):
        features = mel(2, device, seed=seed)
        assert generate(features) == stock.generate(features, max_new_tokens=20).tolist()


@pytest.mark.gpu
class TestInductor:
    @pytest.fixture(params=PLUG_IN)
    def generate(self, request: pytest.FixtureRequest, device: torch.device) -> Callable[[torch.Tensor], list[list[int]]]:
        return compiled_by_inductor(request.param, device)

    def test_tokens_are_those_of_stock_without_compilation(self, generate: Callable, device: torch.device) -> None:
        stock = tiny_whisper(device, seed=3)
        for seed in (1, 2, 3):  # warm-up, recording of the CUDA graphs, replay
            features = mel(2, device, seed=seed)
            assert generate(features) == stock.generate(features, max_new_tokens=20).tolist()

    def test_later_calls_compile_nothing(self, generate: Callable, device: torch.device) -> None:
        generate(mel(2, device))
        graphs = counters["stats"]["unique_graphs"]
        assert graphs >= 2
        for seed in (2, 3):
            generate(mel(2, device, seed=seed))
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["graph_break"]

    @pytest.mark.parametrize("plug_in", [accelerate, by_name])
    def test_what_generate_compiles_by_itself(self, device: torch.device, plug_in: Callable) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        stock = model.generate(features, max_new_tokens=20)
        plug_in(model)
        for _ in range(3):
            ours = model.generate(features, max_new_tokens=20, cache_implementation="static")
            assert ours.tolist() == stock.tolist()
        assert counters["stats"]["unique_graphs"] > 0
        assert not counters["graph_break"]

    def test_half_precision_transcribes_the_sample(
        self, tiny_en: tuple, speech: np.ndarray, speech_text: str, device: torch.device
    ) -> None:
        model, processor = accelerate(copy.deepcopy(tiny_en[0]).half()), tiny_en[1]
        model.generation_config.cache_implementation = "static"
        model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        features = processor(speech, sampling_rate=16000, return_tensors="pt").input_features.to(device, torch.float16)
        for _ in range(3):
            text = processor.batch_decode(model.generate(features), skip_special_tokens=True)[0]
            assert text.strip() == speech_text
