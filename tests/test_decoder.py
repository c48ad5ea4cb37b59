"""The fused chain and the captured step against the stock decoder."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from attention_cases import assert_close_as_pytorch
from whisper_models import FRAMES, MEL_BINS, TEXT, tiny_whisper
from whisper_triton.kernels._checks import MAX_QUERIES
from whisper_triton.kernels.skinny_linear import MAX_ROWS

import whisper_triton
from whisper_triton import cross_projections, decoder, fused
from whisper_triton.decoder import DecoderStep, fingerprint, why_not_captured
from whisper_triton.fused import MAX_SEQUENCES, FusedDecoder, is_fusable
from whisper_triton.kernels import project_cross_kv

PROMPT = 3


def inputs(model, B: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder states (B, frames, C) and ids (B, length)."""
    states = torch.randn(B, FRAMES, model.config.d_model, device=model.device, dtype=model.dtype)
    return states, torch.randint(0, TEXT, (B, length), device=model.device)


def stock_logits(model, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(encoder_outputs=(states,), decoder_input_ids=ids, use_cache=False).logits


def prefill(model, cache, states: torch.Tensor, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model(encoder_outputs=(states,), decoder_input_ids=ids, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(("B", "layers", "dtype"), [(1, 2, torch.float16), (1, 1, torch.float32), (5, 2, torch.float16)])
def test_the_fused_chain_gives_the_stock_decoders_logits(B, layers, dtype, device):
    model = tiny_whisper(device, decoder_layers=layers).to(dtype)
    states, ids = inputs(model, B, PROMPT + 2)
    expected = stock_logits(model, states, ids)
    exact = stock_logits(copy.deepcopy(model).double(), states.double(), ids)
    with whisper_triton.accelerated(model):
        assert is_fusable(model, B)
        cache = whisper_triton.build_static_cache(model, B)
        prefill(model, cache, states, ids[:, :PROMPT])
        chain = FusedDecoder(model)
        with torch.no_grad():
            logits = torch.cat([chain(ids[:, t : t + 1], cache)[0] for t in range(PROMPT, ids.shape[1])], dim=1)
    # Of all rows and steps together: a single row's rounding is a matter of luck.
    assert (logits - exact[:, PROMPT:]).norm() <= 2 * (expected - exact)[:, PROMPT:].norm()
    assert int(cache.get_seq_length()) == ids.shape[1]


@pytest.mark.parametrize(("B", "T", "layers"), [(1, 3, 1), (3, 5, 2), (1, 16, 1)])
def test_the_chain_takes_a_prompt_and_gives_its_last_tokens_logits(B, T, layers, device):
    """Also one that begins where another ended, and a step after them finds all their keys and values."""
    model = tiny_whisper(device, decoder_layers=layers).half()
    states, ids = inputs(model, B, 2 * T + 1)
    expected = stock_logits(model, states, ids)
    exact = stock_logits(copy.deepcopy(model).double(), states.double(), ids)
    with whisper_triton.accelerated(model), torch.no_grad():
        assert is_fusable(model, B * T)
        step = DecoderStep(model, B, FRAMES)
        step.project(states)
        chain, start, errors = FusedDecoder(model), 0, []
        for length in (T, T, 1):
            logits, left = chain(ids[:, start : start + length], step.cache)
            of_all = model.proj_out(model.model.decoder.layer_norm(left))
            some = slice(start, start + length)
            start += length
            assert logits.shape == (B, 1, expected.shape[-1])
            errors.append([(x - exact[:, start - 1]).norm() for x in (logits[:, 0], expected[:, start - 1])])
            errors.append([(x - exact[:, some]).norm() for x in (of_all, expected[:, some])])
    ours, stock = torch.tensor(errors).square().sum(0).sqrt()
    assert ours <= 2 * stock
    assert int(step.cache.get_seq_length()) == 2 * T + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_layers_cross_keys_and_values_are_projected_at_once(dtype, device):
    model = whisper_triton.accelerate(tiny_whisper(device).to(dtype))
    states, ids = inputs(model, 2, PROMPT)
    step, cache = DecoderStep(model, 2, FRAMES), whisper_triton.build_static_cache(model, 2)
    prefill(model, cache, states, ids)
    for _ in range(2):  # the second window
        step.cache.reset()
        assert not any(step.cache.is_updated.values())
        step.project(states)
        assert all(step.cache.is_updated.values())
    layers = zip(
        model.model.decoder.layers, step.cache.cross_attention_cache.layers, cache.cross_attention_cache.layers, strict=True
    )
    for layer, ours, theirs in layers:
        assert int(ours.cumulative_length) == int(theirs.cumulative_length) == FRAMES
        projections = copy.deepcopy(layer.encoder_attn).double()
        for name, projection in (("keys", projections.k_proj), ("values", projections.v_proj)):
            exact = projection(states.double()).view(2, FRAMES, *theirs.keys.shape[1::2]).transpose(1, 2)
            assert_close_as_pytorch(getattr(ours, name), exact, getattr(theirs, name))
    # The layers then leave the cross cache as it is.
    for layer in step.cache.cross_attention_cache.layers:
        layer.keys.zero_()
    prefill(model, step.cache, states, ids)
    assert not step.cache.cross_attention_cache.layers[0].keys.any()


def test_keys_and_values_that_are_there_still_are_not_projected_again(device, monkeypatch):
    model = whisper_triton.accelerate(tiny_whisper(device).half())
    states, _ = inputs(model, 2, PROMPT)
    step, launches = DecoderStep(model, 2, FRAMES), []

    def projected(states):
        """Whether there was a launch, and what is then in the cache."""
        before = len(launches)
        step.reset()
        assert not any(step.cache.is_updated.values())
        with torch.no_grad():
            step.project(states)
        layers = step.cache.cross_attention_cache.layers
        assert all(step.cache.is_updated.values())
        assert [int(layer.cumulative_length) for layer in layers] == [FRAMES] * len(layers)
        return len(launches) > before, torch.stack([torch.stack((layer.keys, layer.values)) for layer in layers])

    def launch(*args):
        launches.append(args)
        project_cross_kv(*args)

    monkeypatch.setattr(cross_projections, "project_cross_kv", launch)
    first = projected(states)
    assert first[0]
    again = projected(states)
    assert not again[0]
    assert torch.equal(again[1], first[1])
    # What others hold, or write into, is another matter.
    assert projected(states.clone())[0]
    states = states.clone()
    assert projected(states)[0]
    with torch.no_grad():
        states.mul_(0.5)
        changed = projected(states)
        assert changed[0]
        assert not torch.equal(changed[1], first[1])
        model.model.decoder.layers[1].encoder_attn.v_proj.weight.mul_(2)
        assert projected(states)[0]
        step.cache.reorder_cache(torch.tensor([1, 0], device=device))
        assert projected(states)[0]
    assert not projected(states)[0]
    with torch.inference_mode():
        states = states.clone()
        assert projected(states)[0]
        assert projected(states)[0]


def bias_on_the_keys(model):
    attention = model.model.decoder.layers[1].encoder_attn
    attention.k_proj.bias = torch.nn.Parameter(torch.randn_like(attention.v_proj.bias))


def weights_not_dense(model):
    projection = model.model.decoder.layers[1].encoder_attn.k_proj
    projection.weight.data = projection.weight.data.T.contiguous().T


@pytest.mark.parametrize("change", [bias_on_the_keys, weights_not_dense])
def test_what_one_launch_cannot_project_each_layer_projects(change):
    model = tiny_whisper()
    change(model)
    states, ids = inputs(model, 1, PROMPT)
    expected = stock_logits(model, states, ids)
    exact = stock_logits(copy.deepcopy(model).double(), states.double(), ids)
    step = DecoderStep(whisper_triton.accelerate(model), 1, FRAMES)
    step.project(states)
    assert not any(step.cache.is_updated.values())
    with torch.no_grad():
        logits = model(encoder_outputs=(states,), decoder_input_ids=ids, past_key_values=step.cache, use_cache=True).logits
    assert_close_as_pytorch(logits, exact, expected)


def test_encoder_states_of_another_form_are_left_to_the_layers():
    model = whisper_triton.accelerate(tiny_whisper())
    step = DecoderStep(model, 1, FRAMES)
    states, _ = inputs(model, 1, PROMPT)
    for other in (states[:, 1:], states.half(), states.expand(2, -1, -1), states.transpose(1, 2).contiguous().transpose(1, 2)):
        step.project(other)
        assert not any(step.cache.is_updated.values())


def test_the_prompts_that_a_graph_takes():
    model = whisper_triton.accelerate(tiny_whisper(dtype=torch.float16))
    step = DecoderStep(model, 2, FRAMES)
    assert [T for T in (1, 2, MAX_ROWS // 2, MAX_ROWS // 2 + 1, 40) if step.takes(model, T)] == [
        T for T in (1, 2, MAX_ROWS // 2, MAX_ROWS // 2 + 1) if 2 * T <= MAX_ROWS and T <= MAX_QUERIES
    ]
    step = DecoderStep(model, 1, FRAMES)
    assert step.takes(model, MAX_QUERIES)
    assert not step.takes(model, MAX_QUERIES + 1)
    step = DecoderStep(model, MAX_SEQUENCES, FRAMES)
    assert step.takes(model, MAX_ROWS // MAX_SEQUENCES)
    assert not step.takes(model, MAX_ROWS // MAX_SEQUENCES + 1)
    step = DecoderStep(model, MAX_SEQUENCES + 1, FRAMES)  # the model's own modules
    assert step.fused is None
    assert step.takes(model, 1)


@pytest.mark.parametrize(("d_model", "heads"), [(80, 1), (96, 1), (128, 1)])
def test_every_head_dim_goes_through_the_chain(d_model, heads, device):
    """80 and 96 are no powers of two; 32 is the head dim of all other models here."""
    model = tiny_whisper(
        device, d_model=d_model, decoder_layers=1, decoder_attention_heads=heads, encoder_attention_heads=heads
    ).half()
    states, ids = inputs(model, 1, PROMPT + 1)
    expected = stock_logits(model, states, ids)[:, -1]
    exact = stock_logits(copy.deepcopy(model).double(), states.double(), ids)[:, -1]
    with whisper_triton.accelerated(model), torch.no_grad():
        assert is_fusable(model, 1)
        cache = whisper_triton.build_static_cache(model, 1)
        prefill(model, cache, states, ids[:, :-1])
        logits = FusedDecoder(model)(ids[:, -1:], cache)[0][:, 0]
    assert (logits - exact).norm() <= 2 * (expected - exact).norm()


def test_what_the_chain_does_not_cover_is_known_beforehand():
    assert is_fusable(tiny_whisper(dtype=torch.float16), 64)
    assert not is_fusable(tiny_whisper(dtype=torch.float16), 65)
    assert is_fusable(tiny_whisper(), 1)
    assert not is_fusable(tiny_whisper(), 2)
    assert not is_fusable(tiny_whisper(dtype=torch.float64), 1)
    assert not is_fusable(tiny_whisper(activation_function="relu"), 1)
    assert not is_fusable(tiny_whisper(decoder_ffn_dim=448), 1)
    model = tiny_whisper()
    model.proj_out = torch.nn.Linear(model.config.d_model, model.config.vocab_size)
    assert not is_fusable(model, 1)
    for kwargs in ({"bias": False}, {"elementwise_affine": False}):
        model = tiny_whisper()
        model.model.decoder.layers[1].final_layer_norm = torch.nn.LayerNorm(model.config.d_model, **kwargs)
        assert not is_fusable(model, 1)


@pytest.mark.parametrize(
    ("dtype", "shared_memory", "rows"),
    [(torch.float16, 163 << 10, 64), (torch.bfloat16, 99 << 10, 1), (torch.float32, 227 << 10, 1)],
)
def test_the_rows_that_a_gpu_takes(dtype, shared_memory, rows, monkeypatch):
    monkeypatch.setattr(fused, "_shared_memory", lambda device: shared_memory)
    assert fused.max_rows(dtype, torch.device("cuda")) == rows


def test_a_capture_runs_the_pass_twice_at_one_place_and_leaves_the_cache_there(monkeypatch):
    step = DecoderStep(whisper_triton.accelerate(tiny_whisper()), 1, FRAMES)
    layers, found = step.cache.self_attention_cache.layers, []
    graph = types.SimpleNamespace(replay=lambda: found.append("replay"))
    for layer in layers:
        layer.host_length = 63  # the last slot

    def run():
        for layer in layers:
            layer.claim(1)
        step.cache.get_seq_length().add_(1)
        assert not torch.is_grad_enabled()
        return torch.tensor(float(len(layers)))

    def twice(run, device):
        found.append(device)
        return graph, [run(), run()][1], 1000

    monkeypatch.setattr(decoder, "capture", twice)
    caches = step.nbytes
    parts = (step.cache.self_attention_cache, step.cache.cross_attention_cache)
    assert caches == sum(t.nbytes for part in parts for layer in part.layers for t in (layer.keys, layer.values))
    captured, replay = step._capture(run)
    assert captured is graph
    assert step.nbytes == caches + 1000
    assert replay() == 2.0
    assert found == [torch.device("cpu"), "replay"]
    assert int(step.cache.get_seq_length()) == 0
    assert {layer.host_length for layer in layers} == {63}


def test_a_step_is_captured_on_a_gpu_only():
    assert "cpu" in why_not_captured(whisper_triton.accelerate(tiny_whisper()))


class OnGpu:
    """A model that says it lies on a GPU, so that what else stands against a capture can be asked for without one."""

    device = torch.device("cuda")

    def __init__(self, model):
        self.model, self.proj_out, self.config = model.model, model.proj_out, model.config
        for parameter in model.parameters():
            assert parameter.device.type == "cpu"


class Wrapped(torch.Tensor):
    """Stands for the tensors that hold quantised or sharded weights."""


def test_a_hook_around_every_module_is_a_reason_not_to_capture():
    model = whisper_triton.accelerate(tiny_whisper())
    before = fingerprint(model)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    try:
        assert "every module" in why_not_captured(OnGpu(model))
        assert fingerprint(model) != before
    finally:
        hook.remove()
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.model.decoder.layers[0].fc1, "forward", lambda h: h), "forward pass of its own"),
        (lambda m: m.model.register_forward_hook(lambda *a: None), "hook"),
        (lambda m: m.model.decoder.layers[1].fc2.register_forward_pre_hook(lambda *a: None), "hook"),
        (lambda m: m.model.decoder.layers[0].train(), "training"),
        (lambda m: setattr(m.model.decoder.layers[0], "fc1", torch.nn.Sequential(m.model.decoder.layers[0].fc1)), "Sequential"),
        (
            lambda m: setattr(
                m.model.decoder.layers[0].fc1,
                "weight",
                torch.nn.Parameter(m.model.decoder.layers[0].fc1.weight.data.as_subclass(Wrapped)),
            ),
            "Wrapped",
        ),
        (lambda m: setattr(m.config, "_attn_implementation", "sdpa"), "sdpa"),
    ],
)
def test_what_a_graph_would_not_see_is_a_reason_not_to_capture(change, reason):
    model = whisper_triton.accelerate(tiny_whisper())
    on_gpu = OnGpu(model)
    assert "lies on" in why_not_captured(on_gpu)  # all that stands against it
    change(model)
    assert reason in why_not_captured(on_gpu)


def test_the_fingerprint_follows_the_weights():
    model = tiny_whisper()
    before = fingerprint(model)
    assert fingerprint(model) == before
    model.model.decoder.layers[1].fc1.weight.data = model.model.decoder.layers[1].fc1.weight.data.clone()
    assert fingerprint(model) != before


def test_a_step_built_in_inference_mode_serves_outside_it():
    model = whisper_triton.accelerate(tiny_whisper())
    with torch.inference_mode():
        step = DecoderStep(model, 1, FRAMES)
        prefill(model, step.cache, *inputs(model, 1, PROMPT))
    step.cache.reset()
    step.encoder_states.fill_(1)
    assert int(step.cache.get_seq_length()) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("B", [1, 2, 8, 16, MAX_SEQUENCES + 1])
class TestCapturedStep:
    """The last batch is beyond the fused kernels: the graph then holds the model's own modules."""

    def test_one_graph_serves_every_position(self, B, dtype, device):
        model = tiny_whisper(device).to(dtype)
        last = model.config.max_target_positions
        states, ids = inputs(model, B, last)
        stock = stock_logits(model, states, ids)
        exact = stock_logits(copy.deepcopy(model).double(), states.double(), ids)
        whisper_triton.accelerate(model)
        step = DecoderStep(model, B, FRAMES)
        prefill(model, step.cache, states, ids[:, :PROMPT])
        ours = [step(model, ids[:, t : t + 1]) for t in range(PROMPT, last)]
        graph = step.graph
        error = (torch.cat(ours, 1) - exact[:, PROMPT:]).norm()
        assert error <= 1.25 * (stock[:, PROMPT:] - exact[:, PROMPT:]).norm()

        step.cache.reset()
        prefill(model, step.cache, states, ids[:, :PROMPT])
        again = [step(model, ids[:, t : t + 1]) for t in range(PROMPT, last)]
        assert step.graph is graph
        assert torch.equal(torch.cat(ours), torch.cat(again))

    def test_a_row_does_not_depend_on_the_others(self, B, dtype, device):
        if B == 1:
            pytest.skip("one row has no others")
        model = whisper_triton.accelerate(tiny_whisper(device).to(dtype))
        states, ids = inputs(model, B, PROMPT + 5)
        step = DecoderStep(model, B, FRAMES)
        results = []
        for others in (0, 1):
            states[1:] += others
            ids[1:, PROMPT:] = (ids[1:, PROMPT:] + others) % TEXT
            step.cache.reset()
            prefill(model, step.cache, states, ids[:, :PROMPT])
            results.append(torch.cat([step(model, ids[:, t : t + 1]) for t in range(PROMPT, ids.shape[1])], 1))
        assert torch.equal(results[0][0], results[1][0])
        assert not torch.equal(results[0][1], results[1][1])

    def test_a_full_cache_refuses_the_next_step_and_keeps_what_it_holds(self, B, dtype, device):
        model = whisper_triton.accelerate(tiny_whisper(device).to(dtype))
        last = model.config.max_target_positions
        states, ids = inputs(model, B, last)
        step = DecoderStep(model, B, FRAMES)
        prefill(model, step.cache, states, ids[:, : last - 1])
        step(model, ids[:, -1:])
        before = [layer.keys.clone() for layer in step.cache.self_attention_cache.layers]
        with pytest.raises(ValueError, match="slots"):
            step(model, ids[:, -1:])
        assert all(torch.equal(a, b.keys) for a, b in zip(before, step.cache.self_attention_cache.layers, strict=True))


@pytest.mark.gpu
class TestGenerate:
    def test_the_step_is_kept_between_calls_and_captured_again_when_weights_move(self, device):
        model = whisper_triton.accelerate(tiny_whisper(device))
        features = torch.randn(2, MEL_BINS, 2 * FRAMES, device=device)
        first = model.generate(features, max_new_tokens=10)
        step = model._whisper_triton.steps[2]
        assert torch.equal(model.generate(features, max_new_tokens=10), first)
        assert model._whisper_triton.steps[2] is step
        model.half().float()
        model.generate(features, max_new_tokens=10)
        assert model._whisper_triton.steps[2] is not step

    def test_several_batch_sizes_live_side_by_side(self, device):
        model = whisper_triton.accelerate(tiny_whisper(device))
        for B in (1, 2, 4):
            model.generate(torch.randn(B, MEL_BINS, 2 * FRAMES, device=device), max_new_tokens=5)
        assert list(model._whisper_triton.steps) == [1, 2, 4]

    def test_a_hook_on_the_decoder_is_called_at_every_step(self, device):
        model = whisper_triton.accelerate(tiny_whisper(device))
        calls = []
        model.model.decoder.layers[0].fc1.register_forward_hook(lambda *args: calls.append(1))
        ids = model.generate(torch.randn(1, MEL_BINS, 2 * FRAMES, device=device), max_new_tokens=8, min_new_tokens=8)
        assert len(calls) >= 8 <= ids.shape[1]
