"""What `whisper-triton doctor` prints: versions, GPU, and which path each part of the package takes here and why."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from whisper_triton import __version__, kernels
from whisper_triton.fused import MAX_SEQUENCES, max_rows
from whisper_triton.kernels import backend
from whisper_triton.kernels._dispatch import HAS_TRITON, why_reference
from whisper_triton.kernels._paced import MIN_WIDTH
from whisper_triton.kernels.skinny_linear import LayerNorm
from whisper_triton.runtime import choose_device, choose_dtype, default_model, describe_path, no_gpu_reason
from whisper_triton.variants import why_not_dependent, why_not_paced

# All that have a reference: what else the package exports are their helpers.
KERNELS = tuple(name for name in kernels.__all__ if f"{name}_reference" in kernels.__all__)


def report() -> str:
    """The whole report, a fact a line. On a GPU it builds and launches a few kernels, to see whether that works."""
    device = choose_device(None)
    try_kernel(device)
    if why_not_paced(device) is None:
        try_paced_kernels(device)
    dtype = str(choose_dtype(None, device)).removeprefix("torch.")
    path, reason = describe_path(device), _reason(device)  # once the kernel has been tried
    facts = [
        ("whisper-triton", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),  # which names the build, where the package's metadata may not
        ("triton", _version("triton")),
        ("transformers", _version("transformers")),
        ("GPU", _gpu(device)),
        ("transcribe", f"{default_model(device, 'transcribe')} in {dtype} on {device.type}, unless told otherwise"),
    ]
    if why := why_reference(device):
        facts.append(("Triton fails", why))
    parts = [
        *((kernel, path, reason) for kernel in KERNELS),
        *_variants(device),
        ("attention module", path, "decodes with the kernels above; what they do not cover goes the stock way, and is logged"),
        ("decoding step", *_step(device)),
        ("prompt", *_prompt(device)),
        ("encoder", *_encoder(device)),
        ("choice of tokens", *_choice(device)),
    ]
    lines = [f"{name:<17} {value}" for name, value in facts]
    width = max(len(taken) for _, taken, _ in parts)
    lines += ["", *(f"{name:<17} {taken:<{width}}  {why}" for name, taken, why in parts)]
    return "\n".join(lines)


def try_kernel(device: torch.device) -> None:
    """Launches a small kernel where Triton would be taken, which finds out whether it can be."""
    if backend(device) == "triton":
        kernels.bias_gelu(torch.zeros(1, 32, device=device), torch.zeros(32, device=device))
        torch.cuda.synchronize(device)


def try_paced_kernels(device: torch.device) -> None:
    """Launches a linear layer and a cross-attention of the least width that paced copies and clusters are for, if they are."""
    C = MIN_WIDTH
    weight, vector, cache = (
        torch.zeros(*shape, dtype=torch.float16, device=device) for shape in ((C, C), (C,), (1, C // 64, 64, 64))
    )
    x, norm = vector[None], LayerNorm(vector, vector, 1e-5)
    kernels.skinny_linear(x, (weight,), (vector,), layer_norm=norm)
    kernels.cross_attention(x, weight, vector, cache, cache, layer_norm=norm, scale=1.0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _variants(device: torch.device) -> list[tuple[str, str, str]]:
    """The kernels' faster variants, whether they serve, and why."""
    dependent, paced = why_not_dependent(device), why_not_paced(device)
    wide = f"2-byte decoders of {MIN_WIDTH} columns and more"
    plain = "no: plain kernels"
    return [
        ("dependent launch", "no", dependent)
        if dependent
        else ("dependent launch", "yes", "a kernel begins while another ends"),
        ("paced copies", plain, paced) if paced else ("paced copies", "yes", f"linear layers and attention of {wide}"),
        ("clusters", plain, paced) if paced else ("clusters", "yes", f"cross-attention of few heads, {wide}"),
    ]


def _why_no_graph(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "no GPU to capture a CUDA graph on"
    return "references are not captured" if backend(device) == "reference" else None


def _step(device: torch.device) -> tuple[str, str]:
    """How the steps of `generate` are run, and why."""
    if reason := _why_no_graph(device):
        return "module by module", reason
    most, most_fp32 = (min(MAX_SEQUENCES, max_rows(t, device)) for t in (choose_dtype(None, device), torch.float32))
    less = "" if most == most_fp32 else f" (fp32: {most_fp32})"
    many = "one sequence" if most == 1 else f"up to {most} sequences"
    why = f"{many} at a time{less} through fused kernels, more through the attention module"
    return "replayed CUDA graph", why


def _prompt(device: torch.device) -> tuple[str, str]:
    if _why_no_graph(device):
        return "module by module", "PyTorch's SDPA serves many queries at a time"
    rows = max_rows(choose_dtype(None, device), device)
    if rows == 1:
        return "module by module", "fused kernels take one token at a time here"
    return "replayed CUDA graph", f"up to 16 tokens a sequence, {rows} in all of up to {MAX_SEQUENCES}; others module by module"


def _encoder(device: torch.device) -> tuple[str, str]:
    if reason := _why_no_graph(device):
        return "module by module", reason
    return "replayed CUDA graph", "cuBLAS and PyTorch's SDPA, what stands between them fused"


def _choice(device: torch.device) -> tuple[str, str]:
    if _why_no_graph(device):
        return "stock's processors", "no captured step that could choose"
    return "in the step's graph", "for the calls that README names; else stock's processors"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return f"none: {no_gpu_reason()}"
    properties = torch.cuda.get_device_properties(device)
    toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    more = f", and {torch.cuda.device_count() - 1} more" if torch.cuda.device_count() > 1 else ""
    capability = f"compute capability {properties.major}.{properties.minor}"
    return f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB, {toolkit}{more}"


def _reason(device: torch.device) -> str:
    """Why the kernels take the path they take."""
    kind = backend(device)
    if kind == "triton":
        return "a GPU and Triton are there"
    if kind == "interpreter":
        return "TRITON_INTERPRET=1 is set: for tests, very slow"
    if not HAS_TRITON:
        return "Triton is not installed"
    return "Triton fails on this GPU, as said above" if device.type == "cuda" else "no GPU"
