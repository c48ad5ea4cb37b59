"""Whatever was done to a model between `accelerate` and `restore`, it then is what a model is that never was accelerated.

Both are led through the same sequence of what people do with models, only one of them accelerated in between; hypothesis
chooses the sequences. Without a GPU a step runs eagerly where a graph would be replayed.
"""

from __future__ import annotations

import copy
import pathlib
import pickle
import tempfile
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from counts import SEQUENCES, count
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import WhisperForConditionalGeneration
from whisper_models import SOT, Interrupt, assert_same, mel, tensors_of, tiny_whisper

from whisper_triton import accelerate, accelerated, decoder, is_accelerated, restore

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels", "eager_steps")
Whisper = WhisperForConditionalGeneration


@pytest.fixture(autouse=True)
def _modules(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, the steps run in the model's modules: the chain of references would only be slower."""
    if device.type == "cpu":
        monkeypatch.setattr(decoder, "is_fusable", lambda model, batch_size: False)


class Adapter(nn.Module):
    """Stands in for a linear layer, which it holds, as those of PEFT do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2).to(base.weight.device, base.weight.dtype)
        self.up = nn.Linear(2, base.out_features).to(base.weight.device, base.weight.dtype)
        for i, parameter in enumerate((*self.down.parameters(), *self.up.parameters())):
            parameter.data = torch.linspace(-0.2, 0.1 * i, parameter.numel()).view_as(parameter).to(parameter)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.base(states) + self.up(self.down(states))


class Wrapper(nn.Module):
    """Stands in for an attention module, which it holds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, weights = self.inner(*args, **kwargs)
        return out * 0.5, weights


class Pair:
    """A model that is accelerated now and then, and one that never is."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ours, self.stock = device, tiny_whisper(device, seed=3), tiny_whisper(device, seed=3)

    def each(self, change: Callable[[Whisper], object]) -> None:
        for model in (self.ours, self.stock):
            change(model)

    # --- what is done to ours alone

    def accelerate(self) -> None:
        accelerate(self.ours)

    def restore(self) -> None:
        restore(self.ours)

    def accelerated_block(self) -> None:
        with accelerated(self.ours):
            self.generate()

    def deep_copy(self) -> None:
        self.ours = copy.deepcopy(self.ours)

    def pickle(self) -> None:
        if any(module._forward_hooks for module in self.ours.modules()):  # which transformers leaves, and nobody can pickle
            return
        was_accelerated = is_accelerated(self.ours)
        self.ours = pickle.loads(pickle.dumps(self.ours))
        if was_accelerated:  # a method that is kept by its name is the class's own when it comes back
            accelerate(self.ours)

    def interrupt(self) -> None:
        features = mel(2, self.ours.device).to(self.ours.dtype)
        for at in (50, 400, 700):  # on a GPU graphs take the place of later operations
            with (
                pytest.raises(KeyboardInterrupt) if at == 50 else suppress(KeyboardInterrupt),
                Interrupt(KeyboardInterrupt, at),
            ):
                self.ours.generate(features, min_new_tokens=20, max_new_tokens=20)

    # --- what both go through

    def generate(self) -> None:
        kwargs = {"max_new_tokens": 6, "return_timestamps": True}
        results = [model.generate(mel(2, model.device).to(model.dtype), **kwargs) for model in (self.ours, self.stock)]
        if self.stock.dtype == torch.float32:  # fewer bits may well choose another token
            assert results[0].tolist() == results[1].tolist()

    def token_timestamps(self) -> None:
        def run(model: Whisper) -> None:
            attn_implementation = model.config._attn_implementation
            model.generate(mel(1, model.device).to(model.dtype), max_new_tokens=3, return_token_timestamps=True)
            model.config._attn_implementation = attn_implementation  # which stock leaves at eager

        self.each(run)

    def half(self) -> None:
        self.each(lambda model: model.half())

    def float(self) -> None:
        self.each(lambda model: model.float())

    def to(self) -> None:
        """There and back: each parameter lies elsewhere then."""
        self.each(lambda model: model.to(torch.float64).to(model.device, torch.float32))

    def to_cpu(self) -> None:
        self.each(lambda model: model.to("cpu"))

    def to_device(self) -> None:
        self.each(lambda model: model.to(self.device))

    def train_mode(self) -> None:
        self.each(lambda model: model.train())
        self.generate()
        self.each(lambda model: model.eval())

    def load_state_dict(self) -> None:
        other = {name: tensor.roll(1, 0) for name, tensor in self.stock.state_dict().items()}
        self.each(lambda model: model.load_state_dict(other))

    def assign_state_dict(self) -> None:
        """Other tensors in place of the parameters, of another dtype; tied ones are apart then."""
        dtype = torch.float64 if self.stock.dtype == torch.float32 else torch.float32
        for model in (self.ours, self.stock):
            other = {name: tensor.roll(1, 0).to(dtype) for name, tensor in self.stock.state_dict().items()}
            model.load_state_dict(other, assign=True)

    def save_pretrained(self) -> None:
        states = []
        for model in (self.ours, self.stock):
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                files = [(path.name, path.read_bytes()) for path in sorted(pathlib.Path(folder).iterdir())]
            states.append(files)
        assert states[0] == states[1]

    def adapt(self) -> None:
        for model in (self.ours, self.stock):
            for attention in (model.model.decoder.layers[0].self_attn, model.model.encoder.layers[1].self_attn):
                if isinstance(getattr(attention, "q_proj", None), nn.Linear):
                    attention.q_proj = Adapter(attention.q_proj)

    def take_adapters_out(self) -> None:
        for model in (self.ours, self.stock):
            for module in list(model.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, Adapter):
                        setattr(module, name, child.base)

    def wrap_attention(self) -> None:
        for model in (self.ours, self.stock):
            layer = model.model.decoder.layers[1]
            if not isinstance(layer.encoder_attn, Wrapper):
                layer.encoder_attn = Wrapper(layer.encoder_attn)

    def compile(self) -> None:
        """A compiled model is run and thrown away. Not for hypothesis to choose: it takes seconds."""
        features, ids = mel(1, self.ours.device).to(self.ours.dtype), torch.full((1, 2), SOT, device=self.ours.device)
        with torch.no_grad():
            ours = torch.compile(self.ours, backend="eager")(features, decoder_input_ids=ids).logits
            stock = torch.compile(self.stock, backend="eager")._orig_mod  # leaves a mark on the model
            exact = copy.deepcopy(stock).double()(features.double(), decoder_input_ids=ids).logits
            assert_same(ours, stock(features, decoder_input_ids=ids).logits, exact)

    def compile_attention(self) -> None:
        """In place, by inductor: what was compiled while it was ours must not run when it is stock's. It takes seconds too."""
        self.each(lambda model: model.model.encoder.layers[0].self_attn.compile())

    def check(self) -> None:
        ours, stock = restore(self.ours), self.stock
        assert not is_accelerated(ours)
        assert repr(ours) == repr(stock)
        assert repr(ours.config) == repr(stock.config)
        assert ours.config._attn_implementation == stock.config._attn_implementation
        for (name, mine), (_, theirs) in zip(ours.named_modules(), stock.named_modules(), strict=True):
            assert sorted(vars(mine)) == sorted(vars(theirs)), name
            assert type(mine) is type(theirs)
            assert (len(mine._forward_hooks), mine.training) == (len(theirs._forward_hooks), theirs.training), name
        mine, theirs = ours.state_dict(), stock.state_dict()
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in ours.parameters())
        ids = torch.full((2, 3), SOT, device=stock.device)
        with torch.no_grad():
            outputs = [model(mel(2, model.device).to(model.dtype), decoder_input_ids=ids) for model in (ours, stock)]
        mine, theirs = map(tensors_of, outputs)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[path], theirs[path]) for path in theirs)
        results = [model.generate(mel(3, model.device).to(model.dtype), max_new_tokens=8) for model in (ours, stock)]
        assert torch.equal(*results)


