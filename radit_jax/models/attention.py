"""The one door to attention.

Who may attend to whom is said in one way everywhere: equal, non-zero segment ids,
and, for a causal model, a key position not after the query's. Packing, padding on
either side and the unwritten part of a KV cache are all cases of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row that may attend to nothing (padding) stays finite too.
MASKED = -1e30
# Queries per block of causal attention: half the scores of a long row are never made.
BLOCK = 128


class Layout(NamedTuple):
    """Where queries or keys stand: their segment and their position in it."""

    segment_ids_BL: Int[Array, "B L"]  # 0: padding, attends to nothing
    positions_BL: Int[Array, "B L"]


def attention_mask(queries: Layout, keys: Layout, causal: bool) -> Bool[Array, "B L M"]:
    """True where a query may attend to a key."""
    query_segment = queries.segment_ids_BL[:, :, None]
    key_segment = keys.segment_ids_BL[:, None, :]
    mask = (query_segment == key_segment) & (key_segment != 0)
    if causal:
        mask &= keys.positions_BL[:, None, :] <= queries.positions_BL[:, :, None]
    return mask


def attention(
    q_BLHK: Float[Array, "B L H K"],
    k_BMGK: Float[Array, "B M G K"],
    v_BMGK: Float[Array, "B M G K"],
    mask_BLM: Bool[Array, "B L M"],
    in_order: bool = False,
) -> Float[Array, "B L H K"]:
    """Grouped-query attention, scores and softmax in float32.

    Query head h reads key/value head ``h // (H / G)``, as in Llama checkpoints.

    Args:
        q_BLHK: queries.
        k_BMGK: keys.
        v_BMGK: values.
        mask_BLM: True where a query may attend to a key.
        in_order: queries and keys are the same tokens and the mask is causal along
            the row, so that keys behind a block of queries need not be looked at.
    """
    B, L, H, K = q_BLHK.shape
    G = k_BMGK.shape[2]
    if jax.typeof(k_BMGK).sharding.spec[2] != jax.typeof(q_BLHK).sharding.spec[2]:
        # Key/value heads that do not divide over the tensor axis are kept whole;
        # repeat them per query head, each device keeping its own.
        k_BMGK, v_BMGK = (
            jax.sharding.reshard(
                jnp.repeat(x, H // G, axis=2), jax.typeof(q_BLHK).sharding.spec
            )
            for x in (k_BMGK, v_BMGK)
        )
        G = H
    R = H // G
    # Heads before tokens: the products below are then plain batches of matrices.
    # The sharding is said because JAX would infer the tensor axis to be the queries'
    # of a group when there is a single key/value head.
    rows, length, head, within = jax.typeof(q_BLHK).sharding.spec
    q_BLGRK = jnp.reshape(
        q_BLHK * K**-0.5,
        (B, L, G, R, K),
        out_sharding=jax.P(rows, length, head, None, within),
    )
    q_BGRLK = q_BLGRK.transpose(0, 2, 3, 1, 4)
    k_BGMK, v_BGMK = (x.transpose(0, 2, 1, 3) for x in (k_BMGK, v_BMGK))
    size = BLOCK if in_order and L % BLOCK == 0 else L
    blocks = []
    for start in range(0, L, size):
        stop = start + size
        keys = stop if in_order else k_BGMK.shape[2]
        scores = jnp.einsum(
            "BGNK,BGMK->BGNM",
            q_BGRLK[:, :, :, start:stop].reshape(B, G, R * size, K),
            k_BGMK[:, :, :keys],
            preferred_element_type=jnp.float32,
        ).reshape(B, G, R, size, keys)
        mask = mask_BLM[:, None, None, start:stop, :keys]
        weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)
        out = jnp.einsum(
            "BGNM,BGMK->BGNK",
            weights.astype(v_BGMK.dtype).reshape(B, G, R * size, keys),
            v_BGMK[:, :, :keys],
        )
        blocks.append(out.reshape(B, G, R, size, K))
    out_BGRLK = jnp.concatenate(blocks, axis=3) if len(blocks) > 1 else blocks[0]
    return jnp.reshape(
        out_BGRLK.transpose(0, 3, 1, 2, 4),
        (B, L, H, K),
        out_sharding=jax.P(rows, length, head, within),
    )
