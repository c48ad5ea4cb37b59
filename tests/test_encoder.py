"""The encoder's chain of fused kernels and its captured graph against the stock encoder."""

from __future__ import annotations

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from whisper_models import FRAMES, MEL_BINS, assert_generates_as_stock, mel, tiny_whisper

import whisper_triton
from whisper_triton import encoder, fused_encoder
from whisper_triton.encoder import CapturedEncoder, fingerprint, why_not_captured
from whisper_triton.fused_encoder import FusedEncoder

pytest_plugins = ["whisper_fixtures"]


def encode(model: Any, features: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.model.encoder(features.to(model.device, model.dtype), **kwargs).last_hidden_state


def assert_near(model: Any, features: torch.Tensor, ours: torch.Tensor) -> None:
    """`ours` is hardly farther from a float64 run of the stock encoder than stock is in the same dtype.

    In fp32 the sums' order is all there is between them, and another one may well be half as good.
    """
    exact, stock = encode(copy.deepcopy(model).double(), features), encode(model, features)
    assert ours.dtype == stock.dtype
    assert ours.shape == stock.shape
    assert (ours - exact).norm() <= (2 if stock.dtype == torch.float32 else 1.25) * (stock - exact).norm()


def assert_close(ours: torch.Tensor, stock: torch.Tensor) -> None:
    """In fp32, far below any change of weights or features."""
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)


