"""`cross_attention`: its error, what must not matter to a result, and the kernel whose programs work in clusters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    GuardedAllocations,
    Shape,
    assert_chain_waits,
    assert_close_as_pytorch,
    bits,
    lay_out,
    needs_gluon,
    poisoned_allocations,
    random_caches,
    storage,
)
from whisper_triton.kernels._clustered_cross import CrossTiles, clustered_cross, covers_cross, fits_cross
from whisper_triton.kernels._linear_call import LinearCall
from whisper_triton.kernels.decode_attention import LOG2E
from whisper_triton.kernels.skinny_linear import LayerNorm

from whisper_triton.kernels import _paced, cross_attention, cross_attention_reference, decode_attention_reference

OP = torch.ops.whisper_triton.cross_attention.default
EPS, SCALE = 1e-5, 0.125
Attend = Callable[..., torch.Tensor]


class Case(NamedTuple):
    """Arguments of `cross_attention`, and the shape of its query."""

    shape: Shape
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    layer_norm: LayerNorm

    def run(self, attend: Attend = cross_attention, **options: object) -> torch.Tensor:
        return attend(*self[1:6], layer_norm=self.layer_norm, scale=SCALE, **options)

    def exact(self) -> torch.Tensor:
        tensors = [None if t is None else t.double() for t in self[1:6]]
        norm = LayerNorm(self.layer_norm.weight.double(), self.layer_norm.bias.double(), EPS)
        return cross_attention_reference(*tensors, layer_norm=norm, scale=SCALE)

    def pytorch(self) -> torch.Tensor:
        """As stock's modules run it, each result rounded to the tensors' dtype."""
        y = F.layer_norm(self.x, self.x.shape[1:], self.layer_norm.weight, self.layer_norm.bias, EPS)
        query = (F.linear(y, self.weight, self.bias) * SCALE).view(self.shape.states)
        return decode_attention_reference(query, self.key_cache, self.value_cache, scale=1.0, is_causal=False)

    def call(self) -> LinearCall:
        return LinearCall(self.x, [self.weight], [self.bias], *self.layer_norm, SCALE, False, None)


def random_case(
    B: int, H: int, S: int, K: int, dtype: torch.dtype, device: torch.device, T: int = 1, D: int = 64, has_bias: bool = True
) -> Case:
    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = (torch.randn(*shape, device=device) * scale).to(dtype)
        return lay_out(values.view(1, 1, -1, shape[-1]), "contiguous").view(shape)  # canaries around it

    shape = Shape(B, T, H, D, S, S)
    norm = LayerNorm(1 + normal(K, scale=0.1), normal(K, scale=0.1), EPS)
    bias = normal(H * D) if has_bias else None
    weight = normal(H * D, K, scale=2 * K**-0.5)
    return Case(shape, normal(B * T, K), weight, bias, *random_caches(shape, dtype, device, [S] * B), norm)


def assert_right(case: Case, attend: Attend = cross_attention, **options: object) -> torch.Tensor:
    """As near to float64 as PyTorch, and nothing that it was given has changed."""
    tensors = [t for t in (*case[1:6], *case.layer_norm[:2]) if t is not None]
    before = [storage(tensor) for tensor in tensors]
    with poisoned_allocations():
        out = case.run(attend, **options)
    assert out.is_contiguous()
    assert out.shape == case.shape.states
    assert_close_as_pytorch(out, case.exact(), case.pytorch())
    for tensor, buffer in zip(tensors, before, strict=True):
        assert torch.equal(storage(tensor), buffer)
    return out


@pytest.mark.parametrize(
    ("B", "T", "H", "S", "K", "D", "dtype"),
    [
        (1, 1, 2, 100, 128, 64, torch.float32),
        (1, 1, 6, 1500, 384, 64, torch.float16),
        (3, 1, 2, 65, 96, 32, torch.float16),
        (2, 3, 2, 70, 160, 80, torch.float16),  # a prompt
        (1, 4, 1, 1, 128, 128, torch.float16),
    ],
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_error_is_within_twice_that_of_pytorch(
    B: int, T: int, H: int, S: int, K: int, D: int, dtype: torch.dtype, has_bias: bool, device: torch.device
) -> None:
    case = random_case(B, H, S, K, dtype, device, T, D, has_bias)
    out = assert_right(case)
    counters = torch.zeros(B * H, dtype=torch.int32, device=device)
    assert_close_as_pytorch(case.run(counters=counters), case.exact(), case.pytorch())
    assert not counters.any()
    if T == 1:
        assert torch.equal(bits(case.run()), bits(out))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("B", "H", "K"), [(1, 20, 1280), (8, 20, 1280), (1, 16, 1024), (1, 6, 384), (2, 12, 768)])
def test_the_error_at_whispers_shapes(B: int, H: int, K: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_right(random_case(B, H, 1500, K, dtype, device))


def test_of_what_has_ended_no_key_is_read(device: torch.device) -> None:
    case = random_case(3, 2, 70, 128, torch.float16, device)
    whole = case.run()
    for dtype in (torch.int32, torch.int64):
        for cache in (case.key_cache, case.value_cache):
            cache[1] = torch.nan
        some = case.run(ended=torch.tensor([0, 7, 0], dtype=dtype, device=device))
        assert torch.equal(bits(some[::2]), bits(whole[::2]))
        assert not some[1].any()


def test_the_other_sequences_of_a_batch_do_not_matter(device: torch.device) -> None:
    case = random_case(4, 2, 130, 128, torch.float16, device)
    out = case.run()
    case.x[2:], case.key_cache[2:], case.value_cache[2:] = 100, torch.inf, torch.nan
    assert torch.equal(bits(case.run()[:2]), bits(out[:2]))


def test_the_op_keeps_the_rules_of_torch_library(device: torch.device) -> None:
    case = random_case(2, 2, 9, 64, torch.float16, device, T=2)
    norm = case.layer_norm
    for ended in (None, torch.zeros(2, dtype=torch.int64, device=device)):
        torch.library.opcheck(OP, (*case[1:6], norm.weight, norm.bias, EPS, SCALE, None, ended))


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    case = random_case(2, 2, 9, 64, torch.float16, device, T=2)
    compiled = torch.compile(lambda: case.run() + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), case.run() + 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "K"), [(1, 768), (8, 1280)])
def test_a_captured_chain_waits_for_each_query(B: int, K: int, device: torch.device) -> None:
    layers = [random_case(B, K // 64, 1500, K, torch.float16, device) for _ in range(4)]
    assert_layers_wait(layers, lambda case: case.run())


def assert_layers_wait(layers: list[Case], run: Callable[[Case], torch.Tensor]) -> None:
    """Each x is the result of the launch before it."""
    x = layers[0].x

    def chain(launched: Callable[[], None]) -> tuple[torch.Tensor]:
        out = x
        for layer in layers:
            out = run(layer._replace(x=out.view(x.shape)))
            launched()
        return (out,)

    assert_chain_waits(x, chain)


# --- clusters of programs: kernels/_clustered_cross.py

TILES = [CrossTiles(num_warps, PACE) for num_warps in (4, 8) for PACE in (1, 4)]


def by_clusters(tiles: CrossTiles) -> Attend:
    def attend(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        *caches: torch.Tensor,
        layer_norm: LayerNorm,
        scale: float,
        ended: torch.Tensor | None = None,
    ) -> torch.Tensor:
        call = LinearCall(x, [weight], [bias], *layer_norm, scale, False, None)
        return clustered_cross(call, *caches, LOG2E, ended, tiles)

    return attend


def check_clusters(
    B: int, H: int, S: int, K: int, dtype: torch.dtype, tiles: CrossTiles, device: torch.device, D: int = 64, layout: str = ""
) -> None:
    """Right; zeros, and no key read, of a sequence that has ended."""
    case, attend = random_case(B, H, S, K, dtype, device, D=D), by_clusters(tiles)
    if layout:
        case = case._replace(key_cache=lay_out(case.key_cache, layout), value_cache=lay_out(case.value_cache, layout))
    out = assert_right(case, attend)
    ended = torch.zeros(B, dtype=torch.int64, device=device)
    ended[0] = 7
    case.key_cache[0], case.value_cache[0] = torch.nan, torch.nan
    some = case.run(attend, ended=ended)
    assert torch.equal(bits(some[1:]), bits(out[1:]))
    assert not some[0].any()


@pytest.fixture
def clusters(device: torch.device) -> None:
    if not _paced.has_paced_copies(device, torch.float16):
        pytest.skip("not this GPU's")


@pytest.mark.gpu
@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_clusters(tiles: CrossTiles, dtype: torch.dtype, device: torch.device) -> None:
    for B, H, S, K in ((1, 20, 1500, 1280), (3, 20, 1500, 1280), (1, 16, 1500, 1024), (1, 1, 1499, 256), (2, 3, 1, 512)):
        check_clusters(B, H, S, K, dtype, tiles, device)
    for D in (32, 128):
        if 8 * tiles.num_warps <= D:
            check_clusters(1, 3, 1500, 512, dtype, tiles, device, D, "swapped")


@pytest.mark.gpu
@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_clusters_write_all_of_the_result_and_nothing_beside_it(tiles: CrossTiles, device: torch.device) -> None:
    case = random_case(2, 3, 100, 512, torch.float16, device)
    with GuardedAllocations() as guarded:
        case.run(by_clusters(tiles))
    guarded.check()


@pytest.mark.gpu
@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_clusters_in_a_captured_chain(tiles: CrossTiles, device: torch.device) -> None:
    layers = [random_case(1, 20, 1500, 1280, torch.float16, device) for _ in range(4)]
    assert_layers_wait(layers, lambda case: case.run(by_clusters(tiles)))


@needs_gluon
def test_one_row_of_a_wide_model_takes_clusters(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_paced, "capability", lambda device: (9, 0))
    wide = {"B": 1, "H": 16, "S": 1500, "K": 1024, "dtype": torch.float16, "device": device}

    def is_covered(**other: object) -> bool:
        case = random_case(**(wide | other))
        return covers_cross(case.call(), case.key_cache, case.value_cache)

    assert is_covered()
    for other in (
        {"B": 2}, {"T": 2}, {"H": 12}, {"S": 2049}, {"K": 1000}, {"D": 80}, {"dtype": torch.float32}, {"has_bias": False},
    ):  # fmt: skip
        assert not is_covered(**other), other


@pytest.mark.parametrize(
    ("other", "tiles"),
    [
        ({"K": 384}, CrossTiles(4, 2)),  # no whole chunks
        ({"D": 80}, CrossTiles(4, 2)),
        ({"T": 2}, CrossTiles(4, 2)),
        ({"has_bias": False}, CrossTiles(4, 2)),
        ({"dtype": torch.float32}, CrossTiles(4, 2)),
        ({}, CrossTiles(16, 2)),  # half a row of the weight a warp
        ({}, CrossTiles(1, 2)),
        ({"D": 128, "S": 2048, "K": 3072}, CrossTiles(4, 2)),  # more than shared memory holds
        ({"D": 128, "S": 2048, "K": 2560}, CrossTiles(4, 2)),  # the same, with what the kernel declares for itself
    ],
)
def test_what_is_not_for_clusters_is_refused(
    other: dict[str, object], tiles: CrossTiles, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_paced, "capability", lambda device: (9, 0))
    case = random_case(**({"B": 1, "H": 1, "S": 8, "K": 512, "dtype": torch.float16, "device": device} | other))
    assert not fits_cross(case.call(), case.key_cache, case.value_cache, tiles)
    with pytest.raises(ValueError, match=r"clusters are for .* got torch\.float\d\d \(\d, "):
        case.run(by_clusters(tiles))


@needs_gluon
def test_no_clusters_over_a_cache_past_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_paced, "capability", lambda device: (9, 0))
    case = random_case(1, 16, 1500, 1024, torch.float16, torch.device("cpu"))
    call = LinearCall(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in case.call()))
    for stride, is_covered in (((1 << 31) // 1500 // 16 * 16, True), (((1 << 31) // 1500 // 16 + 1) * 16, False)):
        cache = torch.empty_strided((1, 16, 1500, 64), (64, 64, stride, 1), dtype=torch.float16, device="meta")
        assert covers_cross(call, cache, cache) == is_covered


def test_a_layer_norm_is_wanted() -> None:
    case = random_case(1, 1, 8, 64, torch.float16, torch.device("cpu"))
    with pytest.raises(ValueError, match="a layer norm is wanted"):
        cross_attention(case.x, case.weight, case.bias, case.key_cache, case.value_cache, layer_norm=None, scale=1.0)


def test_no_clusters_without_paced_copies() -> None:
    case = random_case(1, 16, 1500, 1024, torch.float16, torch.device("cpu"))
    assert not covers_cross(case.call(), case.key_cache, case.value_cache)
    with pytest.raises(ValueError, match=r"on an H100.* on cpu"):
        case.run(by_clusters(CrossTiles(4, 4)))
