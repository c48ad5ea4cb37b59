"""CTranslate2's tensors of a Whisper model under transformers' names and in transformers' shapes.

CTranslate2 stores what transformers stores, fused and renamed: queries, keys and values of self-attention lie in one
matrix, keys and values of cross-attention in another, and the keys, which have no bias in Whisper, got one of zeros.
"""

from __future__ import annotations

import torch
from transformers.models.whisper.modeling_whisper import sinusoids

from whisper_triton.ctranslate2 import CheckpointError, ModelFile

FRAMES = 1500  # of the encoder's output, from a window of 30 s
EMBEDDING = "decoder/embeddings/weight"
PROJECTION = "decoder/projection/weight"
# Scalars that must hold one value for the decoder to be Whisper's.
FIXED = {
    "decoder/activation": 3,  # exact GELU
    "decoder/alibi": 0,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
# By transformers' name: CTranslate2's name, and what each of its linear layers fuses.
ATTENTIONS = {
    "self_attn": ("self_attention", (("q_proj", "k_proj", "v_proj"), ("out_proj",))),
    "encoder_attn": ("attention", (("q_proj",), ("k_proj", "v_proj"), ("out_proj",))),
}


def count_layers(file: ModelFile, side: str) -> int:
    """The number of layers in the "encoder" or "decoder"; at least 1.

    Raises:
        CheckpointError: there is none.
    """
    count = 0
    while f"{side}/layer_{count}/ffn/linear_0/weight" in file:
        count += 1
    if count == 0:
        raise CheckpointError(f"{file}: the {side} has no layers")
    return count


def state_dict(file: ModelFile, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All weights in `dtype`, the tied `proj_out.weight` left out.

    Raises:
        CheckpointError: a tensor is missing, has the wrong rank, or has no place in Whisper.
    """
    return _Renamer(file, dtype).run()


class _Renamer:
    """Takes tensors out of the file one by one and notes which were taken, so that none is overlooked."""

    def __init__(self, file: ModelFile, dtype: torch.dtype) -> None:
        self._file = file
        self._dtype = dtype
        self._used: set[str] = set()
        self._state: dict[str, torch.Tensor] = {}

    def run(self) -> dict[str, torch.Tensor]:
        for name, value in FIXED.items():
            found = self._file.scalar(name)
            if found not in (None, value):
                raise CheckpointError(f"{self._file}: {name} is {found}, in Whisper it is {value}")
        for conv in ("conv1", "conv2"):
            self._copy(f"encoder.{conv}", f"encoder/{conv}", ("weight", "bias"))
        self._side("encoder", ("self_attn",))
        self._side("decoder", ("self_attn", "encoder_attn"))
        self._state["model.decoder.embed_tokens.weight"] = self._take(EMBEDDING, 2)
        if PROJECTION in self._file and not self._file.same(PROJECTION, EMBEDDING):
            raise CheckpointError(f"{self._file}: {PROJECTION} is not the embedding, as it is in Whisper")
        self._used.add(PROJECTION)
        unknown = sorted(name for name in self._file.names() - self._used if self._file.shape(name) != ())
        if unknown:
            raise CheckpointError(f"{self._file}: {unknown[0]} has no place in Whisper")
        return self._state

    def _side(self, side: str, attentions: tuple[str, ...]) -> None:
        self._copy_norm(f"{side}.layer_norm", f"{side}/layer_norm")
        encodings = f"{side}/position_encodings/encodings"
        if side == "encoder" and encodings not in self._file:
            width = self._file.shape("encoder/conv1/bias")[0]
            if width < 4 or width % 2:
                raise CheckpointError(f"{self._file}: no Whisper is {width} wide, as encoder/conv1/bias is")
            positions = sinusoids(FRAMES, width).to(self._dtype)
        else:
            positions = self._take(encodings, 2)
        self._state[f"model.{side}.embed_positions.weight"] = positions
        for i in range(count_layers(self._file, side)):
            source, target = f"{side}/layer_{i}", f"{side}.layers.{i}"
            for attention in attentions:
                self._copy_attention(f"{target}.{attention}", source, attention)
            self._copy(f"{target}.fc1", f"{source}/ffn/linear_0", ("weight", "bias"))
            self._copy(f"{target}.fc2", f"{source}/ffn/linear_1", ("weight", "bias"))
            self._copy_norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")

    def _copy_attention(self, target: str, source: str, attention: str) -> None:
        folder, linears = ATTENTIONS[attention]
        self._copy_norm(f"{target}_layer_norm", f"{source}/{folder}/layer_norm")
        for i, projections in enumerate(linears):
            linear = f"{source}/{folder}/linear_{i}"
            weights = self._split(f"{linear}/weight", 2, len(projections))
            biases = self._split(f"{linear}/bias", 1, len(projections))
            for projection, weight, bias in zip(projections, weights, biases, strict=True):
                self._state[f"model.{target}.{projection}.weight"] = weight
                if projection != "k_proj":
                    self._state[f"model.{target}.{projection}.bias"] = bias
                elif bias.any():
                    raise CheckpointError(f"{self._file}: {linear}/bias is not zero for the keys, as it is in Whisper")

    def _copy_norm(self, target: str, source: str) -> None:
        self._copy(target, source, ("gamma", "beta"))

    def _copy(self, target: str, source: str, names: tuple[str, str]) -> None:
        for name, parameter in zip(names, ("weight", "bias"), strict=True):
            rank = 1 if name != "weight" else 3 if "/conv" in source else 2
            self._state[f"model.{target}.{parameter}"] = self._take(f"{source}/{name}", rank)

    def _split(self, name: str, rank: int, parts: int) -> list[torch.Tensor]:
        tensor = self._take(name, rank)
        if tensor.shape[0] % parts:
            raise CheckpointError(f"{self._file}: {name} {list(tensor.shape)} does not split into {parts} parts")
        # Copies, because views would keep a checkpoint saved later from being written.
        return [part.clone() for part in tensor.chunk(parts)]

    def _take(self, name: str, rank: int) -> torch.Tensor:
        self._used.add(name)
        if len(self._file.shape(name)) != rank:
            raise CheckpointError(f"{self._file}: {name} has shape {list(self._file.shape(name))}, not {rank} dims")
        return self._file.tensor(name, self._dtype)
