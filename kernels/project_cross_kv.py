"""Keys and values of all cross-attention layers from the encoder's states, straight into the static caches, in one launch.

    key_caches[l][b, h, s, :] = (encoder_states[b, s] @ key_weights[l].T)[h * D : (h + 1) * D]
    value_caches[l][b, h, s, :] = (encoder_states[b, s] @ value_weights[l].T + value_biases[l])[h * D : (h + 1) * D]

The layers' weights, biases and caches are tensors of their own: the kernel finds them through a table of addresses on the
device, which `cross_table` builds once. Sequences and frames are one dimension of M = B * S rows; a program computes a tile of
one layer's keys or values, and neighbouring programs share rows and weights in the L2. Called once a window, before the prompt.
Method: grouped GEMM, https://triton-lang.org/main/getting-started/tutorials/08-grouped-gemm.html.

Work: 4 * L * M * H * D * C floating-point operations, for 2 * L * M * H * D elements written: bound by the tensor cores.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch

from ._checks import check_dtype, check_gradients, check_tensors
from ._cross_table import CrossTable, addresses_of, cross_table
from ._dispatch import capability, pdl_handover, pdl_options, register, tl, triton


def project_cross_kv_reference(encoder_states: torch.Tensor, table: CrossTable) -> None:
    """What `project_cross_kv` computes, in PyTorch: fp32 inside, float64 throughout for float64 inputs."""
    _check(encoder_states, table, is_reference=True)
    _run_reference(encoder_states, *table)


@triton.jit
def load_address(pointers_ptr, row, L, i_l, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor of layer `i_l` in a row of the table of addresses."""
    ptr = tl.load(pointers_ptr + row * L + i_l).to(tl.pointer_type(dtype))
    return tl.multiple_of(ptr, 16) if ALIGNED else ptr


