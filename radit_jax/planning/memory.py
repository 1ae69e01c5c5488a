"""What fills a chip's HBM while a compiled program runs, by kind and by name.

Read from what the compiler writes down: its buffer assignment (which value lies where)
and live ranges (from when to when).
"""

import collections
import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from radit_jax.planning.hlo import (
    PASSES,
    Array,
    HloError,
    Instruction,
    Module,
    arrays,
)

GRADIENTS = "gradients"
CASTS = "weights in compute precision"
KEPT = "activations kept for the backward pass"
TEMPORARIES = "temporaries"
UNUSED = "gaps between buffers"
CODE = "program"


class Buffer(NamedTuple):
    """A stretch of HBM at the moment when most of it is in use."""

    kind: str
    bytes: int
    shape: str
    name: str  # of the argument, or the named scopes it was made under


class Memory(NamedTuple):
    """HBM of one device, in bytes."""

    kinds: dict[str, int]
    buffers: list[Buffer]  # largest first

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self.kinds.values())


class _Value(NamedTuple):
    name: str  # of the instruction
    element: int | None  # of a tuple
    size: int
    offset: int
    array: Array


class _Allocation(NamedTuple):
    size: int
    what: str  # "parameter 3, shape ...", "preallocated-temp"
    values: list[_Value]


_ALLOCATION = re.compile(r"allocation \d+: size (\d+),(.*)$")
_VALUE = re.compile(
    r" value: <\d+ ([^\s{]+)(?:{([\d,]*)})?(?: \(phi\))? @\d+> "
    r"\(size=(\d+),offset=(\d+)\): (.*)$"
)
_RANGE = re.compile(r"^    ([^\s{]+){([\d,]*)}:(\d+)-(\d+)$")


def measure(
    module: Module,
    assignment: str,
    live_ranges: str,
    kind_of: Callable[[str], str],
    code_bytes: int,
    weights: str = "weights",
) -> Memory:
    """Account for all HBM of a program.

    Args:
        module: the program.
        assignment: text of the compiler's buffer assignment.
        live_ranges: text of its live ranges.
        kind_of: kind of an argument, by its name.
        code_bytes: of the program itself.
        weights: kind of the arguments that are trained; what has their shape is a
            gradient, or a copy in another type.

    Raises:
        HloError: the texts are not what this reader knows.
    """
    reader = _Reader(module, live_ranges)
    named = {p.index: p for p in module.entry.parameters}
    shapes: set[tuple[int, ...]] = set()
    kinds: collections.Counter[str] = collections.Counter()
    buffers = []
    temporary: list[_Allocation] = []
    for allocation in _allocations(assignment):
        if "color" in allocation.what or "thread-local" in allocation.what:
            continue
        found = re.search(r"parameter (\d+)", allocation.what)
        if found:
            parameter = named[int(found[1])]
            kind = kind_of(parameter.scope)
            if kind == weights:
                shapes.add(tuple(sorted(parameter.arrays[0].dims)))
            shape = str(parameter.arrays[0])
            buffers.append(Buffer(kind, allocation.size, shape, parameter.scope))
            kinds[kind] += allocation.size
        elif "preallocated-temp" in allocation.what:
            temporary.append(allocation)
        else:
            kinds["outputs and constants"] += allocation.size
    for allocation in temporary:
        used = 0
        for buffer in reader.at_peak(allocation, shapes):
            buffers.append(buffer)
            kinds[buffer.kind] += buffer.bytes
            used += buffer.bytes
        kinds[UNUSED] += allocation.size - used
    kinds[CODE] = code_bytes
    buffers.sort(key=lambda b: -b.bytes)
    return Memory({k: n for k, n in kinds.items() if n}, buffers)


def _allocations(text: str) -> list[_Allocation]:
    found: list[_Allocation] = []
    for line in text.splitlines():
        head = _ALLOCATION.match(line)
        if head:
            found.append(_Allocation(int(head[1]), head[2], []))
            continue
        value = _VALUE.match(line)
        if value and found:
            made = arrays(value[5])
            if made:
                index = int(value[2].split(",")[0]) if value[2] else None
                found[-1].values.append(
                    _Value(value[1], index, int(value[3]), int(value[4]), made[0])
                )
    if not found:
        raise HloError("no allocation in the text of the buffer assignment")
    return found


