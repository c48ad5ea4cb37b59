"""skinny_linear against its float64 reference, no further from it than twice what PyTorch's own layers are."""

from __future__ import annotations

import sys

import pytest
import torch
from attention_cases import GuardedAllocations, assert_chain_waits, captured, lay_out, poisoned_allocations
from whisper_triton.kernels._linear_tiles import Tiles as LinearTiles
from whisper_triton.kernels._linear_tiles import fits_tiles
from whisper_triton.kernels._paced import has_paced_copies
from whisper_triton.kernels._paced_rows import covers_rows
from whisper_triton.kernels.skinny_linear import LayerNorm, skinny_linear, skinny_linear_reference

module = sys.modules["whisper_triton.kernels.skinny_linear"]
DTYPES = (torch.float32, torch.float16)


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


def make(B: int, K: int, N: int, parts: int, dtype: torch.dtype, device: torch.device):
    """x, weights, biases (none for the second, as Whisper's k), a layer norm and a residual, with NaNs around each."""

    def randn(*shape: int) -> torch.Tensor:
        return lay_out(torch.randn(1, 1, *shape[:-1] or (1,), shape[-1], device=device).to(dtype), "contiguous").view(shape)

    weights = tuple(randn(N, K).div_(K**0.5) for _ in range(parts))
    biases = tuple(None if i == 1 else randn(N) for i in range(parts))
    return randn(B, K), weights, biases, LayerNorm(randn(K), randn(K), 1e-5), randn(B, N)


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, LayerNorm):
        return LayerNorm(value.weight.double(), value.bias.double(), value.eps)
    return tuple(double(v) for v in value) if isinstance(value, tuple) else value


def check(x, weights, biases, tiles: LinearTiles | None = None, **around) -> None:
    exact = skinny_linear_reference(double(x), double(weights), double(biases), **{k: double(v) for k, v in around.items()})
    with poisoned_allocations():
        ours = skinny_linear(x, weights, biases, tiles=tiles, **around)
    # PyTorch's own layers in the model's dtype, each result rounded, as the stock decoder runs them.
    norm = around.get("layer_norm")
    y = x if norm is None else torch.nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    outs = [torch.nn.functional.linear(y, w, b) for w, b in zip(weights, biases, strict=True)]
    outs[0] = outs[0] * around.get("scale", 1.0)
    stock = torch.cat(outs, -1)
    stock = torch.nn.functional.gelu(stock) if around.get("gelu") else stock
    stock = stock + around["residual"] if around.get("residual") is not None else stock
    assert ours.dtype == x.dtype
    assert ours.shape == stock.shape
    assert relative_error(ours, exact) <= 2 * relative_error(stock, exact)


ROWS = [(1, torch.float32), (1, torch.float16), (2, torch.float16), (33, torch.float16)]


@pytest.mark.parametrize(("B", "dtype"), ROWS)
@pytest.mark.parametrize("K", [64, 384, 1280])
class TestEveryLinkOfALayer:
    def test_layer_norm_and_three_projections_the_first_scaled(self, B, K, dtype, device):
        x, weights, biases, norm, _ = make(B, K, 20, 3, dtype, device)
        check(x, weights, biases, layer_norm=norm, scale=0.125)

    def test_layer_norm_and_gelu(self, B, K, dtype, device):
        x, weights, biases, norm, _ = make(B, K, 70, 1, dtype, device)
        check(x, weights, biases, layer_norm=norm, gelu=True)

    @pytest.mark.parametrize("mean", [10.0, 100.0])
    def test_a_row_whose_mean_is_far_above_its_deviation(self, B, K, dtype, device, mean):
        x, weights, biases, norm, _ = make(B, K, 20, 1, dtype, device)
        check(x + mean, weights, biases, layer_norm=norm)

    def test_residual(self, B, K, dtype, device):
        x, weights, biases, _, residual = make(B, K, 33, 1, dtype, device)
        check(x, weights, biases, residual=residual)

    def test_no_bias_at_all(self, B, K, dtype, device):
        x, weights, _, norm, _ = make(B, K, 40, 1, dtype, device)
        check(x, weights, (None,), layer_norm=norm)


@pytest.mark.parametrize("B", [1, 16])
def test_a_split_k_is_summed_with_bias_and_residual(B, device):
    x, weights, biases, _, residual = make(B, 1024, 300, 1, torch.float16, device)
    check(x, weights, biases, tiles=LinearTiles(32, 4, 4, USE_DOT=B > 1), residual=residual)


