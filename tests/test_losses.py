"""Log-probabilities of targets against numpy, also with the vocabulary split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radit_jax import losses, sharding

RNG = np.random.default_rng(0)
LOGITS_BTV = (10 * RNG.standard_normal((8, 3, 16))).astype(np.float32)
TARGETS_BT = RNG.integers(16, size=(8, 3)).astype(np.int32)


def oracle(logits_BTV, targets_BT):
    logits_BTV = logits_BTV.astype(np.float64)
    normaliser_BT = np.log(np.exp(logits_BTV).sum(-1))
    chosen_BT = np.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
    return chosen_BT - normaliser_BT


def test_log_probabilities_are_those_of_numpy():
    with jax.set_mesh(sharding.make_mesh()):
        found_BT = losses.token_log_probabilities(
            jnp.asarray(LOGITS_BTV), jnp.asarray(TARGETS_BT)
        )
    np.testing.assert_allclose(found_BT, oracle(LOGITS_BTV, TARGETS_BT), atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2), (8, 1, 1)])
def test_a_split_vocabulary_changes_neither_values_nor_gradients(sizes):
    def total(logits_BTV, targets_BT):
        log_BT = losses.token_log_probabilities(logits_BTV, targets_BT)
        return log_BT.sum(), log_BT

    def on(mesh):
        with jax.set_mesh(mesh):
            logits_BTV = sharding.put(LOGITS_BTV, sharding.LOGITS_BLV)
            targets_BT = sharding.put(TARGETS_BT, sharding.ROWS_BL)
            return jax.jit(jax.grad(total, has_aux=True))(logits_BTV, targets_BT)

    grads_BTV, log_BT = on(sharding.make_mesh(*sizes))
    expected_grads_BTV, _ = on(sharding.make_mesh())
    np.testing.assert_allclose(log_BT, oracle(LOGITS_BTV, TARGETS_BT), atol=1e-5)
    np.testing.assert_allclose(grads_BTV, expected_grads_BTV, atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    logits_BTV = jnp.zeros((1, 1, 4096), jnp.bfloat16)
    with jax.set_mesh(sharding.make_mesh()):
        found_BT = losses.token_log_probabilities(
            logits_BTV, jnp.zeros((1, 1), jnp.int32)
        )
    assert found_BT.dtype == jnp.float32
    assert float(found_BT[0, 0]) == pytest.approx(-np.log(4096), rel=1e-6)


def test_huge_logits_stay_finite():
    logits_BTV = jnp.asarray([[[1e30, -1e30, 0.0]]])
    with jax.set_mesh(sharding.make_mesh()):
        found_BT = losses.token_log_probabilities(
            jnp.repeat(logits_BTV, 2, axis=1), jnp.asarray([[0, 1]])
        )
    assert float(found_BT[0, 0]) == 0.0
    assert np.isfinite(found_BT).all()


# --- R-FT -----------------------------------------------------------------------

LOG_P = np.array([[-2.0, -9.0, -4.0], [-30.0, -31.0, -np.inf]], np.float32)
TOKENS = np.array([2, 5], np.int32)
SCORES = np.array([[0.3, 0.9, -0.2], [401.0, 399.5, 9e9]], np.float32)
PRESENT = np.isfinite(LOG_P)


def lsr(*settings):
    return losses.lsr_log_target(jnp.asarray(LOG_P), jnp.asarray(TOKENS), *settings)


def softmax(x, present):
    x = np.where(present, x, -np.inf)
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("mode", "score"),
    [
        ("mean_log_probability", lambda sums, n: sums / n),
        ("token_probability", lambda sums, n: np.exp(sums / n)),
        ("sequence_probability", lambda sums, n: np.exp(sums)),
    ],
)
@pytest.mark.parametrize("temperature", [0.01, 0.3])
def test_lsr_targets_are_those_of_numpy(mode, score, temperature):
    found = lsr(temperature, mode)
    sums = np.where(PRESENT, LOG_P.astype(np.float64), 0)
    expected = softmax(score(sums, TOKENS[:, None]) / temperature, PRESENT)
    np.testing.assert_allclose(np.exp(found), expected, atol=1e-6)


def test_an_unknown_score_mode_is_told():
    with pytest.raises(ValueError, match="'mean' is not one of mean_log_probability"):
        lsr(0.1, "mean")


def kl(p, q):
    return np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300)), 0)


def distributions():
    """log p_R and log p_LSR as the code has them, then p and q by numpy."""
    log_p = losses.retriever_log_probabilities(
        jnp.asarray(SCORES), jnp.asarray(PRESENT), 0.5
    )
    p = softmax(SCORES.astype(np.float64) / 0.5, PRESENT)
    sums = np.where(PRESENT, LOG_P.astype(np.float64), 0)
    q = softmax(sums / TOKENS[:, None] / 0.3, PRESENT)
    return log_p, lsr(0.3), p, q


@pytest.mark.parametrize("reverse", [False, True])
def test_divergences_are_those_of_numpy_in_their_direction(reverse):
    log_p, log_q, p, q = distributions()
    pairs = ((log_q, log_p), (q, p)) if reverse else ((log_p, log_q), (p, q))
    found = losses.divergence(*pairs[0])
    np.testing.assert_allclose(found, kl(*pairs[1]).sum(-1), rtol=1e-4, atol=1e-6)
    # Otherwise the two directions would not be told apart.
    assert abs(kl(p, q).sum() - kl(q, p).sum()) > 0.1


def test_retriever_losses_are_those_of_numpy():
    log_p, log_q, p, q = distributions()
    rng = np.random.default_rng(0)
    tokens = np.log(rng.uniform(0.1, 0.9, (2, 4, 3)))
    tokens[1, 2:] = 0  # an answer of two tokens
    tokens[1, :, 2] = 0  # and no third passage
    mixed = [
        -sum(np.log(p[b] @ (np.exp(tokens[b, t]) * PRESENT[b])) for t in range(size))
        for b, size in enumerate((4, 2))
    ]
    expected = {
        "kl": kl(p, q).sum(-1),
        "reverse_kl": kl(q, p).sum(-1),
        "pdist": kl(q, p).sum(-1) / 3,
        "emdr2": mixed,
    }
    assert expected.keys() == losses.RETRIEVER_LOSSES.keys()
    for name, values in expected.items():
        found = losses.RETRIEVER_LOSSES[name](log_p, log_q, jnp.asarray(tokens))
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_one_passage_for_all_tokens_is_the_likelihood_of_the_answer():
    """EMDR2 with all of p_R on a passage is what that passage makes of the answer."""
    log_p = jnp.array([[0.0, losses.ABSENT]])
    tokens = jnp.log(jnp.array([[[0.5, 0.9], [0.25, 0.9]]]))
    found = losses.emdr2(log_p, log_p, tokens)
    np.testing.assert_allclose(found, [-np.log(0.5 * 0.25)], rtol=1e-6)


def test_the_gradient_is_the_analytic_one_and_spares_the_absent():
    log_q = lsr(0.3)

    def loss(scores):
        log_p = losses.retriever_log_probabilities(scores, jnp.asarray(PRESENT), 1.0)
        return losses.divergence(log_p, log_q).sum()

    found = jax.grad(loss)(jnp.asarray(SCORES))
    p = softmax(SCORES.astype(np.float64), PRESENT)
    q = np.exp(np.asarray(log_q, np.float64))
    each = np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300))
    total = (p * each).sum(-1, keepdims=True)
    np.testing.assert_allclose(found, p * (each - total) * PRESENT, atol=1e-5)
    assert found[1, 2] == 0


def test_entropy_and_rank_correlation_by_hand():
    uniform = jnp.log(jnp.full((1, 4), 0.25))
    assert float(losses.entropy(uniform)[0]) == pytest.approx(np.log(4))
    one = jnp.array([[0.0, losses.ABSENT, losses.ABSENT]])
    assert float(losses.entropy(one)[0]) == 0
    up, down = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[3.0, 2.0, 1.0]])
    swapped = jnp.array([[2.0, 1.0, 3.0]])
    gone = jnp.array([[1.0, 2.0, losses.ABSENT]])
    cases = [
        (up, up, 1),
        (up, down, -1),
        (up, swapped, 1 / 3),
        (gone, down, -1),
        (one, up, 0),
    ]
    for a, b, expected in cases:
        found = losses.rank_correlation(a, b)
        assert float(found[0]) == pytest.approx(expected)
