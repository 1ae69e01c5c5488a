"""TPU slices that need not be attached: their chips, names, devices and links.

``v5p:4x4x4`` is a generation and the shape of its torus in chips, as libtpu spells it;
``2xv5e:16x16`` is two such slices joined by the data-centre network.
"""

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import topologies

GIB = 2**30

# Shapes that can be rented. Larger 3D ones are made of cubes of 4 x 4 x 4 chips.
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    *("8x8x8", "8x8x12", "8x8x16", "8x16x16", "16x16x16", "16x16x24"),
)
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


class Chip(NamedTuple):
    """Published figures of one chip of a generation.

    Peak, HBM and interconnect: Google Cloud's "System architecture" pages of TPU v4,
    v5e, v5p and v6e (bidirectional interconnect per chip / ports / 2 is a link in one
    direction), v4 also Jouppi et al., 2023 (arXiv 2304.01433), Table 4. ``usable``: the
    HBM that libtpu lets a program have, from its own out-of-memory errors; the rest of
    the capacity is the runtime's.
    """

    hbm_gib: float  # capacity
    usable_gib: float
    flops: float  # dense bf16, per second
    hbm_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second of one link in one direction
    network_bandwidth: float  # bytes per second between slices; 0: not published
    wraps_at: int  # lengths of a torus' side that are multiples of it close to a ring
    shapes: tuple[str, ...]
    config: str  # libtpu's: "megacore" makes one device of a chip's two cores


CHIPS = {
    "v4": Chip(32, 30.75, 275e12, 1200e9, 50e9, 0.0, 4, _CUBES[:-3], "megacore"),
    "v5e": Chip(16, 15.75, 197e12, 819e9, 50e9, 3.125e9, 16, _SQUARES, "default"),
    "v5p": Chip(95, 95.74, 459e12, 2765e9, 100e9, 6.25e9, 4, _CUBES, "megacore"),
    "v6e": Chip(32, 31.25, 918e12, 1638e9, 100e9, 12.5e9, 16, _SQUARES, "default"),
}


class Slice(NamedTuple):
    """One or more equal slices of a generation."""

    generation: str
    sides: tuple[int, ...]  # of the torus, in chips
    copies: int = 1  # slices joined by the data-centre network

    @property
    def chip(self) -> Chip:
        """Figures of its chips."""
        return CHIPS[self.generation]

    @property
    def size(self) -> int:
        """Chips of all slices."""
        return self.copies * math.prod(self.sides)

    def wraps(self, dimension: int) -> bool:
        """Whether the torus closes to a ring in a dimension.

        3D slices do in all dimensions once each is made of whole cubes; 2D ones where a
        side is as long as the pod.
        """
        sides = self.sides if len(self.sides) == 3 else (self.sides[dimension],)
        return all(side % self.chip.wraps_at == 0 for side in sides)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.sides))
        return f"{f'{self.copies}x' * (self.copies > 1)}{self.generation}:{shape}"


def parse(name: str) -> Slice:
    """A slice by its name.

    Raises:
        ValueError: there is no such slice; the nearest ones first.
    """
    known = [f"{kind}:{shape}" for kind, chip in CHIPS.items() for shape in chip.shapes]
    found = re.fullmatch(r"(?:(\d+)x)?(v\w+:[\dx]+)", name)
    if not found or found[2] not in known or found[1] == "0":
        near = difflib.get_close_matches(name, known, 3, 0.4)
        lists = "; ".join(
            f"{kind}: {', '.join(chip.shapes)}" for kind, chip in CHIPS.items()
        )
        raise ValueError(
            f"there is no slice {name!r}"
            + (f"; did you mean {' or '.join(near)}?" if near else ".")
            + f" A slice is GENERATION:SHAPE in chips, such as v5p:4x4x4, and "
            f"2xv5e:16x16 is two of them. There are {lists}"
        )
    generation, shape = found[2].split(":")
    sides = tuple(int(side) for side in shape.split("x"))
    return Slice(generation, sides, int(found[1] or 1))


def devices(target: Slice) -> Sequence[jax.Device]:
    """Devices of a slice that can be compiled for, but not run on.

    Raises:
        ValueError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "planning compiles for TPUs with libtpu, which is not installed: "
            'python -m pip install "radit_jax[tpu]"'
        )
    # libtpu asks the cloud's metadata server who it is, and complains where there is
    # none. Not read again once it is loaded, so a TPU host keeps its own values.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    # Two programs cannot share a TPU, but can compile at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    host = tuple(min(side, 2) for side in target.sides) + (1,) * (3 - len(target.sides))
    topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name=str(target._replace(copies=1)),
        chip_config_name=target.chip.config,
        chips_per_host_bounds=(*host[:2], 1),
        num_slices=target.copies,
    )
    return topology.devices


class Links(NamedTuple):
    """How the devices of a group reach each other."""

    chips: int  # of the group, in one slice
    bandwidth: float  # bytes per second that can flow into a chip from its own slice
    slices: int  # that the group is spread over
    network: float  # bytes per second that can flow into a chip from other slices


@runtime_checkable
class Placed(Protocol):
    """A device of a slice: it has ``slice_index`` too where there are several."""

    coords: Sequence[int]  # place in the torus


def _position(device: Placed) -> tuple[int, tuple[int, ...]]:
    """Slice and place in it."""
    return getattr(device, "slice_index", None) or 0, tuple(device.coords)


def links(target: Slice, group: Sequence[Placed]) -> Links:
    """What connects a group of devices, at best.

    A group spread over a side of the torus reaches a chip by two links where the side
    closes to a ring that the group fills, else by one: the chip at the end of a line
    has no other. Sides add up.
    """
    positions = [_position(device) for device in group]
    slices = len({slice_ for slice_, _ in positions})
    places = np.array(
        [place for slice_, place in positions if slice_ == positions[0][0]]
    )
    ways = 0
    for dimension in range(len(target.sides)):
        spread = len(np.unique(places[:, dimension]))
        if spread > 1:
            ring = spread == target.sides[dimension] and target.wraps(dimension)
            ways += 2 if ring else 1
    chip = target.chip
    return Links(
        len(places), ways * chip.link_bandwidth, slices, chip.network_bandwidth
    )