PLAIN_TILES = [(1, LinearTiles(4, 1, 4)), (3, LinearTiles(16, 1, 4, True)), (17, LinearTiles(16, 4, 4, True))]
PACED_TILES = [
    (1, LinearTiles(4, 1, 4, PACE=2)),
    (3, LinearTiles(16, 1, 4, True, 2)),
    (17, LinearTiles(16, 4, 4, True, 2)),
    (3, LinearTiles(16, 1, 4, True, 2, PROGRAMS=1)),
]


@pytest.mark.parametrize(
    ("B", "tiles"), [*PLAIN_TILES, *(pytest.param(*case, marks=pytest.mark.gpu, id=f"paced{case}") for case in PACED_TILES)]
)
def test_all_of_the_result_is_written_and_nothing_beside_it(B, tiles, device, monkeypatch):
    """Nor beside the sums of a split K, and the rows that a layer norm of its own leaves."""
    monkeypatch.setattr(module, "_op", module._launch)  # inside an op no allocation is seen
    if tiles.PACE and not has_paced_copies(device, torch.float16):
        pytest.skip("not this GPU's")
    N = 51 if tiles.USE_DOT else 48  # rows of weights that fill their tiles, and some that do not
    x, weights, biases, norm, residual = make(B, 1024, N, 1, torch.float16, device)
    with GuardedAllocations() as guarded:
        if tiles.PROGRAMS:
            skinny_linear(x, weights, (None,), tiles=tiles, layer_norm=norm)
        else:
            skinny_linear(x, weights, biases, tiles=tiles, residual=residual)
            if tiles.SPLIT_K == 1:
                skinny_linear(x, weights, biases, tiles=tiles, layer_norm=norm, gelu=True)
    guarded.check()


def test_a_row_is_the_same_whatever_the_other_rows_hold(device):
    x, weights, biases, norm, _ = make(8, 384, 64, 1, torch.float16, device)
    other = x.clone()
    other[1:] = torch.randn_like(other[1:]) * 100
    first, second = (skinny_linear(rows, weights, biases, layer_norm=norm) for rows in (x, other))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_the_op_keeps_the_rules_of_torch_library(device):
    op = torch.ops.whisper_triton.skinny_linear.default
    x, weights, biases, norm, residual = make(1, 64, 32, 1, torch.float16, device)
    tiles = [4, 1, 4, 0, 0, 0]
    torch.library.opcheck(op, (x, list(weights), list(biases), *norm, 1.0, True, None, tiles))
    torch.library.opcheck(op, (x, list(weights), [None], None, None, 0.0, 1.0, False, residual, tiles))


def test_results_are_the_same_from_run_to_run(device):
    x, weights, biases, _, residual = make(4, 2048, 64, 1, torch.float16, device)
    runs = [skinny_linear(x, weights, biases, residual=residual, tiles=LinearTiles(32, 2, 4, True)) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("width", [384, 512, 768, 1024, 1280, 1536, 2048, 3072, 4096, 5120])
def test_every_width_of_whisper_fits(width):
    assert fits_tiles(width)


def test_other_widths_are_refused(device):
    assert not fits_tiles(448)
    assert not fits_tiles(8)
    assert not fits_tiles(24)
    x, weights, biases, _, _ = make(1, 448, 32, 1, torch.float32, device)
    with pytest.raises(ValueError, match="448"):
        skinny_linear(x, weights, biases)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b, r: (torch.cat([x] * 65), w, b, {}), "65"),
        (lambda x, w, b, r: (torch.cat([x] * 2), w, b, {}), "fp32"),
        (lambda x, w, b, r: (x, (w[0], w[0]), (b[0], b[0]), {}), "one or three"),
        (lambda x, w, b, r: (x, (w[0].T.contiguous().T,), b, {}), "contiguous"),
        (lambda x, w, b, r: (x, w, b, {"residual": r[:, :-1]}), "residual"),
        (lambda x, w, b, r: (x, w, b, {"gelu": True, "tiles": LinearTiles(32, 2, 4)}), "split"),
        (lambda x, w, b, r: (x, w, b, {"tiles": LinearTiles(16, 1, 4, PACE=2)}), "paced"),
        (lambda x, w, b, r: (x, w, b, {"tiles": LinearTiles(4, 1, 4, PACE=-1)}), "PACE and PROGRAMS at least 0"),
        (lambda x, w, b, r: (x, w, b, {"tiles": LinearTiles(4, 1, 8)}), "BLOCK_N must be as many"),
        (lambda x, w, b, r: (x, w, b, {"tiles": LinearTiles(8, 1, 4, True)}), "16 for tensor cores"),
        (lambda x, w, b, r: (x, w, b, {"tiles": LinearTiles(16, 1, 4, True)}), "tf32"),
        (lambda x, w, b, r: (x, w, b, {"tiles": LinearTiles(64, 1, 64)}), "32 warps are the most"),
        (lambda x, w, b, r: (x, w, b, {"tiles": LinearTiles(16, 0, 4)}), "SPLIT_K must be at least 1"),
    ],
)
def test_bad_input_is_refused_with_a_reason(change, message, device):
    x, weights, biases, _, residual = make(1, 512, 64, 1, torch.float32, device)
    x, weights, biases, around = change(x, weights, biases, residual)
    with pytest.raises(ValueError, match=message):
        skinny_linear(x, weights, biases, **around)


