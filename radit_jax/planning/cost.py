"""What one run of a compiled program does: FLOPs, HBM traffic, collectives.

Counted in the optimised module, so recomputation, casts and the partitioner's own
collectives are in it; the body of a loop counts as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from radit_jax.planning.hlo import (
    Array,
    Computation,
    HloError,
    Instruction,
    Module,
    groups,
)

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)
# Instructions that move nothing: names for what is there, or the other half of a start.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"),
    *("conditional", "call", "partition-id", "replica-id", "after-all", "domain"),
    *("optimization-barrier", "opt-barrier", "async-update"),
)


class Collective(NamedTuple):
    """One collective of the program, as often as it runs."""

    kind: str
    group: tuple[int, ...]  # devices of the first group, by place in the mesh
    pairs: bool  # the group is a (source, target)
    bytes: int  # of the full array: what is gathered, reduced or exchanged by a group
    times: int
    scope: str

    @property
    def wire(self) -> float:
        """Bytes that must flow into a chip, all runs together.

        Of n chips: (n - 1) / n of the full array to gather or to reduce and scatter it,
        twice that to do both (an all-reduce), the whole to pass it on.
        """
        if self.pairs:
            return float(self.times * self.bytes)
        n = len(self.group)
        rounds = 2 if self.kind == "all-reduce" else 1
        return self.times * rounds * self.bytes * (n - 1) / n


@dataclasses.dataclass
class Cost:
    """Of one run of the program, on each device."""

    flops: float = 0.0  # of matrix products and convolutions
    kernel_flops: float = 0.0  # of these, inside Pallas kernels
    unit_flops: float = 0.0  # of the matrix units, which take bf16 a pass
    hbm_bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)


# FLOPs of a Pallas kernel, from its call and the arrays it reads.
KernelFlops = Callable[[Instruction, Sequence[Array]], float]


def count(
    module: Module,
    devices: int,
    kernel_flops: KernelFlops,
    loop_trips: int | None = None,
) -> Cost:
    """Count a program.

    Args:
        module: the program of one device.
        devices: that run it together.
        kernel_flops: what a kernel stands for.
        loop_trips: how often loops run that stop on data, if there are any.

    Raises:
        HloError: such a loop, without ``loop_trips``.
    """
    cost = Cost()
    _Counter(module, devices, kernel_flops, loop_trips, cost).computation(
        module.entry, 1
    )
    return cost


class _Counter:
    def __init__(
        self,
        module: Module,
        devices: int,
        kernel_flops: KernelFlops,
        loop_trips: int | None,
        cost: Cost,
    ):
        self.module = module
        self.devices = devices
        self.kernel_flops = kernel_flops
        self.loop_trips = loop_trips
        self.cost = cost

    def computation(self, computation: Computation, times: int) -> None:
        """Everything that a run of it does, ``times`` over."""
        # An asynchronous collective is spread over the fusions that hide it; all its
        # parts name the same chain.
        chains: set[tuple[str, str]] = set()
        for instruction in computation:
            opcode = instruction.opcode
            if opcode == "while":
                trips = self.module.trips(instruction, computation)
                if trips is None:
                    trips = self.loop_trips
                if trips is None:
                    raise HloError(f"cannot tell how often {instruction.name} runs")
                self.computation(self.module[instruction.called("body")], times * trips)
                continue
            if opcode == "conditional":
                for branch in _branches(instruction):
                    self.computation(self.module[branch], times)
                continue
            if opcode == "call":
                self.computation(self.module[instruction.called("to_apply")], times)
                continue
            self.work(instruction, computation, times, chains)
            self.cost.hbm_bytes += times * self.traffic(instruction, computation)

    def work(
        self,
        instruction: Instruction,
        within: Computation,
        times: int,
        chains: set[tuple[str, str]],
    ) -> None:
        """FLOPs and collectives of an instruction and of what is fused into it."""
        opcode = instruction.opcode
        if opcode in ("fusion", "async-start"):
            inner = self.module[instruction.called("calls")]
            scatters = inner.name.startswith("all-reduce-scatter")
            for part in inner:
                self.work(part, inner, times, chains)
            if scatters and self.cost.collectives[-1].kind == "all-reduce":
                # The sum of which every device keeps its share.
                last = self.cost.collectives.pop()
                self.cost.collectives.append(last._replace(kind="reduce-scatter"))
        elif opcode in ("dot", "convolution"):
            of = _dot_flops if opcode == "dot" else _convolution_flops
            flops = times * of(instruction, within)
            self.cost.flops += flops
            self.cost.unit_flops += flops * _passes(instruction, within)
        elif opcode == "custom-call" and "tpu_custom_call" in instruction.attributes:
            read = [within.by_name[name].arrays for name in instruction.operands]
            flops = self.kernel_flops(instruction, [a for part in read for a in part])
            self.cost.flops += times * flops
            self.cost.kernel_flops += times * flops
            self.cost.unit_flops += times * flops
        elif opcode == "recv" and "_xla_megascale_transfer_type" in (
            instruction.attributes
        ):
            self.cost.collectives.append(
                _between_slices(instruction, self.devices, times)
            )
        elif opcode.removesuffix("-start") in COLLECTIVES:
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
            if chain:
                key = (chain[1], channel[1] if channel else "")
                if key in chains:
                    return
                chains.add(key)
            self.cost.collectives.append(
                _collective(instruction, within, self.devices, times)
            )

    def traffic(self, instruction: Instruction, within: Computation) -> float:
        """HBM bytes that an instruction reads and writes."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0.0
        if opcode == "custom-call" and not instruction.operands:
            return 0.0
        inner = None
        if opcode == "fusion":
            inner = self.module[instruction.called("calls")]
        read = 0.0
        for i, name in enumerate(instruction.operands):
            whole = _hbm(within.by_name[name].arrays)
            if whole and inner is not None:
                whole = min(whole, self.read(inner, inner.parameters[i]))
            elif whole and opcode in ("dynamic-slice", "slice", "gather"):
                whole = min(whole, _size(instruction.arrays)) if i == 0 else whole
            elif opcode == "dynamic-update-slice" and i == 0:
                whole = 0.0
            read += whole
        return read + self.written(instruction, within, inner)

    def written(
        self, instruction: Instruction, within: Computation, inner: Computation | None
    ) -> float:
        """HBM bytes of the output; of an update in place, those that change."""
        if instruction.opcode.endswith("-start"):
            # The other half of a copy between memories; read on this side already, or
            # written where only the target is HBM.
            return _hbm(instruction.arrays[:1]) * (
                not any(_hbm(within.by_name[n].arrays) for n in instruction.operands)
            )
        if instruction.opcode == "dynamic-update-slice":
            changed = within.by_name[instruction.operands[1]]
            return min(_hbm(instruction.arrays), _size(changed.arrays))
        if inner is None:
            return _hbm(instruction.arrays)
        outputs = [inner.root]
        if inner.root.opcode == "tuple":
            outputs = [inner.by_name[name] for name in inner.root.operands]
        total = 0.0
        for output, array in zip(outputs, instruction.arrays, strict=False):
            whole = _hbm([array])
            update = self.update(inner, output)
            total += whole if update is None else min(whole, update)
        return total

    def update(self, inner: Computation, output: Instruction) -> float | None:
        """Bytes that an output changes of what it is written over; None: all."""
        while output.opcode in ("bitcast", "fusion"):
            if output.opcode == "fusion":
                inner = self.module[output.called("calls")]
                output = inner.root
            else:
                output = inner.by_name[output.operands[0]]
        if output.opcode != "dynamic-update-slice":
            return None
        return _size(inner.by_name[output.operands[1]].arrays)

    def read(self, inner: Computation, parameter: Instruction) -> float:
        """Bytes that a fusion reads of a parameter: of a stack that it slices, a slice.

        What it only writes over is not read.
        """
        if parameter.root:
            return math.inf
        total = 0.0
        for user in inner.users[parameter.name]:
            if user.opcode == "bitcast":
                total += self.read(inner, user)
            elif user.opcode in ("dynamic-slice", "slice", "gather"):
                total += _size(user.arrays)
            elif (
                user.opcode == "dynamic-update-slice"
                and user.operands[0] == parameter.name
            ):
                continue
            elif user.opcode == "fusion":
                called = self.module[user.called("calls")]
                if all(part.opcode in ("parameter", "bitcast") for part in called):
                    total += self.read(inner, user)
                    continue
                for i, name in enumerate(user.operands):
                    if name == parameter.name:
                        total += self.read(called, called.parameters[i])
            else:
                return math.inf
        return total


