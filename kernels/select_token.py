"""Picks the next token of every row from its logits, by Whisper's rules, and carries the decoding's state on: two launches.

    s = logits, -inf where a token is suppressed, always or at this length, or where timestamps may not stand:
        they come in pairs, do not decrease, the first is a timestamp of at most some index
    s = -inf for all text if  logsumexp(log_softmax(s)[timestamps]) > max(log_softmax(s)[text])
    token = argmax(s), or argmax(s / temperature + Gumbel noise), which draws from softmax(s / temperature)
    logprob = log_softmax(s)[token]

These are transformers' `SuppressTokens`, `SuppressTokensAtBegin`, `MinLength`, `MinNewTokens`, `WhisperTimeStamp` and
`Temperature` processors in the order in which Whisper's `generate` applies them, and the end of `_sample`: a row that has ended
gets the pad token. All that differs from call to call lies on the device (`TokenRules`), as does all that a step changes
(`TokenState`), so that one captured graph serves every call and no step waits for the host.

The first launch cuts text and timestamps into chunks and reduces each to (maximum, sum of exponentials, best token); the
second, a program a row, joins them: see `_choose_token.py`. Noise is Philox at the counter (token, length) under the row's own
seed: a row draws the same wherever in a batch it stands, and whatever else is there. `top_k` is `TopKLogitsWarper`, a variant
of the two launches: see `_sampling.py`.
The probability of no speech is not here: it is of the prompt's first token, once a window, and no rule of a step reads it.
Who calls it: `whisper_triton.decode_loop`. Bytes moved: B * V logits and V flags, with `top_k` 8 * B * V more in the L2.
"""

from __future__ import annotations

import torch

from ._checks import check_dtype, check_flags, check_gradients, check_kinds, check_tensors
from ._choose_token import _pick_token_kernel, _reduce_chunks_kernel
from ._dispatch import backend, fall_back, launched_on, pdl_options, triton
from ._rules import ENDS, TokenLimits, TokenRules, TokenState, apply_rules
from ._sampling import GROUP, MAX_TOP_K, gumbel_reference, keep_top_k

# Tokens a program. Of 512, 1024, 2048 and 4096 the fastest at 8 and 32 rows, at one within 0.2 us of it: measured by
# benchmarks/select_token.py on one H100 80GB HBM3, 2026-11-25.
BLOCK_V = 1024


def select_token_reference(logits: torch.Tensor, rules: TokenRules, state: TokenState, *, top_k: bool = False) -> None:
    """What `select_token` does, in PyTorch."""
    _check(logits, rules, state, top_k, is_reference=True)
    B, V = logits.shape
    limits = TokenLimits(*rules.limits.unbind())
    tokens, rows = torch.arange(V, device=logits.device), torch.arange(B, device=logits.device)
    scores = apply_rules(logits, rules, state.ids, state.lengths, state.last_timestamps)
    divided = scores / rules.temperature
    if top_k:
        divided = keep_top_k(divided, limits.top_k)
    noise = gumbel_reference(state.seeds[:, None], tokens, state.lengths[:, None])
    keys = torch.where(rules.temperature > 0, divided + noise, scores)
    chosen = keys.argmax(-1)
    left = divided * rules.temperature if top_k else scores
    logprobs = left.log_softmax(-1).gather(1, chosen[:, None])[:, 0].float()
    running = state.ends == 0
    chosen, logprobs = torch.where(running, chosen, limits.pad_token), torch.where(running, logprobs, 0.0)

    inside = (state.lengths >= 0) & (state.lengths < state.ids.shape[1])
    place = state.lengths.clamp(0, state.ids.shape[1] - 1)
    for kept, new in ((state.ids, chosen), (state.logprobs, logprobs)):
        kept[rows, place] = torch.where(inside, new, kept[rows, place])
    state.last_timestamps.copy_(torch.where(running & (chosen >= limits.timestamp_begin), chosen, state.last_timestamps))
    state.lengths.add_(1)
    done = ((rules.flags[chosen] & ENDS) != 0) | (state.lengths >= limits.max_length)
    state.ends.copy_(torch.where(running & done, state.lengths, state.ends))
    told = torch.where(running & done, limits.call << 32 | state.lengths, state.host_ends.to(logits.device))
    state.host_ends.copy_(told)
    state.next_ids.copy_(chosen[:, None])


def select_token(
    logits: torch.Tensor, rules: TokenRules, state: TokenState, *, top_k: bool = False, block_size: int = BLOCK_V
) -> None:
    """Chooses the next token of every row and writes it into `state`, in place; no value comes back to the host.

    A row that has ended gets the pad token; its length goes on. Past the last column of `ids`, and before the first,
    nothing is written there; nor read, so that a length that ran away cannot corrupt memory.

    Args:
        logits: (B, V) fp16, bf16 or fp32, contiguous; the rules' and the state's shapes and dtypes are given there. Every
            row holds at least one token, at most L, and `limits.max_length` is at most L.
        top_k: draw from the `limits.top_k` most probable tokens, 1 to MAX_TOP_K, and those that equal the last of them; the
            temperature is not 0.
        block_size: tokens a program, a power of two, at least 32.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit, or inputs that need gradients.
    """
    _check(logits, rules, state, top_k)
    check_gradients("select_token", logits, rules.temperature, state.logprobs)
    if not isinstance(block_size, int) or block_size < GROUP or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two from {GROUP} on, got {block_size!r:.50}")
    if backend(logits.device) != "reference":
        try:
            with launched_on(logits.device):
                return _launch(logits, rules, state, top_k, block_size)
        except Exception as error:  # the first launch writes nothing of `state`
            fall_back("select_token", logits.device, error)
    select_token_reference(logits, rules, state, top_k=top_k)


