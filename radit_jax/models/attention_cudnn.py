"""Attention by cuDNN's fused kernel, on NVIDIA GPUs."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from radit_jax.models.remat import ATTENTION

# With a mask the kernel wants an even number of tokens for its gradient.
MULTIPLE = 2
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
MOST_HEAD_SIZE, HEAD_SIZES = 128, 8  # the largest, and what divides it


def attend(
    q_BLHK: Float[Array, "B L H K"],
    k_BGLK: Float[Array, "B G L K"],
    v_BGLK: Float[Array, "B G L K"],
    mask_BLM: Bool[Array, "B L M"],
) -> Float[Array, "B L H K"]:
    """Causal attention of rows within themselves, scores and softmax in float32.

    The kernel knows causal rows, of which it skips blocks behind the diagonal, and a
    bias for everything else: the mask becomes one of [B, 1, L, L] in the compute dtype,
    the only array of that size. Each device runs it on its own rows and heads.

    Args:
        q_BLHK: queries; L is a multiple of MULTIPLE.
        k_BGLK: keys of the same tokens, heads first and split like the queries'.
        v_BGLK: values.
        mask_BLM: True where a query may attend to a key; at least to itself.
    """
    rows, length, head, within = jax.typeof(q_BLHK).sharding.spec
    assert (length, within) == (None, None), "a device needs whole rows and heads"

    def local(q_BLHK: Array, k_BGLK: Array, v_BGLK: Array, mask_BLM: Array) -> Array:
        return jax.nn.dot_product_attention(
            q_BLHK,
            k_BGLK.transpose(0, 2, 1, 3),
            v_BGLK.transpose(0, 2, 1, 3),
            mask=mask_BLM[:, None],
            is_causal=True,
            implementation="cudnn",
        )

    heads = jax.P(rows, head, None, None)
    queries = jax.P(rows, None, head, None)
    out_BLHK = jax.shard_map(
        local,
        in_specs=(queries, heads, heads, jax.P(rows, None, None)),
        out_specs=queries,
        check_vma=False,
    )(q_BLHK, k_BGLK, v_BGLK, mask_BLM)
    return checkpoint_name(out_BLHK, ATTENTION)
