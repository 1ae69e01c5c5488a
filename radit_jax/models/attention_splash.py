"""Attention by the splash kernel of JAX (Pallas), on TPUs.

Scores of a block of queries and keys live on the chip and nowhere else, forward and
backward, and blocks behind the diagonal are never made.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from radit_jax.models.remat import ATTENTION

# The kernel reads keys in multiples of a vector register's lanes.
MULTIPLE = 128
# Sides of a block of scores: the published default for TPU v4 to v6, as far as it
# divides the row.
BLOCK = 512
NOTHING = -1  # segment id that no key has


def attend(
    q_BLHK: Float[Array, "B L H K"],
    k_BGLK: Float[Array, "B G L K"],
    v_BGLK: Float[Array, "B G L K"],
    segment_ids_BL: Int[Array, "B L"],
    prefix_ids_BL: Int[Array, "B L"] | None,
    interpret: bool,
) -> Float[Array, "B L H K"]:
    """Causal attention of rows within themselves, scores and softmax in float32.

    Each device runs the kernel on its own rows and heads. Padding attends to padding:
    finite, and no other token sees it.

    With ``prefix_ids_BL`` the kernel runs twice, once over each token's own segment and
    once over the one that it goes on from, and the two outputs are weighed by the sums
    of exponentials behind them (Dao 2023, FlashAttention-2, section 2.3). That is for
    forward passes only.

    Args:
        q_BLHK: queries; L is a multiple of MULTIPLE.
        k_BGLK: keys of the same tokens, heads first and split like the queries'.
        v_BGLK: values.
        segment_ids_BL: 0 is padding.
        prefix_ids_BL: see ``attention.Layout``.
        interpret: run the kernel as plain JAX, for tests without a TPU.

    Raises:
        ValueError: a gradient is asked for with ``prefix_ids_BL``.
    """
    rows, length, head, within = jax.typeof(q_BLHK).sharding.spec
    assert (length, within) == (None, None), "a device needs whole rows and heads"
    q_BHLK = (q_BLHK * q_BLHK.shape[3] ** -0.5).transpose(0, 2, 1, 3)
    local: Callable[..., Array] = _own
    ids = [segment_ids_BL]
    if prefix_ids_BL is not None:
        local, q_BHLK = _own_and_prefix, _forward_only(q_BHLK)
        # The tokens of a beginning may name it as their prefix: what is weighed with
        # itself stays as it is.
        ids.append(jnp.where(prefix_ids_BL == 0, NOTHING, prefix_ids_BL))
    heads = jax.P(rows, head, None, None)
    out_BHLK = jax.shard_map(
        functools.partial(local, interpret=interpret),
        in_specs=(heads, heads, heads, *(jax.P(rows, None) for _ in ids)),
        out_specs=heads,
        # The kernel does not say over which axes its outputs vary.
        check_vma=False,
    )(q_BHLK, k_BGLK, v_BGLK, *ids)
    return out_BHLK.transpose(0, 2, 1, 3)


def _own(
    q_BHLK: Array, k_BGLK: Array, v_BGLK: Array, ids_BL: Array, interpret: bool
) -> Array:
    """Attention to the own segment, on one device."""
    kernel = _kernel(q_BHLK.shape, interpret)
    return jax.vmap(kernel)(q_BHLK, k_BGLK, v_BGLK, splash.SegmentIds(ids_BL, ids_BL))


def _own_and_prefix(
    q_BHLK: Array,
    k_BGLK: Array,
    v_BGLK: Array,
    ids_BL: Array,
    prefix_ids_BL: Array,
    interpret: bool,
) -> Array:
    """Attention to the own segment and to another one, on one device."""
    kernel = _kernel(q_BHLK.shape, interpret, save_residuals=True)
    outs, normalisers = [], []
    for query_ids_BL in (ids_BL, prefix_ids_BL):
        ids = splash.SegmentIds(query_ids_BL, ids_BL)
        out_BHLK, (normaliser_BHL,) = jax.vmap(kernel)(q_BHLK, k_BGLK, v_BGLK, ids)
        outs.append(out_BHLK.astype(jnp.float32))
        normalisers.append(normaliser_BHL[..., None])
    # Of a query that nothing matches the normaliser is near the lowest float: finite,
    # and its weight is exactly zero beside that of the token itself.
    total_BHL1 = jnp.logaddexp(*normalisers)
    parts = [
        out_BHLK * jnp.exp(normaliser_BHL1 - total_BHL1)
        for out_BHLK, normaliser_BHL1 in zip(outs, normalisers, strict=True)
    ]
    return (parts[0] + parts[1]).astype(q_BHLK.dtype)


def _kernel(
    shape: tuple[int, ...], interpret: bool, save_residuals: bool = False
) -> Any:
    """The kernel for one row of queries [B, H, L, K]."""
    _, H, L, _ = shape
    block = max(n for n in range(MULTIPLE, BLOCK + 1, MULTIPLE) if L % n == 0)
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((L, L))] * H),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        save_residuals=save_residuals,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )


@jax.custom_vjp
def _forward_only(x: Array) -> Array:
    """The array itself, through which no gradient passes."""
    return x


def _refuse(x: Array) -> tuple[Array, None]:
    raise ValueError(
        "attention = splash has no gradient where segments share a beginning (prefix "
        "ids); give every sequence a segment of its own, or set attention=xla"
    )


_forward_only.defvjp(_refuse, lambda saved, d_x: (d_x,))
