"""The two launches of `select_token`: scores of chunks of the vocabulary, reduced, and a program a row that joins them."""

from __future__ import annotations

from . import _rules
from ._dispatch import pdl_handover, tl, triton
from ._rules import TokenLimits
from ._sampling import draw_from_top_k, gumbel


def _place_of(limit: str) -> tl.constexpr:
    """Where it lies in `limits`. Of a module's globals Triton reads only what is a `tl.constexpr`."""
    return tl.constexpr(TokenLimits._fields.index(limit))


AT_MAX_LENGTH = _place_of("max_length")
AT_PAD_TOKEN = _place_of("pad_token")
AT_BEGIN_LENGTH = _place_of("begin_length")
AT_MIN_LENGTH = _place_of("min_length")
AT_TIMESTAMP_BEGIN = _place_of("timestamp_begin")
AT_TIMESTAMP_LENGTH = _place_of("timestamp_length")
AT_LAST_INITIAL_TIMESTAMP = _place_of("last_initial_timestamp")
AT_END_OF_TEXT = _place_of("end_of_text")
AT_PREFER_TIMESTAMPS = _place_of("prefer_timestamps")
AT_TOP_K = _place_of("top_k")
AT_CALL = _place_of("call")

SUPPRESSED = tl.constexpr(_rules.SUPPRESSED)
SUPPRESSED_AT_BEGIN = tl.constexpr(_rules.SUPPRESSED_AT_BEGIN)
SUPPRESSED_UNTIL_MIN_LENGTH = tl.constexpr(_rules.SUPPRESSED_UNTIL_MIN_LENGTH)
ENDS = tl.constexpr(_rules.ENDS)


