"""Packed weights: one tensor, the same parameters, and no trace of it for whatever else uses a model."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import WhisperForConditionalGeneration
from whisper_models import mel, tiny_whisper

from whisper_triton.packing import pack, unpack

C = 64


def qkv(model: WhisperForConditionalGeneration) -> list[list[nn.Linear]]:
    """q, k and v of every attention of the encoder."""
    return [[layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj] for layer in model.model.encoder.layers]


def packed_whisper() -> WhisperForConditionalGeneration:
    model = tiny_whisper(seed=3)
    for linears in qkv(model):
        pack(linears)
    return model


def is_packed(model: WhisperForConditionalGeneration) -> bool:
    storages = {p.untyped_storage().data_ptr() for linears in qkv(model) for linear in linears for p in linear.parameters()}
    return len(storages) == 2 * len(qkv(model))  # one of weights, one of biases a layer


def same_output(model: WhisperForConditionalGeneration) -> bool:
    """As the model of the same seed that was never packed."""
    with torch.no_grad():
        outputs = [m.model.encoder(mel(1)).last_hidden_state for m in (model, tiny_whisper(seed=3))]
    return torch.equal(*outputs)


class TestPack:
    def test_one_product_gives_all(self) -> None:
        model = tiny_whisper(seed=3)
        linears, x = qkv(model)[0], torch.randn(5, C)
        wanted = torch.cat([linear(x) for linear in linears], 1)
        parameters = [p for linear in linears for p in linear.parameters()]
        weight, bias = pack(linears)
        assert weight.shape == (3 * C, C)
        assert weight.is_contiguous()
        assert not bias[C : 2 * C].any()
        assert torch.allclose(nn.functional.linear(x, weight, bias), wanted, rtol=1e-5, atol=1e-5)
        assert all(a is b for a, b in zip(parameters, (p for linear in linears for p in linear.parameters()), strict=True))

    def test_it_shares_memory_with_the_parameters(self) -> None:
        linears = qkv(tiny_whisper())[0]
        weight, bias = pack(linears)
        with torch.no_grad():
            linears[1].weight.fill_(7.0)
            linears[2].bias.fill_(8.0)
        assert (weight[C : 2 * C] == 7).all()
        assert (bias[2 * C :] == 8).all()
        assert not (weight[:C] == 7).any()

    def test_again_it_moves_nothing(self) -> None:
        linears = qkv(tiny_whisper())[0]
        first, second = pack(linears), pack(linears)
        assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]
        assert all(map(torch.equal, first, second))

    def test_a_neighbour_that_is_not_zero_is_no_missing_bias(self) -> None:
        """As of somebody who cut a fused bias in three and dropped the keys' part."""
        linears = qkv(tiny_whisper())[0]
        fused = torch.ones(3 * C)
        linears[0].bias.data, linears[2].bias.data = fused[:C], fused[2 * C :]
        _, bias = pack(linears)
        assert bias.tolist() == [1.0] * C + [0.0] * C + [1.0] * C
        assert (fused == 1).all()

    def test_layers_without_any_bias_have_none(self) -> None:
        weight, bias = pack([nn.Linear(4, 3, bias=False), nn.Linear(4, 5, bias=False)])
        assert weight.shape == (8, 4)
        assert bias is None

    def test_in_inference_mode_the_parameters_stay_trainable(self) -> None:
        linears = qkv(tiny_whisper())[0]
        with torch.inference_mode():
            pack(linears)
        linears[0](torch.randn(2, C)).sum().backward()
        torch.optim.SGD(linears[0].parameters(), lr=1.0).step()
        assert linears[0].weight.grad is not None

    @pytest.mark.parametrize("other", [nn.Linear(5, 4), nn.Linear(4, 4).half()])
    def test_layers_that_do_not_fit_are_refused(self, other: nn.Linear) -> None:
        first = nn.Linear(4, 4)
        before = first.weight.data_ptr()
        with pytest.raises(ValueError, match="input width"):
            pack([first, other])
        assert first.weight.data_ptr() == before


