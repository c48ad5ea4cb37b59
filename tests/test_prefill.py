"""The prompt inside `generate`: all cross keys and values in one launch, and a graph of its own for each short length.

Without a GPU nothing is captured: the passes then run eagerly in place of their graphs, all else being the same.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import relative_error
from whisper_models import START_OF_PREVIOUS, TEXT, VOCABULARY, assert_generates_as_stock, assert_same, mel, tiny_whisper
from whisper_triton.kernels.cross_attention import cross_attention_reference
from whisper_triton.kernels.embed_tokens import embed_tokens_reference
from whisper_triton.kernels.skinny_linear import skinny_linear_reference

import whisper_triton
from whisper_triton import fused
from whisper_triton.cache import CACHE_NAME
from whisper_triton.decoder import DecoderStep

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("eager_steps", "reference_kernels")


@pytest.fixture(autouse=True)
def _reference_chain(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """On a CPU the chain's kernels are their references too: `test_decoder.py` runs them in the interpreter."""
    if device.type == "cpu":
        monkeypatch.setattr(fused, "skinny_linear", skinny_linear_reference)
        monkeypatch.setattr(fused, "cross_attention", cross_attention_reference)
        monkeypatch.setattr(fused, "embed_tokens", embed_tokens_reference)


@pytest.fixture
def projections(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each window of the calls to come: whether one launch filled the cross cache."""
    windows = []
    project = DecoderStep.project

    def recorded(step: DecoderStep, states: torch.Tensor) -> None:
        project(step, states)
        windows.append(all(step.cache.is_updated.values()))

    monkeypatch.setattr(DecoderStep, "project", recorded)
    return windows


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens a sequence in each pass that a graph serves."""
    lengths = []
    claim = DecoderStep._claim

    def recorded(step: DecoderStep, new_tokens: int) -> None:
        lengths.append(new_tokens)
        claim(step, new_tokens)

    monkeypatch.setattr(DecoderStep, "_claim", recorded)
    return lengths


def assert_scores_as_stock(model: Any, features: torch.Tensor, **kwargs: Any) -> None:
    """As `assert_generates_as_stock`, but with no processor of the test's: our own loop decodes after the prompt."""

    def run(runner: Any) -> Any:
        output = runner.generate(
            features.to(runner.dtype), return_dict_in_generate=True, output_scores=True, return_timestamps=False, **kwargs
        )
        return {"sequences": output["sequences"], "scores": output["scores"]}

    stock, exact = run(model), run(copy.deepcopy(model).double())
    with whisper_triton.accelerated(model):
        assert_same(run(model), stock, exact)
        assert model._whisper_triton.steps[features.shape[0]].selection is not None  # which our loop alone makes


# With a processor of the test's, stock's loop calls the forward pass; without, ours calls it for the prompt alone.
by_both_loops = pytest.mark.parametrize(
    "generates_as_stock",
    [partial(assert_generates_as_stock, distinct=2), assert_scores_as_stock],
    ids=["stock's loop", "our loop"],
)


@by_both_loops
def test_a_prompt_is_one_pass_of_the_chain(device, projections, passes, generates_as_stock):
    model = tiny_whisper(device, seed=3, dtype=torch.float16)
    prompt = torch.tensor([START_OF_PREVIOUS, 5, 17], device=device)
    generates_as_stock(model, mel(2, device), prompt_ids=prompt, max_new_tokens=2)
    assert passes == [5, 1]
    assert projections == [True]


@by_both_loops
def test_a_prompt_that_the_chain_does_not_take_runs_in_the_modules(device, projections, passes, generates_as_stock):
    model = tiny_whisper(device, seed=3)
    generates_as_stock(model, mel(2, device), max_new_tokens=4)  # two rows of fp32
    assert passes == [1, 1, 1]
    assert projections == [True]


@by_both_loops
def test_a_prompt_of_one_token_is_a_step(device, projections, passes, generates_as_stock):
    model = tiny_whisper(device, seed=3)
    del model.generation_config.no_timestamps_token_id
    generates_as_stock(model, mel(1, device), max_new_tokens=2)
    assert passes == [1, 1]
    assert projections == [True]


def test_who_decodes_by_himself_gets_all_logits_of_the_prompt(device, passes):
    model = tiny_whisper(device, seed=3, dtype=torch.float16)
    shapes = []

    def decode(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        kwargs = {name: kwargs[name] for name in ("encoder_outputs", CACHE_NAME, "use_cache") if name in kwargs}
        inputs = model.prepare_inputs_for_generation(input_ids, **kwargs)
        shapes.append(model(**inputs, return_dict=True).logits.shape)
        return torch.cat([input_ids, input_ids[:, -1:]], -1)

    with whisper_triton.accelerated(model):
        model.generate(mel(2, device).half(), custom_generate=decode)
    assert shapes == [(2, 2, VOCABULARY)]
    assert passes == []


def test_a_forward_call_outside_generate_gets_all_logits(device, passes):
    model = whisper_triton.accelerate(tiny_whisper(device, seed=3, dtype=torch.float16))
    features = mel(1, device).half()
    model.generate(features, max_new_tokens=1)
    kept = model._whisper_triton.steps[1].cache
    kept.reset()
    passes.clear()
    ids = torch.randint(0, TEXT, (1, 4), device=device)
    with torch.no_grad():
        assert model(features, decoder_input_ids=ids, past_key_values=kept, use_cache=True).logits.shape[1] == 4
    assert passes == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
class TestOnGpu:
    def test_prompts_of_all_lengths_in_batches_of_all_sizes(self, dtype, device, projections):
        """One model throughout: its graphs are kept from call to call, and serve other prompts than they were captured on."""
        config = {"seed": 3, "dtype": dtype, "max_target_positions": 448}
        model, stock = tiny_whisper(device, **config), tiny_whisper(device, **config)
        exact = copy.deepcopy(stock).double()
        whisper_triton.accelerate(model)
        generator, errors = torch.Generator().manual_seed(0), []
        for B, length in ((1, 0), (1, 20), (3, 0), (1, 200), (3, 12), (1, 13), (20, 0), (3, 200), (1, 0), (1, 12), (3, 0)):
            text = torch.randint(0, TEXT, (length,), generator=generator)
            prompt = torch.cat([torch.tensor([START_OF_PREVIOUS]), text]).to(device) if length else None
            errors.append(self.errors(model, stock, exact, mel(B, device, seed=B + length), prompt))
        ours, theirs = torch.tensor(errors).square().sum(0).sqrt()
        # Not 1.25, as at large-v3's size in benchmarks/decoder_step.py: with widths as small as these the rounding of few
        # elements decides. 1.39 was seen here in fp16 on a GPU, 1.05 over twelve other features in the interpreter.
        assert ours <= 2 * theirs
        assert all(projections)
        step = model._whisper_triton.steps[1]
        # Of 2 and, with the prompt's first token, of 15 and 16 tokens: fp32 has no chain for several rows. The steps
        # that follow are in the loop's own graph.
        assert set(step.passes) == {T for T in (2, 15, 16) if step.takes(model, T)}

    def errors(self, model, stock, exact, features, prompt) -> list[float]:
        """How far from float64's our and stock's scores after the prompt are; in fp32 the tokens must be stock's."""
        kwargs = {"prompt_ids": prompt, "max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
        ours, theirs, right = (runner.generate(features.to(runner.dtype), **kwargs) for runner in (model, stock, exact))
        if model.dtype == torch.float32:
            assert torch.equal(ours["sequences"], theirs["sequences"])
        wanted = right["scores"][0].double()
        finite = wanted.isfinite()  # a suppressed token's score is -inf
        assert torch.equal(ours["scores"][0].isfinite(), finite)
        return [relative_error(result["scores"][0][finite], wanted[finite]) for result in (ours, theirs)]

    def test_a_prompts_graph_follows_the_weights(self, dtype, device):
        model = whisper_triton.accelerate(tiny_whisper(device, seed=3, dtype=dtype))
        features = mel(1, device).to(dtype)
        first = model.generate(features, max_new_tokens=8)
        step = model._whisper_triton.steps[1]
        other = tiny_whisper(device, seed=5, dtype=dtype)
        for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
            parameter.data = new.data.clone()
        second = model.generate(features, max_new_tokens=8)
        assert model._whisper_triton.steps[1] is not step
        assert not torch.equal(first, second)
        assert torch.equal(second, whisper_triton.accelerate(other).generate(features, max_new_tokens=8))

    def test_a_prompt_is_bitwise_the_same_again_and_whatever_the_others_hold(self, dtype, device):
        model = whisper_triton.accelerate(tiny_whisper(device, seed=3, dtype=dtype))
        features = mel(3, device).to(dtype)
        kwargs = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_scores": True}
        runs = [model.generate(features, **kwargs)["scores"] for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        features[1:] *= 0.5
        assert torch.equal(model.generate(features, **kwargs)["scores"][0][0], runs[0][0][0])
