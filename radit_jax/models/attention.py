"""The one door to attention; the rooms behind it are ``attention_*``.

Who may attend to whom is said in one way everywhere: equal, non-zero segment ids,
and, for a causal model, a key position not after the query's. Packing, padding on
either side and the unwritten part of a KV cache are all cases of it. Several segments
may also go on from one beginning that stands in the row once.

Which kernel computes it is chosen once per run (``choose_kernel``) and handed down.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from radit_jax import sharding
from radit_jax.models import attention_cudnn, attention_splash, attention_xla

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """What computes the attention of whole rows.

    Attributes:
        name: one of KERNELS.
        interpret: of ``splash``: run it as plain JAX, for tests without a TPU.
    """

    name: str = "xla"
    interpret: bool = False


XLA = Kernel()
KERNELS = {
    "xla": "plain JAX, on every backend",
    "splash": "the fused Pallas kernel, on TPUs",
    "cudnn": "the fused kernel of cuDNN, on NVIDIA GPUs",
}
AUTO = "auto"
# What ``auto`` means on a platform, where the kernel can run.
FUSED = {"tpu": "splash", "gpu": "cudnn"}
# A kernel's rows are filled up to a multiple of this.
MULTIPLES = {"splash": attention_splash.MULTIPLE, "cudnn": attention_cudnn.MULTIPLE}


def obstacle(name: str, platform: str, dtype: DTypeLike, head_size: int) -> str | None:
    """Why a kernel cannot run, in words that say what would help; None: it can.

    Args:
        name: of the kernel.
        platform: that programs are compiled for: ``cpu``, ``gpu`` or ``tpu``.
        dtype: of compute.
        head_size: K of the model.
    """
    if name in FUSED.values() and FUSED.get(platform) != name:
        home = next(where for where, kernel in FUSED.items() if kernel == name)
        return f"it runs on {home} only, and this is {platform}"
    if name != "cudnn":
        return None
    if jnp.dtype(dtype) not in attention_cudnn.DTYPES:
        kinds = " or ".join(str(kind) for kind in attention_cudnn.DTYPES)
        return f"it computes in {kinds}, not {jnp.dtype(dtype)}; set dtype=bfloat16"
    most, step = attention_cudnn.MOST_HEAD_SIZE, attention_cudnn.HEAD_SIZES
    if head_size > most or head_size % step:
        return f"it takes heads of a multiple of {step} up to {most}, not {head_size}"
    return None


def choose_kernel(
    wanted: str, platform: str, dtype: DTypeLike, head_size: int
) -> Kernel:
    """The kernel of a run, and a line in the log that says which and why.

    Args:
        wanted: the setting ``attention``: ``auto`` or one of KERNELS.
        platform: as of ``obstacle``.
        dtype: as of ``obstacle``.
        head_size: as of ``obstacle``.

    Raises:
        ValueError: an unknown kernel, or one that cannot run here.
    """
    if wanted not in (AUTO, *KERNELS):
        raise ValueError(
            f"attention = {wanted!r} is not one of {AUTO}, {', '.join(KERNELS)}"
        )
    name = FUSED.get(platform, XLA.name) if wanted == AUTO else wanted
    reason = obstacle(name, platform, dtype, head_size)
    if reason and wanted != AUTO:
        raise ValueError(
            f"attention = {wanted} cannot run: {reason}. attention={XLA.name} runs "
            f"everywhere, and attention={AUTO} takes what is fastest here"
        )
    if reason:
        log.info("attention: %s; %s cannot run: %s", XLA.name, name, reason)
        return XLA
    log.info("attention: %s, %s", name, KERNELS[name])
    return Kernel(name)


class Layout(NamedTuple):
    """Where queries or keys stand: their segment and their position in it."""

    segment_ids_BL: Int[Array, "B L"]  # 0: padding, attends to nothing
    positions_BL: Int[Array, "B L"]
    # Of queries: a second segment that they attend to, 0 for none; the beginning that
    # their own segment goes on from.
    prefix_ids_BL: Int[Array, "B L"] | None = None


def attention_mask(queries: Layout, keys: Layout, causal: bool) -> Bool[Array, "B L M"]:
    """True where a query may attend to a key."""
    query_segment = queries.segment_ids_BL[:, :, None]
    key_segment = keys.segment_ids_BL[:, None, :]
    mask = query_segment == key_segment
    if queries.prefix_ids_BL is not None:
        mask |= queries.prefix_ids_BL[:, :, None] == key_segment
    mask &= key_segment != 0
    if causal:
        mask &= keys.positions_BL[:, None, :] <= queries.positions_BL[:, :, None]
    return mask


def attention(
    q_BLHK: Float[Array, "B L H K"],
    k_BGMK: Float[Array, "B G M K"],
    v_BGMK: Float[Array, "B G M K"],
    mask_BLM: Bool[Array, "B L M"],
    in_order: bool = False,
) -> Float[Array, "B L H K"]:
    """Grouped-query attention under any mask, by XLA on every backend.

    Query head h reads key/value head ``h // (H / G)``, as in Llama checkpoints. A query
    that may attend to nothing (padding) gets some average and passes no gradient.

    A few queries against a cache stay here everywhere: their work is reading the
    cache once, which a fused kernel cannot shorten, and theirs are blocks of 128
    queries and more.

    Args:
        q_BLHK: queries.
        k_BGMK: keys, heads first (``heads_first``), as a cache keeps them.
        v_BGMK: values.
        mask_BLM: True where a query may attend to a key.
        in_order: queries and keys are the same tokens and the mask is causal along
            the row, so that keys behind a block of queries need not be looked at.
    """
    k_BGMK, v_BGMK = _split_like(q_BLHK, k_BGMK, v_BGMK)
    return attention_xla.attend(q_BLHK, k_BGMK, v_BGMK, mask_BLM, in_order)


# Queries [B, L, H, K], keys and values [B, G, L, K] to what is read [B, L, H, K].
Attend = Callable[[Array, Array, Array], Array]


def causal_attention(layout: Layout, kernel: Kernel = XLA) -> Attend:
    """Attention of packed rows within themselves, made ready once for all layers.

    The tokens of a segment stand in the order of their positions, and after the
    beginning that they go on from. Padding gets something finite, which must not be
    used.

    Args:
        layout: of queries and keys.
        kernel: what computes it.
    """
    if kernel.name == "xla":
        mask_BLM = attention_mask(layout, layout, causal=True)
        return functools.partial(attention, mask_BLM=mask_BLM, in_order=True)
    L = layout.segment_ids_BL.shape[1]
    more = -L % MULTIPLES[kernel.name]
    segments_BL, prefixes_BL = (
        None
        if ids_BL is None
        else jax.sharding.reshard(
            jnp.pad(ids_BL, ((0, 0), (0, more))), sharding.ROWS_BL
        )
        for ids_BL in (layout.segment_ids_BL, layout.prefix_ids_BL)
    )
    assert segments_BL is not None
    room: Attend
    if kernel.name == "splash":
        room = functools.partial(
            attention_splash.attend,
            segment_ids_BL=segments_BL,
            prefix_ids_BL=prefixes_BL,
            interpret=kernel.interpret,
        )
    else:
        # Padding sees padding: cuDNN wants a key for every query.
        mask_BLM = segments_BL[:, :, None] == segments_BL[:, None, :]
        if prefixes_BL is not None:
            mask_BLM |= (prefixes_BL[:, :, None] == segments_BL[:, None, :]) & (
                prefixes_BL[:, :, None] != 0
            )
        room = functools.partial(attention_cudnn.attend, mask_BLM=mask_BLM)

    def attend(q_BLHK: Array, k_BGLK: Array, v_BGLK: Array) -> Array:
        k_BGLK, v_BGLK = _split_like(q_BLHK, k_BGLK, v_BGLK)
        q_BLHK = jnp.pad(q_BLHK, ((0, 0), (0, more), (0, 0), (0, 0)))
        k_BGLK, v_BGLK = (
            jnp.pad(x_BGLK, ((0, 0), (0, 0), (0, more), (0, 0)))
            for x_BGLK in (k_BGLK, v_BGLK)
        )
        return room(q_BLHK, k_BGLK, v_BGLK)[:, :L]

    return attend


def _split_like(q_BLHK: Array, k_BGMK: Array, v_BGMK: Array) -> tuple[Array, Array]:
    """Keys and values with their heads split over devices as the queries' are.

    Key/value heads that do not divide over the tensor axis are kept whole; they are
    repeated per query head here, each device keeping its own.
    """
    rows, _, head, within = jax.typeof(q_BLHK).sharding.spec
    if jax.typeof(k_BGMK).sharding.spec[1] == head:
        return k_BGMK, v_BGMK
    repeats = q_BLHK.shape[2] // k_BGMK.shape[1]
    k_BGMK, v_BGMK = (
        jax.sharding.reshard(
            jnp.repeat(x_BGMK, repeats, axis=1), jax.P(rows, head, None, within)
        )
        for x_BGMK in (k_BGMK, v_BGMK)
    )
    return k_BGMK, v_BGMK


def heads_first(x_BMGK: Float[Array, "B M G K"]) -> Float[Array, "B G M K"]:
    """Keys or values with heads before tokens: products are plain batches of matrices
    then."""
    return x_BMGK.transpose(0, 2, 1, 3)
