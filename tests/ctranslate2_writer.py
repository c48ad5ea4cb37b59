"""Writes CTranslate2 directories for the tests: the format's other half, which only tests need."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import WhisperForConditionalGeneration
from whisper_models import LANGUAGES, TEXT, VOCABULARY

TYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
QUANTIZED = {"int8": torch.int8, "int16": torch.int16}
ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}


def pack_string(text: str) -> bytes:
    """A string of the format: length with the closing NUL, text, NUL."""
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def pack_tensor(name: str, tensor: torch.Tensor) -> bytes:
    """An entry of the format."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    shape = struct.pack(f"<B{tensor.dim()}I", tensor.dim(), *tensor.shape)
    return pack_string(name) + shape + struct.pack("<BI", TYPES.index(tensor.dtype), len(data)) + data


def pack_model(
    tensors: Mapping[str, torch.Tensor],
    aliases: Mapping[str, str] = ALIASES,
    *,
    version: int = 6,
    spec: str = "WhisperSpec",
    revision: int = 3,
) -> bytes:
    """The whole of a `model.bin`."""
    parts = [struct.pack("<I", version), pack_string(spec), struct.pack("<II", revision, len(tensors))]
    parts += [pack_tensor(name, tensor) for name, tensor in tensors.items()]
    parts.append(struct.pack("<I", len(aliases)))
    parts += [pack_string(alias) + pack_string(name) for alias, name in aliases.items()]
    return b"".join(parts)


def store(tensors: Mapping[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The tensors as a file of `kind` ("float32", "float16", "bfloat16", "int8", "int16") stores them."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            stored[name] = tensor
        elif kind not in QUANTIZED:
            stored[name] = tensor.to(getattr(torch, kind))
        elif not name.endswith("/weight"):
            stored[name] = tensor
        else:
            rows = tensor.reshape(tensor.shape[0], -1)
            scale = 127 / rows.abs().amax(dim=1) if kind == "int8" else 2**10 / rows.abs().max()
            stored[name] = (rows * scale.view(-1, 1)).round().to(QUANTIZED[kind]).view(tensor.shape)
            stored[f"{name}_scale"] = scale
    return stored


def whisper_tensors(model: WhisperForConditionalGeneration) -> dict[str, torch.Tensor]:
    """A model's weights under CTranslate2's names: queries, keys and values fused, a bias of zeros for the keys."""
    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    tensors: dict[str, torch.Tensor] = {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"]}

    def fuse(source: str, target: str, *projections: str) -> None:
        weights = [state[f"{source}.{projection}.weight"] for projection in projections]
        zeros = torch.zeros(weights[0].shape[0])
        biases = [state.get(f"{source}.{projection}.bias", zeros) for projection in projections]
        tensors[f"{target}/weight"] = torch.cat(weights)
        tensors[f"{target}/bias"] = torch.cat(biases)

    def norm(source: str, target: str) -> None:
        tensors[f"{target}/gamma"], tensors[f"{target}/beta"] = state[f"{source}.weight"], state[f"{source}.bias"]

    for side in ("encoder", "decoder"):
        heads = getattr(model.config, f"{side}_attention_heads")
        tensors[f"{side}/num_heads"] = torch.tensor(heads, dtype=torch.int16)
        tensors[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norm(f"{side}.layer_norm", f"{side}/layer_norm")
        for i in range(getattr(model.config, f"{side}_layers")):
            ours, theirs = f"{side}.layers.{i}", f"{side}/layer_{i}"
            fuse(f"{ours}.self_attn", f"{theirs}/self_attention/linear_0", "q_proj", "k_proj", "v_proj")
            fuse(f"{ours}.self_attn", f"{theirs}/self_attention/linear_1", "out_proj")
            norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            if side == "decoder":
                fuse(f"{ours}.encoder_attn", f"{theirs}/attention/linear_0", "q_proj")
                fuse(f"{ours}.encoder_attn", f"{theirs}/attention/linear_1", "k_proj", "v_proj")
                fuse(f"{ours}.encoder_attn", f"{theirs}/attention/linear_2", "out_proj")
                norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
            fuse(ours, f"{theirs}/ffn/linear_0", "fc1")
            fuse(ours, f"{theirs}/ffn/linear_1", "fc2")
            norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
    for conv in ("conv1", "conv2"):
        fuse("encoder", f"encoder/{conv}", conv)
    tensors["decoder/pre_norm"] = torch.tensor(1, dtype=torch.int8)
    return tensors


def vocabulary(text: int = TEXT, size: int = VOCABULARY, languages: Sequence[str] = tuple(LANGUAGES)) -> list[str]:
    """A vocabulary of `text` words, Whisper's special tokens, and as many timestamps as `size` leaves room for.

    The words are bytes and pairs of bytes, in the alphabet of byte-level BPE.
    """
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(a + b for a in letters for b in letters)][:text]
    special = ["<|endoftext|>", "<|startoftranscript|>", *languages, "<|translate|>", "<|transcribe|>"]
    special += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    tokens = words + special
    return tokens + [f"<|{i * 0.02:.2f}|>" for i in range(size - len(tokens))]


def write_directory(
    folder: Path, model: WhisperForConditionalGeneration, kind: str = "float32", tokens: list[str] | None = None
) -> Path:
    """Writes a CTranslate2 directory with a bare vocabulary, of a model whose tokens are `tokens`; returns `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(pack_model(store(whisper_tensors(model), kind)))
    rules = model.generation_config
    settings = {
        "suppress_ids": rules.suppress_tokens,
        "suppress_ids_begin": rules.begin_suppress_tokens,
        "alignment_heads": rules.alignment_heads,
        "lang_ids": [],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    tokens = vocabulary() if tokens is None else tokens
    (folder / "vocabulary.json").write_text(json.dumps(tokens))
    return folder
