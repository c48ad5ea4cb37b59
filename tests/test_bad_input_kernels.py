"""Every kernel's launcher, and its reference, against arguments that do not fit: each is refused with a reason, and no tensor
has changed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from bad_inputs import (
    Arguments,
    Bad,
    assert_refused,
    expanded,
    overlapping,
    replaced,
    undense,
    wrong_dtypes,
    wrong_kinds,
    wrong_shapes,
)
from counts import REFUSED_BY_REFERENCES, count
from whisper_triton.kernels._linear_tiles import Tiles as LinearTiles
from whisper_triton.kernels._rules import TokenLimits, TokenRules, TokenState
from whisper_triton.kernels.skinny_linear import LayerNorm

from whisper_triton import kernels

L, B, T, H, D, S, C = 2, 2, 2, 3, 32, 8, 64  # layers, sequences, tokens, heads, head dim, slots, width
V, ROWS = 96, 4  # vocabulary, rows of an encoder's states
FLOATS = (torch.int64, torch.bool, torch.complex64, torch.float64, torch.float16)  # not where fp32 is wanted
INTEGERS = (torch.int16, torch.float32, torch.bool)  # not where int64 is wanted


def attention(**more: Any) -> Arguments:
    """Arguments of the attention kernels in fp32."""
    states = {name: torch.randn(B, T, H, D) for name in ("query", "key", "value")}
    caches = {name: torch.randn(B, H, S, D) for name in ("key_cache", "value_cache")}
    return states | caches | more


def linear() -> Arguments:
    return {
        "x": torch.randn(1, C),
        "weight": torch.randn(16, C),
        "bias": torch.randn(16),
        "norm_weight": torch.randn(C),
        "norm_bias": torch.randn(C),
        "residual": torch.randn(1, 16),
    }


def skinny_linear(weight: Any, bias: Any, norm_weight: Any, norm_bias: Any, **given: Any) -> torch.Tensor:
    """With one weight, or as many as are given in a tuple."""
    weights, biases = (one if isinstance(one, tuple) else (one,) for one in (weight, bias))
    made = {"weights": weights, "biases": biases, "layer_norm": LayerNorm(norm_weight, norm_bias, 1e-5)}
    return kernels.skinny_linear(**(made | given))


def cross() -> Arguments:
    """Two sequences of one token, in fp16, as rows beyond the first must be."""
    given = {
        "x": torch.randn(B, C),
        "weight": torch.randn(H * D, C),
        "bias": torch.randn(H * D),
        "key_cache": torch.randn(B, H, S, D),
        "value_cache": torch.randn(B, H, S, D),
        "norm_weight": torch.randn(C),
        "norm_bias": torch.randn(C),
    }
    counters, ended = torch.zeros(B * H, dtype=torch.int32), torch.zeros(B, dtype=torch.int64)
    return {name: tensor.half() for name, tensor in given.items()} | {"counters": counters, "ended": ended}


def cross_attention(norm_weight: Any, norm_bias: Any, **given: Any) -> torch.Tensor:
    made = {"layer_norm": LayerNorm(norm_weight, norm_bias, 1e-5), "scale": 1.0}
    return kernels.cross_attention(**(made | given))


def table() -> Arguments:
    """One layer's tensors; `cross_table` below adds a good layer before it."""
    return {
        "key_weight": torch.randn(H * D, C),
        "value_weight": torch.randn(H * D, C),
        "value_bias": torch.randn(H * D),
        "key_cache": torch.randn(B, H, S, D),
        "value_cache": torch.randn(B, H, S, D),
    }


def cross_table(**second: Any) -> kernels.CrossTable:
    """Of one tensor of each kind, given as a layer's, or of lists of them, given as such."""
    parameters = inspect.signature(kernels.cross_table).parameters
    made = [[first, second.pop(name)] for name, first in table().items()]
    return kernels.cross_table(**(dict(zip(parameters, made, strict=True)) | second))


def project(encoder_states: Any, table: Any) -> None:
    kernels.project_cross_kv(encoder_states, table)


