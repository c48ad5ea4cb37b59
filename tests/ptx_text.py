"""The text of a kernel in PTX as blocks of statements: see ptx.py."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Statement(NamedTuple):
    text: str
    guard: str  # a predicate, or ""
    is_negated: bool
    opcode: str
    operands: list[str]


@dataclass
class Kernel:
    """What is between the braces of an entry. Names declared in inner braces are made unique."""

    name: str
    parameters: dict[str, str]  # name -> type
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    shared: dict[str, int] = field(default_factory=dict)  # name of a static variable -> bytes
    labels: dict[str, int] = field(default_factory=dict)  # -> block
    blocks: list[list[Statement]] = field(default_factory=lambda: [[]])  # which are entered at their first statement only


# A label, a brace that opens or closes a scope, or a statement, within which braces are for operands.
TOKEN = re.compile(r"\s*(?:(?P<label>[\w$]+):(?!:)|(?P<brace>[{}])|(?P<statement>(?:[^;{}]|\{[^;{}]*\})+);)")
STATEMENT = re.compile(r"(?:@(?P<negated>!?)(?P<guard>[\w%$]+) )?(?P<opcode>[\w.:]+)(?: (?P<operands>.*))?")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+")
REGISTERS = re.compile(r"\.reg \.(\w+) (.*)")
SHARED = re.compile(r"\.shared (?:\.align \d+ )?\.b8 ([\w$]+)\[(\d+)\]")
ADDRESS = re.compile(r"\[ ?([\w%$]+) ?(?:\+ ?(-?\w+))? ?\]")
IGNORED = re.compile(r"//.*|^\s*\.(?:loc|file|pragma)\b.*", re.MULTILINE)
ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)[^{]*\{", re.DOTALL)


def parse(ptx: str) -> Kernel:
    """The one kernel of `ptx`.

    Raises:
        NotImplementedError: text that is none of the above.
    """
    ptx = IGNORED.sub("", ptx)
    entry = ENTRY.search(ptx)
    kernel = Kernel(entry[1], {name: kind for kind, name in re.findall(r"\.param \.(\w+)[^,]*?(\w+)\s*(?:,|$)", entry[2])})
    targets = set(re.findall(r"\bbra(?:\.uni)?\s+([\w$]+)", ptx))  # the other labels are for debuggers
    position, scopes = entry.end(), [{}]
    while scopes:
        token = TOKEN.match(ptx, position)
        if token is None:
            raise NotImplementedError(ptx[position : position + 100].strip())
        position = token.end()
        if label := token["label"]:
            if label in kernel.labels:
                raise NotImplementedError(f"two labels {label}")
            if label in targets:
                kernel.labels[label] = len(kernel.blocks)
                kernel.blocks.append([])
        elif token["brace"] == "{":
            scopes.append({})
        elif token["brace"] == "}":
            scopes.pop()
        else:
            _add(kernel, " ".join(token["statement"].split()), scopes, f"__{position}")
    return kernel


def _add(kernel: Kernel, text: str, scopes: list[dict[str, str]], suffix: str) -> None:
    """Adds a declaration or an instruction to `kernel`; `scopes`: what names of inner braces are called."""

    def declare(name: str) -> str:
        is_inner = len(scopes) > 1
        return scopes[-1].setdefault(name, name + suffix) if is_inner else name

    if match := REGISTERS.fullmatch(text):
        for name in OPERAND.findall(match[2]):
            stem, _, count = name.rstrip(">").partition("<")
            names = [f"{stem}{i}" for i in range(int(count))] if count else [name]
            kernel.registers |= {declare(name): match[1] for name in names}
        return
    if match := SHARED.fullmatch(text):
        kernel.shared[declare(match[1])] = int(match[2])
        return
    for names in scopes[:0:-1]:  # innermost first: what it is called then is declared nowhere else
        text = re.sub(r"[%$\w]+", lambda word, names=names: names.get(word[0], word[0]), text)
    match = STATEMENT.fullmatch(text)
    if match is None:
        raise NotImplementedError(text)
    operands = OPERAND.findall(match["operands"] or "")
    kernel.blocks[-1].append(Statement(text, match["guard"] or "", bool(match["negated"]), match["opcode"], operands))
    if match["opcode"].partition(".")[0] in ("bra", "ret"):
        kernel.blocks.append([])