def assert_undone(steps: list[str], device: torch.device) -> None:
    pair = Pair(device)
    for step in steps:
        getattr(pair, step)()
    pair.check()
    count(SEQUENCES)


HAS_GPU = torch.cuda.is_available()
NOT_CHOSEN = ("each", "check", "compile", "compile_attention", *(() if HAS_GPU else ("to_cpu", "to_device")))
NAMES = [name for name in vars(Pair) if not name.startswith("_") and name not in NOT_CHOSEN]


@settings(max_examples=40 if HAS_GPU else 20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.sampled_from(NAMES), max_size=8))
@example(steps=["accelerate", "compile", "generate", "restore", "generate"])
@example(steps=["accelerate", "generate", "to_cpu", "generate", "to_device", "generate", "to_cpu", "restore", "to_device"])
@example(steps=["accelerate", "generate", "assign_state_dict", "generate", "float", "assign_state_dict", "float", "generate"])
@example(steps=["accelerate", "generate", "adapt", "generate", "take_adapters_out", "generate", "deep_copy", "generate"])
@example(steps=["accelerate", "half", "generate", "float", "load_state_dict", "generate", "interrupt", "save_pretrained"])
@example(
    steps=["accelerate", "wrap_attention", "generate", "pickle", "generate", "token_timestamps", "train_mode", "to", "generate"]
)
def test_any_sequence_is_undone(steps: list[str], device: torch.device) -> None:
    assert_undone(steps, device)


def test_what_inductor_compiled_is_undone(device: torch.device) -> None:
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"inductor has nothing to compile with: {error}")
    assert_undone(["accelerate", "generate", "compile_attention", "generate", "restore", "generate"], device)
