"""Names of slices, and the links that a group of chips has."""

import importlib.util
import itertools
import re

import jax
import numpy as np
import pytest

from radit_jax import sharding
from radit_jax.planning import slices

with_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu has wheels for Linux on x86-64 only",
)


def test_names():
    target = slices.parse("v5p:4x4x8")
    assert (target.generation, target.sides, target.copies) == ("v5p", (4, 4, 8), 1)
    assert (target.size, str(target)) == (128, "v5p:4x4x8")
    pair = slices.parse("2xv5e:8x16")
    assert (pair.size, pair.copies, str(pair)) == (256, 2, "2xv5e:8x16")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("v5p:4x4x5", "v5p:4x4x4"),
        ("v5p-4x4x4", "v5p:4x4x4"),
        ("v6:16x16", "v6e:16x16"),
        ("0xv5e:4x4", "v5e:4x4"),
        ("V5E:4x4", "v5e:4x4"),
    ],
)
def test_unknown_slices_name_the_nearest_and_all(name, nearest):
    with pytest.raises(ValueError, match="there is no slice") as error:
        slices.parse(name)
    text = str(error.value)
    assert nearest in text.split("did you mean")[1].split("?")[0]
    for generation in slices.CHIPS:
        assert f"{generation}: " in text


def test_without_libtpu_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(slices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install \"radit_jax\[tpu\]\""):
        slices.devices(slices.parse("v5e:2x2"))


def group(target, *ranges):
    places = itertools.product(*ranges)
    return slices.links(target, [Chip(place) for place in places])


class Chip:
    def __init__(self, place, slice_index=0):
        self.coords = list(place)
        self.slice_index = slice_index


ALL = range(4)
ONE = (0,)


@pytest.mark.parametrize(
    ("ranges", "ways"),
    [
        ((ALL, ONE, ONE), 2),  # a ring
        ((ALL, ALL, ONE), 4),
        ((range(2), ONE, ONE), 1),  # half of a ring is a line
        ((ALL, range(2), ONE), 3),
    ],
)
def test_links_of_a_cube(ranges, ways):
    target = slices.parse("v5p:4x4x4")
    found = group(target, *ranges)
    assert found.bandwidth == ways * 100e9
    assert found.slices == 1


def test_small_slices_do_not_close_to_rings():
    assert group(slices.parse("v5p:2x4x4"), ONE, ALL, ONE).bandwidth == 100e9
    assert group(slices.parse("v5e:4x4"), ALL, ONE).bandwidth == 50e9
    sixteen = range(16)
    assert group(slices.parse("v5e:8x16"), ONE, sixteen).bandwidth == 100e9
    assert group(slices.parse("v5e:8x16"), range(8), ONE).bandwidth == 50e9


def test_groups_over_slices():
    target = slices.parse("2xv5e:4x4")
    found = slices.links(target, [Chip((x, 0), s) for s in (0, 1) for x in ALL])
    assert (found.chips, found.slices) == (4, 2)
    assert found.network == target.chip.network_bandwidth > 0


def test_figures_agree_with_what_training_reports():
    """Peaks stand in two places, for devices by kind and for slices by name."""
    from radit_jax.stages.hardware import PEAK_BF16

    for name, chip in slices.CHIPS.items():
        assert PEAK_BF16[f"TPU {name}"] == pytest.approx(chip.flops, rel=0.005)


@with_libtpu
@pytest.mark.parametrize(
    "name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"], ids=lambda n: n[:3]
)
def test_memory_of_a_chip_is_what_libtpu_lets_a_program_have(name):
    target = slices.parse(name)
    mesh = sharding.make_mesh(4, devices=slices.devices(target))
    rows = int(target.chip.hbm_gib + 1) * 2**18
    one = jax.ShapeDtypeStruct(
        (4, rows, 1024), np.float32, sharding=jax.NamedSharding(mesh, jax.P("data"))
    )
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(lambda x: x.sum(2)).lower(one).compile()
    available = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(refused.value))
    assert float(available[1]) == target.chip.usable_gib


@with_libtpu
def test_a_mesh_over_slices_has_them_along_data():
    devices = slices.devices(slices.parse("2xv5e:4x4"))
    mesh = sharding.make_mesh(4, -1, 2, devices=devices)
    assert mesh.devices.shape == (4, 4, 2)
    for row, expected in zip(mesh.devices, (0, 0, 1, 1), strict=True):
        assert {device.slice_index for device in row.flat} == {expected}
    with pytest.raises(ValueError, match=r"mesh\.data = 1 does not divide over 2 slic"):
        sharding.make_mesh(1, 32, 1, devices=devices)


@with_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x2", "v5e:1x1", "v5e:4x8", "v5p:2x2x1"])
def test_devices_are_one_a_chip(name):
    target = slices.parse(name)
    found = slices.devices(target)
    assert len(found) == target.size
    assert len({tuple(device.coords) for device in found}) == target.size


@with_libtpu
@pytest.mark.parametrize("sizes", [(8, 1, 8), (2, 16, 2), (1, 2, 32)], ids=str)
def test_a_mesh_may_split_a_side_of_the_torus(sizes):
    cube = slices.devices(slices.parse("v5p:4x4x4"))
    mesh = sharding.make_mesh(*sizes, devices=cube)
    assert mesh.devices.shape == sizes
    # Those that share a row fill a box.
    for row in mesh.devices.reshape(-1, sizes[-1]):
        places = np.array([device.coords for device in row])
        assert np.prod(np.ptp(places, axis=0) + 1) == sizes[-1]
