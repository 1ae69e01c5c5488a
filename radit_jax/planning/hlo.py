"""Reading a compiled module's text: computations, instructions, shapes, loops."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Bits of an element.
_BITS = {
    **{"pred": 8, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s4": 4, "u4": 4},
    **{"s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32},
    **{"s64": 64, "u64": 64, "f64": 64, "c64": 64, "s2": 2, "u2": 2, "s1": 1, "u1": 1},
    "c128": 128,
}


class HloError(ValueError):
    """A module's text is not what this reader knows."""


class Array(NamedTuple):
    """Type and layout of one array."""

    dtype: str
    dims: tuple[int, ...]
    tile: tuple[int, ...] = ()  # over the most minor dimensions, in memory order
    order: tuple[int, ...] = ()  # dimensions, most minor first
    space: int = 0  # 0: HBM; others are on the chip or the host

    @property
    def bytes(self) -> int:
        """Of its elements alone."""
        return math.prod(self.dims) * _BITS[self.dtype] // 8

    @property
    def padded(self) -> int:
        """Bytes in memory, where tiles fill the last dimensions up."""
        order = self.order or tuple(reversed(range(len(self.dims))))
        minor_first = [self.dims[d] for d in order]
        for i, side in enumerate(reversed(self.tile)):
            if i < len(minor_first):
                minor_first[i] = -(-minor_first[i] // side) * side
            else:
                minor_first.append(side)
        return math.prod(minor_first) * _BITS[self.dtype] // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\](?:\{([^{}]*)\})?")


def arrays(text: str) -> tuple[Array, ...]:
    """All arrays of a type, those of a tuple in order; tokens are none."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        if dtype not in _BITS:
            if dtype in ("token", "opaque"):
                continue
            raise HloError(f"element type {dtype!r} of {text[:80]!r} is not known")
        order, _, rest = layout.partition(":")
        tile = re.search(r"T\(([0-9,]+)\)", rest)
        space = re.search(r"S\((\d+)\)", rest)
        found.append(
            Array(
                dtype,
                _numbers(dims),
                _numbers(tile[1]) if tile else (),
                _numbers(order),
                int(space[1]) if space else 0,
            )
        )
    return tuple(found)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]  # names
    arguments: str  # what stands between the parentheses
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """What it makes."""
        return arrays(self.type)

    @functools.cached_property
    def scope(self) -> str:
        """The named scopes it was written under, as JAX records them."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str | None:
        """Name of the computation that an attribute refers to."""
        found = re.search(rf"\b{attribute}=%?([^,\s}}]+)", self.attributes)
        return found[1] if found else None

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """An attribute such as ``dimensions={0,1}``."""
        found = re.search(rf"\b{attribute}={{([0-9,]*)}}", self.attributes)
        return _numbers(found[1]) if found else ()

    @property
    def index(self) -> int:
        """Of a ``get-tuple-element``, or the number of a ``parameter``."""
        if self.opcode == "parameter":
            return int(self.arguments)
        found = re.search(r"\bindex=(\d+)", self.attributes)
        if found is None:
            raise HloError(f"{self.name}: no index")
        return int(found[1])


class Computation:
    """Instructions in order, by name too."""

    def __init__(self, name: str, instructions: list[Instruction]):
        self.name = name
        self.instructions = instructions
        self.by_name = {i.name: i for i in instructions}

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)

    @functools.cached_property
    def root(self) -> Instruction:
        """What it returns."""
        return next(i for i in self.instructions if i.root)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """In the order they are passed."""
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return sorted(found, key=lambda i: i.index)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads each instruction."""
        found: dict[str, list[Instruction]] = {i.name: [] for i in self.instructions}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found


# What hands a value on as it is.
PASSES = ("bitcast", "copy", "reshape", "optimization-barrier", "convert")


class Module:
    """A compiled program.

    Args:
        text: of the optimised module, one instruction a line.

    Raises:
        HloError: it is no such text.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        entry = None
        name: str | None = None
        lines: list[str] = []
        for line in text.splitlines():
            if name is None:
                head = re.match(r"(ENTRY )?%?([^\s(]+) \(.*\{$", line)
                if head:
                    name, lines = head[2], []
                    entry = name if head[1] else entry
            elif line == "}":
                found = [_instruction(line) for line in lines]
                self.computations[name] = Computation(name, found)
                name = None
            elif line.startswith("  "):
                lines.append(line)
            else:
                # What a kernel says of itself may have line breaks.
                lines[-1] += line
        if entry is None:
            raise HloError("no entry computation; is this the text of a module?")
        self.entry = self.computations[entry]

    def __getitem__(self, name: str | None) -> Computation:
        if name is None or name not in self.computations:
            raise HloError(f"there is no computation {name!r}")
        return self.computations[name]

    def trips(self, loop: Instruction, caller: Computation) -> int | None:
        """How often a ``while`` runs its body; None where data decides."""
        known = re.search(r'known_trip_count[^0-9]*"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition = self[loop.called("condition")]
        compare = condition.root
        while compare.opcode in ("fusion", "call"):
            # The comparison is wrapped; its operands are those of the wrapper.
            wrapped = self[compare.called("calls") or compare.called("to_apply")]
            inner = wrapped.root
            if inner.opcode != "compare":
                return None
            compare = dataclasses.replace(
                inner,
                operands=tuple(
                    compare.operands[wrapped.by_name[name].index]
                    if wrapped.by_name[name].opcode == "parameter"
                    else name
                    for name in inner.operands
                ),
            )
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        first, limit = (
            self._constant(condition, name, loop, caller) for name in compare.operands
        )
        if first is None or limit is None:
            return None
        return max(limit - first, 0)

    def _constant(
        self, condition: Computation, name: str, loop: Instruction, caller: Computation
    ) -> int | None:
        """Value of a condition's operand when the loop starts, where it is constant.

        Loops made by ``jax.lax.scan`` count from 0 in steps of 1.
        """
        found = condition.by_name.get(name)
        if found is None:
            return None
        if found.opcode == "constant":
            return int(found.arguments)
        if found.opcode != "get-tuple-element":
            return None
        carried = caller.by_name[loop.operands[0]]
        return self._initial(caller, carried, found.index)

    def _initial(
        self, caller: Computation, carried: Instruction, index: int
    ) -> int | None:
        if carried.opcode != "tuple":
            return None
        value = caller.by_name[carried.operands[index]]
        while value.opcode in PASSES:
            value = caller.by_name[value.operands[0]]
        return int(value.arguments) if value.opcode == "constant" else None


def _instruction(line: str) -> Instruction:
    line = line.strip()
    root = line.startswith("ROOT ")
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = start + _closing(rest[start:])
    arguments = rest[start + 1 : end]
    operands = tuple(re.findall(r"%([^\s,()]+)", arguments))
    opcode = rest[:start]
    return Instruction(
        name.lstrip("%"), opcode, kind, operands, arguments, rest[end + 1 :], root
    )


def _closing(text: str) -> int:
    """Position of the parenthesis that closes the one at the start."""
    depth = 0
    for place in re.finditer(r"[()]", text):
        depth += 1 if place[0] == "(" else -1
        if depth == 0:
            return place.start()
    raise HloError(f"parentheses of {text[:80]!r} do not match")


def groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """Which devices take part together in a collective, as rows of the device list."""
    text = instruction.attributes
    if "source_target_pairs=" in text:
        pairs = re.search(r"source_target_pairs={([{}0-9,]*)}", text)
        assert pairs is not None
        return [list(_numbers(g)) for g in re.findall(r"{([0-9,]+)}", pairs[1])]
    found = re.search(r"replica_groups={((?:{[0-9,]*},?)*)}", text)
    if found:
        listed = [list(_numbers(g)) for g in re.findall(r"{([0-9,]*)}", found[1])]
        return listed or [list(range(devices))]
    found = re.search(
        r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", text
    )
    if found:
        return _iota(_numbers(found[2]), found[3]).reshape(_numbers(found[1])).tolist()
    found = re.search(
        r"replica_groups=mesh\[([^\]]*)\]"
        r"(?:, device_ids=\(\[([0-9,]+)\](?:T\(([0-9,]+)\))?\))?"
        r" {([^}]*)}",
        text,
    )
    if found is None:
        raise HloError(f"{instruction.name}: replica groups of {text[:200]!r}")
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
    order = _iota(_numbers(found[2]), found[3]) if found[2] else np.arange(devices)
    mesh = order.reshape(tuple(sizes.values()))
    within = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", found[4])]
    across = [i for i in range(len(sizes)) if i not in within]
    size = math.prod(mesh.shape[i] for i in within)
    return mesh.transpose(*across, *within).reshape(-1, size).tolist()


def _iota(dims: tuple[int, ...], transpose: str | None) -> np.ndarray:
    numbers = np.arange(math.prod(dims)).reshape(dims)
    if transpose:
        numbers = numbers.transpose(_numbers(transpose))
    return numbers.reshape(-1)
