"""Mesh sizes, and what does not divide over them."""

import jax
import numpy as np
import pytest

from radit_jax import sharding


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 1, -1), (1, 1, 8)),
        ((8, -1, 1), (8, 1, 1)),
        ((2, 2, 2), (2, 2, 2)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(sizes, expected):
    mesh = sharding.make_mesh(*sizes)
    assert tuple(mesh.shape.values()) == expected
    assert tuple(mesh.shape) == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


def test_a_mesh_of_one_takes_one_of_the_devices():
    assert sharding.make_mesh().devices.flat[0] == jax.devices()[0]
    assert sharding.make_mesh().size == 1


def test_devices_can_be_chosen():
    chosen = jax.devices()[4:6]
    mesh = sharding.make_mesh(1, -1, 1, devices=chosen)
    assert list(mesh.devices.flat) == chosen


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((-1, -1, 1), "at most one of them -1"),
        ((0, 1, 1), "must be positive"),
        ((-2, 1, 1), "must be positive"),
        ((3, -1, 1), "8 devices do not divide by 3"),
        ((2, 2, 1), "needs 4 devices, there are 8; set one size to -1"),
        ((4, 4, 1), "needs 16 devices, there are 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_words(sizes, words):
    with pytest.raises(ValueError, match=words):
        sharding.make_mesh(*sizes)


def test_what_does_not_divide_names_the_nearest_size():
    with jax.set_mesh(sharding.make_mesh(1, 2, 4)):
        sharding.check_divides("heads", 8)
        with pytest.raises(ValueError, match=r"heads = 6 .* tensor = 4; .* works is 3"):
            sharding.check_divides("heads", 6)
        with pytest.raises(ValueError, match=r"rows = 6 .* data, fsdp, tensor = 8"):
            sharding.check_divides("rows", 6, sharding.AXES)


def test_rows_are_spread_over_both_data_axes():
    rows_BL = np.arange(16, dtype=np.int32).reshape(8, 2)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        assert sharding.row_shards() == 4
        placed_BL = sharding.put_rows(rows_BL)
        assert placed_BL.sharding.shard_shape((8, 2)) == (2, 2)
    np.testing.assert_array_equal(placed_BL, rows_BL)


def test_key_value_heads_that_do_not_divide_are_kept_whole():
    with jax.set_mesh(sharding.make_mesh(1, 2, 4)):
        whole = sharding.kv_head_spec(2)
        split = sharding.kv_head_spec(4)
    assert whole == jax.P("fsdp", None, None)
    assert split == jax.P("fsdp", "tensor", None)
    assert sharding.without_fsdp(split) == jax.P(None, "tensor", None)


def test_tokens_between_layers_are_split_where_they_divide():
    with jax.set_mesh(sharding.make_mesh(1, 2, 4)):
        assert sharding.stream_spec(False, 6) == sharding.ACT_BLD
        assert sharding.stream_spec(True, 8) == jax.P(("data", "fsdp"), "tensor", None)
        words = r"mesh.sequence, tokens of a row = 6 .* tensor = 4; .* works is 3"
        with pytest.raises(ValueError, match=words):
            sharding.stream_spec(True, 6)