def test_sums_that_want_more_memory_than_the_weights_are_counted():
    assert covers_rows(32, 256, False, 64, 1, 16)
    assert not covers_rows(32, 256, False, 128, 1, 16)


@pytest.mark.parametrize("has_copies", [False, True])
@pytest.mark.parametrize("width", [384, 512, 768, 1024, 1280, 2048, 3072, 4096])
def test_the_tiles_of_every_link_are_allowed(width, has_copies, monkeypatch):
    """On a GPU that has paced copies and on one that has none; an op that does nothing stands for the kernels."""
    monkeypatch.setattr(module, "has_paced_copies", lambda device, dtype: has_copies)
    seen = []
    monkeypatch.setattr(module, "_op", lambda *arguments: seen.append((arguments[0].shape[0], LinearTiles(*arguments[-1]))))

    def empty(*shape):
        return torch.empty(*shape, dtype=torch.float16, device="meta")

    norm = LayerNorm(empty(width), empty(width), 1e-5)
    square, wide, narrow, head = (empty(*s) for s in ((width, width), (4 * width, width), (width, 4 * width), (51866, width)))
    for B in (1, 2, 4, 5, 8, 16, 17, 32, 33, 64):
        x, y = empty(B, width), empty(B, 4 * width)
        skinny_linear(x, (square,) * 3, (None,) * 3, layer_norm=norm, scale=0.125)
        skinny_linear(x, (square,), (None,), residual=x)
        skinny_linear(x, (square,), (None,), layer_norm=norm, scale=0.125)
        skinny_linear(x, (wide,), (None,), layer_norm=norm, gelu=True)
        skinny_linear(y, (narrow,), (None,), residual=x)
        skinny_linear(x, (head,), (None,), layer_norm=norm)
    layers = {B for B, tiles in seen if tiles.PACE > 0 and not tiles.PROGRAMS}
    heads = {B for B, tiles in seen if tiles.PROGRAMS}
    all_paced = {1, 2, 4, 5, 8, 16, 17, 32}
    if not has_copies:
        assert not layers | heads
    elif width <= 1280:
        assert layers == {1024: all_paced - {2, 4}, 1280: all_paced}.get(width, set())
        assert heads == (all_paced if width >= 1024 else {5, 8} if width % 256 == 0 else set())


def test_an_lm_head_with_a_bias_has_a_program_a_tile(monkeypatch):
    monkeypatch.setattr(module, "has_paced_copies", lambda device, dtype: True)
    seen = []
    monkeypatch.setattr(module, "_op", lambda *arguments: seen.append(LinearTiles(*arguments[-1])))
    x, head, bias = (torch.empty(*s, dtype=torch.float16, device="meta") for s in ((8, 1280), (51866, 1280), (51866,)))
    skinny_linear(x, (head,), (None,))
    skinny_linear(x, (head,), (bias,))
    assert [tiles.PROGRAMS > 0 for tiles in seen] == [True, False]


