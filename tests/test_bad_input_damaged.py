"""Models half moved, half cast, quantised, hooked or spread over devices: stock's error or result, and `restore` as ever."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bad_input_model import assert_same_outcome, everything, given, outcome
from test_patching import traces
from torch import nn
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperEncoder
from whisper_models import mel, tiny_whisper

from whisper_triton import accelerate, decoder, restore

pytest_plugins = ["whisper_fixtures"]
pytestmark = [pytest.mark.usefixtures("reference_kernels"), pytest.mark.filterwarnings("ignore")]

Model = WhisperForConditionalGeneration
GPUS = torch.cuda.device_count()


class Int8Linear(nn.Module):
    """A quantised layer as libraries put it in place of `nn.Linear`: int8 weights, a scale a row, multiplied out when used."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class Packed(nn.Parameter):
    """A parameter of a class of its own, as quantisers have them."""


def quantise(root: nn.Module) -> None:
    for module in list(root.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))


def quantise_by_pytorch(model: Model) -> None:
    """PyTorch's own int8 layers, which are for a CPU."""
    torch.ao.quantization.quantize_dynamic(model.cpu(), {nn.Linear}, inplace=True)


def repack(root: nn.Module) -> None:
    for module in root.modules():
        if type(module) is nn.Linear:
            module.weight = Packed(module.weight.data, requires_grad=False)


class Hook:
    """What accelerate's `dispatch_model` leaves on a module: a forward pass on the instance that sends its inputs along."""

    def __init__(self, module: nn.Module, device: torch.device | str) -> None:
        self.forward, self.device = module.forward, device
        module._hf_hook, module._old_forward, module.forward = self, self.forward, self

    def send(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*map(self.send, args), **{name: self.send(value) for name, value in kwargs.items()})


def dispatch(model: Model, devices: dict[str, Any]) -> None:
    """A `device_map`: hooks on the parts that it names, as `from_pretrained(device_map=...)` puts them there."""
    for name, device in devices.items():
        part = model.get_submodule(name).to(device)
        Hook(part, device)
    model.hf_device_map = dict(devices)


def to_half(*names: str) -> Callable[[Model], None]:
    return lambda model: [model.get_submodule(name).half() for name in names] and None


def to_meta(*names: str) -> Callable[[Model], None]:
    return lambda model: [model.get_submodule(name).to("meta") for name in names] and None


def strided(model: Model) -> None:
    for layer in model.model.decoder.layers:
        for linear in (layer.fc1, layer.encoder_attn.k_proj, layer.encoder_attn.v_proj):
            linear.weight.data = linear.weight.data.T.contiguous().T


def without_bias(model: Model) -> None:
    for layer in model.model.decoder.layers:
        layer.encoder_attn.v_proj.bias = None
        layer.fc1.bias = None


