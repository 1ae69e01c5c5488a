"""Log-likelihoods without whole logits, against NumPy and against whole logits."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radit_jax import sharding
from radit_jax.batch import Packed
from radit_jax.inference import score
from radit_jax.inference.score import (
    chunked_log_probabilities,
    target_log_probabilities,
)
from radit_jax.models.llama import Llama, LlamaConfig

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
RNG = np.random.default_rng(0)
B, T, D, V = 8, 10, 16, 64
HIDDEN_BTD = RNG.standard_normal((B, T, D), np.float32)
HEAD_VD = 3 * RNG.standard_normal((V, D), np.float32)
TARGETS_BT = RNG.integers(V, size=(B, T)).astype(np.int32)
D_LOG_BT = RNG.standard_normal((B, T), np.float32)


def oracle():
    """Values and gradients by hand, in float64."""
    h_BTD, w_VD = HIDDEN_BTD.astype(np.float64), HEAD_VD.astype(np.float64)
    logits_BTV = h_BTD @ w_VD.T
    normaliser_BT1 = np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    log_BTV = logits_BTV - normaliser_BT1
    chosen_BTV = np.eye(V)[TARGETS_BT]
    d_logits_BTV = (chosen_BTV - np.exp(log_BTV)) * D_LOG_BT[..., None]
    return (
        (log_BTV * chosen_BTV).sum(-1),
        d_logits_BTV @ w_VD,
        np.einsum("BTV,BTD->VD", d_logits_BTV, h_BTD),
    )


@functools.partial(jax.jit, static_argnames="budget")  # a program for every budget
def values_and_gradients(h_BTD, w_VD, targets_BT, d_log_BT, budget):
    def log_of(h_BTD, w_VD):
        return chunked_log_probabilities(h_BTD, w_VD, targets_BT)

    log_BT, pull = jax.vjp(log_of, h_BTD, w_VD)
    return log_BT, *pull(d_log_BT)


def on_mesh(dtype=jnp.float32):
    return (
        sharding.put(HIDDEN_BTD, sharding.ACT_BLD).astype(dtype),
        sharding.put(HEAD_VD, sharding.W_VD),
        sharding.put_rows(TARGETS_BT),
        sharding.put_rows(D_LOG_BT),
    )


# One token at a time, seven (so that the last chunk is filled up), and all at once.
@pytest.mark.parametrize("budget", [1, 7 * 4 * V, 2**20])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_chunks_give_the_values_and_gradients_of_the_whole(sizes, budget, monkeypatch):
    monkeypatch.setattr(score, "LOGITS_BYTES", budget)
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        arrays = on_mesh()
        found = values_and_gradients(*arrays, budget)
        specs = (sharding.ROWS_BL, sharding.ACT_BLD, sharding.W_VD)
        for ours, theirs, spec in zip(found, oracle(), specs, strict=True):
            assert ours.sharding.spec == spec
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_the_gradient_of_the_head_is_added_up_in_float32(monkeypatch):
    """In bfloat16 a sum of a thousand equal parts would stop growing at 256 of them."""
    monkeypatch.setattr(score, "LOGITS_BYTES", 1)
    tokens = 1024
    with jax.set_mesh(sharding.make_mesh()):
        h_BTD = jnp.ones((1, tokens, 8), jnp.bfloat16)
        targets_BT = jnp.zeros((1, tokens), jnp.int32)

        def log_of(w_VD):
            return chunked_log_probabilities(h_BTD, w_VD, targets_BT).sum()

        h_BTD, targets_BT = jax.tree.map(
            jax.sharding.reshard,
            (h_BTD, targets_BT),
            (sharding.ACT_BLD, sharding.ROWS_BL),
        )
        w_VD = sharding.put(np.zeros((4, 8), np.float32), sharding.W_VD)
        d_w_VD = jax.jit(jax.grad(log_of))(w_VD)
    assert d_w_VD.dtype == jnp.float32
    expected = tokens * (np.eye(4)[0] - 0.25)
    np.testing.assert_allclose(d_w_VD, np.tile(expected[:, None], (1, 8)), rtol=1e-6)


def test_bfloat16_stays_near(monkeypatch):
    monkeypatch.setattr(score, "LOGITS_BYTES", 7 * 4 * V)
    with jax.set_mesh(sharding.make_mesh()):
        found = values_and_gradients(*on_mesh(jnp.bfloat16), "bfloat16")
    assert [x.dtype for x in found] == [jnp.float32, jnp.bfloat16, jnp.float32]
    for ours, theirs in zip(found, oracle(), strict=True):
        assert np.abs(ours - theirs).max() < 0.03 * np.abs(theirs).max()


CONFIG = LlamaConfig(
    vocab_size=V,
    width=16,
    layers=1,
    heads=8,
    kv_heads=8,
    head_size=4,
    mlp_width=16,
    max_length=16,
)


def batch():
    segments_BL = np.ones((B, 16), np.int32)
    positions_BL = np.broadcast_to(np.arange(16, dtype=np.int32), (B, 16))
    tokens_BL = RNG.integers(V, size=(B, 16)).astype(np.int32)
    sites_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    parts = (tokens_BL, segments_BL, positions_BL, sites_BT, TARGETS_BT, D_LOG_BT)
    return Packed(*map(sharding.put_rows, parts))


def loss(model, batch):
    return (target_log_probabilities(model, batch) * batch.weights_BT).sum()


def test_a_model_is_scored_the_same_in_chunks(monkeypatch):
    config = dataclasses.replace(CONFIG, tied=True)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        model, rows = jax.jit(lambda: Llama(config, jax.random.key(0)))(), batch()
        whole = jax.jit(jax.value_and_grad(loss))(model, rows)
        monkeypatch.setattr(score, "LOGITS_BYTES", 3 * 4 * V)
        found = jax.jit(jax.value_and_grad(lambda m, b: loss(m, b)))(model, rows)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, whole)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_logits_beyond_the_budget_are_never_there_as_a_whole(sizes, monkeypatch):
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        model = jax.eval_shape(lambda: Llama(CONFIG, jax.random.key(0)))
        rows = batch()
        tokens, words = B * T // sharding.row_shards(), V // sizes[2]
        enough = 4 * tokens * words
        for budget, whole in ((enough, True), (enough - 1, False)):
            monkeypatch.setattr(score, "LOGITS_BYTES", budget)
            program = jax.make_jaxpr(jax.grad(lambda m, b: loss(m, b)))(model, rows)
            program = re.sub(r"@(\([a-z,]+\)|[a-z]+)", "", str(program))
            assert (f"f32[{B},{T},{V}]" in program) == whole
            assert f"f32[{tokens},{words}]" not in program
            assert (f"f32[{tokens // 2},{words}]" in program) != whole