@pytest.mark.parametrize(
    ("B", "K", "norm", "tiles"),
    [
        (1, 512, False, LinearTiles(4, 2, 4, PACE=2)),  # K in two parts
        (1, 512, False, LinearTiles(32, 1, 4, PACE=2)),  # N = 48 in no whole tiles
        (1, 8192, True, LinearTiles(16, 1, 4, PACE=2)),  # more than shared memory holds
        (2, 256, False, LinearTiles(16, 1, 2, True, 2)),  # two warps
        (2, 384, False, LinearTiles(16, 1, 4, True, 2)),  # K in no whole chunks
        (2, 2048, True, LinearTiles(64, 1, 4, True, 1)),  # more than shared memory holds
        (2, 256, False, LinearTiles(16, 1, 4, False, 2)),  # several rows without tensor cores
        (32, 1280, True, LinearTiles(64, 1, 16, True, 5, 2)),  # fits, but for what brings sums together beside the weights
    ],
)
def test_paced_tiles_that_do_not_fit_are_refused(B, K, norm, tiles, monkeypatch):
    monkeypatch.setattr(module, "has_paced_copies", lambda device, dtype: True)
    x, weights, biases, layer_norm, _ = make(B, K, 48, 1, torch.float16, torch.device("cpu"))
    biases = (None,) if tiles.PROGRAMS else biases
    with pytest.raises(ValueError, match=r"paced copies are for whole tiles|several rows"):
        skinny_linear(x, weights, biases, layer_norm=layer_norm if norm else None, tiles=tiles)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("PACE", [1, 2, 9])
@pytest.mark.parametrize(("K", "BLOCK_N"), [(64, 4), (384, 8), (1280, 16), (5120, 4)])
def test_paced_copies(K, BLOCK_N, PACE, dtype, device):
    tiles = LinearTiles(BLOCK_N, 1, 4, PACE=PACE)
    if not has_paced_copies(device, dtype):
        pytest.skip("not this GPU's")
    x, weights, biases, norm, residual = make(1, K, 48, 3, dtype, device)
    check(x, weights, biases, tiles=tiles, layer_norm=norm, scale=0.125)
    check(x, weights[:1], biases[:1], tiles=tiles, layer_norm=norm, gelu=True)
    check(x, weights[:1], biases[:1], tiles=tiles, residual=residual)
    check(x, weights[:1], (None,), tiles=tiles, layer_norm=norm)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_warps", "PACE"), [(4, 1), (4, 9), (8, 2), (16, 2)])
@pytest.mark.parametrize(("B", "K", "BLOCK_N"), [(2, 256, 16), (8, 1280, 32), (9, 1280, 16), (17, 1024, 64), (33, 256, 16)])
def test_paced_rows(B, K, BLOCK_N, num_warps, PACE, dtype, device):
    tiles = LinearTiles(BLOCK_N, 1, num_warps, True, PACE)
    if not has_paced_copies(device, dtype):
        pytest.skip("not this GPU's")
    for N in (48, 51):  # rows of weights that fill their tiles, and some that do not
        x, weights, biases, norm, residual = make(B, K, N, 3, dtype, device)
        check(x, weights, biases, tiles=tiles, layer_norm=norm, scale=0.125)
        check(x, weights[:1], biases[:1], tiles=tiles, layer_norm=norm, gelu=True)
        check(x, weights[:1], biases[:1], tiles=tiles, residual=residual)
        check(x, weights[:1], biases[:1], tiles=tiles._replace(SPLIT_K=K // 256), residual=residual)
        check(x, weights[:1], (None,), tiles=tiles, layer_norm=norm)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [384, 1280])
@pytest.mark.parametrize("B", [1, 2, 33])
def test_a_captured_graph_follows_its_input(B, K, device):
    x, weights, biases, norm, residual = make(B, K, K, 3, torch.float16, device)
    calls = (
        lambda: skinny_linear(x, weights, biases, layer_norm=norm, scale=0.125),
        lambda: skinny_linear(x, weights[:1], biases[:1], layer_norm=norm, gelu=True),
        lambda: skinny_linear(x, weights[:1], biases[:1], residual=residual),
    )
    graph, results = captured(lambda: [call() for call in calls])
    for _ in range(3):
        x.normal_()
        residual.normal_()
        graph.replay()
        for result, call in zip(results, calls, strict=True):
            assert torch.equal(result, call())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("B", [1, 2, 8, 32])
def test_a_captured_chain_waits_for_each_input(B, dtype, device):
    """The linear layers of two layers of a wide model, in its tiles: each reads what the launch before it wrote."""
    K, V = 1280, 51866

    def norm() -> LayerNorm:
        return LayerNorm(*(torch.randn(K, device=device).to(dtype) for _ in range(2)), 1e-5)

    def linear(N: int, K: int, parts: int = 1):
        return make(B, K, N, parts, dtype, device)[1:3]

    shapes = (K, K, 3), (K, K), (K, K), (K, K), (4 * K, K), (K, 4 * K)
    layers = [(*(linear(*shape) for shape in shapes), [norm() for _ in range(3)]) for _ in range(2)]
    first, head, last_norm, last = torch.empty(B, K, device=device, dtype=dtype), linear(V, K)[0], norm(), linear(K, K)

    def chain(launched):
        def run(*args, **around):
            out = skinny_linear(*args, **around)
            launched()
            return out

        x = first
        for qkv, out, query, cross_out, fc1, fc2, norms in layers:
            thirds = run(x, *qkv, layer_norm=norms[0], scale=0.125).view(3, B, K)  # in place of what attention makes of them
            x = run(thirds[0], *out, residual=x)
            y = run(x, *query, layer_norm=norms[1], scale=0.125)
            x = run(y, *cross_out, residual=thirds[1])
            x = run(x, *cross_out, residual=thirds[2])
            y = run(x, *fc1, layer_norm=norms[2], gelu=True)
            x = run(y, *fc2, residual=x)  # of several rows split over K, and the parts added up by a launch of its own
        logits = run(x, head, (None,), layer_norm=last_norm)  # whose programs go on from tile to tile
        return logits, run(logits.view(-1)[: B * K].view(B, K), *last)

    assert_chain_waits(first, chain, times=200)


def test_compiles_without_a_graph_break(device):
    x, weights, biases, norm, _ = make(2, 64, 32, 3, torch.float16, device)
    compiled = torch.compile(
        lambda: skinny_linear(x, weights, biases, layer_norm=norm) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(), skinny_linear(x, weights, biases, layer_norm=norm) + 1)


@pytest.mark.parametrize(
    ("B", "around", "tiles"),
    [
        (2, {"gelu": True}, LinearTiles(16, 1, 4, True, 1, 2)),
        (2, {"residual": torch.ones(2, 48, dtype=torch.float16)}, LinearTiles(16, 1, 4, True, 1, 2)),
        (33, {}, LinearTiles(16, 1, 4, True, 1, 2)),  # more rows than a program takes
        (2, {}, LinearTiles(16, 1, 4, True, 0, 2)),
        (1, {}, LinearTiles(16, 1, 4, False, 1, 2)),
        (2, {}, LinearTiles(16, 2, 4, True, 1, 2)),
    ],
)
def test_many_tiles_a_program_are_for_a_bare_product(B, around, tiles, monkeypatch):
    monkeypatch.setattr(module, "has_paced_copies", lambda device, dtype: True)
    x, weights, *_ = make(B, 512, 48, 1, torch.float16, torch.device("cpu"))
    reason = "without bias, GELU and residual" if around else f"over all of K, of up to 32 rows, got {B} and"
    with pytest.raises(ValueError, match=reason):
        skinny_linear(x, weights, (None,), tiles=tiles, **around)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("BLOCK_N", "num_warps", "PROGRAMS"), [(16, 4, 1), (16, 4, 4), (32, 4, 1), (32, 8, 2)])