def choice() -> Arguments:
    """logits, rules and state by their fields' names."""
    limits = torch.tensor(TokenLimits(max_length=6, pad_token=1))
    rules = TokenRules(torch.zeros(V, dtype=torch.uint8), limits, torch.tensor(0.0))
    numbers = [torch.full((B,), value) for value in (2, 0, 0)]
    ids = torch.zeros(B, 6, dtype=torch.int64)
    seeds, host_ends = torch.zeros(B, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
    state = TokenState(ids, torch.zeros(B, 6), *numbers, seeds, torch.zeros(B, 1, dtype=torch.int64), host_ends)
    return {"logits": torch.randn(B, V)} | rules._asdict() | state._asdict()


def select_token(logits: Any, **given: Any) -> None:
    rules, state = (kind(*(given.pop(name) for name in kind._fields)) for kind in (TokenRules, TokenState))
    kernels.select_token(logits, **({"rules": rules, "state": state} | given))


# Of what is no tensor: what it must be, as a refusal says it, and values that are not.
Other = tuple[str, tuple[Any, ...]]
NUMBER: Other = ("a finite number", (None, "x", torch.nan, torch.inf, -torch.inf, torch.tensor(1.0), (1.0,)))
LIMIT: Other = ("a number from 0 on", (None, "x", torch.nan, -1.0, torch.tensor(1.0)))
FLAG: Other = ("True or False", (None, "x", 1, torch.tensor(True)))
TUPLE: Other = ("tuples", (None, 3, torch.zeros(1, C), {}))
LIST: Other = ("of type Sequence", (None, 3, torch.zeros(L, 4), iter(())))
NORM: Other = ("of type LayerNorm", (3, (torch.zeros(C), torch.zeros(C)), (torch.zeros(C), torch.zeros(C), 1e-5)))
TILES: Other = ("of type Tiles", (3, (16,), (16, 1, 4, False, 0, 0), ()))
RULES: Other = ("of type TokenRules", (None, 3, ()))
STATE: Other = ("of type TokenState", (None, 3, ()))
BLOCK: Other = ("a power of two from 32 on", (None, "x", 64.0, 100, 16, 0, -32))
TABLE: Other = ("what cross_table returns", (None, 3, ()))


class Launcher(NamedTuple):
    call: Callable[..., Any]
    make: Callable[[], Arguments]
    others: dict[str, Other]  # arguments that are no tensors


LAUNCHERS = {
    "update_kv_cache": Launcher(
        kernels.update_kv_cache,
        lambda: {k: v for k, v in attention(cache_position=torch.tensor([3, 5])).items() if k != "query"},
        {},
    ),
    "append_attention": Launcher(
        kernels.append_attention,
        lambda: attention(cache_position=torch.tensor([3, 5]), scale=1.0, ended=torch.zeros(B, dtype=torch.int64)),
        {"scale": NUMBER, "read_ahead": FLAG},
    ),
    "decode_attention": Launcher(
        kernels.decode_attention,
        lambda: {
            name: value
            for name, value in attention(
                kv_length=torch.tensor([3, 5]),
                scale=1.0,
                counters=torch.zeros(B * H, dtype=torch.int32),
                ended=torch.zeros(B, dtype=torch.int64),
            ).items()
            if name not in ("key", "value")
        },
        {"scale": NUMBER, "is_causal": FLAG, "read_ahead": FLAG},
    ),
    "cross_attention": Launcher(cross_attention, cross, {"scale": NUMBER, "layer_norm": NORM}),
    "skinny_linear": Launcher(
        skinny_linear,
        linear,
        {"weights": TUPLE, "biases": TUPLE, "layer_norm": NORM, "scale": NUMBER, "gelu": FLAG, "tiles": TILES},
    ),
    "embed_tokens": Launcher(
        kernels.embed_tokens,
        lambda: {
            "input_ids": torch.zeros(B, T, dtype=torch.int64),
            "token_embedding": torch.randn(9, C),
            "position_embedding": torch.randn(7, C),
            "cache_position": torch.tensor(3),
        },
        {},
    ),
    "cross_table": Launcher(
        cross_table,
        table,
        {
            **dict.fromkeys(("key_weights", "value_weights", "key_caches", "value_caches"), LIST),
            "value_biases": (LIST[0], LIST[1][1:]),  # may be None
        },
    ),
    "project_cross_kv": Launcher(
        project, lambda: {"encoder_states": torch.randn(B, S, C), "table": cross_table(**table())}, {"table": TABLE}
    ),
    "add_layer_norm": Launcher(
        kernels.add_layer_norm,
        lambda: {
            "x": torch.randn(ROWS, C),
            "residual": torch.randn(2, C),
            "weight": torch.randn(C),
            "bias": torch.randn(C),
            "eps": 1e-5,
        },
        {"eps": NUMBER, "limit": LIMIT},
    ),
    "bias_gelu": Launcher(kernels.bias_gelu, lambda: {"x": torch.randn(ROWS, C), "bias": torch.randn(C)}, {}),
    "select_token": Launcher(select_token, choice, {"rules": RULES, "state": STATE, "top_k": FLAG, "block_size": BLOCK}),
}
# What of the changes below is allowed.
FREE: dict[tuple[str, str], tuple[str, ...]] = {
    ("add_layer_norm", "residual"): ("dim 0 longer",),  # refused as no divisor, below
    ("embed_tokens", "token_embedding"): ("dim 0 longer",),
    ("embed_tokens", "position_embedding"): ("dim 0 longer",),
    ("embed_tokens", "cache_position"): ("one dim more",),
    ("bias_gelu", "x"): ("dim 0 longer",),
    ("add_layer_norm", "x"): ("dim 0 longer",),
    ("embed_tokens", "input_ids"): ("one dim less", "dim 0 longer", "dim 1 longer"),
    ("decode_attention", "query"): ("dim 1 longer",),
    ("decode_attention", "kv_length"): ("None", "one dim less"),
    ("update_kv_cache", "cache_position"): ("one dim less",),
    ("append_attention", "cache_position"): ("one dim less",),
    ("skinny_linear", "bias"): ("None",),
    ("skinny_linear", "residual"): ("None",),
    ("cross_attention", "bias"): ("None",),
    ("cross_attention", "counters"): ("None", "dim 0 longer", "one dim more"),
    ("cross_attention", "ended"): ("None",),
    ("decode_attention", "counters"): ("None", "dim 0 longer", "one dim more"),
    ("decode_attention", "ended"): ("None",),
    ("append_attention", "ended"): ("None",),
    ("select_token", "logits"): ("float16",),
    ("select_token", "ids"): ("dim 1 longer",),
}
MUTATED = {
    "update_kv_cache": ("key_cache", "value_cache"),
    "append_attention": ("key_cache", "value_cache"),
    "cross_table": ("key_cache", "value_cache"),
}


def systematic(launcher: str) -> list[Bad]:
    """Each tensor as something else, in another dtype, of another shape, not dense, and what is written to seen twice; and
    what is no tensor as something else.
    """
    bad: list[Bad] = []
    for name, tensor in LAUNCHERS[launcher][1]().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        bad += wrong_kinds(name)
        bad += wrong_dtypes(name, FLOATS if tensor.dtype == torch.float32 else INTEGERS)
        bad += wrong_shapes(name, tensor)
        if tensor.dim() > 1 and (launcher, name) != ("embed_tokens", "input_ids"):
            bad.append(replaced("not dense", name, undense, r"(dense|contiguous)"))
        if name in MUTATED.get(launcher, ()):
            bad.append(replaced("one row seen by all", name, expanded, rf"{name}.* overlap"))
            bad.append(replaced("slots that overlap", name, overlapping, rf"{name}.* overlap"))
    allowed = [f"{name}: {what}" for (kernel, name), free in FREE.items() if kernel == launcher for what in free]
    for name, (wanted, values) in LAUNCHERS[launcher].others.items():
        for value in values:
            # An object's address differs from process to process, and would from test to test.
            what = "tensor" if isinstance(value, torch.Tensor) else repr(value).split(" at ")[0]
            message = rf"{name}.* must be {wanted}, got .*{re.escape(repr(value)[:5])}"
            bad.append(several(f"{name}: {what:.30}", {name: lambda _, value=value: value}, message))
    return [one for one in bad if one.name not in allowed]


def several(what: str, changes: dict[str, Callable[[Any], Any]], message: str) -> Bad:
    """Several arguments changed together, or given where they had not been."""
    return Bad(what, lambda given: given.update({name: to(given.get(name)) for name, to in changes.items()}), message)


def cache_of(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Callable[[Any], Any]]:
    return {"key_cache": change, "value_cache": change}


OTHER_CACHES = [
    several("a cache of one sequence", cache_of(lambda t: t[:1]), r"\(1, 3, 8, 32\)"),
    several("a cache of three sequences", cache_of(lambda t: torch.cat([t, t[:1]])), r"\(3, 3, 8, 32\)"),
    several("a cache of two heads", cache_of(lambda t: t[:, :2]), r"\(2, 2, 8, 32\)"),
    several("a cache (B, S, H, D)", cache_of(lambda t: t.transpose(1, 2).contiguous()), r"\(2, 8, 3, 32\)"),
    several("a cache without slots", cache_of(lambda t: t[:, :, :0]), r"\(2, 3, 0, 32\)"),
    several("a cache in another dtype", cache_of(torch.Tensor.half), r"torch\.float16"),
]
ONE_TENSOR = Bad(
    "one tensor for both caches",
    lambda given: given.update(value_cache=given["key_cache"]),
    "key_cache and value_cache are one",
)
ONE_PLACE = Bad(
    "one place for both caches",
    lambda given: given.update(value_cache=given["key_cache"].view_as(given["key_cache"])),
    "key_cache and value_cache share memory",
)


def moved_by_a_slot(given: Arguments) -> None:
    """Both caches in one buffer, where what is a slot of the values is the next slot of the keys."""
    cache = given["key_cache"]
    both = cache.new_zeros(cache.numel() + D)
    given.update(key_cache=both[:-D].view_as(cache), value_cache=both[D:].view_as(cache))


PARTLY = Bad("caches that overlap", moved_by_a_slot, "key_cache( 1)? and value_cache( 1)? share memory")
ALL = dict.fromkeys(("query", "key", "value"), lambda t: t[:, :0])
SPECIAL: dict[str, list[Bad]] = {
    "update_kv_cache": [*OTHER_CACHES, ONE_TENSOR, ONE_PLACE, PARTLY],
    "append_attention": [
        *OTHER_CACHES,
        ONE_TENSOR,
        ONE_PLACE,
        PARTLY,
        several("no tokens", ALL, r"\(2, 0, 3, 32\)"),
        several("17 tokens", dict.fromkeys(ALL, lambda t: t[:, :1].expand(B, 17, H, D)), "at most 16 query tokens, got 17"),
        several("a head dim of 24", dict.fromkeys((*ALL, "key_cache", "value_cache"), lambda t: t[..., :24]), "got 24"),
    ],
    "decode_attention": [
        *OTHER_CACHES,
        several("no tokens", {"query": lambda t: t[:, :0]}, r"\(2, 0, 3, 32\)"),
        several("17 tokens", {"query": lambda t: t[:, :1].expand(B, 17, H, D)}, "at most 16 query tokens, got 17"),
        several("every second end", {"ended": lambda t: t.new_zeros(2 * t.numel())[::2]}, "dense"),
        several("every second counter", {"counters": lambda t: t.new_zeros(2 * t.numel())[::2]}, "contiguous"),
    ],
    "cross_attention": [
        *OTHER_CACHES[1:-1],  # rows may be two tokens of one sequence
        several("a cache in another dtype", cache_of(torch.Tensor.float), r"torch\.float32"),
        several("an odd row", {"x": lambda x: torch.cat([x, x[:1]])}, r"\(3, 64\)"),
        several("no rows", {"x": lambda x: x[:0]}, "1 to 64 rows, got 0"),
        several("17 tokens a sequence", {"x": lambda x: x.repeat(17, 1)}, "at most 16 query tokens, got 17"),
        several("heads of another width", cache_of(lambda t: t[..., :16].contiguous()), r"\(2, 3, 8, 16\)"),
    ],
    "skinny_linear": [
        several("no weight", {"weight": lambda w: (), "bias": lambda b: ()}, "one or three"),
        several("two weights", {"weight": lambda w: (w, w), "bias": lambda b: (b, b)}, "one or three"),
        several("fewer biases", {"weight": lambda w: (w, w, w), "bias": lambda b: (b, b)}, "for each, got 3 and 2"),
        several("several rows in fp32", {"x": lambda x: x.repeat(2, 1), "residual": lambda r: r.repeat(2, 1)}, "tf32"),
        several("65 rows", {"x": lambda x: x.repeat(65, 1)}, "1 to 64 rows, got 65"),
        several("off 16 bytes", {"x": lambda x: x.new_zeros(C + 1)[None, 1:]}, "multiple of 16 bytes"),
        several("K split under a norm", {"tiles": lambda t: LinearTiles(16, 2, 4)}, "split"),
        several("an odd tile", {"tiles": lambda t: LinearTiles(12, 1, 4)}, r"power.* of two, got .*12"),
        several("no tile", {"tiles": lambda t: LinearTiles(0, 1, 4)}, r"power.* of two, got .*0"),
    ],
    "embed_tokens": [several("a position each", {"cache_position": lambda t: t.new_zeros(B)}, r"\(2,\)")],
    "cross_table": [
        Bad("key weights for a value cache", lambda g: g.update(key_weight=g["key_weight"].T), r"\(64, 96\)"),
        Bad("one tensor for both caches", lambda g: g.update(value_cache=g["key_cache"]), "key_cache 1 and value_cache 1 "),
        PARTLY,
    ],
    "project_cross_kv": [
        several("no table", {"table": lambda t: tuple(t)}, "must be what cross_table returns, got tuple"),
        several("one frame less", {"encoder_states": lambda x: x[:, 1:]}, r"\(2, 7, 64\)"),
    ],
    "add_layer_norm": [
        several("three rows onto four", {"residual": lambda r: torch.cat([r, r[:1]])}, "4 rows are no multiple .* 3"),
        several("two rows onto five", {"x": lambda x: torch.cat([x, x[:1]])}, "5 rows are no multiple .* 2"),
    ],
    "bias_gelu": [several("transposed", {"x": lambda x: x.T.contiguous().T}, "contiguous")],
    "select_token": [
        several("no row", {"logits": lambda x: x[:0]}, r"\(0, 96\)"),
        several("no token", {"logits": lambda x: x[:, :0]}, r"\(2, 0\)"),
        several("a state of three rows", {n: lambda t: torch.cat([t, t[:1]]) for n in TokenState._fields}, r"\(3,"),
    ],
}  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("launcher", "bad"),
    [pytest.param(name, bad, id=f"{name}-{bad.name}") for name in LAUNCHERS for bad in systematic(name) + SPECIAL[name]],
)
def test_it_is_refused_with_a_reason_and_changes_nothing(launcher: str, bad: Bad, device: torch.device) -> None:
    call, make, _ = LAUNCHERS[launcher]
    with torch.device(device):
        assert_refused(call, make(), bad)


