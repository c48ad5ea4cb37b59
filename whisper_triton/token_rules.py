"""What `generate` has set up for the choice of tokens, as the device-side rules of `select_token`.

Stock transformers applies a list of logits processors to the scores and asks a list of stopping criteria. `read_settings`
knows those that Whisper's own options bring, by their exact class, and their order; anything else, a user's own above all, is
not covered, and the reason says so. `write_rules` puts the settings where a captured step reads them, without waiting for
the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    WhisperTimeStampLogitsProcessor,
)
from transformers.generation.logits_process import WhisperNoSpeechDetection
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from .kernels._rules import (
    ENDS,
    FLAGS,
    SUPPRESSED,
    SUPPRESSED_AT_BEGIN,
    SUPPRESSED_UNTIL_MIN_LENGTH,
    TokenLimits,
    TokenRules,
)
from .kernels._sampling import MAX_TOP_K


class NotCovered(Exception):
    """The reason why a call's tokens cannot be chosen by `select_token`."""


class Settings(NamedTuple):
    """A call's rules, as far as the host knows them: token ids stay on the device, where stock has put them."""

    tokens: tuple[tuple[int, torch.Tensor], ...]  # (flag, the ids that have it)
    no_timestamps: int | None  # suppressed, where there are rules for timestamps
    limits: TokenLimits  # without pad token
    temperature: float


def read_settings(
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    prompt_length: int,
    vocabulary_size: int,
) -> Settings:
    """What the lists that `generate` hands to its decoding loop ask for.

    Raises:
        NotCovered: something that the kernel does not do.
    """
    tokens: list[tuple[int, torch.Tensor]] = []
    limits: dict[str, int] = {"pad_token": 0}
    temperature = 1.0 if generation_config.do_sample else 0.0
    no_timestamps = None
    seen: list[type] = []
    for processor in processors:
        kind = type(processor)
        # What suppresses tokens may come in any order, but only before it can the timestamps' rule weigh what is left.
        is_warper = kind in (TemperatureLogitsWarper, TopKLogitsWarper)
        if kind in seen or (WhisperTimeStampLogitsProcessor in seen and not is_warper):
            raise NotCovered(f"{kind.__name__} a second time, or after the rules for timestamps")
        if TopKLogitsWarper in seen or (TemperatureLogitsWarper in seen and kind is not TopKLogitsWarper):
            raise NotCovered(f"{kind.__name__} after the temperature or top-k")
        seen.append(kind)
        if kind is SuppressTokensLogitsProcessor:
            tokens.append((SUPPRESSED, processor.suppress_tokens))
        elif kind is SuppressTokensAtBeginLogitsProcessor:
            tokens.append((SUPPRESSED_AT_BEGIN, processor.begin_suppress_tokens))
            limits["begin_length"] = processor.begin_index
        elif kind is MinLengthLogitsProcessor or kind is MinNewTokensLengthLogitsProcessor:
            _add_min_length(processor, tokens, limits)
        elif kind is WhisperTimeStampLogitsProcessor:
            limits |= _timestamp_limits(processor, prompt_length, vocabulary_size)
            no_timestamps = processor.no_timestamps_token_id
        elif kind is WhisperNoSpeechDetection and processor.begin_index == prompt_length:
            pass  # it looks at the first scores and leaves them as they are
        elif kind is TemperatureLogitsWarper and generation_config.do_sample:
            temperature = processor.temperature
        elif kind is TopKLogitsWarper and generation_config.do_sample:
            if processor.top_k > MAX_TOP_K or processor.filter_value != -torch.inf:
                raise NotCovered(f"{kind.__name__} of {processor.top_k}, to {processor.filter_value}")
            limits["top_k"] = processor.top_k
        else:
            raise NotCovered(kind.__name__)
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            limits["max_length"] = min(criterion.max_length, limits.get("max_length", criterion.max_length))
        elif type(criterion) is EosTokenCriteria:
            tokens.append((ENDS, criterion.eos_token_id))
        else:
            raise NotCovered(type(criterion).__name__)
    if "max_length" not in limits:
        raise NotCovered("no greatest length")
    return Settings(tuple(tokens), no_timestamps, TokenLimits(**limits), temperature)


