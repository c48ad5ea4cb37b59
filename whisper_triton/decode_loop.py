"""The decoding loop of `generate` with nothing to wait for from token to token: `custom_generate` of an accelerated model.

The prompt's forward pass is the model's own. After it each token is one replay of a graph that decodes a token and has
`select_token` choose the next, which lies where the next replay reads it. The host only counts replays, and looks every few of
them, one behind, whether all rows have ended; what was decoded beyond the end is dropped. Whatever is not covered, by the loop
here or by the rules in `token_rules.py`, is decoded by stock's own loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, WhisperForConditionalGeneration
from transformers.generation.logits_process import WhisperNoSpeechDetection
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerateEncoderDecoderOutput

from .attention import report_once
from .cache import CACHE_NAME
from .decoder import DecoderStep
from .kernels import select_token
from .kernels._rules import TokenState, apply_rules
from .kernels._sampling import keep_top_k
from .late import are_put_off, end_lateness, take_late_looks
from .streams import RandomStreams
from .token_rules import NotCovered, Settings, allocate_rules, read_settings, write_rules

ROWS_AT_ONCE = 64  # whose scores are computed together, after the last token
# Replays from one look at the rows' ends to the next: what is decoded between an end and the look that finds it is for nothing.
# A look takes the host some 10 us, which a step of a large decoder hides and one of a small decoder hardly does.
LOOK_EVERY = 4
LARGE = 512 << 20  # bytes of a decoder whose ends are looked for at every replay: medium's, large-v3's, not turbo's
# Replays that are queued before late looks at the model are taken, of a large decoder and of a small one: some 2 ms of the
# GPU's work, which is what they keep a slow host for (benchmarks/NOTES.md, generate, 23). Ends within them are found no sooner.
QUEUED_FIRST_OF_LARGE, QUEUED_FIRST = 4, 16
STOCKS_LOOP = "tokens are chosen in stock's loop"  # what is logged, before the reason

# What `generate` may pass to the forward passes, with the values that a replay covers. The attention mask is of the encoder's
# frames, which Whisper ignores.
_TENSORS = (CACHE_NAME, "encoder_outputs", "attention_mask", "decoder_attention_mask")
_ARGUMENTS = {
    "use_cache": (True,),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
}


class Logprobs(torch.Tensor):
    """The log-probabilities of a window's new tokens (B, T), in place of the scores from which stock would compute them.

    For its threshold stock takes the scores of all steps to the host and back, 200 KB a token.
    """


def mean_logprob(scores: Sequence[Logprobs], tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """What stock's `_retrieve_avg_logprobs` makes of all scores of a row: the mean, 0-dim, over its `tokens`.

    Args:
        scores: one tensor (T,). tokens: at most T. temperature: which log-probabilities are without; None, which stock cannot
            compare with 0, too.
    """
    return scores[0].as_subclass(torch.Tensor)[: len(tokens)].mean()


class TokenSelection:
    """The rules and the state of one batch size's decoding, at addresses that a graph can hold.

    Args:
        batch_size: B.
        max_length: the most tokens of a row, prompt included.
    """

    def __init__(self, batch_size: int, max_length: int, vocabulary_size: int, device: torch.device) -> None:
        B = batch_size
        # What is kept from call to call must not be an inference tensor, which only inference mode may write again.
        with torch.inference_mode(False):
            lengths, last_timestamps, ends = (torch.zeros(B, dtype=torch.int64, device=device) for _ in range(3))
            ids = torch.zeros(B, max_length, dtype=torch.int64, device=device)
            logprobs = torch.zeros(B, max_length, device=device)
            seeds, next_ids = torch.zeros_like(ends), torch.zeros_like(ends)[:, None]
            # The kernel writes where rows end into the host's own memory: nothing is copied.
            host_ends = torch.zeros(B, dtype=torch.int64, pin_memory=device.type == "cuda")
            self.state = TokenState(ids, logprobs, lengths, last_timestamps, ends, seeds, next_ids, host_ends)
            self.rules = allocate_rules(vocabulary_size, device)
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._call = 0
        self.top_k = 0  # of this call; 0: all tokens

    def begin(
        self, prompt: torch.Tensor, settings: Settings, pad_token: torch.Tensor | None, seeds: torch.Tensor | None = None
    ) -> None:
        """Starts over with `prompt` (B, T) and a call's rules; where it samples, with the rows' seeds (B,) int64."""
        # What a call that was interrupted still writes into the host's memory is told from this one's by its number.
        self._call = (self._call + 1) % (1 << 31)
        self.top_k = settings.limits.top_k
        settings = settings._replace(limits=settings.limits._replace(call=self._call))
        write_rules(settings, pad_token, self.rules)
        self.state.ids[:, : prompt.shape[1]] = prompt
        self.state.lengths.fill_(prompt.shape[1])
        if seeds is not None:
            self.state.seeds.copy_(seeds)
        for tensor in (self.state.last_timestamps, self.state.ends):
            tensor.zero_()

    def __call__(self, logits: torch.Tensor) -> None:
        """Chooses from logits (B, V)."""
        select_token(logits, self.rules, self.state, top_k=self.top_k > 0)

    def look(self) -> None:
        """Marks what `ends` waits for."""
        if self._event is not None:
            self._event.record()

    def ends(self) -> list[int]:
        """A row's length at its end, 0 where it went on when `look` was called last: or 0 no more, if it has ended since."""
        if self._event is not None:
            self._event.synchronize()
        return [end & 0xFFFFFFFF if end >> 32 == self._call else 0 for end in self.state.host_ends.tolist()]

    def scores(self, logits: list[torch.Tensor], prompt_length: int) -> tuple[torch.Tensor, ...]:
        """What stock's processors made of the logits (B, V) of each step, the first of which chose token `prompt_length`."""
        steps, B = len(logits), logits[0].shape[0]
        new = self.state.ids[:, prompt_length : prompt_length + steps]
        order = torch.arange(1, steps + 1, device=new.device)
        # Of each step the newest timestamp before it: its place counted from 1, 0 for none.
        place = torch.where(new >= self.rules.limits[4], order, 0).cummax(1).values.roll(1, 1)
        place[:, 0] = 0
        newest = torch.where(place > 0, new.gather(1, (place - 1).clamp(min=0)), 0).T
        lengths = (order - 1 + prompt_length)[:, None].expand(steps, B)
        scores: list[torch.Tensor] = []
        width = max(1, ROWS_AT_ONCE // B)
        for first in range(0, steps, width):
            some = slice(first, first + width)
            rows = torch.cat(logits[some])
            ids = self.state.ids.repeat(rows.shape[0] // B, 1)
            some_scores = apply_rules(rows, self.rules, ids, lengths[some].flatten(), newest[some].flatten())
            some_scores = torch.where(self.rules.temperature > 0, some_scores / self.rules.temperature, some_scores)
            if self.top_k:
                some_scores = keep_top_k(some_scores, self.top_k)
            scores += some_scores.split(B)
        return tuple(scores)


def run_until_ended(
    advance: Callable[[], object],
    selection: TokenSelection,
    steps: int,
    look_every: int = LOOK_EVERY,
    first: int = 0,
    meanwhile: Callable[[], object] = lambda: None,
) -> int:
    """Calls `advance` until all rows have ended, up to `look_every` times more than needed, at most `steps` times; returns the
    greatest length.

    The first `first` times nobody looks for ends, which may be so many more than needed; then `meanwhile` is called, with all
    of them queued.

    After `steps` of them all rows must have ended. What a look waits for has always a newer step queued behind it: the device
    goes on meanwhile, and the host, which queues a step in microseconds, is never more than `look_every` + 1 of them ahead, or
    `first`.
    To ask the event without waiting for it would only let the host run on, and queue what nobody needs.
    """
    for i in range(steps):
        looks = i >= first and i % look_every == 0
        if looks:
            selection.look()
        advance()
        if i + 1 == first:
            meanwhile()
        # Only now, and for the step before: the device has this one to run meanwhile.
        if looks and all(selection.ends()):
            break
    else:
        if steps < first:
            meanwhile()
        selection.look()
    return max(selection.ends())


def decode(
    model: WhisperForConditionalGeneration,
    step: DecoderStep | None,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    returns_tokens: bool,
    streams: RandomStreams,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateEncoderDecoderOutput:
    """What stock's loop returns for the same arguments: ids (B, T), or with `return_dict_in_generate` all that is asked for.

    Args:
        step: captured for this call, or None. input_ids: (B, T), the prompt.
        returns_tokens: nobody sees more than the tokens. Scores are then `Logprobs`, for a threshold, and nothing else is kept.
        streams: of the call, where rows that are sampled have their seeds from.
    """
    settings, heard = None, streams.next_attempt()
    # Why there is no step, or another cache than the step's, was said when the cache was chosen.
    if step is not None and model_kwargs.get(CACHE_NAME) is step.cache:
        try:
            settings = _settings(model, step, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        except NotCovered as reason:
            report_once(f"{STOCKS_LOOP}: {reason}")
    if settings is None:
        end_lateness()
        loop = getattr(type(model), GENERATION_MODES_MAPPING[generation_config.get_generation_mode()])
        return loop(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )
    if step.selection is None:
        step.selection = TokenSelection(
            input_ids.shape[0], model.config.max_target_positions, model.proj_out.out_features, input_ids.device
        )
    selection = step.selection
    prompt_logits = model._prefill(input_ids, generation_config, model_kwargs).logits
    logits = prompt_logits[:, -1].contiguous()
    detect_no_speech(model, step, logits_processor, input_ids, prompt_logits)
    selection.top_k = settings.limits.top_k
    # Without a pad token stock counts the end tokens that fill up a row as its own, with their log-probabilities.
    returns_tokens = returns_tokens and generation_config.pad_token_id is not None
    # What `return_dict_in_generate` hands out is stock's for rows that have ended too: scores, logits, the cache.
    hands_out = bool(generation_config.return_dict_in_generate) and not returns_tokens
    prompt_length = input_ids.shape[1]
    steps = settings.limits.max_length - prompt_length - 1
    # Captured before the rules are written, which a capture changes. Without any step there may be no slot left for one.
    advance = step.advance(model, selection, decodes_ended=hands_out) if steps > 0 else lambda: logits
    seeds = None
    if settings.temperature > 0.0:
        take_late_looks()  # before a number is drawn from PyTorch's generator, which a call made anew would draw again
        seeds = streams.seeds(heard, model_kwargs["encoder_outputs"][0])
    selection.begin(input_ids, settings, generation_config._pad_token_tensor, seeds)
    selection(logits)
    wants_scores = hands_out and generation_config.output_scores
    wants_logits = hands_out and generation_config.output_logits
    kept = [logits]
    run = (lambda: kept.append(advance().clone())) if wants_scores or wants_logits else advance
    is_large = step.weight_bytes >= LARGE
    look_every, first = (1, QUEUED_FIRST_OF_LARGE) if is_large else (LOOK_EVERY, QUEUED_FIRST)
    length = run_until_ended(run, selection, steps, look_every, first if are_put_off() else 0, take_late_looks)
    step.rewind(length - 1)  # the last token of all is not in the cache
    ids, kept = selection.state.ids[:, :length].clone(), kept[: length - prompt_length]
    if generation_config.return_dict_in_generate and returns_tokens:
        logprobs = selection.state.logprobs[:, prompt_length:length].cpu()  # in one copy; stock makes one a row, and a step
        return GenerateEncoderDecoderOutput(sequences=ids, scores=(logprobs.as_subclass(Logprobs),))
    if hands_out:
        return GenerateEncoderDecoderOutput(
            sequences=ids,
            scores=selection.scores(kept, prompt_length) if wants_scores else None,
            logits=tuple(one.to(torch.float32, copy=True) for one in kept) if wants_logits else None,
            **{CACHE_NAME: step.cache},
        )
    return ids


def detect_no_speech(
    model: WhisperForConditionalGeneration,
    step: DecoderStep,
    processors: LogitsProcessorList,
    input_ids: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    """What stock's detector, if it is among the processors, does at the first token, without its second pass over the prompt.

    Args:
        input_ids: (B, T), the prompt. logits: (B, T, V) of its tokens, or (B, 1, V) of the last alone, from `step`.
    """
    kinds = [type(processor) for processor in processors]
    if WhisperNoSpeechDetection not in kinds:
        return
    detector, (B, T) = processors[kinds.index(WhisperNoSpeechDetection)], input_ids.shape
    # The prompt's token at which Whisper tells speech from none: where the transcript starts, after what comes before it.
    index, at_start = detector.begin_index - detector.start_of_trans_offset, None
    if detector.start_of_trans_offset > 1 and detector.model is model and index >= 0:
        if detector.inputs["input_features"].shape[0] != B:
            return  # at a temperature for some rows alone; it has found all rows' before, and would find them again
        at_start = logits[:, index] if logits.shape[1] == T else step.logits_at(model, T, index)
    if at_start is None:
        LogitsProcessorList(processors[: kinds.index(WhisperNoSpeechDetection) + 1])(input_ids, logits[:, -1].float())
    else:
        detector._no_speech_prob = at_start.float().softmax(-1)[:, detector.no_speech_token]


def _settings(
    model: WhisperForConditionalGeneration,
    step: DecoderStep,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> Settings:
    """The rules for the loop above; raises NotCovered, whose reason is logged once: it names no sizes of the call."""
    if GENERATION_MODES_MAPPING[generation_config.get_generation_mode()] != "_sample":
        raise NotCovered("a search over beams")
    if input_ids.shape[0] != step.encoder_states.shape[0] or input_ids.device != step.encoder_states.device:
        raise NotCovered("input ids of another batch size, or on another device, than the encoder's states")
    if model.config.output_attentions or model.config.output_hidden_states:
        raise NotCovered("attentions or hidden states are asked for")
    for name, value in model_kwargs.items():
        if name not in _TENSORS and not any(value is allowed for allowed in _ARGUMENTS.get(name, (None,))):
            raise NotCovered(f"{name} is given")
    settings = read_settings(
        logits_processor, stopping_criteria, generation_config, input_ids.shape[1], model.proj_out.out_features
    )
    if not input_ids.shape[1] < settings.limits.max_length <= model.config.max_target_positions:
        raise NotCovered("a prompt that leaves no token to choose, or more tokens than the model has positions for")
    mask = model_kwargs.get("decoder_attention_mask")
    if mask is not None and not mask.all():  # waits for the device, once a window
        raise NotCovered("a padded prompt")
    return settings
