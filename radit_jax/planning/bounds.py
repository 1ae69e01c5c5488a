"""From what a program does to the least time it can take on a slice."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from radit_jax.planning import slices
from radit_jax.planning.cost import Collective, Cost, by_axis, each


class Traffic(NamedTuple):
    """A collective of the program with where it runs and what it costs at least."""

    kind: str
    axis: str  # mesh axes, joined by "+"
    chips: int  # that take part together
    bytes: int  # of the full array, once
    times: int
    wire: float  # bytes into each chip, all runs together
    seconds: float  # of all runs
    scope: str


class Bounds(NamedTuple):
    """Least seconds of a step, by what would be the only thing to wait for."""

    compute: float
    hbm: float
    axes: dict[str, float]  # interconnect, by mesh axis
    traffic: list[Traffic]  # longest first

    @property
    def interconnect(self) -> float:
        """Of all axes, one after the other."""
        return sum(self.axes.values(), 0.0)

    @property
    def step(self) -> float:
        """With everything overlapped: the longest of them.

        Axes may run at the same time, on links of their own.
        """
        return max(self.compute, self.hbm, *self.axes.values(), 0.0)

    @property
    def one_by_one(self) -> float:
        """With the interconnect never hidden behind compute."""
        return max(self.compute, self.hbm) + self.interconnect


def bound(cost: Cost, target: slices.Slice, mesh: Mesh) -> Bounds:
    """Least seconds of each kind of work, from the chip's published figures."""
    traffic = [_traffic(c, target, mesh) for c in each(cost.collectives)]
    axes: dict[str, float] = {}
    for t in traffic:
        axes[t.axis] = axes.get(t.axis, 0.0) + t.seconds
    return Bounds(
        cost.unit_flops / target.chip.flops,
        cost.hbm_bytes / target.chip.hbm_bandwidth,
        dict(sorted(axes.items(), key=lambda item: -item[1])),
        sorted(traffic, key=lambda t: -t.seconds),
    )


def _traffic(collective: Collective, target: slices.Slice, mesh: Mesh) -> Traffic:
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    axis = by_axis(places, mesh.axis_names, collective)
    flat = mesh.devices.reshape(-1)
    reach = slices.links(target, [flat[i] for i in collective.group])
    return Traffic(
        collective.kind,
        axis,
        len(collective.group),
        collective.bytes,
        collective.times,
        collective.wire,
        _seconds(collective, reach),
        collective.scope,
    )


def _seconds(collective: Collective, reach: slices.Links) -> float:
    """Of all runs; between slices, each chip passes on its share of the array."""
    if len(collective.group) < 2:
        return 0.0
    if reach.slices == 1:
        return collective.wire / reach.bandwidth
    if not reach.network:
        raise ValueError("how fast slices of this generation are joined is unpublished")
    share = collective.wire / reach.chips
    within = collective.wire / reach.bandwidth if reach.bandwidth else 0.0
    return max(within, share / reach.network)


def busiest(traffic: Sequence[Traffic], count: int) -> Sequence[Traffic]:
    """The first few that take any time."""
    return [t for t in traffic if t.seconds > 0][:count]
