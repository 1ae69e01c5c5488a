"""The one door to attention.

Who may attend to whom is said in one way everywhere: equal, non-zero segment ids,
and, for a causal model, a key position not after the query's. Packing, padding on
either side and the unwritten part of a KV cache are all cases of it. Several segments
may also go on from one beginning that stands in the row once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row that may attend to nothing (padding) stays finite too.
MASKED = -1e30
# Queries per block of causal attention: half the scores of a long row are never made.
BLOCK = 128
# Name of what a rematerialised layer should keep, so that its backward pass need not
# run attention forward again.
SAVED = "attention"
# What a backward pass keeps: matrix products and attention, while the element-wise
# work between them is done again.
KEEP_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(SAVED),
)


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
    """Grouped-query attention, scores and softmax in float32.

    Query head h reads key/value head ``h // (H / G)``, as in Llama checkpoints. A query
    that may attend to nothing (padding) gets some average and passes no gradient.

    Args:
        q_BLHK: queries.
        k_BGMK: keys, heads first (``heads_first``), as a cache keeps them.
        v_BGMK: values.
        mask_BLM: True where a query may attend to a key.
        in_order: queries and keys are the same tokens and the mask is causal along
            the row, so that keys behind a block of queries need not be looked at.
    """
    B, L, H, K = q_BLHK.shape
    rows, length, head, within = jax.typeof(q_BLHK).sharding.spec
    if jax.typeof(k_BGMK).sharding.spec[1] != head:
        # Key/value heads that do not divide over the tensor axis are kept whole;
        # repeat them per query head, each device keeping its own.
        k_BGMK, v_BGMK = (
            jax.sharding.reshard(
                jnp.repeat(x, H // x.shape[1], axis=1), jax.P(rows, head, None, within)
            )
            for x in (k_BGMK, v_BGMK)
        )
    G = k_BGMK.shape[1]
    # The sharding is said because JAX would infer the tensor axis to be the queries'
    # of a group when there is a single key/value head.
    q_BLGRK = jnp.reshape(
        q_BLHK * K**-0.5,
        (B, L, G, H // G, K),
        out_sharding=jax.P(rows, length, head, None, within),
    )
    out_BGRLK = _attend(
        q_BLGRK.transpose(0, 2, 3, 1, 4), k_BGMK, v_BGMK, mask_BLM, in_order
    )
    return jnp.reshape(
        out_BGRLK.transpose(0, 3, 1, 2, 4),
        (B, L, H, K),
        out_sharding=jax.P(rows, length, head, within),
    )


def heads_first(x_BMGK: Float[Array, "B M G K"]) -> Float[Array, "B G M K"]:
    """Keys or values with heads before tokens: products are plain batches of matrices
    then."""
    return x_BMGK.transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q_BGRLK: Array, k_BGMK: Array, v_BGMK: Array, mask_BLM: Array, in_order: bool
) -> Array:
    """Attention with scaled queries and heads first; R query heads share a key head."""
    return _attend_forward(q_BGRLK, k_BGMK, v_BGMK, mask_BLM, in_order)[0]


def _blocks(L: int, M: int, in_order: bool) -> list[tuple[int, int, int]]:
    """(first query, end of queries, end of keys) of each block."""
    size = BLOCK if in_order and L % BLOCK == 0 else L
    ends = range(size, L + 1, size)
    return [(end - size, end, end if in_order else M) for end in ends]


def _scores(q_BGRLK: Array, k_BGMK: Array) -> Array:
    """Float32 scores [B, G, R, L, M]."""
    B, G, R, L, K = q_BGRLK.shape
    return jnp.einsum(
        "BGNK,BGMK->BGNM",
        q_BGRLK.reshape(B, G, R * L, K),
        k_BGMK,
        preferred_element_type=jnp.float32,
    ).reshape(B, G, R, L, -1)


def _attend_forward(
    q_BGRLK: Array, k_BGMK: Array, v_BGMK: Array, mask_BLM: Array, in_order: bool
) -> tuple[Array, tuple[Array, ...]]:
    B, G, R, L, K = q_BGRLK.shape
    outs, normalisers = [], []
    for start, stop, keys in _blocks(L, k_BGMK.shape[2], in_order):
        mask = mask_BLM[:, None, None, start:stop, :keys]
        scores = _scores(q_BGRLK[:, :, :, start:stop], k_BGMK[:, :, :keys])
        scores = jnp.where(mask, scores, MASKED)
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        out = jnp.einsum(
            "BGNM,BGMK->BGNK",
            weights.astype(v_BGMK.dtype).reshape(B, G, R * (stop - start), keys),
            v_BGMK[:, :, :keys],
            preferred_element_type=jnp.float32,
        ).reshape(B, G, R, stop - start, K)
        outs.append((out / total).astype(v_BGMK.dtype))
        normalisers.append((highest + jnp.log(total))[..., 0])
    out_BGRLK = checkpoint_name(jnp.concatenate(outs, axis=3), SAVED)
    normaliser_BGRL = checkpoint_name(jnp.concatenate(normalisers, axis=3), SAVED)
    return out_BGRLK, (q_BGRLK, k_BGMK, v_BGMK, mask_BLM, out_BGRLK, normaliser_BGRL)


def _attend_backward(
    in_order: bool, saved: tuple[Array, ...], d_out_BGRLK: Array
) -> tuple[Array, Array, Array, None]:
    """Weights are made again from scores and normalisers, as FlashAttention does.

    (Dao et al. 2022, section 3.1 and appendix B.2.)
    """
    q_BGRLK, k_BGMK, v_BGMK, mask_BLM, out_BGRLK, normaliser_BGRL = saved
    B, G, R, L = normaliser_BGRL.shape
    M = k_BGMK.shape[2]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # Of the softmax: sum over keys of weight times its gradient.
    mean_BGRL = product("BGRLK,BGRLK->BGRL", d_out_BGRLK, out_BGRLK)
    dq, dk, dv = [], [], []
    for start, stop, keys in _blocks(L, M, in_order):
        flat = (B, G, R * (stop - start), -1)
        q = q_BGRLK[:, :, :, start:stop]
        d_out = d_out_BGRLK[:, :, :, start:stop].reshape(flat)
        k, v = k_BGMK[:, :, :keys], v_BGMK[:, :, :keys]
        log_weights = _scores(q, k) - normaliser_BGRL[:, :, :, start:stop, None]
        mask = mask_BLM[:, None, None, start:stop, :keys]
        weights = jnp.where(mask, jnp.exp(log_weights), 0.0)
        d_weights = product("BGNK,BGMK->BGNM", d_out, v).reshape(weights.shape)
        d_scores = weights * (d_weights - mean_BGRL[:, :, :, start:stop, None])
        d_scores = d_scores.astype(q.dtype).reshape(flat)
        weights = weights.astype(q.dtype).reshape(flat)
        dq.append(product("BGNM,BGMK->BGNK", d_scores, k).reshape(q.shape))
        # Keys behind the block get nothing from it.
        width = ((0, 0), (0, 0), (0, M - keys), (0, 0))
        dk.append(jnp.pad(product("BGNM,BGNK->BGMK", d_scores, q.reshape(flat)), width))
        dv.append(jnp.pad(product("BGNM,BGNK->BGMK", weights, d_out), width))
    return (
        jnp.concatenate(dq, axis=3).astype(q_BGRLK.dtype),
        functools.reduce(jnp.add, dk).astype(k_BGMK.dtype),
        functools.reduce(jnp.add, dv).astype(v_BGMK.dtype),
        None,
    )


_attend.defvjp(_attend_forward, _attend_backward)
