"""What of a call of `generate` our loop, our caches and the captured steps cover, and in words why not."""

from __future__ import annotations

import copy
import inspect
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, WhisperForConditionalGeneration
from transformers.generation import GenerationMode, MaxLengthCriteria
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin
from transformers.models.whisper.modeling_whisper import WhisperDecoder, WhisperDecoderLayer

from .attention import NAME, STATE, TritonAttention, is_length, why_not_covered
from .cache import CACHE_NAME
from .graphs import modules_of

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)

FROM_BEFORE = "a method kept from before `restore`"
# Arguments of `generate` that bring another loop than `_sample`, or that transformers keeps from a loop of ours.
_OTHER_LOOPS = (
    "custom_generate", "streamer", "assistant_model", "assistant_tokenizer", "tokenizer", "stop_strings", "synced_gpus",
    "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "constraints",
    "force_words_ids", "num_beam_groups",
)  # fmt: skip


def why_not_our_loop(model: WhisperForConditionalGeneration, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call of `generate` cannot be handed our loop, which else looks closer, once for each window; or None."""
    if len(args) > 5:
        return "synced_gpus is given"
    for name in _OTHER_LOOPS:
        if kwargs.get(name):
            return f"{name} is given"
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    # Anything but a configuration is for stock to refuse.
    configs = [c for c in (config, model.generation_config) if c is not None]
    if not all(isinstance(c, GenerationConfig) and _mode(c, kwargs.get("num_beams")) in _MODES[:2] for c in configs):
        return "a search over beams, or another mode of generation"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "torch.distributed is initialized"
    return None


def _mode(config: GenerationConfig, num_beams: Any) -> GenerationMode:
    """How `config` has tokens chosen where a call asks for so many beams; None: it leaves that to the configuration."""
    if num_beams is not None:
        config = copy.copy(config)
        config.num_beams = num_beams
    return config.get_generation_mode()


def _transformers_own(*names: str) -> dict[str, Any]:
    """These methods of Whisper's class, as they are now: None where somebody has replaced one before."""
    found: dict[str, Any] = {}
    for name in names:
        method = inspect.getattr_static(WhisperForConditionalGeneration, name)
        layers, function = [], getattr(method, "__func__", method)
        while function is not None:  # decorators, transformers' or torch's
            layers.append(getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0])
            function = getattr(function, "__wrapped__", None)
        found[name] = method if set(layers) <= {"transformers", "torch", "contextlib"} else None
    return found


def _has_own(model: WhisperForConditionalGeneration, methods: dict[str, Any], overridden: dict[str, Any]) -> bool:
    """Whether the model's class has these methods, and the model itself none but `overridden`, ours."""
    return all(
        inspect.getattr_static(type(model), name) is method and vars(model).get(name) is overridden.get(name)
        for name, method in methods.items()
    )


# What our loop does in place of stock's, and what a replay does in place of the forward pass.
_LOOP = _transformers_own(
    "forward",
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_has_unfinished_sequences",
    "_sample",
)


# All by which `generate` gets from its call to its loop, and more.
_METHODS = {
    name: None if method is None else getattr(WhisperForConditionalGeneration, name)
    for name, method in _transformers_own(
        *(
            name
            for kind in (GenerationMixin, WhisperGenerationMixin, WhisperForConditionalGeneration)
            for name, value in vars(kind).items()
            if isinstance(value, FunctionType | staticmethod)
        )
    ).items()
}


def has_stocks_methods() -> bool:
    """Whether nobody has put another in the place of a method of Whisper's class that has to do with `generate`."""
    return all(getattr(WhisperForConditionalGeneration, name, None) is method for name, method in _METHODS.items())


def has_stocks_forward(model: WhisperForConditionalGeneration) -> bool:
    """Whether the forward pass of the model's class is transformers' own."""
    return inspect.getattr_static(type(model), "forward") is _LOOP["forward"]


def has_stocks_loop(model: WhisperForConditionalGeneration, overridden: dict[str, Any]) -> bool:
    """Whether what stock's loop calls at each token is transformers' own, with no hook around it; `overridden`: our methods on
    this model.
    """
    return not (model._forward_hooks or model._forward_pre_hooks) and _has_own(model, _LOOP, overridden)


