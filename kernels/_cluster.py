"""Thread-block clusters (Gluon, compute capability 9.0): what the kernels share in which the programs of a cluster work on one
head together.

A cluster's programs run at the same time and write into each other's shared memory. So what they hand each other, a query or
the softmax states of their keys, costs them a barrier, where the way through global memory costs a launch, or a fence, a
counter and a second reading. What is sent counts its bytes off a barrier of the program that gets it (`st.async`), which waits
for no more than that: a barrier of the whole cluster would have all that each has stored anywhere be visible first. Gluon has
no words for it: the instructions stand here as PTX. Sources: CUDA C++ Programming Guide, distributed shared memory; PTX ISA,
`mapa`, `st.async`, `mbarrier`, `barrier.cluster`.

Tensors have the cluster's programs as their first dimension, so that each holds what is its own.
"""

from __future__ import annotations

import torch

from ._paced import (
    MAX_DYNAMIC_SHARED_SIZE_BYTES,
    PACED_HEAD_DIMS,
    NotGranted,
    are_aligned,
    constexpr_function,
    gl,
    gluon,
    has_paced_copies,
    join_softmax,
    prefer_shared_memory,
    set_attribute,
)

NUM_CTAS = 8  # programs of a cluster: the most that every GPU with clusters takes


@constexpr_function
def split(rank, num_ctas):
    """The first of so many dimensions over a cluster's programs."""
    return [[1 << i] + [0] * (rank - 1) for i in range(num_ctas.bit_length() - 1)]


@constexpr_function
def split_layout(size_per_thread, threads, warps, num_ctas):
    """The last dimension fastest, the first split over the cluster's programs."""
    rank = len(warps)
    return gl.BlockedLayout(size_per_thread, threads, warps, list(range(rank))[::-1], cga_layout=split(rank, num_ctas))


@constexpr_function
def split_shared(rank, num_ctas):
    return gl.SwizzledSharedLayout(1, 1, 1, order=list(range(rank))[::-1], cga_layout=split(rank, num_ctas))


