"""Meshes, axis names and named specs; the only file that spells mesh axes.

Axes are Explicit: the sharding of an array is part of its type, so weights,
gradients and optimizer moments keep theirs without any ``out_shardings``, and an
operation that would have to guess is an error when it is traced. ``pjit`` of older
code is today's ``jax.jit`` over such a mesh.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")

# Rows of a batch are spread over both data-parallel axes.
ROWS = (DATA, FSDP)
ROWS_B = jax.P(ROWS)
ROWS_BL = jax.P(ROWS, None)
# Of micro-batches, one after the other.
PARTS_BL = jax.P(None, ROWS, None)
ACT_BLD = jax.P(ROWS, None, None)
# The same between layers, tokens split over the devices of a row (Korthikanti et al.
# 2022, section 4.2.2): what norms and residuals keep is divided by the tensor axis.
SEQUENCE_BLD = jax.P(ROWS, TENSOR, None)
LOGITS_BLV = jax.P(ROWS, None, TENSOR)

# Weights: FSDP splits the model width, TENSOR splits heads, MLP width, vocabulary.
W_D = jax.P(None)
W_VD = jax.P(TENSOR, FSDP)
W_LD = jax.P(None, FSDP)
W_DHK = jax.P(FSDP, TENSOR, None)
W_HK = jax.P(TENSOR, None)
W_HKD = jax.P(TENSOR, None, FSDP)
W_DF = jax.P(FSDP, TENSOR)
W_F = jax.P(TENSOR)
W_FD = jax.P(TENSOR, FSDP)
# Key/value heads that do not divide over TENSOR are kept whole on every device.
W_DGK_WHOLE = jax.P(FSDP, None, None)

# Every device holds its own rows of the retrieval index.
INDEX_NE = jax.P(AXES, None)
CANDIDATES_BC = jax.P(None, AXES)
REPLICATED = jax.P()


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh of a run; one size may be -1, "all the devices that are left".

    Args:
        data: replicas that see different rows and hold the same weights.
        fsdp: devices that see different rows and share one copy of the weights.
        tensor: devices that share one row by splitting heads, MLP and vocabulary.
        devices: the devices to use; by default all of all processes, or the first one
            if the mesh is (1, 1, 1) and there is one process, so that a laptop recipe
            runs anywhere.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or ``data`` does
            not divide over TPU slices that only the data-centre network joins.
    """
    sizes = [data, fsdp, tensor]
    if devices is None:
        devices = jax.devices()
        # With several processes each must have a device in it.
        if sizes == [1, 1, 1] and jax.process_count() == 1:
            devices = devices[:1]
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ValueError(
            f"mesh sizes must be positive, at most one of them -1; got {sizes}"
        )
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        if len(devices) % known:
            raise ValueError(
                f"mesh (data, fsdp, tensor) = {tuple(sizes)}: {len(devices)} devices "
                f"do not divide by {known}"
            )
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh (data, fsdp, tensor) = {tuple(sizes)} needs {math.prod(sizes)} "
            f"devices, there are {len(devices)}; set one size to -1 to use them all"
        )
    kinds = (AxisType.Explicit,) * 3
    count = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if count == 1:
        # A torus' side is split between axes only where they fit no other way.
        grid = mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=True
        )
        return Mesh(grid, AXES, axis_types=kinds)
    # Only replicas are joined by the network: they exchange gradients once a step.
    if sizes[0] % count:
        raise ValueError(
            f"mesh.data = {sizes[0]} does not divide over {count} slices; set it "
            f"to {count} or a multiple of it"
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // count, *sizes[1:]),
        (count, 1, 1),
        devices,
        allow_split_physical_axes=True,
    )
    return Mesh(grid, AXES, axis_types=kinds)


def without_fsdp(spec: jax.P) -> jax.P:
    """The spec of a weight once it is gathered for use."""
    return jax.P(*(None if axis == FSDP else axis for axis in spec))


def stream_spec(sequence: bool, tokens: int) -> jax.P:
    """How activations [B, L, D] are kept between layers.

    Args:
        sequence: the setting ``mesh.sequence``.
        tokens: L.

    Raises:
        ValueError: tokens do not divide over the tensor axis.
    """
    if not sequence:
        return ACT_BLD
    check_divides("with mesh.sequence, tokens of a row", tokens)
    return SEQUENCE_BLD


def kv_head_spec(heads: int) -> jax.P:
    """Spec of a (D, G, K) weight for the current mesh."""
    if heads % jax.sharding.get_abstract_mesh().shape.get(TENSOR, 1):
        return W_DGK_WHOLE
    return W_DHK


def check_divides(what: str, size: int, axes: Sequence[str] = (TENSOR,)) -> None:
    """Raise a ValueError in words if ``size`` does not split over the mesh axes."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape.get(axis, 1) for axis in axes)
    if size % parts:
        divisors = [n for n in range(1, parts + 1) if size % n == 0]
        raise ValueError(
            f"{what} = {size} does not divide over mesh axes {', '.join(axes)} = "
            f"{parts}; the nearest size that works is {divisors[-1]}"
        )


def local_size(shape: tuple[int, ...], spec: jax.P) -> int:
    """Elements of an array that each device of the current mesh holds."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(NamedSharding(mesh, spec).shard_shape(shape))


