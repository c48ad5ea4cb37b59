"""What `select_token` is told of a call's rules and of the tokens so far, and what the rules make of logits, in PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Bits of a token's flags.
SUPPRESSED, SUPPRESSED_AT_BEGIN, SUPPRESSED_UNTIL_MIN_LENGTH, ENDS = FLAGS = 1, 2, 4, 8
NEVER = (1 << 31) - 1  # a length, or a token, that is never reached


class TokenLimits(NamedTuple):
    """The numbers among a call's rules. Lengths count a row's prompt too."""

    max_length: int  # at which a row ends
    pad_token: int
    begin_length: int = NEVER  # at which SUPPRESSED_AT_BEGIN holds
    min_length: int = 0  # below which SUPPRESSED_UNTIL_MIN_LENGTH holds
    timestamp_begin: int = NEVER  # the first timestamp; NEVER: no rule for timestamps
    timestamp_length: int = NEVER  # of the prompt: where a first timestamp stands
    last_initial_timestamp: int = NEVER  # the greatest token there
    end_of_text: int = 0  # tokens below it may not follow an opening timestamp
    prefer_timestamps: int = 0  # 1: all timestamps together are compared with the best text token
    top_k: int = 0  # for `select_token(..., top_k=True)`: tokens below the k-th most probable are not drawn
    call: int = 0  # less than 2 ** 31, stands beside what `host_ends` is told


class TokenRules(NamedTuple):
    """A call's rules on the device, read by each step."""

    flags: torch.Tensor  # (V,) uint8, the bits above
    limits: torch.Tensor  # (11,) int64, a TokenLimits
    temperature: torch.Tensor  # () fp32, 0 is greedy


class TokenState(NamedTuple):
    """What a step reads and changes, on the device."""

    ids: torch.Tensor  # (B, L) int64, a row's tokens up to its length
    # (B, L) fp32, of each token that was chosen its log-probability among those that the rules, and `top_k`, left, as
    # transformers computes it for its `logprob_threshold`: without the temperature. 0 of pads.
    logprobs: torch.Tensor
    lengths: torch.Tensor  # (B,) int64
    last_timestamps: torch.Tensor  # (B,) int64, a row's newest timestamp, 0 if it has none
    ends: torch.Tensor  # (B,) int64, the length at which a row ended, 0 while it goes on
    seeds: torch.Tensor  # (B,) int64, of a row's random numbers: different rows draw alike if theirs are equal; never written
    next_ids: torch.Tensor  # (B, 1) int64, the tokens chosen last
    # (B,) int64, the call in the high half and `ends` in the low one, written when a row ends and never before. It may lie in
    # pinned memory of the host: what the host reads after an event is what was written before it, or later.
    host_ends: torch.Tensor


def apply_rules(
    logits: torch.Tensor, rules: TokenRules, ids: torch.Tensor, lengths: torch.Tensor, last_timestamps: torch.Tensor
) -> torch.Tensor:
    """The scores (B, V) that the stock processors make of `logits`, the temperature aside; fp32, float64 for float64.

    Args:
        ids, lengths, last_timestamps: as in `TokenState`.
    """
    limits = TokenLimits(*rules.limits.unbind())
    tokens = torch.arange(logits.shape[1], device=logits.device)
    lengths, newest = lengths[:, None], last_timestamps[:, None]
    is_timestamp = tokens >= limits.timestamp_begin

    active = SUPPRESSED + SUPPRESSED_AT_BEGIN * (lengths == limits.begin_length).long()
    active = active + SUPPRESSED_UNTIL_MIN_LENGTH * (lengths < limits.min_length).long()
    banned = (rules.flags & active) != 0
    L = ids.shape[1]
    places = ((lengths - i).where((lengths >= i) & (lengths <= L), -1) for i in (1, 2))
    last, before = (ids.gather(1, place.clamp(min=0)).where(place >= 0, 0) for place in places)
    new = lengths - limits.timestamp_length
    after_timestamp = (new >= 1) & (last >= limits.timestamp_begin)
    after_pair = after_timestamp & ((new < 2) | (before >= limits.timestamp_begin))
    after_opening = after_timestamp & ~after_pair
    floor = torch.where(newest > 0, newest + (~after_opening).long(), limits.timestamp_begin)
    banned |= is_timestamp & (after_pair | (tokens < floor))
    banned |= after_opening & (tokens < limits.end_of_text)
    banned |= (new == 0) & (~is_timestamp | (tokens > limits.last_initial_timestamp))
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(banned, -torch.inf)

    logprobs = torch.log_softmax(scores, -1)
    timestamps = logprobs.masked_fill(~is_timestamp, -torch.inf).logsumexp(-1)
    text = logprobs.masked_fill(is_timestamp, -torch.inf).amax(-1)
    prefer = (limits.prefer_timestamps != 0) & (timestamps > text)
    return scores.masked_fill(prefer[:, None] & ~is_timestamp, -torch.inf)
