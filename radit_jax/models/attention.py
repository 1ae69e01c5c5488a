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
) -> Float[Array, "B L H K"]:
    """Grouped-query attention, scores and softmax in float32.

    Query head h reads key/value head ``h // (H / G)``, as in Llama checkpoints.
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
    # Said here because JAX would infer the tensor axis to be the queries' of a group
    # when there is a single key/value head.
    rows, length, head, size = jax.typeof(q_BLHK).sharding.spec
    q_BLGRK = jnp.reshape(
        q_BLHK * K**-0.5,
        (B, L, G, H // G, K),
        out_sharding=jax.P(rows, length, head, None, size),
    )
    scores = jnp.einsum(
        "BLGRK,BMGK->BGRLM", q_BLGRK, k_BMGK, preferred_element_type=jnp.float32
    )
    scores = jnp.where(mask_BLM[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BMGK.dtype)
    out_BLGRK = jnp.einsum("BGRLM,BMGK->BLGRK", weights, v_BMGK)
    return jnp.reshape(
        out_BLGRK, (B, L, H, K), out_sharding=jax.P(rows, length, head, size)
    )