def row_shards() -> int:
    """Over how many devices the rows of a batch are spread."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in ROWS)


def check_rows(rows: int, what: str) -> None:
    """Raise a ValueError in words if rows of a batch do not spread over the devices.

    Args:
        rows: of all devices together.
        what: the setting with its value.
    """
    shards = row_shards()
    if rows % shards:
        raise ValueError(
            f"{what} do not divide over the {shards} devices of mesh axes "
            f"{' x '.join(ROWS)}; the nearest multiple is "
            f"{max(round(rows / shards), 1) * shards}"
        )


def process_rows() -> tuple[int, int]:
    """Which part of a batch's rows the devices of this process hold, of how many.

    Processes that only split heads among each other hold the same part, and must read
    the same data.

    Raises:
        ValueError: the parts of two processes overlap without being the same.
    """
    mesh = jax.sharding.get_mesh()
    parts: dict[int, set[int]] = {}
    places = NamedSharding(mesh, ROWS_B).devices_indices_map((row_shards(),))
    for device in mesh.devices.flat:
        row, _, _ = places[device][0].indices(row_shards())
        parts.setdefault(device.process_index, set()).add(row)
    distinct = sorted({tuple(sorted(rows)) for rows in parts.values()})
    if sum(map(len, distinct)) != row_shards():
        raise ValueError(
            f"mesh (data, fsdp, tensor) = {tuple(mesh.shape.values())}: the rows of a "
            f"batch do not split over the {len(parts)} processes; let the sizes of "
            f"{' and '.join(ROWS)} multiply to a multiple of {len(parts)}, or to a "
            "divisor of it"
        )
    mine = tuple(sorted(parts[jax.process_index()]))
    return distinct.index(mine), len(distinct)


def own_mesh() -> Mesh:
    """The devices of this process alone, for models that fit there: what each process
    does by itself needs no other one.

    It is the current mesh where there is but one process.
    """
    if jax.process_count() == 1:
        return jax.sharding.get_mesh()
    devices = jax.local_devices()
    return make_mesh(data=len(devices), devices=devices)


def put(array: np.ndarray, spec: jax.P) -> jax.Array:
    """Place a host array, whole on every process, on the current mesh."""
    array = np.asarray(array)
    placement = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.make_array_from_callback(array.shape, placement, lambda at: array[at])


def put_rows(array: np.ndarray) -> jax.Array:
    """Place a host array, whole on every process, its first axis over the rows."""
    return put(array, rows_spec(array.ndim))


def put_own(array: np.ndarray, spec: jax.P) -> jax.Array:
    """Place this process' part of an array (see ``process_rows``) on the current mesh;
    the parts of all processes together are the array."""
    placement = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.make_array_from_process_local_data(placement, np.asarray(array))


def put_own_rows(array: np.ndarray) -> jax.Array:
    """Place this process' rows of an array, its first axis over the rows."""
    return put_own(array, rows_spec(array.ndim))


def rows_spec(dimensions: int) -> jax.P:
    """Spec of an array whose first axis is the rows of a batch."""
    return jax.P(ROWS, *(None,) * (dimensions - 1))


def fetch(array: jax.Array) -> np.ndarray:
    """An array of the current mesh as one on the host, whole on every process.

    All processes must ask for it together.
    """
    if not (array.is_fully_addressable or array.is_fully_replicated):
        array = _replicated(array)
    return np.asarray(array)


@jax.jit
def _replicated(array: jax.Array) -> jax.Array:
    return jax.sharding.reshard(array, REPLICATED)


def from_each(array: np.ndarray) -> np.ndarray:
    """Host arrays of all processes, stacked by process, on all of them.

    All processes must ask for it together, with arrays of one shape and type; 64 bits
    are cut to 32.
    """
    return multihost_utils.process_allgather(array)


def on_own_mesh(tree: Any) -> Any:
    """A copy of weights of the current mesh on ``own_mesh()``, whole.

    All processes must ask for it together.
    """
    if jax.process_count() == 1:
        return tree
    mesh = own_mesh()

    def copy(array: jax.Array) -> jax.Array:
        whole, spec = fetch(array), jax.typeof(array).sharding.spec
        return jax.device_put(whole, NamedSharding(mesh, spec))

    return jax.tree.map(copy, tree)


def any_process(flag: bool) -> jax.Array:
    """Whether a flag is set on any process; the same on all of them, which must ask
    together. An array, so that asking does not wait for the devices."""
    mesh = jax.sharding.get_mesh()
    flags = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, jax.P(AXES)), lambda at: np.full(1, flag)
    )
    return _any(flags)


@jax.jit
def _any(flags: jax.Array) -> jax.Array:
    return jnp.any(jax.sharding.reshard(flags, REPLICATED))
