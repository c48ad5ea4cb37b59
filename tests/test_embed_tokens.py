"""embed_tokens: the sum of two rows, rounded once."""

from __future__ import annotations

import pytest
import torch
from attention_cases import captured
from whisper_triton.kernels.embed_tokens import embed_tokens, embed_tokens_reference

# Triton's interpreter cuts to bfloat16 where a GPU rounds.
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
@pytest.mark.parametrize(("B", "K"), [(1, 384), (5, 1280), (16, 48)])
def test_equals_the_reference(B, K, dtype, device):
    tokens, positions = torch.randn(99, K, device=device).to(dtype), torch.randn(20, K, device=device).to(dtype)
    ids = torch.randint(0, 99, (B, 3), device=device)[:, 1:2]  # a column, as `generate` cuts it
    for position in (0, 7, 19):
        position = torch.tensor(position, device=device)
        out = embed_tokens(ids, tokens, positions, position)
        assert torch.equal(out, embed_tokens_reference(ids, tokens, positions, position))


@pytest.mark.parametrize(("B", "T"), [(1, 4), (3, 5)])
def test_a_prompt_lies_at_consecutive_positions(B, T, device):
    tokens, positions = torch.randn(99, 80, device=device), torch.randn(20, 80, device=device)
    ids = torch.randint(0, 99, (T + 1, B + 1), device=device).T[:B, 1:]  # neither dimension dense
    for position in (0, 20 - T):
        out = embed_tokens(ids, tokens, positions, torch.tensor(position, device=device))
        expected = [tokens[ids[b, t]] + positions[position + t] for b in range(B) for t in range(T)]
        assert torch.equal(out, torch.stack(expected))
    last = torch.tensor(20 - T + 1, device=device)  # one past the end
    assert torch.equal(embed_tokens(ids, tokens, positions, last).view(B, T, 80)[:, -1], torch.zeros(B, 80, device=device))


@pytest.mark.parametrize("name", ["input_ids", "token_embedding", "position_embedding", "cache_position"])
def test_a_tensor_on_another_device_is_refused(name, device):
    tensors = {
        "input_ids": torch.zeros(1, dtype=torch.int64, device=device),
        "token_embedding": torch.zeros(9, 64, device=device),
        "position_embedding": torch.zeros(9, 64, device=device),
        "cache_position": torch.tensor(0, device=device),
    }
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match="meta"):
        embed_tokens(**tensors)


@pytest.mark.parametrize(("token", "position"), [(99, 0), (-1, 0), (0, 20), (0, -1)])
def test_what_is_out_of_range_reads_nothing(token, position, device):
    tokens, positions = torch.full((99, 64), torch.nan, device=device), torch.full((20, 64), torch.nan, device=device)
    out = embed_tokens(torch.tensor([token], device=device), tokens, positions, torch.tensor(position, device=device))
    assert torch.equal(out, torch.zeros(1, 64, device=device))


def test_the_op_keeps_the_rules_of_torch_library(device):
    tokens, positions = torch.randn(99, 64, device=device), torch.randn(20, 64, device=device)
    ids = torch.randint(0, 99, (2, 3), device=device)
    arguments = ids, tokens, positions, torch.tensor(4, device=device)
    torch.library.opcheck(torch.ops.whisper_triton.embed_tokens.default, arguments)


def test_compiles_without_a_graph_break(device):
    tokens, positions = torch.randn(99, 64, device=device), torch.randn(20, 64, device=device)
    ids, position = torch.randint(0, 99, (2, 3), device=device), torch.tensor(4, device=device)
    compiled = torch.compile(lambda: embed_tokens(ids, tokens, positions, position) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), embed_tokens(ids, tokens, positions, position) + 1)


@pytest.mark.gpu
def test_a_captured_graph_follows_ids_and_position_on_the_device(device):
    tokens, positions = (torch.randn(n, 1280, device=device).half() for n in (51866, 448))
    ids, position = torch.zeros(8, 1, dtype=torch.int64, device=device), torch.tensor(0, device=device)
    graph, out = captured(lambda: embed_tokens(ids, tokens, positions, position))
    for i in range(449):  # the last is past the end
        ids.random_(0, 51866)
        position.fill_(i)
        graph.replay()
        assert torch.equal(out, embed_tokens_reference(ids, tokens, positions, position))
    assert not out.any()
