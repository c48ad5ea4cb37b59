"""A layer norm and a few rows of weights for each warp of a cluster, of one row of x: see `_cluster.py`.

The weights come by paced copies, as in `_paced_linear.py`; what comes of them stays with the warps.
"""

from __future__ import annotations

from ._cluster import split_layout, split_shared
from ._paced import async_load, barrier, commit_group, constexpr_function, gl, gluon, wait_group

BLOCK_K = 256  # columns of a chunk of weights: one warp's 16-byte copies of a row


@constexpr_function
def linear_layout(block_k, num_warps, num_ctas):
    """(program, warp, column of a chunk): a row of weights a warp."""
    return split_layout([1, 1, block_k // 32], [1, 1, 32], [1, num_warps, 1], num_ctas)


@constexpr_function
def norm_layout(block_k, num_warps, num_ctas):
    """(program, column of a chunk)."""
    return split_layout([1, block_k // 32], [1, 32], [1, num_warps], num_ctas)


@gluon.jit
def ask_for_weights(
    weight_ptr,  # (rows, K)
    K: gl.constexpr,
    WARP_ROWS: gl.constexpr,
    PACE: gl.constexpr,
    BLOCK_K: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    NUM_CTAS: gl.constexpr,
):
    """Begins to copy each warp's rows, chunk by chunk: shared memory by chunk and row."""
    LAYOUT: gl.constexpr = linear_layout(BLOCK_K, NUM_WARPS, NUM_CTAS)
    SHARED: gl.constexpr = split_shared(3, NUM_CTAS)
    dtype: gl.constexpr = weight_ptr.dtype.element_ty
    rows = rows_of_warps(WARP_ROWS, LAYOUT, NUM_WARPS, NUM_CTAS)
    offs_k = gl.expand_dims(gl.expand_dims(gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT))), 0), 0)
    weights = ()
    for i in gl.static_range(K // BLOCK_K):
        for i_n in gl.static_range(WARP_ROWS):
            w = gl.allocate_shared_memory(dtype, [NUM_CTAS, NUM_WARPS, BLOCK_K], SHARED)
            ptrs = weight_ptr + gl.expand_dims((rows + i_n) * K, 2) + offs_k + i * BLOCK_K
            async_load(w, ptrs, eviction_policy="evict_first")
            weights = weights + (w,)  # noqa: RUF005  Gluon knows no unpacking
        commit_group()
        wait_group(PACE - 1)
    return weights


@gluon.jit
def rows_of_warps(WARP_ROWS: gl.constexpr, LAYOUT: gl.constexpr, NUM_WARPS: gl.constexpr, NUM_CTAS: gl.constexpr):
    """(programs, warps): the first of each warp's rows of a head."""
    i_c = gl.arange(0, NUM_CTAS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    i_w = gl.arange(0, NUM_WARPS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    return (i_c[:, None] * NUM_WARPS + i_w[None, :]) * WARP_ROWS


@gluon.jit
def ask_for_norm(
    norm_weight_ptr,  # (K,)
    norm_bias_ptr,  # (K,)
    K: gl.constexpr,
    BLOCK_K: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    NUM_CTAS: gl.constexpr,
):
    """Begins to copy both to each program: shared memory by chunk."""
    LAYOUT: gl.constexpr = norm_layout(BLOCK_K, NUM_WARPS, NUM_CTAS)
    SHARED: gl.constexpr = split_shared(2, NUM_CTAS)
    dtype: gl.constexpr = norm_weight_ptr.dtype.element_ty
    i_c = gl.arange(0, NUM_CTAS, layout=gl.SliceLayout(1, LAYOUT))
    offs_k = 0 * i_c[:, None] + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    weights, biases = (), ()
    for i in gl.static_range(K // BLOCK_K):
        g = gl.allocate_shared_memory(dtype, [NUM_CTAS, BLOCK_K], SHARED)
        b = gl.allocate_shared_memory(dtype, [NUM_CTAS, BLOCK_K], SHARED)
        async_load(g, norm_weight_ptr + i * BLOCK_K + offs_k)
        async_load(b, norm_bias_ptr + i * BLOCK_K + offs_k)
        weights, biases = weights + (g,), biases + (b,)  # noqa: RUF005
    commit_group()
    return weights, biases


@gluon.jit
def multiply(
    x_ptr,  # (1, K)
    weights,  # as `ask_for_weights` returns them
    norm,  # as `ask_for_norm` returns it
    eps,
    K: gl.constexpr,
    NUM_ROWS: gl.constexpr,  # of a warp
    BLOCK_K: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    NUM_CTAS: gl.constexpr,
):
    """The layer norm of x by each warp's rows, once all copies have come: a tuple of (programs, warps) fp32."""
    LAYOUT: gl.constexpr = linear_layout(BLOCK_K, NUM_WARPS, NUM_CTAS)
    NORM: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    nothing = gl.expand_dims(0 * rows_of_warps(1, LAYOUT, NUM_WARPS, NUM_CTAS), 2)
    offs_k = gl.expand_dims(gl.expand_dims(gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT))), 0), 0)
    x, acc = (), ()
    for i in gl.static_range(K // BLOCK_K):
        x = x + (gl.load(x_ptr + nothing + offs_k + i * BLOCK_K),)  # noqa: RUF005
    total = gl.zeros([NUM_CTAS, NUM_WARPS, BLOCK_K], gl.float32, layout=LAYOUT)
    squares = gl.zeros([NUM_CTAS, NUM_WARPS, BLOCK_K], gl.float32, layout=LAYOUT)
    for i in gl.static_range(K // BLOCK_K):
        total += x[i].to(gl.float32)
        squares += x[i].to(gl.float32) * x[i].to(gl.float32)
    mean = gl.sum(total, axis=2) / K
    rstd = gl.rsqrt(gl.maximum(gl.sum(squares, axis=2) / K - mean * mean, 0.0) + eps)
    mean, rstd = gl.expand_dims(mean, 2), gl.expand_dims(rstd, 2)
    for _ in gl.static_range(NUM_ROWS):
        acc = acc + (gl.zeros([NUM_CTAS, NUM_WARPS, BLOCK_K], gl.float32, layout=LAYOUT),)  # noqa: RUF005
    barrier()  # so that x is asked for before, not behind, the wait for all copies
    wait_group(0)
    for i in gl.static_range(K // BLOCK_K):
        g = gl.expand_dims(norm[0][i].load(NORM).to(gl.float32), 1)
        x_i = (x[i].to(gl.float32) - mean) * rstd * g + gl.expand_dims(norm[1][i].load(NORM).to(gl.float32), 1)
        added = ()
        for i_n in gl.static_range(NUM_ROWS):
            added = added + (acc[i_n] + weights[i * NUM_ROWS + i_n].load(LAYOUT).to(gl.float32) * x_i,)  # noqa: RUF005
        acc = added
    products = ()
    for i_n in gl.static_range(NUM_ROWS):
        products = products + (gl.sum(acc[i_n], axis=2),)  # noqa: RUF005
    return products
