"""The dual encoder: BERT-style query and context towers.

DRAGON+ reads the [CLS] state and compares by dot product without normalising;
sentence-transformers models such as all-MiniLM average the states and normalise.
Which one holds is a property of the checkpoint (``pooling`` and ``normalize`` of the
config), never of the code that calls it.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from radit_jax import sharding
from radit_jax.models.attention import (
    Layout,
    attention,
    attention_mask,
    heads_first,
)
from radit_jax.models.layers import constant, layer_norm, linear, pick, use, weight
from radit_jax.models.remat import KEEP_PRODUCTS

POOLINGS = ("cls", "mean")


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of a BERT-style encoder; Hugging Face's names in brackets."""

    vocab_size: int
    width: int  # D [hidden_size], also the embedding width E
    layers: int  # S [num_hidden_layers]
    heads: int  # H [num_attention_heads]
    mlp_width: int  # F [intermediate_size]
    max_length: int  # tokens [max_position_embeddings]
    norm_eps: float = 1e-12  # [layer_norm_eps]
    pooling: str = "cls"
    normalize: bool = False

    @property
    def head_size(self) -> int:
        """K."""
        return self.width // self.heads


class EncoderBlock(nnx.Module):
    """One post-norm layer of BERT: attention, then a GELU MLP."""

    def __init__(self, config: EncoderConfig, key: Array):
        keys = jax.random.split(key, 6)
        D, H, K, F = config.width, config.heads, config.head_size, config.mlp_width
        std = 0.02  # BERT's own initialiser
        self.w_q = weight(keys[0], (D, H, K), sharding.W_DHK, std)
        self.b_q = constant(0.0, (H, K), sharding.W_HK)
        self.w_k = weight(keys[1], (D, H, K), sharding.W_DHK, std)
        self.b_k = constant(0.0, (H, K), sharding.W_HK)
        self.w_v = weight(keys[2], (D, H, K), sharding.W_DHK, std)
        self.b_v = constant(0.0, (H, K), sharding.W_HK)
        self.w_o = weight(keys[3], (H, K, D), sharding.W_HKD, std)
        self.b_o = constant(0.0, (D,), sharding.W_D)
        self.attention_norm = constant(1.0, (D,), sharding.W_D)
        self.attention_norm_bias = constant(0.0, (D,), sharding.W_D)
        self.w_up = weight(keys[4], (D, F), sharding.W_DF, std)
        self.b_up = constant(0.0, (F,), sharding.W_F)
        self.w_down = weight(keys[5], (F, D), sharding.W_FD, std)
        self.b_down = constant(0.0, (D,), sharding.W_D)
        self.mlp_norm = constant(1.0, (D,), sharding.W_D)
        self.mlp_norm_bias = constant(0.0, (D,), sharding.W_D)

    def __call__(self, x_BLD: Array, mask_BLM: Array, eps: float) -> Array:
        """The layer's output [B, L, D]."""
        dtype = x_BLD.dtype

        def project(w_DHK: nnx.Param, b_HK: nnx.Param) -> Array:
            bias = b_HK[...].astype(dtype)[None, None]
            return linear(x_BLD, use(w_DHK, dtype)) + bias

        mixed_BLHK = attention(
            project(self.w_q, self.b_q),
            heads_first(project(self.w_k, self.b_k)),
            heads_first(project(self.w_v, self.b_v)),
            mask_BLM,
        )
        x_BLD = x_BLD + self.b_o[...].astype(dtype)[None, None]
        x_BLD = x_BLD + linear(mixed_BLHK, use(self.w_o, dtype), contract=2)
        x_BLD = layer_norm(
            x_BLD, self.attention_norm[...], self.attention_norm_bias[...], eps
        )
        up = linear(x_BLD, use(self.w_up, dtype))
        up = jax.nn.gelu(up + self.b_up[...].astype(dtype)[None, None], False)
        x_BLD = x_BLD + self.b_down[...].astype(dtype)[None, None]
        x_BLD = x_BLD + linear(up, use(self.w_down, dtype))
        return layer_norm(x_BLD, self.mlp_norm[...], self.mlp_norm_bias[...], eps)


