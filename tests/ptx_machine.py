"""The threads of a cluster of programs, and what each of PTX's instructions does to them: see ptx.py."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator

import numpy as np
import torch
from ptx_memory import OFFSET, RANK_SHIFT, Barrier, Buffers, Cluster, Copy, Fault, Parameters, Piece, Shared, check_agree, typed
from ptx_numbers import DTYPES, FUNCTIONS, OPPOSITE, SHUFFLES, literal, narrow, widen
from ptx_text import ADDRESS, OPERAND, Kernel, Statement
from whisper_triton.kernels._paced import SHARED_MEMORY

WARP = 32
MAX_STEPS = 10_000  # blocks of instructions a cluster: more is a loop that waits for what never comes

Where = np.ndarray | bool  # the threads that execute an instruction, (threads,) bool; True: all
Run = Callable[[Where], None]

INTEGER, FLOAT = r"(?P<kind>[us](?:16|32|64))", r"(?P<kind>f32)"
# Opcodes that compute one register from others of their own type, or from a second one of another.
ELEMENTWISE = [
    (rf"(?P<name>add|sub|min|max|neg|abs|div|rem|mul\.lo|mad\.lo)\.{INTEGER}", {}),
    (rf"(?P<name>add|sub|mul|min|max|neg|abs)(?:\.rn)?(?:\.ftz)?\.{FLOAT}", {}),
    (rf"(?P<name>fma\.rn|div\.(?:full|approx|rn)|ex2\.approx|rsqrt\.approx)(?:\.ftz)?\.{FLOAT}", {}),
    (r"(?P<name>and|or|xor|not)\.(?P<kind>pred|b16|b32|b64)", {}),
    (r"(?P<name>shl|shr)\.(?P<kind>[bus](?:16|32|64))", {1: "u32"}),
    (r"(?P<name>bfe)\.(?P<kind>[us]32)", {1: "u32", 2: "u32"}),
    (r"(?P<name>selp)\.(?P<kind>[busf](?:16|32|64))", {2: "pred"}),
]
NO_OPERATIONS = r"griddepcontrol\.\w+|fence\.[\w.:]+|bar\.warp\.sync"
RULES: list[tuple[re.Pattern[str], Callable[..., Run]]] = []  # an opcode, and the method of `Machine` that binds it


def rule(pattern: str) -> Callable[[Callable], Callable]:
    """Marks a method as that for `pattern`, whose named groups are its arguments beside the operands."""

    def register(method: Callable) -> Callable:
        RULES.append((re.compile(pattern), method))
        return method

    return register


@functools.cache
def find_rule(opcode: str) -> tuple[Callable[..., Run], dict[str, str]] | None:
    for pattern, method in RULES:
        if match := pattern.fullmatch(opcode):
            return method, match.groupdict()
    return None


class Machine:
    """The threads of a cluster of programs, with a kernel's statements bound to their registers.

    Raises:
        NotImplementedError: a statement that is not understood.
    """

    def __init__(self, kernel: Kernel, num_warps: int, num_ctas: int, dynamic_shared: int, early: bool) -> None:
        self.kernel, self.num_ctas, self.early = kernel, num_ctas, early
        self.size = WARP * num_warps * num_ctas
        self.threads = np.arange(self.size)
        self.lane = self.threads % WARP
        program = self.threads // (WARP * num_warps)
        self.pc = np.zeros(self.size, np.int64)
        self.copies: list[Copy] = []
        self.cluster = Cluster()
        self.groups = np.zeros(self.size, np.int64)  # that each thread has committed
        self.buffers = Buffers([])
        variables = {"global_smem": dynamic_shared} | kernel.shared
        if sum(variables.values()) > SHARED_MEMORY:
            raise Fault(f"{kernel.name} wants more shared memory than there is: {variables}")
        self.shared = Shared(variables, program)
        self.parameters = Parameters(kernel.parameters)
        self.symbols = self.parameters.symbols | self.shared.symbols

        self.pools = {kind: [name for name in kernel.registers if kernel.registers[name] == kind] for kind in DTYPES}
        self.values = {kind: np.empty((len(names), self.size), DTYPES[kind]) for kind, names in self.pools.items()}
        self.registers = {name: self.values[kind][i] for kind, names in self.pools.items() for i, name in enumerate(names)}
        names = [f"%{word}.{axis}" for word in ("tid", "ntid", "ctaid", "nctaid", "clusterid", "nclusterid") for axis in "xyz"]
        names += ["%laneid", "%cluster_ctarank", "%cluster_nctarank"]
        self.special = {name: np.zeros(self.size, np.uint32) for name in names}
        self.set_special(
            {"%tid.x": self.threads % (WARP * num_warps), "%laneid": self.lane, "%ntid.x": WARP * num_warps}
            | {"%ntid.y": 1, "%ntid.z": 1, "%cluster_ctarank": program, "%cluster_nctarank": num_ctas}
        )
        self.blocks = [[(self.bind(statement), statement) for statement in block] for block in kernel.blocks]

    def set_special(self, values: dict[str, np.ndarray | int]) -> None:
        for name, value in values.items():
            self.special[name][:] = value

    def run(self, grid: tuple[int, int, int], arguments: list[object]) -> None:
        """All programs of a grid, whose x counts clusters."""
        self.parameters.fill(arguments)
        self.buffers = Buffers([argument for argument in arguments if isinstance(argument, torch.Tensor)])
        self.set_special({f"%nclusterid.{axis}": n for axis, n in zip("xyz", grid, strict=True)})
        self.set_special({f"%nctaid.{axis}": n for axis, n in zip("xyz", (grid[0] * self.num_ctas, *grid[1:]), strict=True)})
        with np.errstate(all="ignore"):
            for z, y, x in itertools.product(*(range(n) for n in reversed(grid))):
                self.set_special({"%clusterid.x": x, "%clusterid.y": y, "%clusterid.z": z})
                ctaid = x * self.num_ctas + self.special["%cluster_ctarank"]
                self.set_special({"%ctaid.x": ctaid, "%ctaid.y": y, "%ctaid.z": z})
                self.run_cluster()

    def run_cluster(self) -> None:
        for values in self.values.values():
            values.view(np.uint8)[:] = 0 if values.dtype.kind == "b" else 0xFF
        self.shared.data[:] = 0xFF
        self.pc[:], self.groups[:] = 0, 0
        self.copies.clear()
        self.cluster = Cluster()
        for _ in range(MAX_STEPS):
            here = int(self.pc.min())
            if here == len(self.blocks):
                return self.cluster.end(self.kernel.name)
            active = self.pc == here
            where: Where = True if active.all() else active
            np.copyto(self.pc, here + 1, where=where)  # unless it jumps
            for run, statement in self.blocks[here]:
                try:
                    run(where)
                except Fault as fault:
                    program = ", ".join(str(self.special[f"%ctaid.{axis}"][0]) for axis in "xyz")
                    raise Fault(f"{self.kernel.name}, program ({program}): {statement.text}: {fault}") from None
        raise Fault(f"{self.kernel.name} does not end")

    # --- operands

    def source(self, operand: str, kind: str) -> np.ndarray | np.generic:
        """What an instruction of type `kind` reads there: a live view of all threads' values, or one value."""
        dtype = DTYPES[kind]
        array = self.registers.get(operand, self.special.get(operand))
        if array is not None:
            if array.itemsize < dtype.itemsize or (array.dtype.kind == "b") != (dtype.kind == "b"):
                raise ValueError(f"{operand} is no {kind}")
            return array.view(dtype)[:: array.itemsize // dtype.itemsize]  # the low bytes
        return dtype.type(self.symbols[operand]) if operand in self.symbols else literal(operand, dtype)

    def target(self, operand: str, kind: str) -> np.ndarray:
        """Where an instruction of type `kind` writes; what is assigned to a wider register is extended by its sign."""
        array, dtype = self.registers[operand], DTYPES[kind]
        if array.itemsize < dtype.itemsize or (array.dtype.kind == "b") != (dtype.kind == "b"):
            raise ValueError(f"{operand} is no {kind}")
        if array.itemsize > dtype.itemsize:
            dtype = np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{array.itemsize}")
        return array.view(dtype)

    def many(self, operand: str, kind: str) -> list[np.ndarray]:
        """The sources in braces, or a single one, a value a thread each."""
        return [np.broadcast_to(self.source(name, kind), self.size) for name in OPERAND.findall(operand.strip("{}"))]

    def address(self, operand: str) -> Callable[[np.ndarray], np.ndarray]:
        base, offset = ADDRESS.fullmatch(operand).groups()
        number = int(offset or "0", 0)
        if base not in self.registers:
            place = self.symbols[base] + number
            return lambda at: np.full(len(at), place)
        array = self.registers[base]
        return lambda at: array[at].astype(np.int64) + number

    def active(self, where: Where) -> np.ndarray:
        return self.threads if where is True else np.flatnonzero(where)

    def whole(self, where: Where, count: int) -> np.ndarray:
        """The numbers of those groups of `count` threads that execute an instruction all together.

        Raises:
            Fault: a group of which some do and some do not.
        """
        groups = np.broadcast_to(where, self.size).reshape(-1, count)
        some = groups.any(1)
        if (some != groups.all(1)).any():
            raise Fault(f"reached by a part of each {count} threads")
        return np.flatnonzero(some)

    # --- instructions

    def bind(self, statement: Statement) -> Run:
        """`statement` as a function of the threads that execute it."""
        found = find_rule(statement.opcode)
        if found is None:
            raise NotImplementedError(statement.text)
        method, groups = found
        try:
            run = method(self, statement.operands, **groups)
            guard = self.registers[statement.guard] if statement.guard else None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise NotImplementedError(statement.text) from error
        if guard is None:
            return run
        if statement.is_negated:
            return lambda where: run(~guard & where)
        return lambda where: run(guard & where)

    def compute(self, operand: str, kind: str, function: Callable, *sources: np.ndarray | np.generic) -> Run:
        out = self.target(operand, kind)
        if isinstance(function, np.ufunc) and out.dtype == DTYPES[kind]:
            return lambda where: function(*sources, out=out, where=where, casting="same_kind")
        return lambda where: np.copyto(out, function(*sources), where=where)

    def elementwise(self, operands: list[str], name: str, kind: str, others: dict[int, str]) -> Run:
        sources = [self.source(operand, others.get(i, kind)) for i, operand in enumerate(operands[1:])]
        function = FUNCTIONS.get(name) or FUNCTIONS[name.partition(".")[0]]
        return self.compute(operands[0], kind, function, *sources)

    @rule(NO_OPERATIONS)
    def nothing(self, operands: list[str]) -> Run:
        return lambda where: None

    @rule(r"bra(?:\.uni)?")
    def branch(self, operands: list[str]) -> Run:
        block = self.kernel.labels[operands[0]]
        return lambda where: np.copyto(self.pc, block, where=where)

    @rule(r"ret")
    def end(self, operands: list[str]) -> Run:
        return lambda where: np.copyto(self.pc, len(self.blocks), where=where)

    @rule(r"bar\.sync")
    def program_barrier(self, operands: list[str]) -> Run:
        if operands != ["0"]:
            raise ValueError("one barrier for all threads is known")
        return lambda where: self.whole(where, self.size // self.num_ctas)

    @rule(r"barrier\.cluster\.(?P<step>arrive|wait)(?P<relaxed>\.relaxed)?(?:\.release|\.acquire)?(?:\.aligned)?")
    def cluster_barrier(self, operands: list[str], step: str, relaxed: str | None) -> Run:
        def run(where: Where) -> None:
            self.whole(where, self.size)
            if (step == "arrive") == self.cluster.has_arrived:
                raise Fault("out of turn")
            self.cluster.has_arrived = step == "arrive"
            if step == "wait":
                self.cluster.has_met = True
                self.cluster.deliver()
            elif not relaxed:
                self.cluster.release()

        return run

    @rule(r"mov\.(?P<kind>pred|[busf](?:16|32|64))")
    def move(self, operands: list[str], kind: str) -> Run:
        to, of = operands
        if to[0] == "{":
            outs = [self.registers[name] for name in OPERAND.findall(to.strip("{}"))]
            parts = self.source(of, kind).view(outs[0].dtype)
            return lambda where: [np.copyto(out, parts[k :: len(outs)], where=where) for k, out in enumerate(outs)]
        if of[0] == "{":
            names = OPERAND.findall(of.strip("{}"))
            parts = self.many(of, f"b{8 * DTYPES[kind].itemsize // len(names)}")
            return self.compute(to, kind, lambda: np.stack(parts, 1).view(DTYPES[kind])[:, 0])
        return self.compute(to, kind, lambda value: value, self.source(of, kind))

    @rule(r"(?P<name>mul|mad)\.wide\.(?P<sign>[us])(?P<bits>16|32)")
    def wide(self, operands: list[str], name: str, sign: str, bits: str) -> Run:
        kind = f"{sign}{2 * int(bits)}"
        a, b = (self.source(operand, sign + bits) for operand in operands[1:3])
        added = self.source(operands[3], kind) if name == "mad" else 0
        return self.compute(operands[0], kind, lambda: np.multiply(a, b, dtype=DTYPES[kind]) + added)

    @rule(r"mul\.hi\.(?P<sign>[us])32")
    def high(self, operands: list[str], sign: str) -> Run:
        a, b = (self.source(operand, f"{sign}32") for operand in operands[1:])
        product = functools.partial(np.multiply, dtype=DTYPES[f"{sign}64"])
        return self.compute(operands[0], f"{sign}32", lambda: (product(a, b) >> 32).astype(DTYPES[f"{sign}32"]))

    @rule(r"setp\.(?P<name>eq|ne|lt|le|gt|ge)\.(?P<kind>[bus](?:16|32|64))")
    @rule(r"setp\.(?P<name>eq|lt|le|gt|ge|neu|ltu|leu|gtu|geu)(?:\.ftz)?\.(?P<kind>f32)")
    def compare(self, operands: list[str], name: str, kind: str) -> Run:
        a, b = (self.source(operand, kind) for operand in operands[1:])
        if name in OPPOSITE:
            return self.compute(operands[0], "pred", lambda: ~FUNCTIONS[OPPOSITE[name]](a, b))
        return self.compute(operands[0], "pred", FUNCTIONS[name], a, b)

    @rule(r"cvt\.(?P<to>[us]\d+)\.(?P<of>[us]\d+)")
    def convert_integer(self, operands: list[str], to: str, of: str) -> Run:
        return self.compute(operands[0], to, lambda value: value.astype(DTYPES[to]), self.source(operands[1], of))

    @rule(r"cvt\.f32\.(?P<of>f16|bf16)")
    def convert_up(self, operands: list[str], of: str) -> Run:
        return self.compute(operands[0], "f32", lambda bits: widen(bits, of), self.source(operands[1], "b16"))

    @rule(r"cvt\.rn\.(?P<to>f16|bf16)(?P<two>x2)?\.f32")
    def convert_down(self, operands: list[str], to: str, two: str | None) -> Run:
        first, *second = self.many("{" + ",".join(operands[1:]) + "}", "f32")
        if two:  # the first operand to the upper half
            return self.compute(
                operands[0], "b32", lambda: narrow(first, to).astype(np.uint32) << 16 | narrow(second[0], to).astype(np.uint32)
            )
        return self.compute(operands[0], "b16", lambda: narrow(first, to))

    def access(self, space: str) -> Callable[..., Iterator[Piece]]:
        if space == "shared::cluster":
            return functools.partial(self.shared.locate, in_cluster=True)
        if space == "global":
            return lambda *where: self.buffers.locate(*where)  # the storages are those of a launch
        return {"param": self.parameters, "shared": self.shared, "shared::cta": self.shared}[space].locate

    @rule(
        r"ld\.(?P<space>param|global|shared(?:::cluster|::cta)?)(?:\.c[ag]|\.L[12]::\w+)*(?P<vector>\.v[24])?\.(?P<kind>[busf](?:8|16|32|64))"
    )
    def load(self, operands: list[str], space: str, vector: str | None, kind: str) -> Run:
        outs = [self.target(name, kind) for name in OPERAND.findall(operands[0].strip("{}"))]
        address, locate, dtype = self.address(operands[1]), self.access(space), DTYPES[kind]
        nbytes = dtype.itemsize * self.count(vector, outs)

        def run(where: Where) -> None:
            at = self.active(where)
            for some, data, places in locate(address(at), at, nbytes, nbytes):
                memory, index = typed(data, dtype), places // dtype.itemsize
                for k, out in enumerate(outs):
                    out[some] = memory[index + k]

        return run

    @rule(r"st\.(?P<space>global|shared(?:::cluster|::cta)?)(?P<vector>\.v[24])?\.(?P<kind>[busf](?:8|16|32|64))")
    def store(self, operands: list[str], space: str, vector: str | None, kind: str) -> Run:
        address, locate, dtype = self.address(operands[0]), self.access(space), DTYPES[kind]
        values = self.many(operands[1], kind)
        nbytes = dtype.itemsize * self.count(vector, values)
        is_late = space == "shared::cluster" and not self.early

        def run(where: Where) -> None:
            at = self.active(where)
            for some, data, places in locate(address(at), at, nbytes, nbytes):
                memory, index = typed(data, dtype), places // dtype.itemsize
                for k, value in enumerate(values):
                    check_agree(index + k, value[some], some)
                    if is_late:
                        is_far = self.shared.program_of(places) != self.shared.program[some]
                        self.cluster.send(memory, index[is_far] + k, value[some[is_far]])
                        memory[index[~is_far] + k] = value[some[~is_far]]
                    else:
                        memory[index + k] = value[some]

        return run

    def count(self, vector: str | None, values: list[np.ndarray]) -> int:
        if len(values) != int((vector or ".v1")[2:]):
            raise ValueError(f"{len(values)} registers for {vector}")
        return len(values)

    @rule(r"createpolicy\.fractional\.L2::\w+\.b64")
    def policy(self, operands: list[str]) -> Run:
        return self.compute(operands[0], "b64", lambda: np.uint64(0))

    @rule(r"atom\.global(?:\.(?:relaxed|acq_rel|gpu))*\.add\.(?P<kind>[us](?:32|64))")
    def atomic_add(self, operands: list[str], kind: str) -> Run:
        out, address, (value,) = self.target(operands[0], kind), self.address(operands[1]), self.many(operands[2], kind)
        nbytes = DTYPES[kind].itemsize

        def run(where: Where) -> None:
            for thread in self.active(where):  # one after the other
                at = np.array([thread])
                for _, data, places in self.buffers.locate(address(at), at, nbytes, nbytes):
                    memory, i = typed(data, DTYPES[kind]), places[0] // nbytes
                    old = memory[i]
                    memory[i] = old + value[thread]
                    out[thread] = old

        return run

    @rule(r"cp\.async\.c[ag]\.shared\.global(?:\.L2::\w+)*")
    def copy(self, operands: list[str]) -> Run:
        to, of, nbytes = self.address(operands[0]), self.address(operands[1]), int(operands[2], 0)
        (wanted,) = self.many(operands[3], "u32")  # bytes that are read: the rest is zeros
        zeros = np.zeros(nbytes, np.uint8)

        def run(where: Where) -> None:
            at = self.active(where)
            sizes = wanted[at].astype(np.int64)
            for _, _, where_to in self.shared.locate(to(at), at, nbytes, nbytes):
                rows = np.flatnonzero(sizes)
                pieces = [*self.buffers.locate(of(at[rows]), rows, sizes[rows], nbytes)]
                nowhere = np.flatnonzero(sizes == 0)
                for rows, data, places in [*pieces, (nowhere, zeros, np.zeros(len(nowhere), np.int64))]:
                    threads = at[rows]
                    asked = Copy(threads, self.groups[threads], where_to[rows], data, places, sizes[rows], nbytes)
                    if self.early:
                        self.perform(asked)
                    else:
                        self.copies.append(asked)

        return run

    def perform(self, copy: Copy) -> None:
        column = np.arange(copy.nbytes)
        is_read = column < copy.sizes[:, None]
        index = np.where(is_read, copy.sources[:, None] + column, 0)
        self.shared.data[copy.places[:, None] + column] = np.where(is_read, copy.data[index], 0)

    @rule(r"cp\.async\.commit_group")
    def commit(self, operands: list[str]) -> Run:
        return lambda where: np.add(self.groups, 1, out=self.groups, where=where)

    @rule(r"cp\.async\.wait_group")
    def wait(self, operands: list[str]) -> Run:
        pending = int(operands[0], 0)

        def run(where: Where) -> None:
            done = np.where(where, self.groups - pending, 0)  # groups that are complete from here on
            copies, self.copies = self.copies, []
            for copy in copies:
                is_done = copy.group < done[copy.at]
                if is_done.any():
                    self.perform(copy.select(is_done))
                if not is_done.all():
                    self.copies.append(copy.select(~is_done))

        return run

    @rule(r"mbarrier\.(?P<step>init|arrive\.expect_tx|try_wait\.parity\.acquire\.cluster)\.shared::cta\.b64")
    def barrier_of_bytes(self, operands: list[str], step: str) -> Run:
        """The first phase of an mbarrier object."""
        done = self.target(operands[0], "pred") if step.startswith("try_wait") else None
        address = self.address(operands[0] if step == "init" else operands[1])
        (numbers,) = self.many(operands[-1], "u32")  # of arrivals, of bytes, of the phase

        def run(where: Where) -> None:
            at = self.active(where)
            for some, _, places in self.shared.locate(address(at), at, 8, 8):
                for thread, place in zip(some.tolist(), places.tolist(), strict=True):
                    number = int(numbers[thread])
                    if step == "init":
                        self.cluster.barriers[place] = Barrier(number)
                        continue
                    barrier = self.cluster.barrier(place)
                    if done is None:
                        barrier.expected += number
                        barrier.arrivals -= 1
                    elif number:
                        raise Fault("waits for another phase than the first")
                    else:
                        done[thread] = barrier.is_complete()

        return run

    @rule(r"st\.async\.shared::cluster\.mbarrier::complete_tx::bytes(?P<vector>\.v[24])?\.(?P<kind>f32|b32|u32)")
    def send(self, operands: list[str], vector: str | None, kind: str) -> Run:
        to, barrier_at, dtype = self.address(operands[0]), self.address(operands[2]), DTYPES[kind]
        values = self.many(operands[1], kind)
        nbytes = dtype.itemsize * self.count(vector, values)
        locate = self.access("shared::cluster")

        def run(where: Where) -> None:
            at = self.active(where)
            self.cluster.check_met(len(at) > 0)
            ((_, data, places),) = locate(to(at), at, nbytes, nbytes)
            ((_, _, barriers),) = locate(barrier_at(at), at, 8, 8)
            if (self.shared.program_of(places) != self.shared.program_of(barriers)).any():
                raise Fault("counts bytes off a barrier of another program than they are sent to")
            memory, index = typed(data, dtype), places // dtype.itemsize
            for place in set(barriers.tolist()):
                mine, barrier = barriers == place, self.cluster.barrier(place)
                barrier.nbytes += nbytes * int(mine.sum())
                barrier.sent += [(memory, index[mine] + k, value[at[mine]].copy()) for k, value in enumerate(values)]

        return run

    @rule(r"mapa\.shared::cluster\.u32")
    def map_address(self, operands: list[str]) -> Run:
        own, rank = (self.source(operand, "u32") for operand in operands[1:])
        return self.compute(operands[0], "u32", lambda: (own & OFFSET) | ((rank + np.uint32(1)) << RANK_SHIFT))

    @rule(r"shfl\.sync\.(?P<name>bfly|idx|up|down)\.b32")
    def shuffle(self, operands: list[str], name: str) -> Run:
        out = self.target(operands[0], "b32")
        value, by, limits, members = (self.many(operand, "b32")[0] for operand in operands[1:])

        def run(where: Where) -> None:
            keep, last = limits.astype(np.int64) >> 8 & 31, limits.astype(np.int64) & 31
            bound = (self.lane & keep) | (last & ~keep)
            lane = SHUFFLES[name](self.lane, by.astype(np.int64) & 31, keep)
            lane = np.where(lane >= bound if name == "up" else lane <= bound, lane, self.lane)
            other = self.threads - self.lane + lane
            executes = np.broadcast_to(where, self.size)
            is_named = (members >> self.lane.astype(np.uint32) & 1).astype(bool)
            in_some = executes.reshape(-1, WARP).any(1).repeat(WARP)
            if (in_some & (executes != is_named)).any() or (executes & ~executes[other]).any():
                raise Fault("is for other threads than are there")
            np.copyto(out, value[other], where=where)

        return run

    @rule(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared\.b16")
    def load_matrix(self, operands: list[str], count: str, trans: str | None) -> Run:
        outs = [self.target(name, "b32") for name in OPERAND.findall(operands[0].strip("{}"))]
        address, n = self.address(operands[1]), int(count)

        def run(where: Where) -> None:
            warps = self.whole(where, WARP)
            rows = (warps[:, None] * WARP + np.arange(8 * n)).ravel()  # the threads that tell where a row lies
            for _, data, places in self.shared.locate(address(rows), rows, 16, 16):
                matrices = typed(data, DTYPES["b16"])[places[:, None] // 2 + np.arange(8)].reshape(-1, n, 8, 8)
                if trans:
                    matrices = matrices.swapaxes(2, 3)
                pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, n, WARP)
                at = (warps[:, None] * WARP + np.arange(WARP)).ravel()
                for k, out in enumerate(outs):
                    out[at] = pairs[:, k].ravel()

        return run

    @rule(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?P<kind>f16|bf16)\.(?P=kind)\.f32")
    def multiply(self, operands: list[str], kind: str) -> Run:
        outs = [self.target(name, "f32") for name in OPERAND.findall(operands[0].strip("{}"))]
        a, b, c = self.many(operands[1], "b32"), self.many(operands[2], "b32"), self.many(operands[3], "f32")

        def halves(registers: list[np.ndarray], at: np.ndarray) -> np.ndarray:
            """(warps, registers, group of 4 threads, thread of it, half) in fp64."""
            bits = np.stack([register.reshape(-1, WARP)[at] for register in registers], 1)
            return widen(bits.view(np.uint16), kind).astype(np.float64).reshape(len(at), len(registers), 8, 4, 2)

        def run(where: Where) -> None:
            at = self.whole(where, WARP)
            # Registers of the first operand are (lower or upper half of K, lower or upper half of the rows).
            rows = halves(a, at).reshape(-1, 2, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4, 5).reshape(-1, 16, 16)
            columns = halves(b, at).transpose(0, 1, 3, 4, 2).reshape(-1, 16, 8)
            # Those of the sum are (lower or upper half of the rows, even or odd column).
            added = np.stack([register.reshape(-1, WARP)[at] for register in c], 1).reshape(-1, 2, 2, 8, 4)
            added = added.transpose(0, 1, 3, 4, 2).reshape(-1, 16, 8)
            total = (rows @ columns + added).astype(np.float32).reshape(-1, 2, 8, 4, 2).transpose(0, 1, 4, 2, 3)
            total = total.reshape(-1, 4, WARP)
            for k, out in enumerate(outs):
                out.reshape(-1, WARP)[at] = total[:, k]

        return run


for pattern, others in ELEMENTWISE:
    rule(pattern)(functools.partial(Machine.elementwise, others=others))
