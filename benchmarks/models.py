"""The models that benchmarks run: published shapes with random weights, or a real checkpoint; and the check of their steps.

Nothing is downloaded for a shape, and no speed here depends on the weights. With random ones rounding turns near ties, after
which tokens differ for good, so what is checked are logits against a float64 run, and each token by the logits before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration
from whisper_triton.benchmarks.harness import Place, relative_error

import whisper_triton
from whisper_triton.cache import CACHE_NAME
from whisper_triton.checkpoints import load_model
from whisper_triton.decoder import DecoderStep


class Shape(NamedTuple):
    """What of a Whisper decides how long it takes."""

    d_model: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    mel_bins: int
    vocabulary: int
    frames: int = 1500  # of the encoder's output
    slots: int = 448  # tokens that the decoder knows positions for

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads


SHAPES = {
    "tiny": Shape(384, 4, 4, 6, 80, 51865),
    "base": Shape(512, 6, 6, 8, 80, 51865),
    "small": Shape(768, 12, 12, 12, 80, 51865),
    "medium": Shape(1024, 24, 24, 16, 80, 51865),
    "large-v3": Shape(1280, 32, 32, 20, 128, 51866),
    "turbo": Shape(1280, 32, 4, 20, 128, 51866),
    "distil-large-v3": Shape(1280, 32, 2, 20, 128, 51866),
    "toy": Shape(128, 1, 2, 4, 80, 51865, frames=64),  # nobody's: for runs on a CPU that prove the benchmarks
}


def build_model(
    name: str, dtype: torch.dtype = torch.float16, device: torch.device | str = "cuda"
) -> WhisperForConditionalGeneration:
    """A model of the shape `name` with random weights, the same at every call."""
    shape = SHAPES[name]
    config = WhisperConfig(
        d_model=shape.d_model,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=4 * shape.d_model,
        decoder_ffn_dim=4 * shape.d_model,
        num_mel_bins=shape.mel_bins,
        vocab_size=shape.vocabulary,
        max_source_positions=shape.frames,
        max_target_positions=shape.slots,
        bos_token_id=50257,
        eos_token_id=50257,
        pad_token_id=50257,
        decoder_start_token_id=50258,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = WhisperForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.model.decoder.parameters():  # the default initialisation repeats one token
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.06 * (1280 / shape.d_model) ** 0.5)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=50258,
        eos_token_id=50257,
        pad_token_id=50257,
        # Random weights would choose timestamps too, after which `generate` may go on with a second window: so none is one.
        no_timestamps_token_id=shape.vocabulary - 1,
        is_multilingual=False,
        max_length=448,
    )
    return model


def get_model(name: str, dtype: torch.dtype, device: torch.device | str) -> WhisperForConditionalGeneration:
    """A shape's model, else a real checkpoint as the command `transcribe` names them.

    Raises:
        CheckpointError: neither.
    """
    return build_model(name, dtype, device) if name in SHAPES else load_model(name, dtype, device)[0]


def models_on(place: Place) -> Callable[[str], WhisperForConditionalGeneration]:
    """`get_model` for a place."""
    return functools.partial(get_model, dtype=place.dtype, device=place.device)


def shapes_on(place: Place) -> Callable[[str], Shape]:
    """`get_shape`, which is the same at every place."""
    return get_shape


def get_shape(name: str) -> Shape:
    """As `get_model`, of which only the shape is kept."""
    if name in SHAPES:
        return SHAPES[name]
    c = load_model(name, torch.float16, "cpu")[0].config
    return Shape(
        d_model=c.d_model,
        encoder_layers=c.encoder_layers,
        decoder_layers=c.decoder_layers,
        heads=c.decoder_attention_heads,
        mel_bins=c.num_mel_bins,
        vocabulary=c.vocab_size,
        frames=c.max_source_positions,
        slots=c.max_target_positions,
    )


@contextmanager
def in_float64(model: WhisperForConditionalGeneration) -> Iterator[WhisperForConditionalGeneration]:
    """The model in float64 for a block, its weights afterwards as before."""
    dtype = model.dtype
    try:
        yield model.double()
    finally:
        model.to(dtype)


class StepInput(NamedTuple):
    """A prompt of a few tokens over the states of a window, and what float64 says of the last one."""

    ids: torch.Tensor  # (B, T)
    states: torch.Tensor  # (B, frames, C)
    exact: torch.Tensor  # (B, vocabulary) float64
    stock_error: float  # of stock in the model's dtype


@torch.no_grad()
def step_input(model: WhisperForConditionalGeneration, B: int) -> StepInput:
    """What a step of `model`, which must not be accelerated, is checked on."""
    ids = torch.randint(0, min(50000, model.config.vocab_size), (B, 5), device=model.device)
    shape = (B, model.config.max_source_positions, model.config.d_model)
    states = torch.randn(*shape, device=model.device, dtype=model.dtype)
    stock = model(encoder_outputs=(states,), decoder_input_ids=ids, use_cache=False).logits[:, -1]
    with in_float64(model):
        exact = model(encoder_outputs=(states.double(),), decoder_input_ids=ids, use_cache=False).logits[:, -1]
    return StepInput(ids, states, exact, relative_error(stock, exact))


def check_logits(name: str, logits: torch.Tensor, given: StepInput, bound: float | None = None) -> float:
    """The relative error of a step's logits; exits if it exceeds `bound` times stock's.

    By default 1.25; in fp32, where errors are of the order of the sums alone, 2.
    """
    error = relative_error(logits, given.exact)
    bound = bound or (2 if given.states.dtype == torch.float32 else 1.25)
    if not error <= bound * given.stock_error:
        rows = len(given.ids)
        raise SystemExit(f"{name} is wrong in {rows} rows: relative error {error:.2e}, stock's {given.stock_error:.2e}")
    return error


CHECKED = 8  # rows at least: of one alone an error may by chance be half or twice another's


def checked_rows(B: int) -> int:
    """Of whole batches of B."""
    return -(-CHECKED // B) * B


@torch.no_grad()
def check(model: WhisperForConditionalGeneration, B: int, given: StepInput | None = None) -> tuple[float, float]:
    """(our, stock's) relative error of a step's logits after a prompt, over some rows; exits as `check_logits` does.

    Args:
        given: for `checked_rows(B)` of them, where the same has been asked for already.
    """
    given = given or step_input(model, checked_rows(B))
    ours = []
    with whisper_triton.accelerated(model):
        step = DecoderStep(model, B, given.states.shape[1])
        for ids, states in zip(given.ids.split(B), given.states.split(B), strict=True):
            step.reset()
            model(decoder_input_ids=ids[:, :4], encoder_outputs=(states,), use_cache=True, **{CACHE_NAME: step.cache})
            last = ids[:, 4:]
            # What runs where there is no graph: the chain through its references, where it covers the model.
            ours.append((step(model, last) if model.device.type == "cuda" else step._run(model, last))[:, -1])
    return check_logits("the step", torch.cat(ours), given), given.stock_error
