"""FLOPs, HBM bytes and collectives of compiled programs against counts by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radit_jax import sharding
from radit_jax.planning import aot, cost, kernels
from radit_jax.planning.hlo import HloError, Module


def counted(function, mesh, *arguments, **options):
    compiled = aot.compile_ahead(function, mesh, *arguments)
    return cost.count(compiled.module, mesh.size, kernels.kernel_flops, **options)


@pytest.fixture
def mesh():
    return sharding.make_mesh(1, 4, 2)


def layers(weights, x, policy=None):
    """Five layers with weights gathered over fsdp, as the models do it."""

    @functools.partial(jax.checkpoint, policy=policy)
    def step(x, w):
        w = jax.sharding.reshard(w, jax.P(None, None))
        return jnp.tanh(jnp.einsum("bd,de->be", x, w)), None

    return jax.lax.scan(step, x, weights)[0].sum()


@pytest.fixture
def arguments(mesh):
    return (
        aot.array(mesh, (5, 64, 64), jnp.float32, jax.P(None, sharding.FSDP, None)),
        aot.array(mesh, (32, 64), jnp.float32, jax.P(sharding.FSDP, None)),
    )


@pytest.mark.parametrize(
    ("policy", "products"),
    [
        (jax.checkpoint_policies.everything_saveable, 3),
        (jax.checkpoint_policies.nothing_saveable, 4),
    ],
)
def test_recomputation_counts(mesh, arguments, policy, products):
    step = jax.jit(jax.grad(functools.partial(layers, policy=policy)))
    found = counted(step, mesh, *arguments)
    # The first layer's input needs no gradient, but the loop does not know.
    rows = 32 // 4
    assert found.flops == products * 5 * 2 * rows * 64 * 64


def test_collectives_of_a_scan(mesh, arguments):
    step = jax.jit(jax.grad(layers))
    found = counted(step, mesh, *arguments).collectives
    places = np.arange(8).reshape(1, 4, 2)
    gathers = [c for c in found if c.kind == "all-gather"]
    assert gathers
    for c in gathers:
        assert cost.by_axis(places, sharding.AXES, c) == "fsdp"
        assert (c.bytes, len(c.group), c.times) == (64 * 64 * 4, 4, 5)
        assert c.wire == 5 * 64 * 64 * 4 * 3 / 4
    # On CPUs a reduce-scatter is an all-reduce, of which each keeps a share.
    sums = [c for c in found if c.kind in ("all-reduce", "reduce-scatter")]
    assert {c.bytes for c in sums} == {64 * 64 * 4}
    rounds = 2 if sums[0].kind == "all-reduce" else 1
    assert sums[0].wire == 5 * rounds * 64 * 64 * 4 * 3 / 4


def test_what_a_cache_holds_is_compiled_anew(mesh, arguments):
    """The compiler's notes are written when it works, not when a cache answers."""
    least = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[least]
    jax.config.update(least, 0.0)
    try:
        step = jax.jit(lambda w, x: layers(w, x) + 1.25)
        with aot.tracing(mesh):
            step.lower(*arguments).compile()
        assert counted(step, mesh, *arguments).flops
        assert counted(step, mesh, *arguments).flops
    finally:
        jax.config.update(least, before)


def test_products_split_over_tensor_are_summed_there(mesh):
    x = aot.array(mesh, (32, 64), jnp.float32, jax.P(None, sharding.TENSOR))
    w = aot.array(mesh, (64, 16), jnp.float32, jax.P(sharding.TENSOR, None))
    product = jax.jit(lambda x, w: jnp.dot(x, w, out_sharding=jax.P(None, None)))
    found = counted(product, mesh, x, w)
    assert found.flops == 2 * 32 * 32 * 16
    (total,) = found.collectives
    places = np.arange(8).reshape(1, 4, 2)
    assert (total.kind, total.bytes) == ("all-reduce", 32 * 16 * 4)
    assert cost.by_axis(places, sharding.AXES, total) == "tensor"
    assert total.wire == 2 * 32 * 16 * 4 / 2


def test_a_scan_reads_a_slice_of_its_stack_each_time():
    mesh = sharding.make_mesh()
    stack = aot.array(mesh, (50, 128, 128), jnp.float32, jax.P())
    x = aot.array(mesh, (1, 128), jnp.float32, jax.P())
    multiply = jax.jit(lambda s, x: jax.lax.scan(lambda x, w: (x @ w, None), x, s)[0])
    found = counted(multiply, mesh, stack, x).hbm_bytes
    once = 50 * 128 * 128 * 4
    # Read once by the product; a copy of the slice may be written and read besides.
    assert once <= found < 3.5 * once


def test_loops_that_stop_on_data_need_to_be_told():
    mesh = sharding.make_mesh()
    x = aot.array(mesh, (64, 64), jnp.float32, jax.P())
    stop = jax.jit(
        lambda x: jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ x, x)
    )
    with pytest.raises(HloError, match="how often"):
        counted(stop, mesh, x)
    assert counted(stop, mesh, x, loop_trips=6).flops == 6 * 2 * 64**3


def program(instructions, more=""):
    head = "ENTRY %main (p: f32[4]) -> f32[4] {"
    return Module(f"HloModule m\n{more}\n{head}\n{instructions}\n}}\n")