def _branches(instruction: Instruction) -> list[str]:
    found = re.search(r"branch_computations={([^}]*)}", instruction.attributes)
    if found:
        return re.findall(r"%([^\s,]+)", found[1])
    names = (instruction.called(f"{side}_computation") for side in ("true", "false"))
    return [name for name in names if name]


def _hbm(found: Sequence[Array]) -> float:
    return float(sum(array.padded for array in found if array.space == 0))


def _size(found: Sequence[Array]) -> float:
    return float(sum(array.padded for array in found))


def _one(name: str, within: Computation) -> Array:
    return within.by_name[name].arrays[0]


def _passes(product: Instruction, within: Computation) -> int:
    """Passes of the matrix units: more precise float32 is several bf16 products.

    Three terms hold a float32, two most of it; products of two small terms are left
    out. The fewest that can do is counted, so that times stay bounds.
    """
    found = re.search(r"operand_precision={(\w+),(\w+)}", product.attributes)
    terms = {"highest": 3, "high": 2}
    parts = [
        terms.get(precision, 1) if _one(name, within).dtype == "f32" else 1
        for precision, name in zip(
            found.groups() if found else ("default", "default"),
            product.operands,
            strict=True,
        )
    ]
    return {(3, 3): 6, (2, 2): 3}.get((parts[0], parts[1]), parts[0] * parts[1])


