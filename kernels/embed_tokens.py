"""The decoder's input for new tokens, one a sequence or a prompt: token embedding plus the embedding of the position.

    out[b * T + t] = token_embedding[input_ids[b, t]] + position_embedding[cache_position + t]

The position is read on the device, as everything that changes from step to step.
"""

from __future__ import annotations

import torch

from ._checks import check_dtype, check_gradients, check_positions, check_tensors
from ._dispatch import pdl_handover, pdl_options, register, tl, triton


def embed_tokens_reference(
    input_ids: torch.Tensor, token_embedding: torch.Tensor, position_embedding: torch.Tensor, cache_position: torch.Tensor
) -> torch.Tensor:
    """What `embed_tokens` computes, in PyTorch."""
    _check(input_ids, token_embedding, position_embedding, cache_position, is_reference=True)
    ids = input_ids.reshape(input_ids.shape[0], -1)
    positions = cache_position + torch.arange(ids.shape[1], device=ids.device)
    V, P = len(token_embedding), len(position_embedding)
    inside = (ids >= 0) & (ids < V) & (positions >= 0) & (positions < P)
    rows = token_embedding[ids.where(inside, 0)] + position_embedding[positions.clamp(0, P - 1)]
    return rows.masked_fill(~inside[..., None], 0).flatten(0, 1)


@triton.jit(do_not_specialize_on_alignment=("stride_ids_b", "T"))  # a build for all lengths
def _embed_tokens_kernel(
    input_ids_ptr,  # (B, T) int64
    token_embedding_ptr,  # (V, K)
    position_embedding_ptr,  # (P, K)
    cache_position_ptr,  # () int64
    out_ptr,  # (B * T, K)
    stride_ids_b,
    stride_ids_t,
    T,
    V,
    P,
    K,
    USE_PDL: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pdl_handover(USE_PDL)
    i_t = tl.program_id(0)
    i_b = tl.program_id(1)
    offs_k = tl.arange(0, BLOCK_K)
    token = tl.load(input_ids_ptr + i_b * stride_ids_b + i_t * stride_ids_t)
    position = tl.load(cache_position_ptr) + i_t
    # An id or a position out of range reads nothing; the host refuses both before, where it sees them.
    inside = (token >= 0) & (token < V) & (position >= 0) & (position < P)
    mask = (offs_k < K) & inside
    x = tl.load(token_embedding_ptr + token * K + offs_k, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(position_embedding_ptr + position * K + offs_k, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + (i_b * T + i_t) * K + offs_k, x.to(out_ptr.dtype.element_ty), mask=offs_k < K)


def _launch(
    input_ids: torch.Tensor, token_embedding: torch.Tensor, position_embedding: torch.Tensor, cache_position: torch.Tensor
) -> torch.Tensor:
    V, K = token_embedding.shape
    ids = input_ids if input_ids.dim() == 2 else input_ids[:, None]
    B, T = ids.shape
    out = token_embedding.new_empty(B * T, K)
    _embed_tokens_kernel[(T, B)](
        input_ids_ptr=ids,
        token_embedding_ptr=token_embedding,
        position_embedding_ptr=position_embedding,
        cache_position_ptr=cache_position,
        out_ptr=out,
        stride_ids_b=ids.stride(0),
        stride_ids_t=ids.stride(1),
        T=T,
        V=V,
        P=position_embedding.shape[0],
        K=K,
        BLOCK_K=triton.next_power_of_2(K),
        num_warps=4,
        **pdl_options(out.device),
    )
    return out


def _fake(
    input_ids: torch.Tensor, token_embedding: torch.Tensor, position_embedding: torch.Tensor, cache_position: torch.Tensor
) -> torch.Tensor:
    return token_embedding.new_empty(input_ids.numel(), token_embedding.shape[1])


_op = register(
    "embed_tokens(Tensor input_ids, Tensor token_embedding, Tensor position_embedding, Tensor cache_position) -> Tensor",
    kernel=_launch,
    reference=embed_tokens_reference,
    fake=_fake,
)


def embed_tokens(
    input_ids: torch.Tensor, token_embedding: torch.Tensor, position_embedding: torch.Tensor, cache_position: torch.Tensor
) -> torch.Tensor:
    """Embeds T tokens a sequence, at the positions from `cache_position` on.

    Args:
        input_ids: (B,) or (B, T) int64, any strides.
        token_embedding: (V, K), position_embedding: (P, K), contiguous, of one dtype.
        cache_position: 0-dim or (1,), int64 or int32 on the same device.

    Returns:
        (B * T, K), contiguous, the embeddings' dtype; 0 for an id or a position out of range.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or inputs that need gradients.
    """
    _check(input_ids, token_embedding, position_embedding, cache_position)
    check_gradients("embed_tokens", token_embedding, position_embedding)
    return _op(input_ids, token_embedding, position_embedding, cache_position)


def _check(
    input_ids: torch.Tensor,
    token_embedding: torch.Tensor,
    position_embedding: torch.Tensor,
    cache_position: torch.Tensor,
    is_reference: bool = False,
) -> None:
    check_tensors(input_ids=input_ids, token_embedding=token_embedding, position_embedding=position_embedding)
    check_dtype(token_embedding, is_reference)
    if token_embedding.dim() != 2 or token_embedding.numel() == 0 or position_embedding.numel() == 0:
        shapes = f"{tuple(token_embedding.shape)} and {tuple(position_embedding.shape)}"
        raise ValueError(f"embeddings must be (V, K) and (P, K) and not empty, got {shapes}")
    K = token_embedding.shape[1]
    if input_ids.dtype != torch.int64 or input_ids.dim() not in (1, 2) or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be int64 (B,) or (B, T), got {input_ids.dtype} {tuple(input_ids.shape)}")
    if position_embedding.shape[1:] != (K,) or position_embedding.dtype != token_embedding.dtype:
        raise ValueError(
            f"position_embedding is {position_embedding.dtype} {tuple(position_embedding.shape)}, the tokens' "
            f"{token_embedding.dtype} {tuple(token_embedding.shape)}"
        )
    if not token_embedding.is_contiguous() or not position_embedding.is_contiguous():
        raise ValueError("embeddings must be contiguous")
    if not input_ids.device == position_embedding.device == token_embedding.device:
        raise ValueError(
            f"input_ids are on {input_ids.device}, position_embedding on {position_embedding.device}, token_embedding on "
            f"{token_embedding.device}"
        )
    check_positions("cache_position", cache_position, 1, token_embedding.device)