class _Reader:
    def __init__(self, module: Module, live_ranges: str):
        self.instructions: dict[str, Instruction] = {}
        self.home: dict[str, str] = {}
        # Bodies of loops: the loop, by the name of its body.
        self.loops: dict[str, Instruction] = {}
        for computation in module.computations.values():
            for instruction in computation:
                self.instructions[instruction.name] = instruction
                self.home[instruction.name] = computation.name
                if instruction.opcode == "while":
                    self.loops[instruction.called("body") or ""] = instruction
        self.module = module
        self.order: list[str] = []
        self.ranges: dict[tuple[str, int | None], tuple[int, int]] = {}
        for line in live_ranges.splitlines():
            place = re.match(r"^    (\d+):(\S+)$", line)
            if place:
                self.order.append(place[2])
                continue
            found = _RANGE.match(line)
            if found:
                index = int(found[2].split(",")[0]) if found[2] else None
                self.ranges[found[1], index] = (int(found[3]), int(found[4]))

    def at_peak(
        self, allocation: _Allocation, weights: set[tuple[int, ...]]
    ) -> list[Buffer]:
        """What lies in an allocation when most of it is in use."""
        values = [
            (v, self.ranges[v.name, v.element])
            for v in allocation.values
            if (v.name, v.element) in self.ranges and v.array.space == 0
        ]
        moment = self._peak(values)
        alive: dict[tuple[int, int], tuple[_Value, int]] = {}
        for value, (start, stop) in values:
            if start <= moment <= stop:
                # Names of one place are one buffer; the longest-lived tells most.
                before = alive.get((value.offset, value.size))
                if before is None or stop - start > before[1]:
                    alive[value.offset, value.size] = (value, stop - start)
        return [
            Buffer(self._kind(v, weights), v.size, str(v.array), self._label(v))
            for v, _ in alive.values()
        ]

    def _peak(self, values: Sequence[tuple[_Value, tuple[int, int]]]) -> int:
        """The moment at which the places in use hold the most bytes."""
        changes: dict[int, list[tuple[int, tuple[int, int]]]] = {}
        for value, (start, stop) in values:
            place = (value.offset, value.size)
            changes.setdefault(start, []).append((1, place))
            changes.setdefault(stop + 1, []).append((-1, place))
        count: collections.Counter[tuple[int, int]] = collections.Counter()
        used = most = at = 0
        for moment in sorted(changes):
            for step, place in changes[moment]:
                was = count[place] > 0
                count[place] += step
                used += place[1] * ((count[place] > 0) - was)
            if used > most:
                most, at = used, moment
        return at

    def _kind(self, value: _Value, weights: set[tuple[int, ...]]) -> str:
        origin = self._origin(value.name, value.element)
        backward = self._backward(origin)
        if tuple(sorted(value.array.dims)) in weights and len(value.array.dims) > 1:
            whole = value.array.dtype == "f32"
            return GRADIENTS if whole or backward else CASTS
        if not backward and self._read_backward.get(origin, False):
            return KEPT
        return TEMPORARIES

    @functools.cached_property
    def _read_backward(self) -> dict[tuple[str, int | None], bool]:
        """Whether what was made at an origin is still read in the backward pass."""
        found: dict[tuple[str, int | None], bool] = {}
        for (name, index), (_, stop) in self.ranges.items():
            if name not in self.instructions:
                continue
            origin = self._origin(name, index)
            last = self.order[min(stop, len(self.order) - 1)]
            if last in self.instructions and self._backward((last, None)):
                found[origin] = True
        return found

    def _origin(self, name: str, index: int | None) -> tuple[str, int | None]:
        """The instruction that first made what loops and the like pass on."""
        for _ in range(100):
            instruction = self.instructions[name]
            if instruction.opcode == "get-tuple-element":
                name, index = instruction.operands[0], instruction.index
                continue
            if instruction.opcode == "bitcast":
                name = instruction.operands[0]
                continue
            stack = self._updated(instruction, index)
            if stack is not None:
                name, index = stack, None
                continue
            loop = None
            if instruction.opcode == "while":
                loop = instruction
            elif instruction.opcode == "parameter":
                loop = self.loops.get(self.home[name])
            if loop is None or index is None:
                break
            carried = self.instructions[loop.operands[0]]
            if carried.opcode != "tuple":
                break
            name, index = carried.operands[index], None
        return name, index

    def _updated(self, writer: Instruction, index: int | None) -> str | None:
        """What a fusion writes a slice of, in place; None: it makes something new."""
        if writer.opcode == "dynamic-update-slice":
            return writer.operands[0]
        if writer.opcode != "fusion":
            return None
        inner = self.module[writer.called("calls")]
        result = inner.root
        if result.opcode == "tuple" and index is not None:
            result = inner.by_name[result.operands[index]]
        while result.opcode == "bitcast":
            result = inner.by_name[result.operands[0]]
        if result.opcode != "dynamic-update-slice":
            return None
        stack = inner.by_name[result.operands[0]]
        while stack.opcode == "bitcast":
            stack = inner.by_name[stack.operands[0]]
        return writer.operands[stack.index] if stack.opcode == "parameter" else None

    def _backward(self, origin: tuple[str, int | None]) -> bool:
        return "transpose(" in self._scope(origin[0])

    def _scope(self, name: str) -> str:
        """Of the instruction, or where the compiler made it, of the loop around it."""
        while not (scope := self.instructions[name].scope):
            loop = self.loops.get(self.home[name])
            if loop is None:
                return ""
            name = loop.name
        return scope

    def _label(self, value: _Value) -> str:
        """Of what a loop carries, the scope of what writes it."""
        instruction = self.instructions[value.name]
        loop = None
        if instruction.opcode == "while":
            loop = instruction
        elif instruction.opcode == "parameter":
            loop = self.loops.get(self.home[value.name])
        if loop is not None and value.element is not None:
            result = self.module[loop.called("body")].root
            if result.opcode == "tuple":
                scope = self._written(result.operands[value.element])
                if scope:
                    return scope
        origin, _ = self._origin(value.name, value.element)
        return self._scope(origin) or origin

    def _written(self, name: str) -> str:
        """Scope of what is written into a stack that a loop carries; "": nothing is."""
        writer = self.instructions[name]
        index = None
        if writer.opcode == "get-tuple-element":
            index, writer = writer.index, self.instructions[writer.operands[0]]
        while writer.opcode in ("fusion", "bitcast"):
            if writer.opcode == "bitcast":
                writer = self.instructions[writer.operands[0]]
                continue
            writer = self.module[writer.called("calls")].root
            if writer.opcode == "tuple" and index is not None:
                writer = self.instructions[writer.operands[index]]
        if writer.opcode != "dynamic-update-slice":
            return "" if writer.opcode in ("parameter", "while") else writer.scope
        update = self.instructions[writer.operands[1]]
        while update.opcode in PASSES:
            update = self.instructions[update.operands[0]]
        return update.scope if update.opcode != "parameter" else writer.scope