def _launch(logits: torch.Tensor, rules: TokenRules, state: TokenState, top_k: bool, block_size: int) -> None:
    B, V = logits.shape
    chunks = triton.cdiv(V, block_size) + 1  # the last of text may be cut short, and so may the last of timestamps
    groups = chunks * (block_size // GROUP)
    partial = torch.empty(3, B, chunks, dtype=torch.float32, device=logits.device)
    partial_tokens = torch.empty(B, chunks, dtype=torch.int32, device=logits.device)
    values = maxima = partial  # for what is neither written nor read
    order = partial_tokens
    if top_k:
        values = torch.empty(B, groups, GROUP, dtype=torch.float32, device=logits.device)
        maxima = torch.empty(B, groups, dtype=torch.float32, device=logits.device)
        order = torch.empty(B, groups, dtype=torch.int32, device=logits.device)
    shared = {
        "logits_ptr": logits,
        "temperature_ptr": rules.temperature,
        "partial_ptr": partial,
        "partial_tokens_ptr": partial_tokens,
        "values_ptr": values,
        "maxima_ptr": maxima,
        "flags_ptr": rules.flags,
        "limits_ptr": rules.limits,
        "ids_ptr": state.ids,
        "lengths_ptr": state.lengths,
        "last_timestamps_ptr": state.last_timestamps,
        "ends_ptr": state.ends,
        "seeds_ptr": state.seeds,
        "stride_ids_b": state.ids.stride(0),
        "L": state.ids.shape[1],
        "V": V,
        "TOP_K": top_k,
        "BLOCK_V": block_size,
        "GROUP": GROUP,
        **pdl_options(logits.device),
    }
    # 8 logits a thread of a chunk of 1024, 16 bytes in fp16. No timing of other numbers of warps is on record, here and below.
    _reduce_chunks_kernel[(chunks, B)](num_warps=4, **shared)
    _pick_token_kernel[(B,)](
        order_ptr=order,
        next_ids_ptr=state.next_ids,
        host_ends_ptr=state.host_ends,
        logprobs_ptr=state.logprobs,
        stride_lp_b=state.logprobs.stride(0),
        chunks=chunks,
        BLOCK_C=triton.next_power_of_2(chunks),
        BLOCK_G=triton.next_power_of_2(groups),
        MAX_TOP_K=MAX_TOP_K,
        # Without a barrier, as top_k has one, a second warp might read a row's length after the first has written the next.
        num_warps=8 if top_k else 1,
        **shared,
    )


def _check(logits: torch.Tensor, rules: TokenRules, state: TokenState, top_k: bool, is_reference: bool = False) -> None:
    check_kinds(TokenRules, rules=rules)
    check_kinds(TokenState, state=state)
    check_flags(top_k=top_k)
    check_tensors(logits=logits, **rules._asdict(), **state._asdict())
    check_dtype(logits, is_reference)
    if state.ids.dim() != 2 or state.ids.numel() == 0:
        raise ValueError(f"ids must be (B, L) and not empty, got {tuple(state.ids.shape)}")
    if logits.dim() != 2 or not logits.is_contiguous() or logits.numel() == 0:
        raise ValueError(
            f"logits must be (B, V), contiguous and not empty, got {logits.dtype} {tuple(logits.shape)} {logits.stride()}"
        )
    B, V = logits.shape
    expected = {
        "flags": (rules.flags, (V,), torch.uint8),
        "limits": (rules.limits, (len(TokenLimits._fields),), torch.int64),
        "temperature": (rules.temperature, (), torch.float32),
        "ids": (state.ids, (B, state.ids.shape[-1]), torch.int64),
        "logprobs": (state.logprobs, (B, state.ids.shape[-1]), torch.float32),
        "lengths": (state.lengths, (B,), torch.int64),
        "last_timestamps": (state.last_timestamps, (B,), torch.int64),
        "ends": (state.ends, (B,), torch.int64),
        "seeds": (state.seeds, (B,), torch.int64),
        "next_ids": (state.next_ids, (B, 1), torch.int64),
        "host_ends": (state.host_ends, (B,), torch.int64),
    }
    for name, (tensor, shape, dtype) in expected.items():
        is_reached = tensor.device == logits.device or (name == "host_ends" and tensor.is_pinned())
        if tensor.shape != shape or tensor.dtype != dtype or not is_reached:
            found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} must be {dtype} {shape} on {logits.device} for logits {(B, V)}, got {found}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