def run_chain(model: Any, features: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return FusedEncoder(model.model.encoder)(features.to(model.device, model.dtype))


class TestChain:
    @pytest.mark.usefixtures("reference_kernels")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_it_gives_the_stock_encoders_states(self, dtype, device):
        self.check(tiny_whisper(device, seed=3, dtype=dtype, encoder_ffn_dim=160), mel(2, device))

    def test_on_the_kernels_too(self, device):
        self.check(tiny_whisper(device, dtype=torch.float16, encoder_layers=1), mel(1, device))

    def check(self, model: Any, features: torch.Tensor) -> None:
        ours = run_chain(copy.deepcopy(model), features)
        assert ours.is_contiguous()
        assert_near(model, features, ours)

    @pytest.mark.usefixtures("reference_kernels")
    @pytest.mark.parametrize(("d_model", "heads"), [(96, 3), (160, 2), (96, 1)])
    def test_a_scale_that_is_no_power_of_two_is_applied_as_stock_does(self, d_model, heads, device):
        model = tiny_whisper(device, d_model=d_model, encoder_attention_heads=heads, decoder_attention_heads=heads).half()
        self.check(model, mel(1, device))

    @pytest.mark.usefixtures("reference_kernels")
    def test_states_beyond_fp16_are_limited_as_stock_limits_them(self, device):
        model = tiny_whisper(device, seed=3).half()
        model.model.encoder.layers[0].fc2.bias.data[3] = 60000.0
        model.model.encoder.layers[1].fc2.bias.data[3] = 60000.0
        stock, ours = encode(model, mel(1, device)), run_chain(model, mel(1, device))
        assert ours.isfinite().all()
        assert torch.allclose(ours, stock, rtol=1e-2, atol=1e-2)

    @pytest.mark.usefixtures("reference_kernels")
    def test_what_lies_between_the_products_is_neither_copied_nor_transposed(self, device):
        model = tiny_whisper(device)
        copies: list[str] = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = str(function)
                copies.extend([name] if "clone" in name or "copy" in name or "cat" in name else [])
                return function(*args, **(kwargs or {}))

        chain, features = FusedEncoder(model.model.encoder), mel(2, device)
        with torch.no_grad(), Watch():
            chain(features)
        assert copies == ["aten.clone.default"]  # of the features, which come as (B, mel bins, frames)

    @pytest.mark.usefixtures("reference_kernels")
    def test_a_long_batch_goes_through_in_parts(self, device, monkeypatch):
        model, features = tiny_whisper(device, seed=3), mel(5, device)
        monkeypatch.setattr(fused_encoder, "L2_BYTES", 2 * FRAMES * 64 * 4)
        assert fused_encoder.sequences_at_once(model.model.encoder) == 2
        self.check(model, features)
        parts = [run_chain(model, part) for part in features.split(2)]
        assert torch.equal(run_chain(model, features), torch.cat(parts))

    @pytest.mark.parametrize(
        ("d_model", "dtype", "expected"),
        [(384, torch.float16, 7), (1024, torch.float16, 2), (1280, torch.float16, 2), (1280, torch.float32, 1)],
    )
    def test_how_many_go_at_once_depends_on_the_states_size(self, d_model, dtype, expected):
        with torch.device("meta"):
            encoder = WhisperEncoder(WhisperConfig(d_model=d_model, encoder_ffn_dim=4 * d_model, encoder_layers=0)).to(dtype)
        assert fused_encoder.sequences_at_once(encoder) == expected


class Wrapped(torch.Tensor):
    """Stands for the tensors that hold quantised or sharded weights."""


def wrap(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Wrapped))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders say that they lie on a GPU, so that what else stands against a capture can be asked for without one."""
    monkeypatch.setattr(WhisperEncoder, "device", torch.device("cuda"))


class TestWhyNot:
    def test_a_graph_is_captured_on_a_gpu_only(self):
        assert "cpu" in why_not_captured(whisper_triton.accelerate(tiny_whisper()).model.encoder)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda e: setattr(e.layers[0].fc1, "forward", lambda h: h), "forward pass of its own"),
            (lambda e: e.conv1.register_forward_hook(lambda *a: None), "hook"),
            (lambda e: e.layers[1].fc2.register_forward_pre_hook(lambda *a: None), "hook"),
            (lambda e: e.layers[0].train(), "training"),
            (lambda e: setattr(e.layers[0], "fc1", nn.Sequential(e.layers[0].fc1)), "Sequential"),
            (lambda e: setattr(e.layers[0], "activation_fn", nn.ReLU()), "ReLU"),
            (lambda e: setattr(e.config, "_attn_implementation", "sdpa"), "sdpa"),
            (lambda e: setattr(e.config, "max_source_positions", 7), "for 7 frames"),
            (lambda e: e.double(), "float64"),
            (lambda e: wrap(e.layers[0].self_attn.k_proj), "Wrapped"),
        ],
    )
    @pytest.mark.usefixtures("on_gpu")
    def test_what_a_graph_would_not_see_is_a_reason(self, change, reason):
        encoder = whisper_triton.accelerate(tiny_whisper()).model.encoder
        assert "is torch.float32 on cpu" in why_not_captured(encoder)  # all that stands against it
        change(encoder)
        assert reason in why_not_captured(encoder)

    @pytest.mark.usefixtures("on_gpu")
    def test_a_hook_on_the_encoder_itself_is_none(self):
        encoder = whisper_triton.accelerate(tiny_whisper()).model.encoder
        before = why_not_captured(encoder)
        encoder.register_forward_hook(lambda *args: None)
        assert why_not_captured(encoder) == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda e: setattr(e.layers[1].fc1.weight, "data", e.layers[1].fc1.weight.data.clone()),
            lambda e: setattr(e.layers[1].fc1.weight, "data", e.layers[1].fc1.weight.data.view(torch.bfloat16)),
            lambda e: setattr(e.layers[1].fc1, "weight", nn.Parameter(e.layers[1].fc1.weight.data)),
            lambda e: setattr(e.layers[1].fc1, "bias", None),
            lambda e: setattr(e.layers[1], "activation_fn", nn.ReLU()),
            lambda e: setattr(e.layers[1], "activation_fn", None),
            lambda e: e.layers[0].fc1.register_forward_hook(lambda *args: None),
            lambda e: e.layers[0].fc1.register_forward_pre_hook(lambda *args: None),
            lambda e: e.train(),
            lambda e: e.layers[0].train(),
            lambda e: setattr(e, "layers", e.layers[:2]),
            lambda e: setattr(e.layers[0].fc1, "forward", lambda h: h),
            lambda e: e.half(),
        ],
    )
    def test_the_fingerprint_follows_all_of_it(self, change):
        encoder = tiny_whisper().model.encoder
        before = fingerprint(encoder)
        assert fingerprint(encoder) == before
        change(encoder)
        assert fingerprint(encoder) != before

    def test_a_hook_on_the_encoder_itself_leaves_the_fingerprint(self):
        encoder = tiny_whisper().model.encoder
        before = fingerprint(encoder)
        encoder.register_forward_hook(lambda *args: None)
        assert fingerprint(encoder) == before


@pytest.mark.usefixtures("reference_kernels")
class TestAccelerated:
    def test_the_encoder_keeps_its_signature_and_gives_stocks_output(self, device):
        model = tiny_whisper(device, seed=3)
        signature, stock = inspect.signature(model.model.encoder.forward), encode(model, mel(2, device))
        whisper_triton.accelerate(model)
        assert inspect.signature(model.model.encoder.forward) == signature
        assert_close(encode(model, mel(2, device)), stock)
        with pytest.raises(ValueError, match="length"):
            encode(model, torch.randn(1, MEL_BINS, 10))

    def test_an_encoder_shared_by_two_models_serves_both_and_is_restored(self, device):
        first, second = tiny_whisper(device, seed=3), tiny_whisper(device, seed=4)
        second.model.encoder = first.model.encoder
        stock = encode(first, mel(1, device))
        for model in (first, second):
            whisper_triton.accelerate(model)
        whisper_triton.restore(second)
        assert_close(encode(first, mel(1, device)), stock)
        whisper_triton.restore(first)
        assert not {"forward", "_whisper_triton"} & set(vars(first.model.encoder))
        assert torch.equal(encode(second, mel(1, device)), stock)

    def test_a_forward_pass_of_the_users_own_stays(self, device):
        model, runs = tiny_whisper(device), []
        inner = model.model.encoder.forward
        model.model.encoder.forward = lambda *args, **kwargs: runs.append(1) or inner(*args, **kwargs)
        with whisper_triton.accelerated(model):
            encode(model, mel(1, device))
        assert runs == [1]

    def test_torch_compile_takes_it_whole(self, device):
        model = whisper_triton.accelerate(tiny_whisper(device, seed=3))
        compiled = torch.compile(lambda features: model.model.encoder(features)[0], fullgraph=True, backend="eager")
        with torch.no_grad():
            assert_close(compiled(mel(1, device)), encode(model, mel(1, device)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("B", [1, 3, 8])
def test_one_graph_serves_every_features(B, dtype, device):
    model = tiny_whisper(device, seed=3, dtype=dtype)
    twin = whisper_triton.accelerate(copy.deepcopy(model))
    captured = CapturedEncoder(twin.model.encoder, mel(B, device).to(dtype))
    for seed in (1, 2):
        features = mel(B, device, seed=seed).to(dtype)
        ours = captured(features)
        assert_near(model, features, ours)
        assert torch.equal(captured(features), ours)


@pytest.mark.parametrize(
    ("most", "kept"),
    [
        (3 << 20, [[1], [1, 2], [1, 2, 3], [2, 3, 1], [3, 1, 4], [1, 4, 2]]),
        (2 << 20, [[1], [1, 2], [2, 3], [3, 1], [1, 4], [4, 2]]),
        (1, [[1], [2], [3], [1], [4], [2]]),
    ],
)
def test_kept_graphs_never_take_more_than_their_share(
    most: int, kept: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for one that is larger by itself. Each takes a megabyte here, and counts beside the next as soon as it is there."""
    model, given_up = whisper_triton.accelerate(tiny_whisper()), []
    graphs = model.model.encoder._whisper_triton.graphs

    def capture(module: Any, features: torch.Tensor) -> SimpleNamespace:
        B = features.shape[0]
        # What goes in and comes out fits beside the others before a graph takes it.
        assert not graphs or sum(graph.nbytes for graph in graphs.values()) + features.nbytes <= most
        known = {"fits": lambda _: True, "has_its_memory": lambda: True, "device": features.device}
        return SimpleNamespace(nbytes=1 << 20, wait=lambda: given_up.append(B), **known)

    monkeypatch.setattr(encoder, "CapturedEncoder", capture)
    monkeypatch.setattr(encoder, "why_not_captured", lambda module: None)
    monkeypatch.setattr(encoder, "MAX_BYTES", most)
    found = []
    for B in (1, 2, 3, 1, 4, 2):
        encoder._captured(model.model.encoder, mel(B))
        found.append([batch_size for batch_size, _ in graphs])
    assert found == kept
    assert given_up


