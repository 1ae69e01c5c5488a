"""The splash room in programs compiled for a TPU slice that is not attached."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from radit_jax import sharding
from radit_jax.batch import Packed
from radit_jax.inference.score import target_log_probabilities
from radit_jax.models.attention import Kernel
from radit_jax.models.llama import Llama, LlamaConfig
from radit_jax.planning import aot, slices

pytest.importorskip("libtpu", reason="libtpu has wheels for Linux on x86-64 only")

ROWS, L, T = 8, 256, 32
CONFIG = LlamaConfig(
    vocab_size=512,
    width=256,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=128,
    mlp_width=512,
    max_length=L,
)


@pytest.fixture(scope="module")
def mesh():
    devices = slices.devices(slices.parse("v5e:2x2"))
    return sharding.make_mesh(2, 1, 2, devices=devices)


def compiled(function, mesh, *arguments):
    """The text of a program of arrays that are nowhere."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    with aot.tracing(mesh):
        model = jax.eval_shape(lambda key: Llama(CONFIG, key), key)
        traced = jax.jit(function).trace(aot.on(mesh, model), *arguments)
        return traced.lower(lowering_platforms=("tpu",)).compile().as_text()


def rows(mesh, length, dtype=jnp.int32):
    return aot.array(mesh, (ROWS, length), dtype, sharding.ROWS_BL)


def batch(mesh):
    tokens, sites = rows(mesh, L), rows(mesh, T)
    weights = rows(mesh, T, jnp.float32)
    return Packed(tokens, tokens, tokens, sites, sites, weights)


def kernels(text):
    """How often each Pallas kernel is called."""
    calls = re.findall(r"%splash_mha_([a-z]+)_segmented_\S+ = .* custom-call\(", text)
    return Counter(calls)


score = functools.partial(
    target_log_probabilities, dtype=jnp.bfloat16, kernel=Kernel("splash")
)


@pytest.mark.parametrize(
    ("remat", "forward", "sequence"), [("mlp", 1, True), ("full", 2, False)]
)
def test_a_training_step_compiles_with_splash(mesh, remat, forward, sequence):
    def loss(model, batch):
        stream = sharding.SEQUENCE_BLD if sequence else sharding.ACT_BLD
        log_BT = score(model, batch, remat=remat, stream=stream)
        return (log_BT * batch.weights_BT).sum()

    text = compiled(jax.grad(loss), mesh, batch(mesh))
    assert kernels(text) == {"fwd": forward, "dq": 1, "dkv": 1}
    # Sums over the tensor axis end where their tokens are kept.
    assert ("all-reduce-scatter" in text) == sequence


def test_scoring_with_shared_beginnings_compiles(mesh):
    text = compiled(score, mesh, batch(mesh), rows(mesh, L))
    assert kernels(text) == {"fwd": 2}
