"""Losses as pure functions of arrays."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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


SCORE_MODES = ("mean_log_probability", "token_probability", "sequence_probability")
# Stands for no passage: finite, so that gradients of masked places are zero, not NaN.
ABSENT = -1e30


def lsr_log_target(
    log_p_BC: Float[Array, "B C"],
    tokens_B: Int[Array, " B"],
    temperature: float,
    mode: str = SCORE_MODES[0],
) -> Float[Array, "B C"]:
    """log p_LSR(c|x,y): which passages help the language model to its answer.

    RA-DIT eq. 4 is ``softmax(p_LM(y|c,x) / temperature)`` with temperature .01:
    ``sequence_probability`` here. A probability of several tokens is so small that the
    softmax is flat; ``token_probability`` takes the geometric mean over the answer's
    tokens (REPLUG's code), ``mean_log_probability`` its logarithm (Atlas' PDist).

    Args:
        log_p_BC: summed log-probability of the answer after each passage; -inf: none.
        tokens_B: tokens of the answer.
        temperature: of the softmax over passages.
        mode: one of SCORE_MODES.

    Returns:
        Log-probabilities; ABSENT where there is no passage.
    """
    present_BC = jnp.isfinite(log_p_BC)
    log_p_BC = jnp.where(present_BC, log_p_BC.astype(jnp.float32), 0.0)
    mean_BC = log_p_BC / tokens_B[:, None]
    scores = {
        "mean_log_probability": lambda: mean_BC,
        "token_probability": lambda: jnp.exp(mean_BC),
        "sequence_probability": lambda: jnp.exp(log_p_BC),
    }
    if mode not in scores:
        raise ValueError(f"score mode {mode!r} is not one of {', '.join(scores)}")
    return _log_softmax(scores[mode]() / temperature, present_BC)


def _log_softmax(scores_BC: Array, present_BC: Array) -> Array:
    """Over the passages that are present; ABSENT elsewhere."""
    log_BC = jax.nn.log_softmax(jnp.where(present_BC, scores_BC, ABSENT), axis=-1)
    return jnp.where(present_BC, log_BC, ABSENT)


def retriever_log_probabilities(
    scores_BC: Float[Array, "B C"], present_BC: Bool[Array, "B C"], temperature: float
) -> Float[Array, "B C"]:
    """log p_R(c|x) over the candidates, in float32 (RA-DIT eq. 2)."""
    return _log_softmax(scores_BC.astype(jnp.float32) / temperature, present_BC)


def divergence(
    log_p_BC: Float[Array, "B C"], log_q_BC: Float[Array, "B C"]
) -> Float[Array, " B"]:
    """KL(p || q) of each row in nats; places that are ABSENT in p add nothing."""
    present_BC = log_p_BC > ABSENT / 2
    p_BC = jnp.where(present_BC, jnp.exp(log_p_BC), 0.0)
    difference_BC = jnp.where(present_BC, log_p_BC - log_q_BC, 0.0)
    return jnp.sum(p_BC * difference_BC, axis=-1)


def entropy(log_p_BC: Float[Array, "B C"]) -> Float[Array, " B"]:
    """Of each row in nats; ABSENT places add nothing."""
    present_BC = log_p_BC > ABSENT / 2
    return -jnp.sum(jnp.where(present_BC, jnp.exp(log_p_BC) * log_p_BC, 0.0), axis=-1)


def rank_correlation(
    a_BC: Float[Array, "B C"], b_BC: Float[Array, "B C"]
) -> Float[Array, " B"]:
    """Kendall's tau of each row: pairs in the same order less pairs in the other, over
    all; places ABSENT in either are left out, a row with fewer than two gives 0."""
    present_BC = (a_BC > ABSENT / 2) & (b_BC > ABSENT / 2)
    pairs_BCC = present_BC[:, :, None] & present_BC[:, None, :]
    a_BCC, b_BCC = (jnp.sign(x[:, :, None] - x[:, None, :]) for x in (a_BC, b_BC))
    count_B = jnp.sum(pairs_BCC, axis=(1, 2)) - jnp.sum(present_BC, axis=1)
    agreed_B = jnp.sum(jnp.where(pairs_BCC, a_BCC * b_BCC, 0.0), axis=(1, 2))
    return agreed_B / jnp.maximum(count_B, 1)


def kl(log_p_BC: Array, log_q_BC: Array, token_log_p_BTC: Array | None) -> Array:
    """KL(p_R || p_LSR), RA-DIT's direction (eq. 5) and REPLUG's."""
    return divergence(log_p_BC, log_q_BC)


def reverse_kl(
    log_p_BC: Array, log_q_BC: Array, token_log_p_BTC: Array | None
) -> Array:
    """KL(p_LSR || p_R): cross-entropy towards the target, but for a constant."""
    return divergence(log_q_BC, log_p_BC)


def pdist(log_p_BC: Array, log_q_BC: Array, token_log_p_BTC: Array | None) -> Array:
    """Perplexity distillation as Atlas' code has it: ``reverse_kl`` over C.

    Its target is ``mean_log_probability`` with temperature .01.
    """
    return divergence(log_q_BC, log_p_BC) / log_p_BC.shape[-1]


def emdr2(log_p_BC: Array, log_q_BC: Array, token_log_p_BTC: Array | None) -> Array:
    """-log sum_c p_R(c|x) p_LM(y_t|c,x,y_<t), summed over the answer's tokens.

    End-to-end training of multi-document reader and retriever (Sachan et al., 2021) in
    the form of Atlas' code, a mixture at every token; the language model is frozen.

    Args:
        log_p_BC: log p_R.
        log_q_BC: not used, the tokens' own probabilities teach.
        token_log_p_BTC: log-probability of each answer token after each passage; 0
            where the answer has no such token, which adds nothing, or no passage.
    """
    assert token_log_p_BTC is not None
    mixed_BT = jax.nn.logsumexp(token_log_p_BTC + log_p_BC[:, None, :], axis=-1)
    return -mixed_BT.sum(axis=-1)


# What a retriever is trained by: (log p_R, log p_LSR, tokens' log-probabilities) to the
# loss of each question, in nats.
RETRIEVER_LOSSES = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "pdist": pdist,
    "emdr2": emdr2,
}
