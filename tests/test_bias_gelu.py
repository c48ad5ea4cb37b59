"""bias_gelu against its float64 reference, no further from it than twice what PyTorch's own add and GELU are."""

from __future__ import annotations

import pytest
import torch

from whisper_triton.kernels import bias_gelu, bias_gelu_reference

# Triton's interpreter cuts to bfloat16 where a GPU rounds.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def check(x: torch.Tensor, bias: torch.Tensor) -> None:
    exact = x.double()
    bias_gelu_reference(exact, bias.double())
    stock = torch.nn.functional.gelu(x + bias)
    bias_gelu(x, bias)
    assert (x.double() - exact).norm() <= 2 * (stock.double() - exact).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (3, 384), (17, 512), (16, 257), (33, 100)])
def test_in_place_and_nothing_beside_it(M, N, dtype, device):
    canary = torch.full(((M + 2) * N,), torch.nan, device=device, dtype=dtype)
    x = canary[N : (M + 1) * N].view(M, N)
    x.copy_(3 * torch.randn(M, N, device=device))
    check(x, torch.randn(N, device=device).to(dtype))
    assert canary[:N].isnan().all()
    assert canary[(M + 1) * N :].isnan().all()
    assert x.isfinite().all()


def test_the_ends_of_the_scale(device):
    """Far out the GELU is the identity or zero: no overflow, and a NaN stays one."""
    x = torch.tensor([[65504.0, -65504.0, 0.0, torch.inf, torch.nan, -5.5]], device=device, dtype=torch.float16)
    expected = torch.nn.functional.gelu(x)
    bias_gelu(x, torch.zeros(6, device=device, dtype=torch.float16))
    assert torch.allclose(x, expected, rtol=0, atol=1e-6, equal_nan=True)


def test_it_is_an_op_as_torch_wants_one(device):
    x, bias = torch.randn(5, 64, device=device), torch.randn(64, device=device)
    torch.library.opcheck(torch.ops.whisper_triton.bias_gelu.default, (x, bias))
    ours, compiled = x.clone(), x.clone()
    bias_gelu(ours, bias)
    torch.compile(bias_gelu, fullgraph=True, backend="eager" if device.type == "cpu" else "inductor")(compiled, bias)
    assert torch.equal(ours, compiled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, b: (x.double(), b), "float64"),
        (lambda x, b: (x[0], b), r"\(64,\)"),
        (lambda x, b: (x, b[:3]), r"\(3,\)"),
        (lambda x, b: (x[:0], b), r"\(0, 64\)"),
        (lambda x, b: (x, b.half()), "float16"),
        (lambda x, b: (x.T.contiguous().T, b), "strides"),
    ],
)
def test_bad_input_is_refused_and_left_alone(change, message, device):
    x, bias = change(torch.randn(5, 64, device=device), torch.randn(64, device=device))
    before = x.clone()
    with pytest.raises(ValueError, match=message):
        bias_gelu(x, bias)
    assert torch.equal(x, before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1280, 5120])
def test_real_shapes(N, dtype, device):
    check(3 * torch.randn(8 * 1500, N, device=device).to(dtype), torch.randn(N, device=device).to(dtype))
