"""Kinds of memory and what is in use at the peak, from the compiler's own notes."""

import functools

import jax
import jax.numpy as jnp
import pytest

from radit_jax import sharding
from radit_jax.planning import aot, memory
from radit_jax.planning.hlo import HloError, Module

PROGRAM = """HloModule m

ENTRY %main (w: f32[8,8]) -> f32[] {
  %w = f32[8,8]{1,0} parameter(0), metadata={op_name="w"}
  %x = f32[4]{0} parameter(1), metadata={op_name="x"}
  %cast = bf16[8,8]{1,0} convert(%w), metadata={op_name="jit(f)/cast"}
  %kept = f32[4,4]{1,0} dot(%x, %cast), metadata={op_name="jit(f)/jvp()/mlp/dot"}
  %short = f32[16]{0} add(%kept, %x), metadata={op_name="jit(f)/jvp()/mlp/add"}
  %grad = f32[8,8]{1,0} dot(%kept, %x), metadata={op_name="jit(f)/transpose(jvp())/dot"}
  ROOT %sum = f32[] reduce(%grad, %x), metadata={op_name="jit(f)/sum"}
}
"""
ASSIGNMENT = """BufferAssignment:
allocation 0: size 256, parameter 0, shape |f32[8,8]| at ShapeIndex {}:
 value: <1 w @0> (size=256,offset=0): f32[8,8]{1,0}
allocation 1: size 16, parameter 1, shape |f32[4]| at ShapeIndex {}:
 value: <2 x @0> (size=16,offset=0): f32[4]{0}
allocation 2: size 4, maybe-live-out:
 value: <3 sum @0> (size=4,offset=0): f32[]
allocation 3: size 600, preallocated-temp:
 value: <4 cast @0> (size=128,offset=0): bf16[8,8]{1,0}
 value: <5 kept @0> (size=64,offset=128): f32[4,4]{1,0}
 value: <6 short @0> (size=64,offset=192): f32[16]{0}
 value: <7 grad @0> (size=256,offset=256): f32[8,8]{1,0}
allocation 4: size 999, color 1, preallocated-temp:
 value: <8 elsewhere @1> (size=999,offset=0): f32[8,8]{1,0:S(1)}

Total bytes used: 1
"""
LIVE = """HloLiveRange (max 6):
  InstructionSequence:
    0:w
    1:x
    2:cast
    3:kept
    4:short
    5:grad
    6:sum
  BufferLiveRange:
    cast{{}}:2-3
    kept{{}}:3-5
    short{{}}:{short}
    grad{{}}:5-6
"""


def kind_of(name):
    return "weights" if name == "w" else "batch"


def read(short="4-4", code=7):
    live = LIVE.format(short=short)
    return memory.measure(Module(PROGRAM), ASSIGNMENT, live, kind_of, code)


def test_kinds_at_the_peak():
    found = read()
    # When the gradient is made, its operand is alive and the cast is not.
    assert found.kinds == {
        "weights": 256,
        "batch": 16,
        "outputs and constants": 4,
        memory.KEPT: 64,
        memory.GRADIENTS: 256,
        memory.UNUSED: 600 - 64 - 256,
        memory.CODE: 7,
    }
    assert found.total == 256 + 16 + 4 + 600 + 7
    assert [(b.bytes, b.shape, b.name) for b in found.buffers[:3]] == [
        (256, "f32[8,8]", "w"),
        (256, "f32[8,8]", "jit(f)/transpose(jvp())/dot"),
        (64, "f32[4,4]", "jit(f)/jvp()/mlp/dot"),
    ]


def test_what_lives_at_the_peak_decides():
    found = read(short="4-6")
    assert found.kinds[memory.TEMPORARIES] == 64
    assert memory.CASTS not in found.kinds


def test_other_texts_are_refused():
    with pytest.raises(HloError, match="no allocation"):
        memory.measure(Module(PROGRAM), "nothing", LIVE, kind_of, 0)


def test_a_training_step_keeps_one_activation_per_layer():
    mesh = sharding.make_mesh(1, 4, 2)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def layer(x, w):
        w = jax.sharding.reshard(w, jax.P(None, None))
        return jnp.tanh(jnp.einsum("bd,de->be", x, w)), None

    def loss(weights, x):
        return jax.lax.scan(layer, x, weights)[0].sum()

    weights = aot.array(
        mesh, (6, 64, 64), jnp.float32, jax.P(None, sharding.FSDP, None)
    )
    x = aot.array(mesh, (2048, 64), jnp.float32, jax.P(sharding.FSDP, None))
    step = jax.jit(lambda weights, x: jax.grad(loss)(weights, x).sum())
    compiled = aot.compile_ahead(step, mesh, weights, x)
    found = memory.measure(
        compiled.module,
        compiled.assignment,
        compiled.live_ranges,
        lambda name: "weights" if name == "weights" else "batch",
        compiled.code_bytes,
    )
    rows = 2048 // 4
    assert found.kinds["weights"] == 6 * 16 * 64 * 4
    assert found.kinds["batch"] == rows * 64 * 4
    assert found.kinds[memory.KEPT] >= 6 * rows * 64 * 4
    stack = next(b for b in found.buffers if b.shape == f"f32[6,{rows},64]")
    assert stack.kind == memory.KEPT