@triton.jit
def _reduce_chunks_kernel(
    logits_ptr,  # (B, V) fp16/bf16/fp32
    flags_ptr,  # (V,) uint8
    limits_ptr,  # (11,) int64, a TokenLimits
    temperature_ptr,  # () fp32
    ids_ptr,  # (B, L) int64
    lengths_ptr,  # (B,) int64
    last_timestamps_ptr,  # (B,) int64
    ends_ptr,  # (B,) int64
    seeds_ptr,  # (B,) int64
    partial_ptr,  # (3, B, chunks) fp32: maximum, sum of exponentials below it, best key
    partial_tokens_ptr,  # (B, chunks) int32: the best key's token
    values_ptr,  # (B, chunks, BLOCK_V) fp32, with TOP_K: scores by temperature
    maxima_ptr,  # (B, chunks, BLOCK_V / GROUP) fp32, with TOP_K
    stride_ids_b,
    L,
    V,
    USE_PDL: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
):
    pdl_handover(USE_PDL)
    i_chunk, i_b = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths_ptr + i_b).to(tl.int32)
    running = tl.load(ends_ptr + i_b) == 0
    begin_length = tl.load(limits_ptr + AT_BEGIN_LENGTH).to(tl.int32)
    min_length = tl.load(limits_ptr + AT_MIN_LENGTH).to(tl.int32)
    timestamp_begin = tl.load(limits_ptr + AT_TIMESTAMP_BEGIN).to(tl.int32)
    new = length - tl.load(limits_ptr + AT_TIMESTAMP_LENGTH).to(tl.int32)
    last_initial = tl.load(limits_ptr + AT_LAST_INITIAL_TIMESTAMP).to(tl.int32)
    end_of_text = tl.load(limits_ptr + AT_END_OF_TEXT).to(tl.int32)
    newest = tl.load(last_timestamps_ptr + i_b).to(tl.int32)
    temperature = tl.load(temperature_ptr)
    row_ptr = ids_ptr + i_b * stride_ids_b + length
    # A length that ran away, past the last column or below none, reads nothing.
    last = tl.load(row_ptr - 1, mask=running & (length >= 1) & (length <= L), other=0).to(tl.int32)
    before = tl.load(row_ptr - 2, mask=running & (length >= 2) & (length <= L), other=0).to(tl.int32)

    # A chunk is of text or of timestamps, never of both.
    end = tl.minimum(timestamp_begin, V)
    text_chunks = tl.cdiv(end, BLOCK_V)
    is_text = i_chunk < text_chunks
    start = tl.where(is_text, i_chunk * BLOCK_V, end + (i_chunk - text_chunks) * BLOCK_V)
    offs = start + tl.arange(0, BLOCK_V)
    mask = (offs < tl.where(is_text, end, V)) & running  # of a row that has ended nothing is read
    s = tl.load(logits_ptr + i_b.to(tl.int64) * V + offs, mask=mask, other=float("-inf")).to(tl.float32)
    flags = tl.load(flags_ptr + offs, mask=mask, other=SUPPRESSED).to(tl.int32)

    active = tl.where(length == begin_length, SUPPRESSED_AT_BEGIN, 0) + SUPPRESSED
    active += tl.where(length < min_length, SUPPRESSED_UNTIL_MIN_LENGTH, 0)
    after_timestamp = (new >= 1) & (last >= timestamp_begin)
    is_pair = (new < 2) | (before >= timestamp_begin)
    after_opening = after_timestamp & (is_pair == 0)
    # Tokens from `low` to `high` are left: of text those that may stand here, of timestamps those that are not in the past.
    floor = tl.where(newest > 0, newest + tl.where(after_opening, 0, 1), timestamp_begin)
    low = tl.where(is_text, tl.where(after_opening, end_of_text, 0), floor)
    high = tl.where((new == 0) & (is_text == 0), last_initial, V)
    none = tl.where(is_text, new == 0, after_timestamp & is_pair)
    banned = ((flags & active) != 0) | (offs < low) | (offs > high) | none
    # PyTorch's argmax takes a NaN for the greatest, beyond infinity.
    is_number = s == s
    s = tl.where(banned, float("-inf"), tl.where(is_number, s, float("inf")))

    m = tl.max(s, axis=0)
    p = tl.where(banned, 0.0, tl.exp(s - m))
    key = tl.where(is_number, tl.minimum(s, 3.4028234663852886e38), s)
    chunks, rows = tl.num_programs(0), tl.num_programs(1)
    if TOP_K:
        # Rounded as PyTorch does, and not approximately: values that are equal there are kept together.
        x = tl.where(banned, float("-inf"), tl.div_rn(s, temperature))
        i_partial = i_b.to(tl.int64) * chunks + i_chunk
        tl.store(values_ptr + i_partial * BLOCK_V + tl.arange(0, BLOCK_V), x)
        maxima = tl.max(tl.reshape(x, (BLOCK_V // GROUP, GROUP)), axis=1)
        tl.store(maxima_ptr + i_partial * (BLOCK_V // GROUP) + tl.arange(0, BLOCK_V // GROUP), maxima)
    elif temperature > 0:
        key = s / temperature + gumbel(tl.load(seeds_ptr + i_b), offs, length)
    best, i_best = tl.max(key, axis=0, return_indices=True)

    partial_ptr += i_b * chunks + i_chunk
    tl.store(partial_ptr, m)
    tl.store(partial_ptr + rows * chunks, tl.sum(p, axis=0))
    tl.store(partial_ptr + 2 * rows * chunks, best)
    tl.store(partial_tokens_ptr + i_b * chunks + i_chunk, start + i_best)


@triton.jit
def join_chunks(mask, m_c, l_c, key_c, token_c):
    """Maximum, sum of exponentials below it, best key and its token, over the chunks in `mask`."""
    m_c = tl.where(mask, m_c, float("-inf"))
    m = tl.max(m_c, axis=0)
    l = tl.sum(tl.where(m_c == float("-inf"), 0.0, l_c * tl.exp(m_c - m)), axis=0)
    key, i_best = tl.max(tl.where(mask, key_c, float("-inf")), axis=0, return_indices=True)  # the first, as PyTorch's argmax
    token = tl.sum(tl.where(tl.arange(0, token_c.shape[0]) == i_best, token_c, 0), axis=0)
    return m, l, key, token


@triton.jit
def _pick_token_kernel(
    logits_ptr,  # (B, V) fp16/bf16/fp32
    temperature_ptr,  # () fp32
    partial_ptr,  # as above
    partial_tokens_ptr,
    values_ptr,
    maxima_ptr,
    order_ptr,  # (B, chunks, BLOCK_V / GROUP) int32, with TOP_K
    flags_ptr,  # (V,) uint8
    limits_ptr,  # (11,) int64, a TokenLimits
    seeds_ptr,  # (B,) int64
    ids_ptr,  # (B, L) int64, this and all below in place
    lengths_ptr,  # (B,) int64
    last_timestamps_ptr,  # (B,) int64
    ends_ptr,  # (B,) int64
    next_ids_ptr,  # (B, 1) int64
    host_ends_ptr,  # (B,) int64
    logprobs_ptr,  # (B, L) fp32
    stride_ids_b,
    stride_lp_b,
    L,
    V,
    chunks,
    USE_PDL: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_TOP_K: tl.constexpr,
):
    pdl_handover(USE_PDL)
    i_b = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    mask = offs_c < chunks
    rows = tl.num_programs(0)
    partial_ptr += i_b * chunks + offs_c
    m_c = tl.load(partial_ptr, mask=mask, other=float("-inf"))
    l_c = tl.load(partial_ptr + rows * chunks, mask=mask, other=0.0)
    key_c = tl.load(partial_ptr + 2 * rows * chunks, mask=mask, other=float("-inf"))
    token_c = tl.load(partial_tokens_ptr + i_b * chunks + offs_c, mask=mask, other=0)
    length = tl.load(lengths_ptr + i_b)
    end = tl.load(ends_ptr + i_b)
    max_length, pad_token = tl.load(limits_ptr + AT_MAX_LENGTH), tl.load(limits_ptr + AT_PAD_TOKEN)
    timestamp_begin = tl.load(limits_ptr + AT_TIMESTAMP_BEGIN)
    call = tl.load(limits_ptr + AT_CALL)

    is_text = offs_c < tl.cdiv(tl.minimum(timestamp_begin.to(tl.int32), V), BLOCK_V)
    m_text, l_text, key_text, text = join_chunks(is_text, m_c, l_c, key_c, token_c)
    m_time, l_time, key_time, time = join_chunks(is_text == 0, m_c, l_c, key_c, token_c)
    # Subtracted in the order of log_softmax, so that what is equal there is equal here.
    m = tl.maximum(m_text, m_time)
    l = tl.where(m_text == float("-inf"), 0.0, l_text * tl.exp(m_text - m))
    l += tl.where(m_time == float("-inf"), 0.0, l_time * tl.exp(m_time - m))
    log_l, log_time = tl.log(l), tl.log(l_time)
    prefer = (tl.load(limits_ptr + AT_PREFER_TIMESTAMPS) != 0) & (m_time - m - log_l + log_time > m_text - m - log_l)
    running = end == 0
    is_time = prefer | (key_time > key_text)
    chosen = tl.where(is_time, time, text)
    temperature = tl.load(temperature_ptr)
    if TOP_K:
        groups = chunks * (BLOCK_V // GROUP)
        text_end = tl.minimum(timestamp_begin.to(tl.int32), V)
        text_groups = tl.cdiv(text_end, BLOCK_V) * (BLOCK_V // GROUP)
        row = i_b.to(tl.int64) * groups
        chosen, logprob = draw_from_top_k(
            values_ptr + row * GROUP,
            maxima_ptr + row,
            order_ptr + row,
            tl.where(running, groups, 0),
            tl.where(prefer, text_groups, 0),
            tl.load(limits_ptr + AT_TOP_K).to(tl.int32),
            temperature,
            tl.load(seeds_ptr + i_b),
            length.to(tl.int32),
            text_groups,
            text_end,
            BLOCK_G,
            GROUP,
            MAX_TOP_K,
        )
        tl.debug_barrier()  # before one warp writes what another is to read
    else:
        s = tl.where(is_time, key_time, key_text)
        if temperature > 0:  # then a key holds noise
            s = tl.load(logits_ptr + i_b.to(tl.int64) * V + chosen, mask=running, other=0.0).to(tl.float32)
        logprob = tl.where(prefer, s - m_time - log_time, s - m - log_l)

    token = tl.where(running, chosen.to(tl.int64), pad_token)
    # Of a row that has ended, `token` is whatever pads: it need not be in the vocabulary.
    is_last = (tl.load(flags_ptr + token, mask=running, other=0).to(tl.int32) & ENDS) != 0
    is_inside = (length >= 0) & (length < L)
    tl.store(ids_ptr + i_b * stride_ids_b + length, token, mask=is_inside)
    tl.store(logprobs_ptr + i_b * stride_lp_b + length, tl.where(running, logprob, 0.0), mask=is_inside)
    tl.store(next_ids_ptr + i_b, token)
    tl.store(lengths_ptr + i_b, length + 1)
    tl.store(last_timestamps_ptr + i_b, token, mask=running & (token >= timestamp_begin))
    ends_here = running & (is_last | (length + 1 >= max_length))
    tl.store(ends_ptr + i_b, length + 1, mask=ends_here)
    tl.store(host_ends_ptr + i_b, (call << 32) | (length + 1), mask=ends_here)
