"""Where and how the command runs a model: device, dtype, default model, and the path its kernels take there."""

from __future__ import annotations

import torch

from whisper_triton.kernels import backend

DTYPES = {  # by the names that the command takes
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}


def choose_device(name: str | None) -> torch.device:
    """The device a user named ("cpu", "cuda", "cuda:1"), or the GPU if there is one, else the CPU.

    Raises:
        ValueError: torch knows no such device, or cannot use it here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: give cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not to be had: {no_gpu_reason()}")
    try:
        torch.zeros(1, device=device).item()  # read back, which the device "meta" cannot
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # torch's messages go on for a page
        raise ValueError(f"device {name!r} is not to be had: {reason}") from error
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of a name in `DTYPES`; by default float16 on a GPU, and float32 on a CPU, which has no faster one."""
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    return DTYPES[name]


def default_model(device: torch.device, task: str) -> str:
    """The model taken where none is named.

    On a GPU the largest that is fast, which is turbo, or large-v3 for translation, which turbo never learned. On a CPU
    the largest that keeps up with speech on a few cores.
    """
    if device.type == "cpu":
        return "openai/whisper-small"
    return "openai/whisper-large-v3-turbo" if task == "transcribe" else "openai/whisper-large-v3"


def device_name(device: torch.device) -> str:
    """What a person calls the device, such as "NVIDIA H100 80GB HBM3" or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def no_gpu_reason() -> str:
    """Why torch has no GPU, where `torch.cuda.is_available()` is False."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for the CPU only"
    return "torch finds no GPU (none here, no driver, or hidden by CUDA_VISIBLE_DEVICES)"


def describe_path(device: torch.device) -> str:
    """What computes the attention of decoding on `device`, such as "Triton kernels on NVIDIA H100 80GB HBM3"."""
    kind = {
        "triton": "Triton kernels",
        "interpreter": "Triton kernels in Triton's interpreter",
        "reference": "PyTorch reference",
    }
    return f"{kind[backend(device)]} on {device_name(device)}"
