"""Log-likelihoods of targets under a language model, packed or not."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from radit_jax import losses
from radit_jax.batch import Packed
from radit_jax.models.attention import XLA, Kernel, Layout
from radit_jax.models.layers import pick
from radit_jax.models.llama import Llama


def target_log_probabilities(
    model: Llama,
    batch: Packed,
    prefix_ids_BL: Int[Array, "B L"] | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    kernel: Kernel = XLA,
) -> Float[Array, "B T"]:
    """Log-probability (nats) of the token that follows each site, in float32.

    The output head runs at the sites alone. What stands at unused sites means nothing;
    weigh it with ``batch.weights_BT``.

    Args:
        model: on the current mesh.
        batch: packed rows.
        prefix_ids_BL: where segments share a beginning, see ``Layout``.
        dtype: of compute.
        remat: as of ``Llama.hidden``.
        kernel: of attention.
    """
    layout = Layout(batch.segment_ids_BL, batch.positions_BL, prefix_ids_BL)
    hidden_BLD = model.hidden(batch.tokens_BL, layout, dtype, remat, kernel)
    logits_BTV = model.logits(pick(hidden_BLD, batch.sites_BT))
    return losses.token_log_probabilities(logits_BTV, batch.targets_BT)
