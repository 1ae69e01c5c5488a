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
