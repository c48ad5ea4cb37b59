"""Turns a CTranslate2 directory (`model.bin`, `config.json`, a tokenizer or vocabulary) into transformers' Whisper.

The sizes of the model are read off its tensors; what a token means comes from the tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from whisper_triton.ctranslate2 import CheckpointError, ModelFile
from whisper_triton.vocabulary import load_tokenizer, token_id
from whisper_triton.weights import count_layers, state_dict

HEAD_DIM = 64  # of every Whisper; used where the file does not give the number of heads
MULTILINGUAL_VOCABULARY = 51865  # entries of the smallest one; the English-only models have 51864
# Of the spectrogram that every Whisper hears.
SPECTROGRAM = {"sampling_rate": 16000, "hop_length": 160, "n_fft": 400, "chunk_length": 30}
MAX_INITIAL_TIMESTAMP = 50  # in steps of 0.02 s; OpenAI's value, which CTranslate2's config.json does not carry


def convert(directory: Path, dtype: torch.dtype) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """The model and processor of a CTranslate2 directory, on the CPU, in evaluation mode.

    Args:
        directory: holds `model.bin` and `config.json`, and `tokenizer.json` or `vocabulary.json` or `vocabulary.txt`;
            `preprocessor_config.json` is checked where present.
        dtype: of the returned model; weights stored as float32, float16, bfloat16, int8 or int16 are converted to it.

    Raises:
        CheckpointError: a file is missing, corrupt or not a Whisper model's.
    """
    file = ModelFile(directory / "model.bin")
    settings = read_json(directory / "config.json", dict)
    state = state_dict(file, dtype)
    config = _config(file, state)
    tokenizer = load_tokenizer(directory, config.vocab_size)
    generation_config = _generation_config(directory, settings, tokenizer, config)
    for name in ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"):
        setattr(config, name, getattr(generation_config, name))

    with torch.device("meta"):  # nothing is allocated nor initialised: every tensor comes from the file
        model = WhisperForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "proj_out.weight"}
    for name, shape in expected.items():
        if name not in state or state[name].shape != shape:
            found = list(state[name].shape) if name in state else "missing"
            raise CheckpointError(f"{file}: {name} is {found}, should be {list(shape)}")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = generation_config
    processor = WhisperProcessor(_feature_extractor(directory, config.num_mel_bins), tokenizer)
    return model.eval(), processor


def read_json(path: Path, kind: type) -> Any:
    """The content of JSON file `path`, whose outermost value is a `kind`.

    Raises:
        CheckpointError: the file is missing, no JSON, or holds another type.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # the latter of brackets nested without end
        raise CheckpointError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, kind):
        raise CheckpointError(f"{path}: should hold a {kind.__name__}, holds a {type(content).__name__}")
    return content


def _config(file: ModelFile, state: dict[str, torch.Tensor]) -> WhisperConfig:
    """The model's sizes, read off its tensors."""
    vocab_size, d_model = state["model.decoder.embed_tokens.weight"].shape
    sizes: dict[str, int] = {}
    for side in ("encoder", "decoder"):
        heads = file.scalar(f"{side}/num_heads") or d_model // HEAD_DIM
        if type(heads) is not int or heads < 1 or d_model % heads:
            raise CheckpointError(f"{file}: {heads} heads in the {side} do not divide its width {d_model}")
        sizes[f"{side}_attention_heads"] = heads
        sizes[f"{side}_layers"] = count_layers(file, side)
        sizes[f"{side}_ffn_dim"] = state[f"model.{side}.layers.0.fc1.weight"].shape[0]
    return WhisperConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
        max_source_positions=state["model.encoder.embed_positions.weight"].shape[0],
        max_target_positions=state["model.decoder.embed_positions.weight"].shape[0],
        **sizes,
    )


def _generation_config(
    directory: Path, settings: dict[str, Any], tokenizer: WhisperTokenizer, config: WhisperConfig
) -> GenerationConfig:
    """What `generate` needs to know, as OpenAI's own checkpoints on the hub have it."""
    end = token_id(tokenizer, "<|endoftext|>")
    multilingual = config.vocab_size >= MULTILINGUAL_VOCABULARY
    values: dict[str, Any] = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": token_id(tokenizer, "<|startoftranscript|>"),
        "prev_sot_token_id": token_id(tokenizer, "<|startofprev|>"),
        "no_timestamps_token_id": token_id(tokenizer, "<|notimestamps|>"),
        "max_initial_timestamp_index": MAX_INITIAL_TIMESTAMP,
        "is_multilingual": multilingual,
        "return_timestamps": False,
        "max_length": config.max_target_positions,
    }
    for ours, theirs in (("suppress_tokens", "suppress_ids"), ("begin_suppress_tokens", "suppress_ids_begin")):
        ids = settings.get(theirs)
        if ids is not None:
            _check_ids(directory, theirs, ids, config.vocab_size)
            values[ours] = ids
    if settings.get("alignment_heads") is not None:
        values["alignment_heads"] = settings["alignment_heads"]
        _check_heads(directory, values["alignment_heads"])
    if multilingual:
        # Not from CTranslate2's `lang_ids`: they name no language, and some converters counted them wrongly.
        known = tokenizer.get_vocab()
        values["lang_to_id"] = {f"<|{code}|>": known[f"<|{code}|>"] for code in LANGUAGES if f"<|{code}|>" in known}
        values["task_to_id"] = {task: token_id(tokenizer, f"<|{task}|>") for task in ("transcribe", "translate")}
    return GenerationConfig(**values)


def _check_ids(directory: Path, name: str, ids: Any, vocab_size: int) -> None:
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise CheckpointError(f"{directory / 'config.json'}: {name} should list token ids below {vocab_size}")


def _check_heads(directory: Path, heads: Any) -> None:
    is_list = isinstance(heads, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in heads)
    if not is_list or not all(type(i) is int and i >= 0 for pair in heads for i in pair):
        raise CheckpointError(f"{directory / 'config.json'}: alignment_heads should list pairs of a layer and a head")


def _feature_extractor(directory: Path, num_mel_bins: int) -> WhisperFeatureExtractor:
    path = directory / "preprocessor_config.json"
    found = read_json(path, dict) if path.exists() else {}
    if found.get("feature_size", num_mel_bins) != num_mel_bins:
        raise CheckpointError(f"{path}: {str(found['feature_size'])[:40]} mel bins, the model has {num_mel_bins}")
    for name, value in SPECTROGRAM.items():
        if found.get(name, value) != value:
            raise CheckpointError(f"{path}: {name} is {str(found[name])[:40]!r}, in Whisper it is {value}")
    return WhisperFeatureExtractor(feature_size=num_mel_bins, **SPECTROGRAM)
