"""The language model: Llama 1/2/3.x and its relatives (SmolLM2) in flax.nnx.

Modules are plain pytrees: ``jax.jit``, ``jax.grad`` and ``jax.lax.scan`` apply to
them directly. Layers are stacked along a leading axis and scanned, so that a model
of 80 layers compiles as fast as one of two.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import reshard
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from radit_jax import sharding
from radit_jax.models.attention import (
    XLA,
    Kernel,
    Layout,
    attention,
    attention_mask,
    causal_attention,
    heads_first,
)
from radit_jax.models.layers import (
    Rope,
    constant,
    linear,
    look_up,
    rms_norm,
    rope_tables,
    rotate,
    use,
    weight,
)
from radit_jax.models.remat import MIDDLE, QKV, REMAT_POLICIES


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a model; the names of Hugging Face's ``config.json`` in brackets."""

    vocab_size: int
    width: int  # D [hidden_size]
    layers: int  # S [num_hidden_layers]
    heads: int  # H [num_attention_heads]
    kv_heads: int  # G [num_key_value_heads]
    head_size: int  # K [head_dim, or hidden_size / num_attention_heads]
    mlp_width: int  # F [intermediate_size]
    max_length: int  # tokens [max_position_embeddings]
    norm_eps: float = 1e-5  # [rms_norm_eps]
    rope: Rope = Rope()  # [rope_theta, rope_scaling or rope_parameters]
    tied: bool = False  # output head = embedding [tie_word_embeddings]


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, and where they stand."""

    keys_SBGMK: Float[Array, "S B G M K"]
    values_SBGMK: Float[Array, "S B G M K"]
    layout: Layout  # [B, M]; segment id 0 where nothing is written


class Block(nnx.Module):
    """One pre-norm decoder layer: grouped-query attention, then SwiGLU."""

    def __init__(self, config: LlamaConfig, key: Array):
        keys = jax.random.split(key, 7)
        D, H, G, K, F = (
            config.width,
            config.heads,
            config.kv_heads,
            config.head_size,
            config.mlp_width,
        )
        kv_spec = sharding.kv_head_spec(G)
        self.attention_norm = constant(1.0, (D,), sharding.W_D)
        self.w_q = weight(keys[0], (D, H, K), sharding.W_DHK, D**-0.5)
        self.w_k = weight(keys[1], (D, G, K), kv_spec, D**-0.5)
        self.w_v = weight(keys[2], (D, G, K), kv_spec, D**-0.5)
        self.w_o = weight(keys[3], (H, K, D), sharding.W_HKD, (H * K) ** -0.5)
        self.mlp_norm = constant(1.0, (D,), sharding.W_D)
        self.w_gate = weight(keys[4], (D, F), sharding.W_DF, D**-0.5)
        self.w_up = weight(keys[5], (D, F), sharding.W_DF, D**-0.5)
        self.w_down = weight(keys[6], (F, D), sharding.W_FD, F**-0.5)

    def project_qkv(
        self, x_BLD: Array, tables: tuple[Array, Array], eps: float
    ) -> tuple[Array, Array, Array]:
        """Rotated queries [B, L, H, K] and keys [B, G, L, K], and values like keys."""
        h = rms_norm(x_BLD, self.attention_norm[...], eps)
        h = reshard(h, sharding.ACT_BLD)
        with jax.named_scope("qkv"):
            q = linear(h, use(self.w_q, h.dtype))
            k = linear(h, use(self.w_k, h.dtype))
            v = linear(h, use(self.w_v, h.dtype))
        rotated = rotate(q, tables), heads_first(rotate(k, tables)), heads_first(v)
        return checkpoint_name(rotated, QKV)

    def finish(self, x_BLD: Array, mixed_BLHK: Array, eps: float) -> Array:
        """Output projection, residual and MLP."""
        stream = jax.typeof(x_BLD).sharding.spec
        with jax.named_scope("out"):
            mixed_BLD = linear(mixed_BLHK, use(self.w_o, x_BLD.dtype), contract=2)
            x_BLD = x_BLD + reshard(mixed_BLD, stream)
            x_BLD = checkpoint_name(x_BLD, MIDDLE)
        h = reshard(rms_norm(x_BLD, self.mlp_norm[...], eps), sharding.ACT_BLD)
        with jax.named_scope("mlp"):
            gate = linear(h, use(self.w_gate, h.dtype))
            up = linear(h, use(self.w_up, h.dtype))
            down = linear(jax.nn.silu(gate) * up, use(self.w_down, h.dtype))
            return x_BLD + reshard(down, stream)


class Llama(nnx.Module):
    """A decoder-only language model; build it under ``jax.set_mesh``.

    Raises:
        ValueError: heads, MLP width, vocabulary or width do not divide over the mesh.
    """

    def __init__(self, config: LlamaConfig, key: Array):
        sharding.check_divides("LM attention heads", config.heads)
        sharding.check_divides("LM MLP width", config.mlp_width)
        sharding.check_divides("LM vocabulary", config.vocab_size)
        sharding.check_divides("LM width", config.width, (sharding.FSDP,))
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        D, V = config.width, config.vocab_size
        self.config = config
        self.embedding = weight(embed_key, (V, D), sharding.W_VD, 0.02)
        self.layers = jax.vmap(lambda key: Block(config, key))(
            jax.random.split(layers_key, config.layers)
        )
        self.final_norm = constant(1.0, (D,), sharding.W_D)
        self.head = (
            None if config.tied else weight(head_key, (V, D), sharding.W_VD, D**-0.5)
        )

    def embed(self, tokens_BL: Array, dtype: DTypeLike) -> Array:
        """Token embeddings [B, L, D] in the compute dtype."""
        return jax.shard_map(
            lambda table_VD, ids_BL: jax.lax.psum(
                look_up(table_VD, ids_BL), sharding.TENSOR
            ),
            in_specs=(sharding.without_fsdp(sharding.W_VD), sharding.ROWS_BL),
            out_specs=sharding.ACT_BLD,
        )(use(self.embedding, dtype), reshard(tokens_BL, sharding.ROWS_BL))

    def hidden(
        self,
        tokens_BL: Int[Array, "B L"],
        layout: Layout,
        dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        kernel: Kernel = XLA,
        stream: jax.P = sharding.ACT_BLD,
    ) -> Float[Array, "B L D"]:
        """Final hidden states of packed or padded rows, normed and ready for the head.

        Args:
            tokens_BL: token ids.
            layout: segment ids (0: padding) and positions of the tokens.
            dtype: compute dtype; weights stay float32 masters.
            remat: one of REMAT_POLICIES.
            kernel: of attention.
            stream: of activations between layers, see ``sharding.stream_spec``.
        """
        found = self._read(tokens_BL, layout, dtype, remat, kernel, stream, keep=False)
        return found[0]

    def _read(
        self,
        tokens_BL: Array,
        layout: Layout,
        dtype: DTypeLike,
        remat: str,
        kernel: Kernel,
        stream: jax.P,
        keep: bool,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Hidden states, and each layer's keys and values [S, B, G, L, K] if kept."""
        config = self.config
        attend = causal_attention(layout, kernel)
        tables = rope_tables(
            config.rope, config.head_size, layout.positions_BL, tokens_BL.shape[1]
        )

        def step(x_BLD: Array, block: Block):
            q, k, v = block.project_qkv(x_BLD, tables, config.norm_eps)
            x_BLD = block.finish(x_BLD, attend(q, k, v), config.norm_eps)
            return x_BLD, (k, v) if keep else None

        if remat != "none":
            step = jax.checkpoint(step, policy=REMAT_POLICIES[remat])
        x_BLD = reshard(self.embed(tokens_BL, dtype), stream)
        x_BLD, kept = jax.lax.scan(step, x_BLD, self.layers)
        hidden_BLD = rms_norm(x_BLD, self.final_norm[...], config.norm_eps)
        return reshard(hidden_BLD, sharding.ACT_BLD), kept

    @property
    def output_head(self) -> Float[Array, "V D"]:
        """The master weight of the output head; the embedding when they are tied."""
        return (self.embedding if self.head is None else self.head)[...]

    def logits(self, hidden_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Float32 logits over the vocabulary."""
        return jnp.einsum(
            "BLD,VD->BLV",
            hidden_BLD,
            use(self.output_head, hidden_BLD.dtype),
            preferred_element_type=jnp.float32,
            out_sharding=sharding.LOGITS_BLV,
        )

    def prefill(
        self,
        tokens_BL: Int[Array, "B L"],
        layout: Layout,
        length: int,
        dtype: DTypeLike = jnp.float32,
        kernel: Kernel = XLA,
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """Read whole prompts, padded on either side.

        Returns:
            Hidden states as ``hidden`` gives them, and a cache of ``length`` slots per
            row, of which the first L are written.
        """
        hidden_BLD, kept = self._read(
            tokens_BL, layout, dtype, "none", kernel, sharding.ACT_BLD, keep=True
        )
        assert kept is not None
        more = length - tokens_BL.shape[1]
        keys, values = (
            jnp.pad(x_SBGLK, ((0, 0),) * 3 + ((0, more), (0, 0))) for x_SBGLK in kept
        )
        segments_BL, positions_BL = (
            jnp.pad(x_BL, ((0, 0), (0, more)))
            for x_BL in (layout.segment_ids_BL, layout.positions_BL)
        )
        slots = Layout(segments_BL, positions_BL)
        return hidden_BLD, Cache(keys, values, slots)

    def extend(
        self,
        tokens_BL: Int[Array, "B L"],
        layout: Layout,
        cache: Cache,
        start: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """Read tokens into slots ``start ... start + L - 1`` of the cache.

        A decoding step is a call with one token per row. Slots are shared by all rows,
        positions are each row's own, so what was read before may be padded on either
        side.

        Attention is XLA's on every backend. Few queries meet all slots: the time goes
        into reading the cache once, which no kernel can spare, and the fused kernels
        would fill a single query up to a block of 128.

        Returns:
            Final hidden states of the tokens, and the cache with them written.
        """
        config = self.config
        write = jax.lax.dynamic_update_slice_in_dim
        keys_layout = Layout(
            write(cache.layout.segment_ids_BL, layout.segment_ids_BL, start, 1),
            write(cache.layout.positions_BL, layout.positions_BL, start, 1),
        )
        mask_BLM = attention_mask(layout, keys_layout, causal=True)
        tables = rope_tables(
            config.rope,
            config.head_size,
            layout.positions_BL,
            cache.keys_SBGMK.shape[3],
        )

        def step(carry: tuple[Array, Array, Array], layer: tuple[Block, Array]):
            # The cache is carried, not scanned over: so it is written in place, where
            # a scan would copy all of it for every token.
            x_BLD, keys_SBGMK, values_SBGMK = carry
            block, i = layer
            q, k, v = block.project_qkv(x_BLD, tables, config.norm_eps)
            at = (i, 0, 0, start, 0)
            keys_SBGMK = jax.lax.dynamic_update_slice(keys_SBGMK, k[None], at)
            values_SBGMK = jax.lax.dynamic_update_slice(values_SBGMK, v[None], at)
            mixed = attention(
                q,
                jax.lax.dynamic_index_in_dim(keys_SBGMK, i, keepdims=False),
                jax.lax.dynamic_index_in_dim(values_SBGMK, i, keepdims=False),
                mask_BLM,
            )
            x_BLD = block.finish(x_BLD, mixed, config.norm_eps)
            return (x_BLD, keys_SBGMK, values_SBGMK), None

        x_BLD = self.embed(tokens_BL, cache.keys_SBGMK.dtype)
        (x_BLD, keys, values), _ = jax.lax.scan(
            step,
            (x_BLD, cache.keys_SBGMK, cache.values_SBGMK),
            (self.layers, jnp.arange(config.layers)),
        )
        hidden_BLD = rms_norm(x_BLD, self.final_norm[...], config.norm_eps)
        return hidden_BLD, Cache(keys, values, keys_layout)
