"""Losses as pure functions of arrays."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_log_probabilities(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Log-probability of each target token, in float32.

    The target's logit is picked by comparison rather than by a gather, which also
    works, without communication, where the vocabulary is split over devices.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    normaliser_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    vocabulary_V = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits_BTV.shape[-1]), 2)
    chosen_BTV = jnp.where(targets_BT[..., None] == vocabulary_V, logits_BTV, 0.0)
    return chosen_BTV.sum(axis=-1) - normaliser_BT