def _add_min_length(
    processor: MinLengthLogitsProcessor | MinNewTokensLengthLogitsProcessor,
    tokens: list[tuple[int, torch.Tensor]],
    limits: dict[str, int],
) -> None:
    if type(processor) is MinLengthLogitsProcessor:
        min_length = processor.min_length
    else:
        min_length = processor.prompt_length_to_skip + processor.min_new_tokens
    before = [ids for flag, ids in tokens if flag == SUPPRESSED_UNTIL_MIN_LENGTH]
    if before and before[0] is not processor.eos_token_id:
        raise NotCovered("two least lengths for different tokens")
    if not before:
        tokens.append((SUPPRESSED_UNTIL_MIN_LENGTH, processor.eos_token_id))
    limits["min_length"] = max(min_length, limits.get("min_length", 0))


def _timestamp_limits(processor: WhisperTimeStampLogitsProcessor, prompt_length: int, vocabulary_size: int) -> dict[str, int]:
    if processor.begin_index != prompt_length:
        raise NotCovered("timestamps that do not begin where the prompt ends")
    end_of_text, no_timestamps = processor.eos_token_id, processor.no_timestamps_token_id
    if not isinstance(end_of_text, int) or not 0 <= end_of_text <= no_timestamps < vocabulary_size:
        raise NotCovered(f"text below {end_of_text}, timestamps after {no_timestamps}")
    limits = {
        "timestamp_begin": processor.timestamp_begin,
        "timestamp_length": processor.begin_index,
        "end_of_text": end_of_text,
        "prefer_timestamps": int(bool(processor._detect_timestamp_from_logprob)),
    }
    if processor.max_initial_timestamp_index is not None:
        limits["last_initial_timestamp"] = processor.timestamp_begin + processor.max_initial_timestamp_index
    return limits


def allocate_rules(vocabulary_size: int, device: torch.device) -> TokenRules:
    """Rules for `write_rules` to fill."""
    return TokenRules(
        torch.zeros(vocabulary_size, dtype=torch.uint8, device=device),
        torch.zeros(len(TokenLimits._fields), dtype=torch.int64, device=device),
        torch.zeros((), dtype=torch.float32, device=device),
    )


def write_rules(settings: Settings, pad_token: torch.Tensor | None, rules: TokenRules) -> None:
    """Fills `rules`, in place.

    Args:
        pad_token: 0-dim or (1,) on the device; None where no row can end before the others.
    """
    vocabulary_size, device = rules.flags.shape[0], rules.flags.device
    # A row for each flag, with a column before and one after the vocabulary: stock takes no notice of ids beyond it.
    marks = torch.zeros(len(FLAGS), vocabulary_size + 2, dtype=torch.uint8, device=device)
    tokens, flags = [ids.to(device, torch.int64).flatten() for _, ids in settings.tokens], []
    for (flag, _), ids in zip(settings.tokens, tokens, strict=True):
        flags += [flag] * ids.numel()
    if settings.no_timestamps is not None:
        flags.append(SUPPRESSED)
    starts = [FLAGS.index(flag) * marks.shape[1] + 1 for flag in flags]
    # All that the host knows, in one copy.
    parts = [[*settings.limits], starts, flags, [settings.no_timestamps or 0]]
    host = torch.tensor([number for part in parts for number in part], dtype=torch.int64, pin_memory=device.type == "cuda")
    limits, starts, flags, no_timestamps = host.to(device, non_blocking=True).split([len(part) for part in parts])
    if settings.no_timestamps is not None:
        tokens.append(no_timestamps)
    if tokens:
        places = torch.cat(tokens).clamp(-1, vocabulary_size) + starts
        marks.view(-1).scatter_(0, places, flags.to(torch.uint8))
    rules.flags.copy_(marks.sum(0, dtype=torch.uint8)[1:-1])
    rules.limits.copy_(limits)
    if pad_token is not None:
        rules.limits[TokenLimits._fields.index("pad_token")].copy_(pad_token.view(()))
    rules.temperature.fill_(settings.temperature)