@triton.jit
def _project_cross_kv_kernel(
    encoder_states_ptr,  # (B, S, C) fp16/bf16/fp32
    pointers_ptr,  # (5, L) int64: addresses of key weights, value weights (H * D, C), key caches, value caches, value biases
    stride_es_b,
    stride_es_s,
    stride_c_b,
    stride_c_h,
    stride_c_s,
    M,
    S,
    N,
    L,
    C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,  # all addresses of the table are multiples of 16 bytes
    USE_PDL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pdl_handover(USE_PDL)
    dtype: tl.constexpr = encoder_states_ptr.dtype.element_ty
    i_l = tl.program_id(1)
    # GROUP_M tiles of rows share each tile of weights before the next one is loaded.
    pid = tl.program_id(0)
    num_n = tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * 2 * num_n) * GROUP_M
    group_size = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    i_in_group = pid % (GROUP_M * 2 * num_n)
    pid_n = i_in_group // group_size
    i_part = pid_n // num_n  # 0: keys, 1: values
    weight_ptr = load_address(pointers_ptr, i_part, L, i_l, dtype, ALIGNED)
    cache_ptr = load_address(pointers_ptr, 2 + i_part, L, i_l, dtype, ALIGNED)

    # Past the last row or column the last one is computed again: a mask in the loop would cost more.
    offs_m = (first_m + i_in_group % group_size) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    row = tl.minimum(offs_m, M - 1)
    i_b = (row // S).to(tl.int64)
    i_s = (row % S).to(tl.int64)
    x_ptrs = encoder_states_ptr + (i_b * stride_es_b + i_s * stride_es_s)[:, None] + offs_k[None, :]
    w_ptrs = weight_ptr + (tl.minimum(offs_n, N - 1).to(tl.int64) * C)[None, :] + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if dtype == tl.float32:
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, C, BLOCK_K):
        if C % BLOCK_K == 0:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(k + offs_k < C)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(k + offs_k < C)[:, None], other=0.0)
        if dtype == tl.float32:
            # Four tiles summed by themselves: one sum over all of C would round more than cuBLAS's do. "ieee": not tf32.
            part = tl.dot(x, w, part, input_precision="ieee")
            if k // BLOCK_K % 4 == 3:
                acc += part
                part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        else:
            acc = tl.dot(x, w, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if dtype == tl.float32:
        acc += part

    if HAS_BIAS:
        bias_ptr = load_address(pointers_ptr, 4, L, i_l, dtype, ALIGNED)
        acc += tl.load(bias_ptr + offs_n, mask=(offs_n < N) & (i_part == 1), other=0.0).to(tl.float32)[None, :]
    rows = cache_ptr + (i_b * stride_c_b + i_s * stride_c_s)[:, None]
    columns = (offs_n // HEAD_DIM).to(tl.int64) * stride_c_h + offs_n % HEAD_DIM
    tl.store(rows + columns[None, :], acc.to(dtype), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


class Tiles(NamedTuple):
    """How a launch is cut: rows, columns and depth of a tile, tiles of rows that share weights, warps and pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int


def choose_tiles(N: int, itemsize: int, is_even: bool, compute_capability: tuple[int, int]) -> Tiles:
    """Tiles from shapes, bytes an element and the GPU: (0, 0) for one that is not NVIDIA's.

    `is_even`: every row begins at a multiple of 16 bytes, so that it can be copied to shared memory behind the registers'
    back. Chosen when the kernel was written, those for uneven rows so small that nothing spills. benchmarks/project_cross_kv.py
    --tune compares tiles, but no run of it is on record: that these are the fastest is not known.
    """
    if not is_even:
        return Tiles(64, 64, 32, 8, 4, 2)
    if itemsize == 4:  # on the CUDA cores: no tensor core multiplies in full fp32
        return Tiles(64, 64, 16, 8, 4, 3)
    if compute_capability[0] in (9, 10):
        return Tiles(128, 256, 64, 16, 8, 4) if N % 256 == 0 else Tiles(128, 128, 64, 16, 8, 4)
    return Tiles(128, 128, 32, 8, 8, 3 if compute_capability[0] else 2)


def _launch(encoder_states: torch.Tensor, *fields: object, tiles: Tiles | None = None) -> None:
    table = CrossTable(*fields)
    if not torch.equal(addresses_of(*table[:5]), table.addresses):
        # Copies in their place, say: where `torch.compile` functionalises, an op that mutates is handed those.
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the table's tensors have moved, whose new addresses cannot be written to the GPU in a capture")
        table = cross_table(*table[:5])
    cache = table.key_caches[0]
    B, H, S, D = cache.shape
    L, C, itemsize = len(table.key_caches), encoder_states.shape[2], encoder_states.element_size()
    starts = (encoder_states.data_ptr(), C * itemsize, encoder_states.stride(0) * itemsize, encoder_states.stride(1) * itemsize)
    is_aligned = table.is_aligned
    is_even = is_aligned and all(start % 16 == 0 for start in starts)
    tiles = tiles or choose_tiles(H * D, itemsize, is_even, capability(encoder_states.device))
    num_m, num_n = triton.cdiv(B * S, tiles.BLOCK_M), triton.cdiv(H * D, tiles.BLOCK_N)
    _project_cross_kv_kernel[(num_m * num_n * 2, L)](
        encoder_states_ptr=encoder_states,
        pointers_ptr=table.pointers,
        stride_es_b=encoder_states.stride(0),
        stride_es_s=encoder_states.stride(1),
        stride_c_b=cache.stride(0),
        stride_c_h=cache.stride(1),
        stride_c_s=cache.stride(2),
        M=B * S,
        S=S,
        N=H * D,
        L=L,
        C=C,
        HAS_BIAS=len(table.value_biases) > 0,
        ALIGNED=is_aligned,
        HEAD_DIM=D,
        **tiles._asdict(),
        **pdl_options(encoder_states.device),
    )


def _run_reference(encoder_states: torch.Tensor, *fields: object) -> None:
    table = CrossTable(*fields)
    dtype = torch.promote_types(encoder_states.dtype, torch.float32)
    B, H, S, D = table.key_caches[0].shape
    weights, caches = table.key_weights + table.value_weights, table.key_caches + table.value_caches
    biases = [None] * len(table.key_weights) + (table.value_biases or [None] * len(table.key_weights))
    for weight, bias, cache in zip(weights, biases, caches, strict=True):
        states = encoder_states.to(dtype) @ weight.to(dtype).T
        if bias is not None:
            states += bias.to(dtype)
        cache.copy_(states.view(B, S, H, D).transpose(1, 2))


def _fake(encoder_states: torch.Tensor, *fields: object) -> None:
    return None


_op = register(
    "project_cross_kv(Tensor encoder_states, Tensor[] key_weights, Tensor[] value_weights, Tensor[] value_biases,"
    " Tensor(a!)[] key_caches, Tensor(b!)[] value_caches, Tensor pointers, Tensor addresses) -> ()",
    kernel=_launch,
    reference=_run_reference,
    fake=_fake,
)


def project_cross_kv(encoder_states: torch.Tensor, table: CrossTable) -> None:
    """Fills the cross caches of all layers from one window's encoder states, in one launch.

    Args:
        encoder_states: (B, S, C), any strides with a dense last dimension, in the dtype and on the device of the table's
            tensors: fp32 (multiplied in full fp32), fp16 or bf16.
        table: what `cross_table` made of the layers' weights and caches. The caches are mutated, all S slots of them.

    Raises:
        ValueError: encoder states that do not fit, or inputs that need gradients; the caches are then untouched.
    """
    _check(encoder_states, table)
    check_gradients("project_cross_kv", encoder_states, *chain(*table[:5]))
    _op(encoder_states, *table)


def _check(encoder_states: torch.Tensor, table: CrossTable, is_reference: bool = False) -> None:
    if not isinstance(table, CrossTable):
        raise ValueError(f"table must be what cross_table returns, got {type(table).__name__} {table!r:.50}")
    check_tensors(encoder_states=encoder_states)
    check_dtype(encoder_states, is_reference)
    cache, weight = table.key_caches[0], table.key_weights[0]
    shape = (cache.shape[0], cache.shape[2], weight.shape[1])
    if encoder_states.shape != shape or encoder_states.dtype != cache.dtype or encoder_states.device != cache.device:
        raise ValueError(
            f"encoder states must be {shape} (B, S, C) {cache.dtype} on {cache.device}, got {tuple(encoder_states.shape)} "
            f"{encoder_states.dtype} on {encoder_states.device}"
        )
    if encoder_states.shape[-1] > 1 and encoder_states.stride(-1) != 1:
        raise ValueError(f"encoder_states must be dense in its last dimension, got strides {encoder_states.stride()}")