@pytest.mark.gpu
class TestGraphs:
    def graphs(self, model: Any) -> dict[Any, CapturedEncoder]:
        return model.model.encoder._whisper_triton.graphs

    def test_they_are_kept_by_batch_size_and_captured_again_when_weights_move(self, device):
        model = whisper_triton.accelerate(tiny_whisper(device, seed=3))
        first = encode(model, mel(2, device))
        encode(model, mel(1, device))
        assert list(self.graphs(model)) == [(2, 2 * FRAMES), (1, 2 * FRAMES)]
        kept = self.graphs(model)[2, 2 * FRAMES]
        assert torch.equal(encode(model, mel(2, device)), first)
        assert self.graphs(model)[2, 2 * FRAMES] is kept
        model.half().float()
        encode(model, mel(2, device))
        assert list(self.graphs(model)) == [(2, 2 * FRAMES)]
        assert self.graphs(model)[2, 2 * FRAMES] is not kept

    def test_weights_written_in_place_are_seen(self, device):
        model, other = whisper_triton.accelerate(tiny_whisper(device, seed=3)), tiny_whisper(device, seed=5)
        encode(model, mel(1, device))
        graph = self.graphs(model)[1, 2 * FRAMES]
        model.load_state_dict(other.state_dict())
        assert_close(encode(model, mel(1, device)), encode(other, mel(1, device)))
        assert self.graphs(model)[1, 2 * FRAMES] is graph

    def test_the_result_is_the_callers_own(self, device):
        model = whisper_triton.accelerate(tiny_whisper(device, seed=3))
        first = encode(model, mel(1, device))
        before = first.clone()
        encode(model, mel(1, device, seed=9))
        assert torch.equal(first, before)

    @pytest.mark.parametrize("kwargs", [{"output_attentions": True}, {"output_hidden_states": True}, {"return_dict": False}])
    def test_what_it_does_not_cover_is_stocks(self, kwargs, device):
        model = tiny_whisper(device, seed=3)
        with torch.no_grad():
            stock = model.model.encoder(mel(1, device), **kwargs)
            ours = whisper_triton.accelerate(model).model.encoder(mel(1, device), **kwargs)
        assert type(ours) is type(stock)
        assert len(ours) == len(stock)
        assert not self.graphs(model)

    def test_gradients_flow_as_in_stock(self, device):
        model = whisper_triton.accelerate(tiny_whisper(device, seed=3))
        encode(model, mel(1, device))  # packs the weights
        model.model.encoder(mel(1, device))[0].sum().backward()
        assert all(layer.self_attn.q_proj.weight.grad is not None for layer in model.model.encoder.layers)
        assert len(self.graphs(model)) == 1

    def test_a_hook_on_a_layer_is_called(self, device):
        model, calls = whisper_triton.accelerate(tiny_whisper(device, seed=3)), []
        encode(model, mel(1, device))
        handle = model.model.encoder.layers[0].register_forward_hook(lambda *args: calls.append(1))
        encode(model, mel(1, device))
        assert calls == [1]
        handle.remove()
        encode(model, mel(1, device))
        assert calls == [1]
        assert len(self.graphs(model)) == 1

    def test_inside_somebody_elses_graph_it_is_stocks(self, device):
        model, features = whisper_triton.accelerate(tiny_whisper(device, seed=3)), mel(1, device)
        wanted = encode(model, features)
        encode(whisper_triton.restore(copy.deepcopy(model)), features)  # stock's libraries have been set up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            states = encode(model, features)
        graph.replay()
        assert_close(states, wanted)

    def test_restored_each_parameter_has_memory_of_its_own(self, device):
        model = tiny_whisper(device, seed=3)
        stock = encode(model, mel(2, device))
        with whisper_triton.accelerated(model):
            encode(model, mel(2, device))
            assert any(p.untyped_storage().nbytes() > p.nbytes for p in model.parameters())
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
        assert torch.equal(encode(model, mel(2, device)), stock)

    def test_a_copy_captures_its_own(self, device):
        model = whisper_triton.accelerate(tiny_whisper(device, seed=3))
        first = encode(model, mel(1, device))
        twin = copy.deepcopy(model)
        assert not self.graphs(twin)
        for parameter in model.parameters():
            parameter.data.zero_()
        assert torch.equal(encode(twin, mel(1, device)), first)

    def test_threads_with_streams_of_their_own_take_turns(self, device):
        model = whisper_triton.accelerate(tiny_whisper(device, seed=3))
        wanted = [encode(model, mel(1, device, seed=seed)) for seed in range(4)]
        torch.cuda.synchronize()

        def run(seed: int) -> bool:
            with torch.cuda.stream(torch.cuda.Stream()):
                features = mel(1, device, seed=seed)
                same = [torch.equal(encode(model, features), wanted[seed]) for _ in range(50)]
            return all(same)

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(run, range(4))) == [True] * 4

    def test_a_graph_outlives_others_and_what_memory_they_free(self, device):
        model = whisper_triton.accelerate(tiny_whisper(device, seed=3, d_model=384, encoder_ffn_dim=1536).half())
        first = encode(model, mel(1, device))
        encode(model, mel(8, device))
        del self.graphs(model)[8, 2 * FRAMES]
        torch.cuda.empty_cache()
        poison = [torch.full((1 << 20,), torch.nan, device=device) for _ in range(64)]
        assert torch.equal(encode(model, mel(1, device)), first)
        assert all(tensor.isnan().all() for tensor in poison)

    def test_generate_gives_stocks_tokens(self, device):
        assert_generates_as_stock(tiny_whisper(device, seed=3), mel(2, device), max_new_tokens=12)