class TestAPackedModel:
    def test_it_computes_the_same(self) -> None:
        model = packed_whisper()
        assert is_packed(model)
        assert same_output(model)

    def test_the_state_dict_is_the_same(self) -> None:
        ours, stock = packed_whisper().state_dict(), tiny_whisper(seed=3).state_dict()
        assert list(ours) == list(stock)
        assert all(torch.equal(ours[name], stock[name]) for name in stock)

    @pytest.mark.parametrize("max_shard_size", ["50GB", "200KB"])
    def test_saved_files_are_the_same_byte_for_byte(self, tmp_path: Path, max_shard_size: str) -> None:
        packed_whisper().save_pretrained(tmp_path / "ours", max_shard_size=max_shard_size)
        tiny_whisper(seed=3).save_pretrained(tmp_path / "stock", max_shard_size=max_shard_size)
        stock = {path.name: path.read_bytes() for path in (tmp_path / "stock").iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == stock
        assert same_output(WhisperForConditionalGeneration.from_pretrained(tmp_path / "ours"))

    def test_it_stays_packed_while_it_is_saved(self, tmp_path: Path) -> None:
        model = packed_whisper()
        model.save_pretrained(tmp_path)
        assert is_packed(model)
        assert len(load_file(tmp_path / "model.safetensors")) == len(tiny_whisper().state_dict()) - 1  # proj_out is tied

    def test_loading_weights_writes_into_the_packed_tensor(self) -> None:
        model, other = packed_whisper(), tiny_whisper(seed=5)
        weight, bias = pack(qkv(model)[0])
        model.load_state_dict(other.state_dict())
        assert is_packed(model)
        assert torch.equal(weight, torch.cat([linear.weight for linear in qkv(other)[0]]))
        assert torch.equal(bias[2 * C :], qkv(other)[0][2].bias)

    def test_loading_by_assignment_ends_it(self) -> None:
        model, other = packed_whisper(), tiny_whisper(seed=5)
        model.load_state_dict(other.state_dict(), assign=True)
        assert not is_packed(model)
        weight, _ = pack(qkv(model)[0])
        assert torch.equal(weight[:C], qkv(other)[0][0].weight)

    @pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.float64)])
    def test_another_dtype_ends_it_and_it_can_be_packed_again(self, move) -> None:
        model = move(packed_whisper())
        assert not is_packed(model)
        weight, _ = pack(qkv(model)[0])
        assert weight.dtype == model.dtype
        assert all(p.untyped_storage().data_ptr() == weight.data_ptr() for p in (m.weight for m in qkv(model)[0]))

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda model: torch.load(_saved(model), weights_only=False)], ids=["deepcopy", "torch.save"]
    )
    def test_a_copy_is_on_its_own(self, copied) -> None:
        model = packed_whisper()
        twin = copied(model)
        for parameter in twin.parameters():
            parameter.data.zero_()
        assert same_output(model)

    def test_unpacked_each_parameter_has_memory_of_its_own(self) -> None:
        model = packed_whisper()
        parameters = list(model.parameters())
        for linears in qkv(model):
            unpack(linears)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert same_output(model)

    def test_what_was_never_packed_is_not_touched_by_unpacking(self) -> None:
        linears = qkv(tiny_whisper())[0]
        linears[0].weight.data = torch.zeros(2 * C, C)[:C]  # a view, but of somebody else
        before = [p.data_ptr() for linear in linears for p in linear.parameters()]
        unpack(linears)
        assert [p.data_ptr() for linear in linears for p in linear.parameters()] == before


def _saved(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.gpu
@pytest.mark.parametrize("move", [pack, unpack])
def test_what_another_stream_has_yet_to_read_is_not_overwritten(move, device: torch.device) -> None:
    linears = [nn.Linear(512, 512, device=device) for _ in range(3)]
    x, stream = torch.randn(8, 512, device=device), torch.cuda.Stream()
    if move is unpack:
        pack(linears)
    with torch.no_grad():
        wanted = [linear(x) for linear in linears]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # about 0.1 s
            late = [linear(x) for linear in linears]
        move(linears)
        junk = [torch.full((512, 512), torch.nan, device=device) for _ in range(8)]  # into whatever memory is free now
        torch.cuda.synchronize()
    assert all(map(torch.equal, late, wanted))
    assert len(junk) == 8
