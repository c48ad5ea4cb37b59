"""add_layer_norm against its float64 reference, no further from it than twice what PyTorch's own add and norm are."""

from __future__ import annotations

import pytest
import torch

from whisper_triton.kernels import add_layer_norm, add_layer_norm_reference

# Triton's interpreter cuts to bfloat16 where a GPU rounds.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
EPS = 1e-5
LIMIT = torch.finfo(torch.float16).max - 1000  # of stock's encoder layers


def make(M: int, C: int, R: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """x, residual, and a layer norm's weight and bias."""
    return [torch.randn(*shape, device=device).to(dtype) for shape in ((M, C), (R, C), (C,), (C,))]


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "C", "R"), [(1, 384, 1), (6, 384, 3), (5, 512, 5), (4, 768, 4), (3, 1024, 3), (4, 1280, 2), (7, 100, 7), (2, 1, 2)]
)
def test_sum_and_norm(M, C, R, dtype, device):
    tensors = make(M, C, R, dtype, device)
    x, residual, weight, bias = tensors
    before = [t.clone() for t in tensors]
    total, normed = add_layer_norm(*tensors, EPS)
    stock = x + residual.repeat(M // R, 1)
    assert torch.equal(total, stock)
    _, exact = add_layer_norm_reference(stock.double(), torch.zeros_like(stock).double(), weight.double(), bias.double(), EPS)
    yardstick = torch.nn.functional.layer_norm(stock, (C,), weight, bias, EPS)
    assert normed.dtype == dtype
    assert relative_error(normed, exact) <= 2 * relative_error(yardstick, exact)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def test_a_large_mean_costs_no_digits(device):
    """Moments of one pass would lose them all."""
    x, residual, weight, bias = make(3, 1280, 3, torch.float32, device)
    x += 3000
    _, normed = add_layer_norm(x, residual, weight, bias, EPS)
    _, exact = add_layer_norm_reference(
        (x + residual).double(), torch.zeros_like(x).double(), weight.double(), bias.double(), EPS
    )
    yardstick = torch.nn.functional.layer_norm(x + residual, (1280,), weight, bias, EPS)
    assert relative_error(normed, exact) <= 2 * relative_error(yardstick, exact)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of numpy, in the interpreter
def test_the_sum_is_limited_as_stock_limits_it(device):
    x, residual, weight, bias = make(4, 384, 4, torch.float16, device)
    x[0, :3] = torch.tensor([65000.0, -65000.0, 40000.0])
    residual[0, :3] = torch.tensor([60000.0, -60000.0, 0.0])  # beyond fp16, on both sides
    x[1, 5] = torch.nan
    total, normed = add_layer_norm(x, residual, weight, bias, EPS, LIMIT)
    expected = torch.clamp(x + residual, min=-LIMIT, max=LIMIT)
    assert torch.equal(total.nan_to_num(-1), expected.nan_to_num(-1))
    assert total[0].isfinite().all()
    assert normed[1].isnan().all()
    assert normed[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype, device):
    x, residual, weight, bias = make(8, 384, 8, dtype, device)
    alone = add_layer_norm(x[3:4], residual[3:4], weight, bias, EPS)
    x[4:] = torch.nan
    together = add_layer_norm(x, residual, weight, bias, EPS)
    assert all(torch.equal(a[0], b[3]) for a, b in zip(alone, together, strict=True))


def test_it_is_an_op_as_torch_wants_one(device):
    tensors = make(6, 64, 3, torch.float32, device)
    torch.library.opcheck(torch.ops.whisper_triton.add_layer_norm.default, (*tensors, EPS, 1.0))
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="eager" if device.type == "cpu" else "inductor")
    assert all(map(torch.equal, compiled(*tensors, EPS), add_layer_norm(*tensors, EPS)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, r, w, b: (x.double(), r, w, b), "float64"),
        (lambda x, r, w, b: (x[None], r, w, b), r"\(1, 6, 64\)"),
        (lambda x, r, w, b: (x, r[:, :32].contiguous(), w, b), r"\(3, 32\)"),
        (lambda x, r, w, b: (x[:5], r, w, b), "5 rows"),
        (lambda x, r, w, b: (x[:0], r, w, b), r"\(0, 64\)"),
        (lambda x, r, w, b: (x, r, w[:3], b), r"\(3,\)"),
        (lambda x, r, w, b: (x, r.half(), w, b), "float16"),
        (lambda x, r, w, b: (x.T.contiguous().T, r, w, b), "strides"),
    ],
)
def test_bad_input_is_refused_with_a_reason(change, message, device):
    with pytest.raises(ValueError, match=message):
        add_layer_norm(*change(*make(6, 64, 3, torch.float32, device)), EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_shapes(dtype, device):
    x, residual, weight, bias = make(8 * 1500, 1280, 1500, dtype, device)
    total, normed = add_layer_norm(x, residual, weight, bias, EPS)
    assert torch.equal(total, x + residual.repeat(8, 1))
    _, exact = add_layer_norm_reference(total.double(), torch.zeros_like(x).double(), weight.double(), bias.double(), EPS)
    yardstick = torch.nn.functional.layer_norm(total, (1280,), weight, bias, EPS)
    assert relative_error(normed, exact) <= 2 * relative_error(yardstick, exact)