@constexpr_function
def keys_layout(head_dim, num_warps, num_ctas):
    """(program, warp, key, element)."""
    return split_layout([1, 1, 1, 8], [1, 1, 256 // head_dim, head_dim // 8], [1, num_warps, 1, 1], num_ctas)


@constexpr_function
def join_layout(num_states, head_dim, num_warps, num_ctas):
    """(state, element), the same in all programs; the states of an element lie within a warp."""
    lanes = head_dim // num_warps
    everywhere = [[0, 0] for _ in range(num_ctas.bit_length() - 1)]
    return gl.BlockedLayout([num_states * lanes // 32, 1], [32 // lanes, lanes], [1, num_warps], [0, 1], cga_layout=everywhere)


BARRIERS = 16  # bytes before what is exchanged: two barriers, one an exchange


@constexpr_function
def begin(floats, *expected):
    """Declares shared memory and sets up its barriers for so many bytes each; tells the cluster that this program runs."""
    setup = "".join(
        f" @p mbarrier.init.shared::cta.b64 [$0+{8 * i}], 1;"
        f" @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0+{8 * i}], {nbytes};"
        for i, nbytes in enumerate(expected)
    )
    return (
        f"{{ .shared .align 16 .b8 exchanged[{BARRIERS + 4 * floats}]; .reg .pred p; .reg .b32 a;"
        f" mov.u32 $0, exchanged; mov.u32 a, %tid.x; setp.eq.u32 p, a, 0;{setup}"
        " @p fence.mbarrier_init.release.cluster; barrier.cluster.arrive.relaxed.aligned; }"
    )


@constexpr_function
def wait(i):
    return (
        f"{{ .reg .pred p; exchange_{i}: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [$1+{8 * i}], 0;"
        f" @!p bra exchange_{i}; mov.u32 $0, 0; }}"
    )


@gluon.jit
def cluster_begin(FLOATS: gl.constexpr, EXPECTED_0: gl.constexpr, EXPECTED_1: gl.constexpr):
    """Once, first thing in a kernel. Returns where two barriers lie in shared memory, and behind them so many floats.

    EXPECTED_0, EXPECTED_1: how many bytes this program will be sent before it goes on from each `exchange`. What is sent to a
    program that does not run yet would be lost: see `wait_for_cluster`.
    """
    asm: gl.constexpr = begin(FLOATS, EXPECTED_0, EXPECTED_1)
    return gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_cluster():
    """Until all programs have begun."""
    gl.inline_asm_elementwise("barrier.cluster.wait.aligned; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def exchange(barriers, I: gl.constexpr):
    """Until all that is expected at barrier `I` has come."""
    asm: gl.constexpr = wait(I)
    gl.inline_asm_elementwise(asm, "=r,r", [barriers], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def cluster_rank():
    return gl.inline_asm_elementwise("mov.u32 $0, %cluster_ctarank;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)


@constexpr_function
def send(lanes, rank, place, barrier, values):
    """A warp's first `lanes` lanes send `values`, registers, to `place` in the program `rank`; `r` names a lane's number."""
    vector = f".v{len(values)}" if len(values) > 1 else ""
    data = ", ".join(values)
    data = f"{{{data}}}" if vector else data
    return (
        f"{{ .reg .pred p; .reg .b32 a, b, r; mov.u32 r, %laneid; setp.lt.u32 p, r, {lanes};"
        f" @p mapa.shared::cluster.u32 a, {place}, {rank}; @p mapa.shared::cluster.u32 b, {barrier}, {rank};"
        f" @p st.async.shared::cluster.mbarrier::complete_tx::bytes{vector}.f32 [a], {data}, [b];"
    )


@constexpr_function
def send_one_to_all(num_ctas):
    return send(num_ctas, "r", "$1", "$2", ["$3"]) + " mov.u32 $0, 0; }"


@constexpr_function
def send_four_to_first(lanes):
    nothing = "".join(f" mov.u32 ${i}, 0;" for i in range(4))
    return send(lanes, 0, "$4", "$8", [f"${i}" for i in range(12, 16)]) + nothing + " }"


@constexpr_function
def send_two_to_first():
    return send(1, 0, "$1", "$2", ["$3", "$4"]) + " mov.u32 $0, 0; }"


@gluon.jit
def send_to_all(barrier, place, value, NUM_CTAS: gl.constexpr):
    """A warp's `value` (programs, warps) fp32 to shared memory at `place`, in each program: a lane for each of them."""
    asm: gl.constexpr = send_one_to_all(NUM_CTAS)
    gl.inline_asm_elementwise(asm, "=r,r,r,f", [place, barrier, value], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def send_to_first(barrier, place, acc, m, l, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """A warp's softmax state, `acc` (programs, warps, HEAD_DIM) without the keys of `LAYOUT`, `m` and `l` (programs, warps), to
    shared memory of the first program: HEAD_DIM floats at `place` (programs, warps), and two behind them.

    The lanes of several keys hold the same by then: those of the first send it.
    """
    four: gl.constexpr = send_four_to_first(HEAD_DIM // 8)
    two: gl.constexpr = send_two_to_first()
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))))
    warps = gl.convert_layout(place, gl.SliceLayout(2, gl.SliceLayout(2, LAYOUT)))  # the same threads hold it
    places = gl.expand_dims(warps, 2) + 4 * gl.expand_dims(gl.expand_dims(offs_d, 0), 0)
    gl.inline_asm_elementwise(
        four, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,f,f,f,f", [places, barrier, acc], dtype=gl.int32, is_pure=False, pack=4
    )
    gl.inline_asm_elementwise(two, "=r,r,r,f,f", [place + 4 * HEAD_DIM, barrier, m, l], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def read_eight(place):
    """What was sent to `place`, eight neighbours a thread."""
    return gl.inline_asm_elementwise(
        "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,r,r,r,r", [place], dtype=gl.float32, is_pure=False, pack=4
    )


@gluon.jit
def first_keys(
    WARPS_APART: gl.constexpr, LAYOUT: gl.constexpr, ROWS: gl.constexpr, NUM_WARPS: gl.constexpr, NUM_CTAS: gl.constexpr
):
    """(programs, warps, ROWS): each warp's keys of the first piece, those of a program so many warps' after the last one's."""
    PIECE: gl.constexpr = gl.SliceLayout(3, LAYOUT)
    i_c = gl.arange(0, NUM_CTAS, layout=gl.SliceLayout(1, gl.SliceLayout(2, PIECE)))
    i_w = gl.arange(0, NUM_WARPS, layout=gl.SliceLayout(0, gl.SliceLayout(2, PIECE)))
    i_r = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(0, PIECE)))
    first = (i_c[:, None] * WARPS_APART + i_w[None, :]) * ROWS
    return gl.expand_dims(first, 2) + gl.expand_dims(gl.expand_dims(i_r, 0), 0)


@gluon.jit
def along_keys(x):
    """A vector (D,) of elements as (1, 1, 1, D)."""
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(x, 0), 0), 0)


@gluon.jit
def attend(
    q,  # (1, 1, 1, D), times the scale
    keys,  # pieces in shared memory, (programs, warps, keys, D) each
    values,
    offs_s,  # (programs, warps, keys): of the first piece
    STEP: gl.constexpr,  # from one piece's to the next one's
    end,  # of the keys
    LAYOUT: gl.constexpr,
):
    """Each warp's softmax state in base 2: maxima and sums (programs, warps), accumulators (programs, warps, D)."""
    scores = ()
    for i in gl.static_range(len(keys)):
        score = gl.sum(q * keys[i].load(LAYOUT).to(gl.float32), axis=3)
        score = gl.where(offs_s + i * STEP < end, score, float("-inf"))
        scores = scores + (score,)  # noqa: RUF005  Gluon knows no unpacking
    m = gl.max(scores[0], axis=2)
    for i in gl.static_range(1, len(keys)):
        m = gl.maximum(m, gl.max(scores[i], axis=2))
    safe_m = gl.expand_dims(gl.where(m == float("-inf"), 0.0, m), 2)  # a warp past the last key
    l = gl.exp2(scores[0] - safe_m)
    o = gl.expand_dims(l, 3) * values[0].load(LAYOUT).to(gl.float32)
    for i in gl.static_range(1, len(keys)):
        p = gl.exp2(scores[i] - safe_m)
        l += p
        o += gl.expand_dims(p, 3) * values[i].load(LAYOUT).to(gl.float32)
    return m, gl.sum(l, axis=2), gl.sum(o, axis=2)


@gluon.jit
def join_states(
    barriers,  # of the cluster; the second one is for the states
    states,  # where they are sent to, in shared memory
    m,  # as `attend` returns them
    l,
    o,
    out_ptr,  # (HEAD_DIM,)
    HAS_ENDED: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    LAYOUT: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    NUM_CTAS: gl.constexpr,
):
    """Sends all states to the first program, HEAD_DIM + 4 floats each, which writes what they come to."""
    NUM_STATES: gl.constexpr = NUM_CTAS * NUM_WARPS
    JOIN: gl.constexpr = join_layout(NUM_STATES, HEAD_DIM, NUM_WARPS, NUM_CTAS)
    WARPS: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))
    i_c = gl.arange(0, NUM_CTAS, layout=gl.SliceLayout(1, WARPS))
    i_w = gl.arange(0, NUM_WARPS, layout=gl.SliceLayout(0, WARPS))
    own = states + (i_c[:, None] * NUM_WARPS + i_w[None, :]) * (4 * (HEAD_DIM + 4))
    send_to_first(barriers + 8, own, o, m, l, HEAD_DIM, LAYOUT)
    if cluster_rank() == 0:
        exchange(barriers, 1)
        offs_i = gl.arange(0, NUM_STATES, layout=gl.SliceLayout(1, JOIN))
        offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, JOIN))
        state = states + offs_i * (4 * (HEAD_DIM + 4))
        m_i, l_i = gl.inline_asm_elementwise(
            "ld.shared.v2.f32 {$0, $1}, [$2];", "=f,=f,r", [state + 4 * HEAD_DIM],
            dtype=(gl.float32, gl.float32), is_pure=False, pack=1,
        )  # fmt: skip
        places = state[:, None] + 4 * offs_d[None, :]
        o_i = gl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [places], dtype=gl.float32, is_pure=False, pack=1)
        gl.store(out_ptr + offs_d, join_softmax(m_i, l_i, o_i, HAS_ENDED).to(out_ptr.dtype.element_ty))