def _dot_flops(dot: Instruction, within: Computation) -> float:
    left = _one(dot.operands[0], within)
    inner = math.prod(left.dims[i] for i in dot.numbers("lhs_contracting_dims"))
    return 2.0 * math.prod(dot.arrays[0].dims) * inner


def _convolution_flops(convolution: Instruction, within: Computation) -> float:
    """Multiply-adds with padding and the holes of dilation left out.

    TPUs have no dot but this; its batch dimensions come as dilated ones.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if labels is None:
        raise HloError(f"{convolution.name}: no dim_labels")
    left = dict(zip(labels[1], _one(convolution.operands[0], within).dims, strict=True))
    right = dict(
        zip(labels[2], _one(convolution.operands[1], within).dims, strict=True)
    )
    out = dict(zip(labels[3], convolution.arrays[0].dims, strict=True))
    window = _window(convolution.attributes)
    pairs = 1
    for place, side in enumerate(sorted(d for d in out if d.isdigit())):
        pairs *= _pairs(
            left[side],
            right[side],
            out[side],
            {name: values[place] for name, values in window.items()},
        )
    # The kernel's input features are those of one group.
    return 2.0 * pairs * out["b"] * out["f"] * right["i"]


def _window(attributes: str) -> dict[str, list[tuple[int, ...]]]:
    """Stride, padding and dilation of each spatial dimension."""
    found = re.search(r"window={([^}]*)}", attributes)
    read = dict(part.split("=") for part in found[1].split()) if found else {}
    return {
        name: [tuple(int(n) for n in side.split("_")) for side in value.split("x")]
        for name, value in read.items()
        if name != "rhs_reversal"
    }


def _pairs(left: int, right: int, out: int, window: dict[str, tuple[int, ...]]) -> int:
    """Pairs of an output and a kernel position that meet an element."""
    stride = window.get("stride", (1,))[0]
    low = window.get("pad", (0, 0))[0]
    holes, spread = window.get("lhs_dilate", (1,))[0], window.get("rhs_dilate", (1,))[0]
    at = (
        np.arange(out, dtype=np.int64)[:, None] * stride
        + np.arange(right, dtype=np.int64)[None] * spread
        - low
    )
    return int(((at % holes == 0) & (at >= 0) & (at <= (left - 1) * holes)).sum())


def _collective(
    instruction: Instruction, within: Computation, devices: int, times: int
) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    made = instruction.arrays
    read = [within.by_name[name].arrays for name in instruction.operands]
    size_read = sum(array.bytes for part in read for array in part)
    # A start makes a pair of what it reads and what it will have made.
    size_made = sum(array.bytes for array in made)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        size_made = sum(array.bytes for array in made[len(instruction.operands) :][:1])
    full = max(size_read, size_made) if kind != "collective-permute" else size_read
    found = groups(instruction, devices)
    pairs = kind == "collective-permute"
    return Collective(kind, tuple(found[0]), pairs, full, times, instruction.scope)


def _between_slices(recv: Instruction, devices: int, times: int) -> Collective:
    """A collective over the data-centre network: hosts do it, the chip sends and waits.

    Each slice runs a program of its own, in which devices count from 0.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', recv.attributes)
    ids = re.search(r'_xla_megascale_target="{([\d,:]+)}', recv.attributes)
    if kind is None or ids is None:
        raise HloError(f"{recv.name}: which slices take part, and in what?")
    slices = 0
    for part in ids[1].split(","):
        first, _, last = part.partition(":")
        slices += int(last or first) - int(first) + 1
    name = kind[1].lower().replace("_", "-")
    members = tuple(range(0, devices, devices // slices))
    return Collective(name, members, False, recv.arrays[0].bytes, times, recv.scope)


def by_axis(mesh: np.ndarray, names: Sequence[str], collective: Collective) -> str:
    """Mesh axes whose devices take part together, such as ``data+fsdp``.

    Args:
        mesh: places of the devices, an axis a dimension.
        names: of the axes.
        collective: whose group it is.
    """
    coordinates = np.array(
        [np.argwhere(mesh == device)[0] for device in collective.group]
    )
    moving = [
        name
        for name, column in zip(names, coordinates.T, strict=True)
        if len(np.unique(column)) > 1
    ]
    return "+".join(moving) or "none"


def each(collectives: Sequence[Collective]) -> Iterator[Collective]:
    """Equal collectives of a program as one, with their runs added up."""
    found: dict[tuple, Collective] = {}
    for c in collectives:
        key = (c.kind, c.group, c.pairs, c.bytes, c.scope)
        before = found.get(key)
        found[key] = c if before is None else c._replace(times=before.times + c.times)
    yield from found.values()