@pytest.mark.gpu
@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("launcher", "name"),
    [(name, one) for name, (_, make, _) in LAUNCHERS.items() for one, t in make().items() if isinstance(t, torch.Tensor)],
)
def test_a_tensor_of_the_host_among_those_of_the_gpu(launcher: str, name: str, device: torch.device) -> None:
    call, make, _ = LAUNCHERS[launcher]
    with torch.device(device):
        assert_refused(call, make(), replaced("on the host", name, torch.Tensor.cpu, "cpu"))


def test_no_function_and_no_argument_is_left_out() -> None:
    others = {"CrossTable", "backend"}
    assert set(LAUNCHERS) == {name for name in kernels.__all__ if not name.endswith("_reference")} - others
    for name, (_, make, other) in LAUNCHERS.items():
        assert {*make(), *other} >= set(inspect.signature(getattr(kernels, name)).parameters)


# What concerns launches alone.
ONLY_OF_LAUNCHES = {
    "skinny_linear": ("tiles: ", "several rows in fp32", "off 16 bytes", "K split under a norm", "an odd tile", "no tile"),
    "select_token": ("logits: float64", "block_size: "),
}
WITH_REFERENCES = [name for name in LAUNCHERS if name != "cross_table"]


@pytest.mark.parametrize(
    ("launcher", "bad"),
    [
        pytest.param(name, bad, id=f"{name}-{bad.name}")
        for name in WITH_REFERENCES
        for bad in systematic(name) + SPECIAL[name]
        if not bad.name.startswith(ONLY_OF_LAUNCHES.get(name, ()))
    ],
)
def test_the_reference_refuses_it_too(launcher: str, bad: Bad, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, reference = getattr(kernels, launcher), getattr(kernels, f"{launcher}_reference")
    monkeypatch.setattr(kernels, launcher, reference)  # which the functions above call
    call, make, _ = LAUNCHERS[launcher]
    with torch.device(device):
        assert_refused(reference if call is kernel else call, make(), bad)
    count(REFUSED_BY_REFERENCES)  # the input itself is counted above


@pytest.mark.parametrize("launcher", WITH_REFERENCES)
def test_the_reference_takes_what_is_good(launcher: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, reference = getattr(kernels, launcher), getattr(kernels, f"{launcher}_reference")
    monkeypatch.setattr(kernels, launcher, reference)
    call, make, _ = LAUNCHERS[launcher]
    with torch.device(device):
        (reference if call is kernel else call)(**make())


def floats(launcher: str) -> list[str]:
    """Of the good arguments, the tensors that may need gradients; in a table it is a weight."""
    good = LAUNCHERS[launcher][1]()
    return [
        name for name, t in good.items() if isinstance(t, kernels.CrossTable) or (torch.is_tensor(t) and t.is_floating_point())
    ]


def needing(value: torch.Tensor | kernels.CrossTable) -> object:
    return (value.value_weights[-1] if isinstance(value, kernels.CrossTable) else value).requires_grad_()


@pytest.mark.bad_input
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of -inf - -inf and log(0), which are not used
@pytest.mark.parametrize(("launcher", "name"), [(launcher, name) for launcher in WITH_REFERENCES for name in floats(launcher)])
def test_what_needs_gradients_is_refused_while_they_are_recorded(launcher: str, name: str, device: torch.device) -> None:
    call, make, _ = LAUNCHERS[launcher]
    refusal = rf"^{launcher} has no backward pass: call it under torch\.no_grad\(\), or {launcher}_reference$"
    with torch.device(device):
        given = make()
        assert_refused(call, given, Bad("", lambda given: needing(given[name]), refusal))
        with torch.no_grad():
            call(**given)


@pytest.mark.parametrize(
    "launcher", ["append_attention", "cross_attention", "decode_attention", "embed_tokens", "skinny_linear"]
)
def test_the_reference_gives_gradients(launcher: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, reference = getattr(kernels, launcher), getattr(kernels, f"{launcher}_reference")
    monkeypatch.setattr(kernels, launcher, reference)
    call, make, _ = LAUNCHERS[launcher]
    with torch.device(device):
        given = make()
        states = [given[name].requires_grad_() for name in floats(launcher) if name not in MUTATED.get(launcher, ())]
        (reference if call is kernel else call)(**given).sum().backward()
    assert all(tensor.grad is not None for tensor in states)
