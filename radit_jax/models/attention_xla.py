"""Attention in plain JAX, for every backend and every mask.

The backward pass is FlashAttention's: weights are made again from scores and their
normalisers. Causal rows are worked on in blocks of queries, so that half of the scores
of a long row are never made.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from radit_jax.models.remat import ATTENTION

# Finite, so that a row that may attend to nothing (padding) stays finite too.
MASKED = -1e30
BLOCK = 128  # queries per block of causal attention


def attend(
    q_BLHK: Float[Array, "B L H K"],
    k_BGMK: Float[Array, "B G M K"],
    v_BGMK: Float[Array, "B G M K"],
    mask_BLM: Bool[Array, "B L M"],
    in_order: bool,
) -> Float[Array, "B L H K"]:
    """Scores and softmax in float32; arguments as of ``attention.attention``.

    Heads of queries and of keys are split over the same mesh axes. A query that may
    attend to nothing gets some average and passes no gradient.
    """
    B, L, H, K = q_BLHK.shape
    G = k_BGMK.shape[1]
    rows, length, head, within = jax.typeof(q_BLHK).sharding.spec
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
    out_BGRLK = checkpoint_name(jnp.concatenate(outs, axis=3), ATTENTION)
    normaliser_BGRL = checkpoint_name(jnp.concatenate(normalisers, axis=3), ATTENTION)
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
