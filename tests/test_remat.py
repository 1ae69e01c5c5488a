"""What each policy does again, counted in the program of one layer's backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from radit_jax import sharding
from radit_jax.models.attention import Layout, causal_attention
from radit_jax.models.layers import rope_tables
from radit_jax.models.llama import Block, LlamaConfig
from radit_jax.models.remat import QKV, REMAT_POLICIES

CONFIG = LlamaConfig(
    vocab_size=64,
    width=32,
    layers=1,
    heads=4,
    kv_heads=2,
    head_size=8,
    mlp_width=48,
    max_length=64,
)


def products(jaxpr):
    """How many matrix products a program has, inside its parts too."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "dot_general"
        for inner in jax.tree.leaves(equation.params, is_leaf=is_program):
            if is_program(inner):
                count += products(inner)
    return count


def is_program(x):
    return hasattr(x, "eqns")


def layer_products(policy):
    """Of a layer, forward and backward; nothing is computed."""
    with jax.set_mesh(sharding.make_mesh()):
        ids_BL = sharding.put_rows(np.ones((2, 16), np.int32))
        tables = rope_tables(CONFIG.rope, CONFIG.head_size, ids_BL, 16)
        attend = causal_attention(Layout(ids_BL, ids_BL))
        block = jax.eval_shape(lambda: Block(CONFIG, jax.random.key(0)))
        x_BLD = sharding.put_rows(np.ones((2, 16, 32), np.float32))

        def layer(block, x_BLD):
            q, k, v = block.project_qkv(x_BLD, tables, 1e-5)
            return block.finish(x_BLD, attend(q, k, v), 1e-5)

        if policy is not None:
            layer = jax.checkpoint(layer, policy=policy)

        def both_ways(block, x_BLD):
            out_BLD, pull = jax.vjp(layer, block, x_BLD)
            return out_BLD, pull(x_BLD)

        return products(jax.make_jaxpr(both_ways)(block, x_BLD).jaxpr)


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("dots", 0),
        ("mlp", 2),  # gate and up
        ("offload", 2),
        ("qkv", 3),  # and the product after attention
        ("attention", 6),  # and queries, keys and values
        ("full", 8),  # and attention's own two
    ],
)
def test_a_policy_does_again_what_it_says(name, again):
    everything_kept = layer_products(REMAT_POLICIES["none"])
    # Three for every weight, and attention forward and backward.
    assert everything_kept == 7 * 3 + 2 + 6
    assert layer_products(REMAT_POLICIES[name]) == everything_kept + again


def test_every_policy_is_counted():
    counted = {"none", "dots", "mlp", "offload", "qkv", "attention", "full"}
    assert set(REMAT_POLICIES) == counted


def test_offloaded_arrays_wait_on_the_host():
    def layer(x):
        return jnp.sin(checkpoint_name(jnp.sin(x), QKV))

    kept = jax.checkpoint(layer, policy=REMAT_POLICIES["offload"])
    program = str(jax.make_jaxpr(jax.grad(lambda x: kept(x).sum()))(jnp.ones(4)))
    assert program.count("f32<host>[4] = device_put") == 1
    assert program.count("devices=(MemorySpace.Device,)") == 1