class Encoder(nnx.Module):
    """One tower; the query and the context encoder are two of these.

    Attention is XLA's on every backend. Splash would fill rows of a passage's 160
    tokens up to 256 and heads of 64 up to 128 lanes, and planned for a TPU v5e it moves
    more bytes than the scores that it saves.

    Raises:
        ValueError: an unknown pooling, or sizes that do not divide over the mesh.
    """

    def __init__(self, config: EncoderConfig, key: Array):
        if config.pooling not in POOLINGS:
            raise ValueError(
                f"encoder pooling {config.pooling!r} is not one of {POOLINGS}"
            )
        sharding.check_divides("encoder attention heads", config.heads)
        sharding.check_divides("encoder MLP width", config.mlp_width)
        sharding.check_divides("encoder width", config.width, (sharding.FSDP,))
        words, positions, types, layers = jax.random.split(key, 4)
        D = config.width
        self.config = config
        # BERT's vocabulary of 30,522 divides by no useful tensor axis; it is small.
        self.words = weight(words, (config.vocab_size, D), sharding.W_LD, 0.02)
        self.positions = weight(positions, (config.max_length, D), sharding.W_LD, 0.02)
        self.types = weight(types, (2, D), sharding.W_LD, 0.02)
        self.norm = constant(1.0, (D,), sharding.W_D)
        self.norm_bias = constant(0.0, (D,), sharding.W_D)
        self.layers = jax.vmap(lambda key: EncoderBlock(config, key))(
            jax.random.split(layers, config.layers)
        )

    def states(
        self,
        tokens_BL: Int[Array, "B L"],
        mask_BL: Bool[Array, "B L"],
        dtype: DTypeLike = jnp.float32,
    ) -> Float[Array, "B L D"]:
        """Last hidden states; padding (mask False) may stand on either side.

        Raises:
            ValueError: rows longer than the checkpoint's table of positions.
        """
        if tokens_BL.shape[1] > self.config.max_length:
            raise ValueError(
                f"rows of {tokens_BL.shape[1]} tokens are longer than the encoder's "
                f"{self.config.max_length} positions"
            )
        # The first real token stands at 0, whatever padding is on its left.
        places_BL = jnp.maximum(jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32) - 1, 0)
        x_BLD, at_BLD = (
            use(table, dtype).at[ids_BL].get(out_sharding=sharding.ACT_BLD)
            for table, ids_BL in ((self.words, tokens_BL), (self.positions, places_BL))
        )
        x_BLD = x_BLD + at_BLD
        x_BLD = x_BLD + use(self.types, dtype)[None, :1]
        x_BLD = layer_norm(
            x_BLD, self.norm[...], self.norm_bias[...], self.config.norm_eps
        )
        layout = Layout(mask_BL.astype(jnp.int32), mask_BL.astype(jnp.int32))
        mask_BLM = attention_mask(layout, layout, causal=False)

        @functools.partial(jax.checkpoint, policy=KEEP_PRODUCTS)
        def step(x_BLD: Array, block: EncoderBlock) -> tuple[Array, None]:
            return block(x_BLD, mask_BLM, self.config.norm_eps), None

        return jax.lax.scan(step, x_BLD, self.layers)[0]

    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        mask_BL: Bool[Array, "B L"],
        dtype: DTypeLike = jnp.float32,
    ) -> Float[Array, "B E"]:
        """Float32 embeddings of the rows, pooled as the checkpoint says."""
        states_BLD = self.states(tokens_BL, mask_BL, dtype).astype(jnp.float32)
        if self.config.pooling == "cls":
            first_B1 = jnp.argmax(mask_BL, axis=1, keepdims=True)
            pooled_BE = pick(states_BLD, first_B1)[:, 0]
        else:
            weights_BL = mask_BL.astype(jnp.float32)
            total_BE = jnp.einsum("BLD,BL->BD", states_BLD, weights_BL)
            pooled_BE = total_BE / jnp.maximum(weights_BL.sum(1, keepdims=True), 1.0)
        if self.config.normalize:
            norm_B = jnp.linalg.norm(pooled_BE, axis=-1, keepdims=True)
            pooled_BE = pooled_BE / jnp.maximum(norm_B, 1e-12)
        return pooled_BE
