"""The arguments of a call of `skinny_linear`, as its kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LinearCall(NamedTuple):
    """What the op `skinny_linear` is called with, checked; see there."""

    x: torch.Tensor  # (B, K)
    weights: list[torch.Tensor]  # one (N, K) or three
    biases: list[torch.Tensor | None]  # (N,) each
    norm_weight: torch.Tensor | None  # (K,)
    norm_bias: torch.Tensor | None
    eps: float
    scale: float
    gelu: bool
    residual: torch.Tensor | None  # (B, N)

    def check_alignment(self) -> None:
        """Where a launch begins, since `torch.compile` knows no addresses.

        Raises:
            ValueError: a tensor does not begin at a multiple of 16 bytes.
        """
        for tensor in (self.x, *self.weights, *self.biases, self.norm_weight, self.norm_bias, self.residual):
            if tensor is not None and tensor.data_ptr() % 16:
                raise ValueError(f"all tensors must begin at a multiple of 16 bytes, one of {tuple(tensor.shape)} does not")

    def arguments(self, SPLIT_K: int = 1) -> dict[str, object]:
        """What every kernel of a linear layer takes. Pointers that are not read are x's."""
        x, parts = self.x, len(self.weights)
        arguments: dict[str, object] = {"x_ptr": x}
        for i in range(3):  # a single weight stands for all three
            bias = self.biases[i % parts]
            arguments[f"weight_{i}_ptr"] = self.weights[i % parts]
            arguments[f"bias_{i}_ptr"] = x if bias is None else bias
        return arguments | {
            "norm_weight_ptr": x if self.norm_weight is None else self.norm_weight,
            "norm_bias_ptr": x if self.norm_bias is None else self.norm_bias,
            "residual_ptr": x if self.residual is None else self.residual,
            "scale": self.scale,
            "eps": self.eps,
            "N": self.weights[0].shape[0],
            "K": x.shape[1],
            "NUM_PARTS": parts,
            "HAS_BIAS": sum((bias is not None) << i for i, bias in enumerate(self.biases)),
            "HAS_NORM": self.norm_weight is not None,
            "HAS_RESIDUAL": self.residual is not None and SPLIT_K == 1,  # else what adds up the splits adds it
            "GELU": self.gelu,
        }