def launch_clusters(kernel: gluon.jit, grid: tuple[int, int], num_warps: int, is_alone: bool, **arguments: object) -> None:
    """Launches `kernel`, a cluster of programs for each element of `grid`.

    Of what a kernel declares for itself (`cluster_begin`) Triton does not know: it raises the limit of a program's shared
    memory only where its own share is beyond 48 KB. is_alone: one row, whose links all want the largest share.

    Raises:
        NotGranted: the driver does not raise the limit.
    """
    arguments |= {"NUM_WARPS": num_warps, "NUM_CTAS": NUM_CTAS, "num_warps": num_warps, "num_ctas": NUM_CTAS}
    compiled = kernel.warmup(grid=grid, **arguments, launch_pdl=True)  # builds it at the first call, finds it later
    compiled.run  # noqa: B018  loads it
    if set_attribute(compiled, MAX_DYNAMIC_SHARED_SIZE_BYTES, compiled.metadata.shared):
        raise NotGranted(f"{kernel.__name__} cannot have its {compiled.metadata.shared} bytes of shared memory")
    if is_alone:
        prefer_shared_memory(compiled)
    compiled[(*grid, 1)](*(arguments[name] for name in kernel.arg_names))  # through `kernel` it would be looked for twice


def covers_heads(x: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], num_warps: int) -> bool:
    """Whether attention by clusters takes tensors like x and these caches; a head's elements divide among warps and lanes."""
    D = caches[0].shape[3]
    return (
        has_paced_copies(x.device, x.dtype)
        and are_aligned(*caches)
        and D in PACED_HEAD_DIMS
        and num_warps in (2, 4, 8)
        and 32 % (D // num_warps) == 0
    )
