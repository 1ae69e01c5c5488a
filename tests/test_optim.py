"""Schedule, clipping, decay mask and gradient accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from radit_jax import optim, sharding


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_schedule_warms_up_peaks_and_ends(kind):
    at = optim.schedule(1e-3, 1e-5, warmup_steps=4, steps=20, kind=kind)
    assert float(at(0)) == pytest.approx(1e-3 / 5)  # the first step moves
    assert float(at(2)) == pytest.approx(3e-3 / 5)
    assert float(at(4)) == pytest.approx(1e-3)
    assert float(at(12)) == pytest.approx((1e-3 + 1e-5) / 2)
    assert float(at(20)) == pytest.approx(1e-5)
    assert float(at(500)) == pytest.approx(1e-5)
    values = [float(at(step)) for step in range(21)]
    assert values == sorted(values[:5]) + sorted(values[5:], reverse=True)


def test_cosine_decays_as_a_cosine():
    at = optim.schedule(1.0, 0.0, warmup_steps=0, steps=8)
    for step in range(9):
        expected = 0.5 * (1 + np.cos(np.pi * step / 8))
        assert float(at(step)) == pytest.approx(expected, abs=1e-6)


def test_no_warmup_starts_at_the_peak():
    assert float(optim.schedule(1e-3, 1e-5, 0, 10)(0)) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1.0, 0.0, 10, 10), "warmup_steps = 10 .* less than steps = 10"),
        ((1.0, 0.0, -1, 10), "warmup_steps = -1"),
        ((0.0, 0.0, 1, 10), "learning_rate = 0"),
        ((1.0, 0.0, 1, 10, "cosin"), "'cosin' is not one of"),
    ],
)
def test_impossible_schedules_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        optim.schedule(*arguments)


def weights():
    return {
        "w_q": jnp.ones((2, 3)),
        "attention_norm": jnp.ones((4, 3)),  # stacked: a matrix by its shape only
        "b_q": jnp.ones((2, 3)),
        "layers": [{"mlp_norm": jnp.ones(3), "w_up": jnp.ones((3, 3))}],
        "embedding": jnp.ones((5, 3)),
    }


def test_norms_and_biases_do_not_decay():
    assert optim.decayed(weights()) == {
        "w_q": True,
        "attention_norm": False,
        "b_q": False,
        "layers": [{"mlp_norm": False, "w_up": True}],
        "embedding": True,
    }


def test_decay_is_decoupled_and_scaled_by_the_learning_rate():
    tx = optim.optimizer(optax.constant_schedule(0.1), 0.9, 0.95, 1e-8, 0.5, 1.0)
    params = weights()
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(still, tx.init(params), params)
    assert float(updates["w_q"][0, 0]) == pytest.approx(-0.1 * 0.5)
    assert float(updates["b_q"][0, 0]) == 0.0
    assert float(updates["layers"][0]["mlp_norm"][0]) == 0.0


def test_adamw_is_that_of_numpy():
    rate, beta1, beta2, eps, decay = 0.01, 0.9, 0.95, 1e-8, 0.1
    tx = optim.optimizer(
        optax.constant_schedule(rate), beta1, beta2, eps, decay, clip_norm=1.0
    )
    rng = np.random.default_rng(0)
    w = rng.standard_normal(5)
    params = {"w": jnp.asarray(w, jnp.float32)}
    state = tx.init(params)
    m = v = np.zeros(5)
    for t in range(1, 5):
        g = rng.standard_normal(5) * (10 if t == 2 else 0.1)  # step 2 is clipped
        updates, state = tx.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        g = g / max(np.linalg.norm(g), 1.0)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        step = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        w = w - rate * (step + decay * w)
    np.testing.assert_allclose(params["w"], w, rtol=1e-4)


def test_global_norm_is_of_all_leaves_together():
    tree = {"a": jnp.full((2, 2), 1.0), "b": [jnp.full(3, 2.0)]}
    assert float(optim.global_norm(tree)) == pytest.approx(4.0)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_micro_batches_sum_to_the_gradient_of_one_batch(parts):
    rng = np.random.default_rng(1)
    x_BE = rng.standard_normal((8, 3)).astype(np.float32)
    weights_B = rng.integers(0, 2, 8).astype(np.float32)  # unequal shares
    w = {"w": jnp.asarray(rng.standard_normal(3), jnp.float32)}

    def gradient(model, part):
        x_BE, weights_B = part

        def loss(model):
            return jnp.sum(weights_B * jnp.sin(jnp.einsum("BE,E->B", x_BE, model["w"])))

        return {"targets": weights_B.sum()}, jax.grad(loss)(model)

    with jax.set_mesh(sharding.make_mesh()):
        whole = gradient(w, (jnp.asarray(x_BE), jnp.asarray(weights_B)))
        split = (
            jnp.asarray(x_BE.reshape(parts, -1, 3)),
            jnp.asarray(weights_B.reshape(parts, -1)),
        )
        found = jax.jit(lambda w, s: optim.accumulate(gradient, w, s))(w, split)
    assert float(found[0]["targets"]) == weights_B.sum()
    np.testing.assert_allclose(found[1]["w"], whole[1]["w"], rtol=1e-5)
