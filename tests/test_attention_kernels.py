"""The fused rooms behind the door to attention, against the room of XLA."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radit_jax import sharding
from radit_jax.models import attention_splash
from radit_jax.models.attention import (
    KERNELS,
    XLA,
    Kernel,
    Layout,
    causal_attention,
    choose_kernel,
    heads_first,
)
from radit_jax.models.remat import REMAT_POLICIES

SPLASH = Kernel("splash", interpret=True)
MESHES = [(1, 1, 1), (2, 2, 2), (1, 1, 8)]
ROWS, H, K = 4, 8, 16


def layout_of(length, prefixes=False):
    """Rows of uneven segments, padding on both sides; perhaps with beginnings.

    With beginnings, segment 1 of a row begins the others, as ``lm_score`` packs, but
    for the last one, which stands alone.
    """
    segments, positions, before = np.zeros((3, ROWS, length), np.int32)
    for row in range(ROWS):
        bounds = [3 * row, 40 + row, 41 + row, 90, 100 + 2 * row, length - 7 * row]
        for n, (start, stop) in enumerate(itertools.pairwise(bounds), 1):
            segments[row, start:stop] = n
            before[row, start:stop] = n < 5
            offset = bounds[1] - bounds[0] if prefixes and 1 < n < 5 else 0
            positions[row, start:stop] = np.arange(stop - start) + offset
    parts = (segments, positions, before) if prefixes else (segments, positions)
    return Layout(*map(sharding.put_rows, parts))


def inputs(length, groups, dtype=jnp.float32):
    """Queries, keys, values and what comes back, heads over the tensor axis."""
    rng = np.random.default_rng(length + groups)
    heads = jax.P(sharding.ROWS, None, sharding.TENSOR, None)
    split = groups % jax.sharding.get_mesh().shape[sharding.TENSOR] == 0
    kept = heads if split else jax.P(sharding.ROWS, None, None, None)
    shapes = [(H, heads), (groups, kept), (groups, kept), (H, heads)]
    found = []
    for count, spec in shapes:
        values = rng.standard_normal((ROWS, length, count, K), np.float32)
        found.append(sharding.put(values, spec).astype(dtype))
    return found


@functools.partial(jax.jit, static_argnames="kernel")
def read(q, k, v, layout, kernel):
    attend = causal_attention(layout, kernel)
    out = attend(q, heads_first(k), heads_first(v))
    # What padding sees is nobody's business.
    return jnp.where((layout.segment_ids_BL > 0)[:, :, None, None], out, 0.0)


@functools.partial(jax.jit, static_argnames="kernel")
def read_and_gradients(q, k, v, d_out, layout, kernel):
    out, pull = jax.vjp(lambda q, k, v: read(q, k, v, layout, kernel), q, k, v)
    return [out, *pull(d_out)]


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(
        np.asarray(found, np.float32), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [(MESHES[0], 1), (MESHES[1], 2), (MESHES[1], 8), (MESHES[2], 2), (MESHES[2], 8)],
    ids=str,
)
def test_splash_and_its_gradients_are_those_of_xla(sizes, groups):
    """Rows of 160 are filled up to 256; on (1, 1, 8) key heads meet more devices."""
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        arrays = inputs(160, groups)
        found = read_and_gradients(*arrays, layout_of(160), SPLASH)
        for gradient, array in zip(found[1:], arrays, strict=False):
            assert gradient.sharding == array.sharding
    with jax.set_mesh(sharding.make_mesh()):
        expected = read_and_gradients(*inputs(160, groups), layout_of(160), XLA)
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs)


def test_blocks_of_a_long_row_are_put_together(monkeypatch):
    monkeypatch.setattr(attention_splash, "BLOCK", 128)
    with jax.set_mesh(sharding.make_mesh()):
        layout, arrays = layout_of(384), inputs(384, 2)
        program = str(
            jax.make_jaxpr(functools.partial(read, kernel=SPLASH))(*arrays[:3], layout)
        )
        assert "i8[1,3,3]" in program  # the mask of three by three blocks
        found = read_and_gradients(*arrays, layout, SPLASH)
        for ours, theirs in zip(
            found, read_and_gradients(*arrays, layout, XLA), strict=True
        ):
            close(ours, theirs)


@pytest.mark.parametrize(
    ("length", "blocks"), [(256, "i8[1,1,1]"), (640, "i8[1,5,5]"), (1024, "i8[1,2,2]")]
)
def test_blocks_are_as_large_as_divide_the_row(length, blocks):
    with jax.set_mesh(sharding.make_mesh()):
        of_splash = functools.partial(read, kernel=SPLASH)
        arrays = (*inputs(length, 2)[:3], layout_of(length))
        # The static mask of blocks of queries and keys.
        assert blocks in str(jax.make_jaxpr(of_splash)(*arrays))


@pytest.mark.parametrize("sizes", MESHES[:2], ids=str)
def test_splash_reads_a_beginning_that_segments_share(sizes):
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        layout, (q, k, v, _) = layout_of(130, prefixes=True), inputs(130, 2)
        expected = read(q, k, v, layout, XLA)
        close(read(q, k, v, layout, SPLASH), expected)
        # It is not what the segments see alone.
        alone = layout._replace(prefix_ids_BL=None)
        assert np.abs(read(q, k, v, alone, XLA) - expected).max() > 0.1


def test_a_gradient_through_shared_beginnings_is_refused():
    with jax.set_mesh(sharding.make_mesh()):
        layout, arrays = layout_of(130, prefixes=True), inputs(130, 2)
        with pytest.raises(ValueError, match="no gradient where segments share"):
            read_and_gradients(*arrays, layout, SPLASH)


@functools.partial(jax.jit, static_argnames="kernel")
def raw(q, k, v, d_out, layout, kernel):
    """As ``read_and_gradients``, padding as it comes."""
    attend = causal_attention(layout, kernel)
    out, pull = jax.vjp(
        lambda q, k, v: attend(q, heads_first(k), heads_first(v)), q, k, v
    )
    return [out, *pull(d_out)]


def test_padding_is_finite_and_no_one_sees_it():
    with jax.set_mesh(sharding.make_mesh()):
        layout, (q, k, v, d_out) = layout_of(130), inputs(130, 2)
        real = (layout.segment_ids_BL > 0)[:, :, None, None]
        assert not real.all()
        wild = [jnp.where(real, x, 1e4) for x in (q, k, v)]
        out, *gradients = raw(*wild, jnp.where(real, d_out, 0.0), layout, SPLASH)
        assert jnp.isfinite(out).all()
        calm = read(q, k, v, layout, SPLASH)
        np.testing.assert_array_equal(jnp.where(real, out, 0.0), calm)
        for gradient in gradients:
            assert jnp.isfinite(gradient).all()
            assert not jnp.where(real, 0.0, gradient).any()


@pytest.mark.parametrize("prefixes", [False, True])
def test_rows_of_nothing_but_padding_are_finite(prefixes):
    with jax.set_mesh(sharding.make_mesh()):
        zeros = sharding.put_rows(np.zeros((ROWS, 128), np.int32))
        layout = Layout(zeros, zeros, zeros if prefixes else None)
        q, k, v, _ = inputs(128, 2)

        @jax.jit
        def attend(q, k, v):
            return causal_attention(layout, SPLASH)(q, heads_first(k), heads_first(v))

        assert jnp.isfinite(attend(q, k, v)).all()


def test_bfloat16_stays_near():
    with jax.set_mesh(sharding.make_mesh()):
        for prefixes in (False, True):
            layout = layout_of(130, prefixes)
            exact = read(*inputs(130, 2)[:3], layout, XLA)
            found = read(*inputs(130, 2, jnp.bfloat16)[:3], layout, SPLASH)
            assert found.dtype == jnp.bfloat16
            assert jnp.abs(found - exact).max() < 0.03 * jnp.abs(exact).max()


def kernels(jaxpr):
    """Names of the Pallas kernels of a program, but for calls whose output is dropped.

    Partial evaluation leaves such a call behind; the compiler throws it out.
    """
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found.append(equation.params["name"].split("_segmented")[0])
        elif equation.outvars:
            for inner in jax.tree.leaves(equation.params, is_leaf=is_program):
                if is_program(inner):
                    found += kernels(getattr(inner, "jaxpr", inner))
    return found


def is_program(x):
    return hasattr(x, "eqns")


@pytest.mark.parametrize(
    ("remat", "forward_passes"),
    [("dots", 1), ("mlp", 1), ("qkv", 1), ("attention", 1), ("full", 2)],
)
def test_a_layer_that_keeps_products_runs_splash_forward_once(remat, forward_passes):
    with jax.set_mesh(sharding.make_mesh()):
        layout, (q, k, v, _) = layout_of(128), inputs(128, 2)

        def loss(q, k, v):
            return (read(jnp.sin(q), k, v, layout, SPLASH) ** 2).sum()

        kept = jax.checkpoint(loss, policy=REMAT_POLICIES[remat])
        found = kernels(jax.make_jaxpr(jax.value_and_grad(kept))(q, k, v))
    assert sorted(found) == sorted(
        ["splash_mha_fwd"] * forward_passes + ["splash_mha_dkv", "splash_mha_dq"]
    )


# --- the choice -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "dtype", "head_size", "name"),
    [
        ("tpu", "bfloat16", 128, "splash"),
        ("tpu", "float32", 80, "splash"),
        ("gpu", "bfloat16", 64, "cudnn"),
        ("gpu", "float32", 64, "xla"),
        ("gpu", "bfloat16", 132, "xla"),
        ("gpu", "bfloat16", 100, "xla"),
        ("cpu", "float32", 64, "xla"),
    ],
)
def test_auto_takes_the_fused_kernel_that_can_run(
    platform, dtype, head_size, name, caplog
):
    with caplog.at_level("INFO"):
        assert choose_kernel("auto", platform, dtype, head_size) == Kernel(name)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"attention: {name}")
    fell_back = platform != "cpu" and name == "xla"
    assert ("cudnn cannot run: it" in caplog.messages[0]) == fell_back


@pytest.mark.parametrize(
    ("wanted", "platform", "dtype", "head_size", "words"),
    [
        ("splash", "cpu", "float32", 64, "splash cannot run: it runs on tpu only, and"),
        ("splash", "gpu", "float32", 64, "this is gpu. attention=xla runs everywhere"),
        ("cudnn", "tpu", "bfloat16", 64, "cudnn cannot run: it runs on gpu only"),
        (
            "cudnn",
            "gpu",
            "float32",
            64,
            "in bfloat16 or float16, not float32; set dtyp",
        ),
        ("cudnn", "gpu", "bfloat16", 100, "multiple of 8 up to 128, not 100"),
        (
            "flash",
            "cpu",
            "float32",
            64,
            "'flash' is not one of auto, xla, splash, cudnn",
        ),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(wanted, platform, dtype, head_size, words):
    with pytest.raises(ValueError, match=words):
        choose_kernel(wanted, platform, dtype, head_size)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_xla_runs_everywhere(platform):
    assert choose_kernel("xla", platform, "float32", 100) == XLA
    assert set(KERNELS) == {"xla", "splash", "cudnn"}