@pytest.mark.parametrize(
    ("B", "K", "N"), [(1, 256, 20), (8, 512, 9999), (1, 1280, 51866), (8, 1280, 51866), (9, 1024, 51865), (32, 1280, 51866)]
)
def test_paced_rows_of_many_tiles(B, K, N, BLOCK_N, num_warps, PROGRAMS, dtype, device):
    tiles = LinearTiles(BLOCK_N, 1, num_warps, True, K // 256, PROGRAMS)
    if not has_paced_copies(device, dtype):
        pytest.skip("not this GPU's")
    x, weights, _, norm, _ = make(B, K, N, 1, dtype, device)
    check(x, weights, (None,), tiles=tiles, layer_norm=norm)
    check(x, weights, (None,), tiles=tiles, scale=0.125)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("B", "dtype"),
    [(1, torch.float32), *((B, dtype) for B in (1, 2, 8, 16, 32) for dtype in (torch.float16, torch.bfloat16))],
)
class TestRealShapes:
    """large-v3's links at their size, in every dtype."""

    def test_qkv(self, B, dtype, device):
        x, weights, biases, norm, _ = make(B, 1280, 1280, 3, dtype, device)
        check(x, weights, biases, layer_norm=norm, scale=0.125)

    def test_fc1(self, B, dtype, device):
        x, weights, biases, norm, _ = make(B, 1280, 5120, 1, dtype, device)
        check(x, weights, biases, layer_norm=norm, gelu=True)

    def test_fc2(self, B, dtype, device):
        x, weights, biases, _, residual = make(B, 5120, 1280, 1, dtype, device)
        check(x, weights, biases, residual=residual)

    def test_lm_head(self, B, dtype, device):
        x, weights, _, norm, _ = make(B, 1280, 51866, 1, dtype, device)
        check(x, weights, (None,), layer_norm=norm)