def flops_of(left, right, out, attributes):
    found = program(
        f"  %l = {left} parameter(0)\n  %r = {right} parameter(1)\n"
        f"  ROOT %c = {out} convolution(%l, %r), {attributes}"
    )
    return cost.count(found, 1, kernels.kernel_flops)


def test_convolutions_that_stand_for_products():
    """As TPUs spell them; the dilated one is a batch of 4 products."""
    plain = flops_of("f32[8,16]", "f32[16,32]", "f32[8,32]", "dim_labels=bf_io->bf")
    assert plain.flops == 2 * 8 * 16 * 32
    batch = flops_of(
        "bf16[4,8,16]",
        "bf16[4,32,16]",
        "f32[4,8,32]",
        "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0oi->0bf",
    )
    assert batch.flops == 4 * 2 * 8 * 16 * 32
    spatial = flops_of(
        "f32[1,10,3]",
        "f32[3,3,5]",
        "f32[1,10,5]",
        "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
    )
    # Of 30 pairs of positions two fall on padding.
    assert spatial.flops == 2 * 28 * 3 * 5


def test_precise_products_take_several_passes():
    def passes(left, right, precision):
        found = flops_of(
            f"{left}[8,16]",
            f"{right}[16,32]",
            "f32[8,32]",
            f"dim_labels=bf_io->bf, operand_precision={{{precision},{precision}}}",
        )
        return found.unit_flops / found.flops

    assert passes("f32", "f32", "highest") == 6
    assert passes("f32", "bf16", "highest") == 3
    assert passes("f32", "f32", "high") == 3
    assert passes("bf16", "bf16", "highest") == 1
    assert passes("f32", "f32", "default") == 1


ASYNC = """
%part{n} (a: f32[2,8]) -> f32[8,8] {{
  %a{n} = f32[2,8]{{1,0}} parameter(0)
  ROOT %g{n} = f32[8,8]{{1,0}} all-gather(%a{n}), channel_id={channel}, GROUPS, \
dimensions={{0}}, frontend_attributes={{chain_id="{chain}"}}
}}
""".replace("GROUPS", "replica_groups=[1,4]<=[4]")


def test_parts_of_a_hidden_collective_count_once():
    parts = [(0, 7, 1), (1, 7, 1), (2, 8, 2)]
    more = "".join(
        ASYNC.format(n=n, channel=channel, chain=chain) for n, channel, chain in parts
    )
    calls = "\n".join(
        f"  %f{n} = f32[8,8]{{1,0}} fusion(%p), kind=kCustom, calls=%part{n}"
        for n, _, _ in parts
    )
    found = cost.count(
        program(
            f"  %p = f32[2,8]{{1,0}} parameter(0)\n{calls}\n"
            "  ROOT %z = f32[8,8]{1,0} add(%f0, %f2)",
            more,
        ),
        4,
        kernels.kernel_flops,
    )
    assert [(c.kind, c.bytes, c.times) for c in found.collectives] == [
        ("all-gather", 256, 1)
    ] * 2


@pytest.mark.parametrize("ids", ["1,2", "1:2"])
def test_what_slices_exchange_over_the_network(ids):
    found = cost.count(
        program(
            "  %t = token[] after-all()\n"
            "  ROOT %r = (f32[2,10,128]{2,1,0}, u32[], token[]) recv(%t), "
            'channel_id=1, frontend_attributes={_xla_megascale_target="{'
            f'{ids}}}x{{0:63}}",_xla_megascale_transfer_type="ALL_GATHER"}}'
        ),
        128,
        kernels.kernel_flops,
    )
    (gather,) = found.collectives
    assert gather.kind == "all-gather"
    assert gather.wire == 10 * 128 * 4
    places = np.arange(128).reshape(2, 64, 1)
    assert cost.by_axis(places, sharding.AXES, gather) == "data"


SPLASH = (
    "  ROOT %splash_mha_{kind} = bf16[2,4,2048,128] custom-call(%m, %q, %k), "
    'custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata='
    '{{"xprof_metadata":"{{\\"block_q\\": 512, \\"block_kv\\": 512, '
    '\\"block_q_dkv\\": 256, \\"block_kv_dkv\\": 512, \\"block_q_dq\\": 2048, '
    '\\"block_kv_dq\\": 1024}}"}}}}'
)


@pytest.mark.parametrize(
    ("kind", "products", "pairs"),
    [
        ("fwd_segmented_residuals.2", 2, 10 * 512 * 512),
        ("dq.1", 3, 2 * 2048 * 1024),
        ("dkv_segmented", 4, (1 + 1 + 2 + 2 + 3 + 3 + 4 + 4) * 256 * 512),
    ],
)
def test_kernels_of_splash(kind, products, pairs):
    found = cost.count(
        program(
            "  %m = s8[1,4,4] parameter(0)\n  %q = bf16[2,4,2048,128] parameter(1)\n"
            "  %k = bf16[2,2,2048,128] parameter(2)\n" + SPLASH.format(kind=kind)
        ),
        1,
        kernels.kernel_flops,
    )
    assert found.kernel_flops == found.flops == 2 * products * 2 * 4 * pairs * 128


def test_unknown_kernels_are_refused():
    call = 'custom-call(), custom_call_target="tpu_custom_call"'
    with pytest.raises(HloError, match="mystery"):
        cost.count(program(f"  ROOT %mystery = f32[4] {call}"), 1, kernels.kernel_flops)
