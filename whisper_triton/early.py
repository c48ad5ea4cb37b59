"""The encoder's graph replayed as soon as `generate` is called, while stock prepares what else it needs.

Stock builds configurations, processors and the first tokens before it asks the encoder, milliseconds in which a GPU has nothing
to do. Where a graph has been captured for just these features, it runs meanwhile, in a stream of its own: stock waits for its
small copies to the GPU, and in its stream it would wait for the encoder too. The states lie in the call's `Encoded`, where the
encoder's override finds them if neither features nor weights have changed, and the graph still is what a pass would do: to know
that takes a walk over all modules, for which the GPU does not wait, and which may come later still (`late.py`). If it is not
so, or stock refuses the call, nobody sees the states.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from transformers import WhisperForConditionalGeneration

from .attention import STATE
from .encoded import ENCODED
from .encoder import is_covered, start_kept

_NOT_OF_A_GRAPH = ("output_attentions", "output_hidden_states")
# Where a class has another in its place, nothing is known of what the encoder will be asked.
_STOCKS_SEGMENT = WhisperForConditionalGeneration._get_input_segment


def start_encoder(
    model: WhisperForConditionalGeneration, overridden: Mapping[str, MethodType], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Starts the encoder for a call of `generate`, if a graph covers what it will be asked; wrong arguments are left to stock.

    Args:
        overridden: the methods that `accelerate` has put on the model.
        args, kwargs: those of `generate`.
    """
    encoded, encoder = ENCODED.get(), model.model.encoder
    features = args[0] if args else kwargs.get("input_features")
    segment, state = vars(model).get("_get_input_segment"), vars(encoder).get(STATE)
    given = kwargs.get("generation_config")
    settings = model.generation_config if given is None else given
    if (
        encoded is None
        or state is None  # another's encoder
        # What is called in place of our forward pass may not ask for states that are there.
        or vars(encoder).get("forward") is not state.overridden.get("forward")
        or encoder._compiled_call_impl is not None
        or kwargs.get("encoder_outputs") is not None
        or any(kwargs.get(name) or getattr(settings, name, None) for name in _NOT_OF_A_GRAPH)
        or segment is None
        or segment is not overridden.get("_get_input_segment")
        or type(model)._get_input_segment is not _STOCKS_SEGMENT
    ):
        return
    with torch.no_grad():  # as stock, but later
        if (
            not is_covered(encoder, features, (), {})
            or torch.is_inference_mode_enabled()  # it counts no versions
            or features.is_inference()
            or encoder._forward_pre_hooks  # which may change what no version tells of
        ):
            return
        started = start_kept(encoder, features)
        if started is not None:
            graph, states = started
            encoded.keep_early(encoder, features, states, graph)


def whole_segment(
    input_features: torch.Tensor | None,
    seek: torch.Tensor,
    seek_num_frames: torch.Tensor,
    num_segment_frames: int,
    cur_bsz: int,
    batch_idx_map: list[int],
) -> torch.Tensor | None:
    """What stock's `_get_input_segment` returns, of features with which the encoder has been started, or None.

    It is a copy, as stock's: who writes into either does not change the other.
    """
    encoded = ENCODED.get()
    if encoded is None or input_features is None or input_features.shape[::2] != (cur_bsz, num_segment_frames):
        return None
    if any(seek.tolist()) or any(frames != num_segment_frames for frames in seek_num_frames.tolist()):
        return None
    return encoded.copy_of(input_features)
