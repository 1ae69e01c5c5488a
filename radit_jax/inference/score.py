"""Log-likelihoods of targets under a language model, packed or not."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from radit_jax import losses, sharding
from radit_jax.batch import Packed
from radit_jax.models.attention import XLA, Kernel, Layout
from radit_jax.models.layers import pick
from radit_jax.models.llama import Llama

# Of float32 logits on a device at a time; their gradient takes as much again.
LOGITS_BYTES = 2**28


def target_log_probabilities(
    model: Llama,
    batch: Packed,
    prefix_ids_BL: Int[Array, "B L"] | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    kernel: Kernel = XLA,
    stream: jax.P = sharding.ACT_BLD,
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
        stream: as of ``Llama.hidden``.
    """
    layout = Layout(batch.segment_ids_BL, batch.positions_BL, prefix_ids_BL)
    hidden_BLD = model.hidden(batch.tokens_BL, layout, dtype, remat, kernel, stream)
    hidden_BTD = pick(hidden_BLD, batch.sites_BT)
    logits = (*batch.sites_BT.shape, model.config.vocab_size)
    if 4 * sharding.local_size(logits, sharding.LOGITS_BLV) <= LOGITS_BYTES:
        logits_BTV = model.logits(hidden_BTD)
        return losses.token_log_probabilities(logits_BTV, batch.targets_BT)
    return chunked_log_probabilities(hidden_BTD, model.output_head, batch.targets_BT)


def chunked_log_probabilities(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """As ``losses.token_log_probabilities``, without logits [B, T, V] as a whole.

    Every device works through its tokens in chunks of LOGITS_BYTES, and does so again
    in the backward pass, where it adds up the gradient of the head in float32. The
    vocabulary may be split over devices.

    Args:
        hidden_BTD: final hidden states, in the compute dtype.
        head_VD: the output head, a float32 master weight.
        targets_BT: token ids.
    """
    return jax.shard_map(
        _by_chunks,
        in_specs=(sharding.ACT_BLD, sharding.W_VD, sharding.ROWS_BL),
        out_specs=sharding.ROWS_BL,
    )(hidden_BTD, head_VD, jax.sharding.reshard(targets_BT, sharding.ROWS_BL))


def _by_chunks(h_BTD: Array, w_VD: Array, targets_BT: Array) -> Array:
    """Log-probabilities of a device's rows; it holds a part of the vocabulary."""
    B, T, D = h_BTD.shape
    tokens = B * T
    most = max(LOGITS_BYTES // (4 * len(w_VD)), 1)
    chunks = max(-(-tokens // most), 1)
    more = -tokens % chunks
    h_TD = jnp.pad(h_BTD.reshape(tokens, D), ((0, more), (0, 0)))
    targets_T = jnp.pad(targets_BT.reshape(tokens), (0, more))
    return _log_probabilities(h_TD, w_VD, targets_T, chunks)[:tokens].reshape(B, T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _log_probabilities(
    h_TD: Array, w_VD: Array, targets_T: Array, chunks: int
) -> Array:
    """Log-probabilities [T] of a device's tokens, all rows one after the other."""
    return _forward(h_TD, w_VD, targets_T, chunks)[0]


def _parts(chunks: int, *arrays: Array) -> tuple[Array, ...]:
    """Arrays of tokens cut into chunks, along a new first axis."""
    return tuple(x.reshape(chunks, -1, *x.shape[1:]) for x in arrays)


def _whole_width(w_VD: Array, dtype: DTypeLike) -> Array:
    """The head ready for compute, as ``layers.use`` makes it."""
    return jax.lax.all_gather(w_VD.astype(dtype), sharding.FSDP, axis=1, tiled=True)


def _logits(h_TD: Array, w_VD: Array, targets_T: Array) -> tuple[Array, Array]:
    """Float32 logits over a device's part of the vocabulary, and where targets are."""
    logits_TV = jnp.einsum("TD,VD->TV", h_TD, w_VD, preferred_element_type=jnp.float32)
    first = jax.lax.axis_index(sharding.TENSOR) * len(w_VD)
    ids_TV = first + jax.lax.broadcasted_iota(jnp.int32, logits_TV.shape, 1)
    return logits_TV, ids_TV == targets_T[:, None]


def _forward(
    h_TD: Array, w_VD: Array, targets_T: Array, chunks: int
) -> tuple[Array, tuple[Array, ...]]:
    whole_VD = _whole_width(w_VD, h_TD.dtype)

    def chunk(_: None, part: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
        h_TD, targets_T = part
        logits_TV, is_target_TV = _logits(h_TD, whole_VD, targets_T)
        highest_T = jax.lax.pmax(logits_TV.max(axis=-1), sharding.TENSOR)
        total_T, chosen_T = jax.lax.psum(
            (
                jnp.exp(logits_TV - highest_T[:, None]).sum(axis=-1),
                jnp.where(is_target_TV, logits_TV, 0.0).sum(axis=-1),
            ),
            sharding.TENSOR,
        )
        normaliser_T = highest_T + jnp.log(total_T)
        return None, (chosen_T - normaliser_T, normaliser_T)

    _, found = jax.lax.scan(chunk, None, _parts(chunks, h_TD, targets_T))
    log_T, normaliser_T = (x.reshape(-1) for x in found)
    return log_T, (h_TD, w_VD, targets_T, normaliser_T)


def _backward(
    chunks: int, saved: tuple[Array, ...], d_log_T: Array
) -> tuple[Array, Array, None]:
    h_TD, w_VD, targets_T, normaliser_T = saved
    whole_VD = _whole_width(w_VD, h_TD.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def chunk(d_w_VD: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
        h_TD, targets_T, normaliser_T, d_log_T = part
        logits_TV, is_target_TV = _logits(h_TD, whole_VD, targets_T)
        probabilities_TV = jnp.exp(logits_TV - normaliser_T[:, None])
        d_logits_TV = (is_target_TV - probabilities_TV) * d_log_T[:, None]
        d_logits_TV = d_logits_TV.astype(h_TD.dtype)
        d_w_VD += product("TV,TD->VD", d_logits_TV, h_TD)
        d_h_TD = product("TV,VD->TD", d_logits_TV, whole_VD)
        return d_w_VD, jax.lax.psum(d_h_TD, sharding.TENSOR).astype(h_TD.dtype)

    zeros_VD = jnp.zeros(whole_VD.shape, jnp.float32)
    d_w_VD, d_h = jax.lax.scan(
        chunk,
        jax.lax.pcast(zeros_VD, sharding.AXES, to="varying"),
        _parts(chunks, h_TD, targets_T, normaliser_T, d_log_T),
    )
    d_w_VD = jax.lax.psum_scatter(
        d_w_VD, sharding.FSDP, scatter_dimension=1, tiled=True
    )
    return d_h.reshape(h_TD.shape), jax.lax.psum(d_w_VD, sharding.DATA), None


_log_probabilities.defvjp(_forward, _backward)
