"""What PyTorch offers for the attention of a decode step: each SDPA backend, FlexAttention, and our references compiled."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from whisper_triton.benchmarks.harness import Place, relative_error

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# What SDPA says where the one backend that it may take does not take such tensors.
REFUSALS = ("No available kernel", "No viable backend", "No execution plans")

Attention = Callable[..., torch.Tensor]


def sdpa(backend: SDPBackend, mask: torch.Tensor | None = None) -> Attention:
    """Attention of (B, T, H, D) over (B, H, S, D) by one backend; RuntimeError where it does not take that."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=mask, scale=scale).transpose(1, 2)

    return attend


def flex(place: Place, num_slots: int, length: torch.Tensor | None = None) -> Attention:
    """FlexAttention, compiled, over all slots or those before `length`, a tensor on the device; it decodes where T is small."""
    mask = None
    if length is not None:
        mask = create_block_mask(lambda b, h, q, slot: slot < length, None, None, 1, num_slots, device=place.device)
    compiled = place.compile(flex_attention)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        return compiled(query.transpose(1, 2), key, value, block_mask=mask, scale=scale).transpose(1, 2)

    return attend


def time_alternatives(
    place: Place,
    variants: dict[str, Callable[..., torch.Tensor]],
    inputs: Sequence[Sequence[torch.Tensor]],
    exact: torch.Tensor,
    stock: torch.Tensor,
) -> dict[str, float | None]:
    """{`name_us`: time} of each variant, called with one after the other of `inputs`.

    None where it does not take them or its result is wrong, which ends no run: these are not ours, and stderr tells.
    Of the first rows of the first of `inputs`, `exact` is float64's result and `stock` PyTorch's.
    """
    times: dict[str, float | None] = {}
    for name, variant in variants.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SDPA tells in several why it refuses
                result = variant(*(t.clone() for t in inputs[0]))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not any(refusal in str(error) for refusal in REFUSALS):
                tqdm.write(f"{name} does not run: {str(error).splitlines()[0]}", file=sys.stderr)
            times[f"{name}_us"] = None
            continue
        error, yardstick = relative_error(result[: len(exact)], exact), relative_error(stock, exact)
        if not error <= 2 * yardstick:
            tqdm.write(f"{name} is wrong and not timed: relative error {error:.2e}, SDPA's {yardstick:.2e}", file=sys.stderr)
            times[f"{name}_us"] = None
            continue
        times[f"{name}_us"] = place.measure([lambda v=variant, t=tensors: v(*t) for tensors in inputs])[0]
    return times


def best(times: dict[str, float | None]) -> float:
    """The least of those times that there are."""
    return min(time for time in times.values() if time is not None)
