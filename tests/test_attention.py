"""The door to attention against four lines of NumPy-like attention, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radit_jax import sharding
from radit_jax.models import attention_xla
from radit_jax.models.attention import (
    Layout,
    attention,
    attention_mask,
    heads_first,
)
from radit_jax.models.remat import REMAT_POLICIES


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(sharding.make_mesh(1, 1, 1)):
        yield


def plain(q_BLHK, k_BMGK, v_BMGK, mask_BLM):
    """Softmax over all keys at once, differentiated by JAX."""
    repeats = q_BLHK.shape[2] // k_BMGK.shape[2]
    k_BMHK, v_BMHK = (jnp.repeat(x, repeats, axis=2) for x in (k_BMGK, v_BMGK))
    scores = jnp.einsum("BLHK,BMHK->BHLM", q_BLHK, k_BMHK) * q_BLHK.shape[3] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask_BLM[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("BHLM,BMHK->BLHK", weights, v_BMHK)


def inputs(L, M, H, G, K=8, rows=2):
    rng = np.random.default_rng(L + M + H + G)
    shapes = ((rows, L, H, K), (rows, M, G, K), (rows, M, G, K), (rows, L, H, K))
    return [jnp.asarray(rng.standard_normal(s, np.float32)) for s in shapes]


def packed(L, rows=2):
    """Segments of uneven length, and padding at the end of each row."""
    segments = np.zeros((rows, L), np.int32)
    positions = np.zeros((rows, L), np.int32)
    for row in range(rows):
        for n, start in enumerate(range(0, L - 5, 11 + row), 1):
            length = min(11 + row, L - 5 - start)
            segments[row, start : start + length] = n
            positions[row, start : start + length] = np.arange(length)
    return Layout(jnp.asarray(segments), jnp.asarray(positions))


def attend_with(mask, in_order=False):
    def attend(q, k, v):
        return attention(q, heads_first(k), heads_first(v), mask, in_order)

    return attend


def gradients(attend, q, k, v, d_out):
    out, pull = jax.vjp(attend, q, k, v)
    return [out, *pull(d_out)]


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("block", [8, 64])
def test_packed_rows_and_their_gradients_are_those_of_plain_attention(
    monkeypatch, groups, block
):
    monkeypatch.setattr(attention_xla, "BLOCK", block)
    layout = packed(32)
    mask = attention_mask(layout, layout, causal=True)
    q, k, v, d_out = inputs(32, 32, 6, groups)
    real = (layout.segment_ids_BL > 0)[:, :, None, None]
    # What a padded query sees is nobody's business, and nothing comes back from it.
    d_out = jnp.where(real, d_out, 0.0)
    found = gradients(attend_with(mask, True), q, k, v, d_out)
    expected = gradients(lambda q, k, v: plain(q, k, v, mask), q, k, v, d_out)
    found[0], expected[0] = (
        jnp.where(real, out, 0.0) for out in (found[0], expected[0])
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_any_mask_and_other_keys_than_queries():
    q, k, v, d_out = inputs(5, 9, 4, 2)
    mask = jnp.asarray(np.random.default_rng(0).random((2, 5, 9)) < 0.5)
    mask = mask.at[:, :, 4].set(True)
    found = gradients(attend_with(mask), q, k, v, d_out)
    expected = gradients(lambda q, k, v: plain(q, k, v, mask), q, k, v, d_out)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_query_without_keys_is_finite_and_passes_no_gradient():
    q, k, v, d_out = inputs(4, 4, 2, 2)
    mask = jnp.ones((2, 4, 4), bool).at[:, 1].set(False)
    only = jnp.zeros_like(d_out).at[:, 1].set(d_out[:, 1])
    out, *grads = gradients(attend_with(mask), q, k, v, only)
    assert jnp.isfinite(out).all()
    assert not any(jnp.any(grad) for grad in grads)


def test_scores_of_hundreds_stay_finite():
    q, k, v, d_out = inputs(4, 4, 2, 2)
    mask = jnp.tril(jnp.ones((2, 4, 4), bool))
    found = gradients(attend_with(mask, True), 300 * q, k, v, d_out)
    expected = gradients(lambda q, k, v: plain(q, k, v, mask), 300 * q, k, v, d_out)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_near_and_returns_bfloat16():
    q, k, v, d_out = inputs(16, 16, 4, 2)
    mask = jnp.tril(jnp.ones((2, 16, 16), bool))
    exact = gradients(attend_with(mask, True), q, k, v, d_out)
    half = (x.astype(jnp.bfloat16) for x in (q, k, v, d_out))
    found = gradients(attend_with(mask, True), *half)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        scale = float(jnp.abs(theirs).max())
        assert float(jnp.abs(ours - theirs).max()) < 0.03 * scale


@pytest.mark.parametrize(("remat", "forward_passes"), [("dots", 1), ("full", 2)])
def test_a_layer_that_keeps_matrix_products_runs_attention_forward_once(
    remat, forward_passes
):
    q, k, v, _ = inputs(16, 16, 4, 2)
    mask = jnp.tril(jnp.ones((2, 16, 16), bool))

    def loss(q, k, v):
        return (attend_with(mask, True)(jnp.sin(q), k, v) ** 2).sum()

    kept = jax.checkpoint(loss, policy=REMAT_POLICIES[remat])
    program = str(jax.make_jaxpr(jax.value_and_grad(kept))(q, k, v))
    # One exponential each: forward passes, and the backward pass.
    assert program.count(" exp ") == forward_passes + 1