def brings_its_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of `generate` has a greatest length among its stopping criteria, for which stock drops its own."""
    criteria = args[3] if len(args) > 3 else kwargs.get("stopping_criteria")
    return isinstance(criteria, list) and any(isinstance(criterion, MaxLengthCriteria) for criterion in criteria)


# What in transformers reads the scores of a call that asks for tokens alone: for its threshold of log-probability.
_READERS = _transformers_own(
    "generate",
    "generate_with_fallback",
    "_postprocess_outputs",
    "_need_fallback",
    "_retrieve_avg_logprobs",
    "_retrieve_segment",
    "_stack_split_outputs",
)


def returns_tokens_alone(
    model: WhisperForConditionalGeneration, overridden: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether nobody sees the scores, logits and cache of a call of `generate`; `overridden`: our methods on this model."""
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    asked = [kwargs.get(name) for name in ("return_dict_in_generate", "return_segments", "return_token_timestamps")]
    asked += [getattr(one, "return_dict_in_generate", None) for one in (config, model.generation_config)]
    return not any(asked) and _has_own(model, _READERS, overridden)


# What `generate` passes to a step: the attention mask is of the frames, which Whisper ignores ...
_TENSORS = ("decoder_input_ids", "decoder_attention_mask", CACHE_NAME, "encoder_outputs", "attention_mask")
# ... and besides, with the values that a graph covers.
_STEP_ARGUMENTS = {
    "use_cache": (True,),
    "return_dict": (True, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
}


def why_not_replayed(model: WhisperForConditionalGeneration, kwargs: dict[str, Any]) -> str | None:
    """What no graph covers in the arguments of a step's forward pass, or None."""
    mask = kwargs.get("decoder_attention_mask")
    if mask is not None and not is_length(mask):
        return "decoder_attention_mask is given"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(model.config, name):
            return f"{name} is set"
    for name, value in kwargs.items():
        if name not in _TENSORS and not any(value is covered for covered in _STEP_ARGUMENTS.get(name, (None,))):
            return f"{name} is set"
    return None


def why_not_our_cache(
    model: WhisperForConditionalGeneration,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    generation_mode: GenerationMode,
    batch_size: int,
) -> str | None:
    """What in a call of `generate` is not covered by a cache of ours, the model aside (`why_not_static`), or None.

    `batch_size`: before each row is there for all of its beams or sequences.
    """
    if STATE not in vars(model):
        return FROM_BEFORE
    if model_kwargs.get(CACHE_NAME) is not None:
        return f"{CACHE_NAME} is given"
    if generation_config.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation={generation_config.cache_implementation!r}"
    if generation_config.use_cache is False:
        return "use_cache=False"
    if not isinstance(generation_config.max_length, int):  # stock's dynamic cache does not mind half a token
        return f"max_length={generation_config.max_length!r}"
    if generation_mode not in _MODES:
        return f"{generation_mode.value}"
    if generation_config.is_assistant:
        return "the model is another's assistant"
    if generation_config.output_attentions or model.config.output_attentions:
        return "output_attentions=True"
    states = model_kwargs["encoder_outputs"][0]
    rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
    return why_not_these_states(states, rows)


def why_not_these_states(states: torch.Tensor, rows: int) -> str | None:
    """Why `states`, the first of what a call has for encoder outputs, are not those of each of `rows` rows; or None."""
    if states.dim() != 3 or states.shape[0] != rows:  # a bare tensor's first is its first row
        return f"encoder_outputs are {tuple(states.shape)}, where {rows} rows are decoded"
    return None


def _writes_all_caches(decoder: nn.Module) -> bool:
    """Whether each pass of a decoder is known to write the keys and values of all of its layers."""
    passes = [(decoder, WhisperDecoder)]
    for layer in decoder.layers:
        passes += (layer, WhisperDecoderLayer), (layer.self_attn, TritonAttention)
    is_known = all(type(module).forward is kind.forward and "forward" not in vars(module) for module, kind in passes)
    return is_known and not (decoder.training and decoder.layerdrop)


def why_not_static(model: WhisperForConditionalGeneration, is_known: bool = False) -> str | None:
    """Why the model cannot decode over a static cache of ours, or None.

    `is_known`: a step of the model can be captured as it is, so that its decoder lies on one device; which takes long to ask.
    """
    if STATE not in vars(model):
        return FROM_BEFORE
    if model.config._attn_implementation != NAME:
        return f"attention is {model.config._attn_implementation}"
    decoder, device = model.model.decoder, model.device  # which is looked for anew each time that it is asked for
    # One cache layer a decoder layer, in order, on one device.
    if [layer.self_attn.layer_idx for layer in decoder.layers] != list(range(model.config.decoder_layers)):
        return "decoder layers were taken out or put in"
    # The caches' layers share one length, which the last of them advances.
    if not is_known and not _writes_all_caches(decoder):
        return "the decoder or a layer of it has a forward pass that may leave a cache out"
    parameters = (p for module in modules_of(decoder) for p in module._parameters.values() if p is not None)
    if not is_known and any(parameter.device != device for parameter in parameters):
        return "the decoder lies on several devices"
    return why_not_covered(model.dtype, model.config.d_model // model.config.decoder_attention_heads, device)