DECODER, ENCODER = "model.decoder", "model.encoder"
# Not among them: one projection on meta. PyTorch multiplies a CPU tensor with such a weight into whatever lay in memory, so
# that stock's own result is another one each time.
DAMAGE: dict[str, Callable[[Model], Any]] = {
    "the decoder on meta": to_meta(DECODER),
    "the encoder on meta": to_meta(ENCODER),
    "a decoder layer on meta": to_meta(f"{DECODER}.layers.1"),
    "the first decoder layer on meta": to_meta(f"{DECODER}.layers.0"),
    "the positions on meta": to_meta(f"{DECODER}.embed_positions"),
    "a norm on meta": to_meta(f"{DECODER}.layer_norm"),
    "all of it on meta": lambda model: model.to("meta"),
    "the decoder in fp16": to_half(DECODER, "proj_out"),
    "the encoder in fp16": to_half(ENCODER),
    "a decoder layer in fp16": to_half(f"{DECODER}.layers.1"),
    "one projection in fp16": to_half(f"{DECODER}.layers.0.self_attn.q_proj"),
    "one value projection in fp16": to_half(f"{DECODER}.layers.1.encoder_attn.v_proj"),
    "the positions in fp16": to_half(f"{DECODER}.embed_positions"),
    "the head in fp16": to_half("proj_out"),
    "the decoder in fp64": lambda model: model.model.decoder.double(),
    "all of it in fp64": lambda model: model.double(),
    "quantised": quantise,
    "a quantised decoder": lambda model: quantise(model.model.decoder),
    "a quantised encoder": lambda model: quantise(model.model.encoder),
    "quantised cross-attention": lambda model: [quantise(layer.encoder_attn) for layer in model.model.decoder.layers],
    "quantised by PyTorch": quantise_by_pytorch,
    "a quantised head": lambda model: setattr(model, "proj_out", Int8Linear(model.proj_out)),
    "weights of another class": repack,
    "weights laid out the other way": strided,
    "biases taken out": without_bias,
    "device_map of one device": lambda model: dispatch(model, {"model": model.device, "proj_out": model.device}),
    "device_map by layer": lambda model: dispatch(
        model, {f"{DECODER}.layers.{i}": model.device for i in (0, 1)} | {ENCODER: model.device}
    ),
    "device_map with meta": lambda model: dispatch(model, {ENCODER: model.device, f"{DECODER}.layers.1": "meta"}),
    "device_map with the decoder on meta": lambda model: dispatch(model, {DECODER: "meta", "proj_out": "meta"}),
    "no decoder layer": lambda model: setattr(model.model.decoder, "layers", nn.ModuleList()),
    "no encoder layer": lambda model: setattr(model.model.encoder, "layers", nn.ModuleList()),
    "layers in turn": lambda model: setattr(model.model.decoder, "layers", nn.ModuleList([*model.model.decoder.layers][::-1])),
    "one layer twice": lambda model: setattr(model.model.decoder, "layers", nn.ModuleList([model.model.decoder.layers[0]] * 2)),
    "no head": lambda model: setattr(model, "proj_out", None),
    "an identity for a projection": lambda model: setattr(model.model.decoder.layers[0].self_attn, "out_proj", nn.Identity()),
    "weights of NaN": lambda model: model.model.decoder.layers[0].fc1.weight.data.fill_(torch.nan),
    "a weight of infinity": lambda model: model.model.decoder.layers[1].fc2.weight.data[0].fill_(torch.inf),
    "in training mode": lambda model: model.train(),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("what", DAMAGE)
def test_stocks_error_or_stocks_result(what: str, before: bool, device: torch.device) -> None:
    """Damaged before `accelerate`, and after a first call of the accelerated model."""
    ours, stock = tiny_whisper(device, seed=3), tiny_whisper(device, seed=3)
    if before:
        DAMAGE[what](ours)
        outcome(ours, given())  # with a device_map, stock's generate hooks the encoder where accelerate is installed
        found = traces(ours)
        accelerate(ours)
    else:
        accelerate(ours).generate(mel(2, device), max_new_tokens=2)
        DAMAGE[what](ours)
    DAMAGE[what](stock)
    weights = everything(ours)
    assert_same_outcome(outcome(ours, given()), outcome(stock, given()))
    assert all(map(torch.equal, everything(ours), weights))
    restore(ours)
    assert not any(type(module).__name__ == "TritonAttention" for module in ours.modules())
    assert sum(type(module) is WhisperAttention for module in ours.modules()) == sum(
        type(module) is WhisperAttention for module in stock.modules()
    )
    if before:
        assert traces(ours) == found
    assert_same_outcome(outcome(ours, given()), outcome(stock, given()))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("quantised", "in the decoder a module is Int8Linear"),
        ("quantised by PyTorch", "in the decoder a module is Linear"),
        ("a quantised head", "in the decoder a module is Int8Linear"),
        ("weights of another class", "a weight of the decoder is "),
        ("device_map of one device", "has a forward pass of its own"),
        ("in training mode", "is in training mode"),
    ],
)
def test_none_of_them_is_captured(what: str, reason: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(tiny_whisper(device, seed=3))
    DAMAGE[what](model)
    if device.type == "cpu":  # which would be the reason for all of them
        monkeypatch.setattr(Model, "device", torch.device("cuda"))
    assert reason in decoder.why_not_captured(model)


def test_a_model_that_pytorch_quantised_is_copied_saved_and_restored() -> None:
    ours, stock = tiny_whisper(seed=3), tiny_whisper(seed=3)
    for model in (ours, stock):
        quantise_by_pytorch(model)
    assert type(stock.proj_out) is torch.ao.nn.quantized.dynamic.Linear
    wanted = outcome(stock, given())
    accelerate(ours)
    assert_same_outcome(outcome(ours, given()), wanted)
    copied = copy.deepcopy(ours)
    copied.load_state_dict(ours.state_dict())
    for model in (copied, restore(copied), ours, restore(ours)):
        assert_same_outcome(outcome(model, given()), wanted)
    assert repr(ours) == repr(stock)


PARTS = (
    *(f"{ENCODER}.{part}" for part in ("conv1", "conv2", "embed_positions", "layers", "layer_norm")),
    *(f"{DECODER}.{part}" for part in ("embed_tokens", "embed_positions", "layers.0", "layers.1", "layer_norm")),
    "proj_out",
)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "where",
    [
        "disk",
        pytest.param("cpu", marks=pytest.mark.gpu),
        pytest.param("cuda:1", marks=[pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="one GPU")]),
    ],
)
@pytest.mark.parametrize("moved", ["decoder.layers.1", "decoder.layers", "encoder.layers", "decoder.layer_norm"])
def test_a_device_map_of_transformers(moved: str, where: str, device: torch.device, tmp_path: Path) -> None:
    """What lies on the disk, or beside a GPU on the CPU, is a meta tensor but while it runs."""
    pytest.importorskip("accelerate")
    tiny_whisper(seed=3).save_pretrained(tmp_path)
    devices = {part: where if part.startswith(f"model.{moved}") else str(device) for part in PARTS}
    ours, stock = (Model.from_pretrained(tmp_path, device_map=devices, offload_folder=tmp_path / "disk") for _ in range(2))
    assert len(set(ours.hf_device_map.values())) == 2
    wanted = outcome(stock, given())
    assert torch.is_tensor(wanted[0][1])  # and no error
    accelerate(ours)
    for _ in range(2):
        assert_same_outcome(outcome(ours, given()), wanted)
    restore(ours)
    # Stock's generate has hooked the encoder, and that of `ours` around our method.
    for mine, theirs in zip(ours.modules(), stock.modules(), strict=True):
        assert (type(mine), sorted(vars(mine))) == (type(theirs), sorted(vars(theirs)))
    assert ours.model.encoder._old_forward.__func__ is WhisperEncoder.forward
    assert_same_outcome(outcome(ours, given()), wanted)


@pytest.mark.gpu
@pytest.mark.bad_input
@pytest.mark.parametrize(
    "devices",
    [
        {ENCODER: "cpu", DECODER: "cuda", "proj_out": "cuda"},
        {ENCODER: "cuda", DECODER: "cpu", "proj_out": "cpu"},
        {f"{DECODER}.layers.0": "cuda", f"{DECODER}.layers.1": "cpu"},
    ],
    ids=["the encoder on the CPU", "the decoder on the CPU", "a layer on the CPU"],
)
def test_a_model_spread_over_a_gpu_and_the_cpu(devices: dict[str, str]) -> None:
    ours, stock = tiny_whisper("cuda", seed=3), tiny_whisper("cuda", seed=3)
    for model in (ours, stock):
        dispatch(model, devices)
    accelerate(ours)
    assert_same_outcome(outcome(ours, given()), outcome(stock, given()))
