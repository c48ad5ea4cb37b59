"""Which faster variants of the kernels serve on a GPU, and why not: the plain kernels, as right but slower, serve elsewhere."""

from __future__ import annotations

import textwrap

import torch

from .attention import report_once
from .kernels import _paced, backend
from .kernels._dispatch import capability, has_pdl


def why_not_dependent(device: torch.device) -> str | None:
    """Why kernels do not begin while the one before them ends (programmatic dependent launch), or None."""
    if backend(device) != "triton":
        return "no kernel of Triton's is launched on a GPU"
    return None if has_pdl(device) else "NVIDIA GPUs of compute capability 9.0 and later have it"


def why_not_paced(device: torch.device) -> str | None:
    """Why neither paced copies nor clusters of programs serve on `device`, or None; where they do, it is for wide decoders."""
    if backend(device) != "triton":
        return "no kernel of Triton's is launched on a GPU"
    if capability(device) != _paced.HOPPER:
        return "measured on compute capability 9.0 alone"
    if not _paced.HAS_GLUON:
        return "this Triton has no Gluon that they could be built with: 3.6 has"
    reason = _paced.why_given_up(device)
    return None if reason is None else f"they do not build here: {textwrap.shorten(reason, 300)}"


def report_missing(device: torch.device, width: int, dtype: torch.dtype) -> None:
    """Logs once where a decoder of this width would be faster with another Triton. What does not build says so itself."""
    is_missing = not _paced.HAS_GLUON and backend(device) == "triton" and capability(device) == _paced.HOPPER
    if is_missing and dtype.itemsize == 2 and width >= _paced.MIN_WIDTH:
        report_once(f"the plain kernels serve instead of the paced ones: {why_not_paced(device)}")
