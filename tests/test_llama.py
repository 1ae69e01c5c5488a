"""Llama against transformers, module by module, and against itself on every mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from radit_jax import losses, optim, sharding
from radit_jax.models import attention as attending
from radit_jax.models import attention_xla, layers
from radit_jax.models.attention import Layout
from radit_jax.models.llama import Llama, LlamaConfig
from radit_jax.models.remat import REMAT_POLICIES

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
CONFIG = LlamaConfig(
    vocab_size=64,
    width=32,
    layers=2,
    heads=8,
    kv_heads=2,
    head_size=6,  # not width / heads, as in some checkpoints
    mlp_width=48,
    max_length=64,
    norm_eps=1e-3,  # large enough to show where it is added
)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(sharding.make_mesh(1, 1, 1)):
        yield


def published(config=CONFIG, rope=None):
    """transformers' model of the same shape with random weights."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_size,
            intermediate_size=config.mlp_width,
            max_position_embeddings=config.max_length,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied,
            rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
            initializer_range=0.2,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def ours(model, config=CONFIG):
    """Our model with the weights of transformers' one, on the current mesh."""
    D, H, G, K = config.width, config.heads, config.kv_heads, config.head_size
    theirs = {name: w.detach().numpy() for name, w in model.named_parameters()}

    def stacked(name, shape=None):
        found = [
            theirs[f"model.layers.{i}.{name}.weight"].T for i in range(config.layers)
        ]
        return np.stack([w.reshape(shape or w.shape) for w in found])

    values = {
        "embedding": theirs["model.embed_tokens.weight"],
        "final_norm": theirs["model.norm.weight"],
        "head": theirs.get("lm_head.weight"),
        "attention_norm": stacked("input_layernorm"),
        "w_q": stacked("self_attn.q_proj", (D, H, K)),
        "w_k": stacked("self_attn.k_proj", (D, G, K)),
        "w_v": stacked("self_attn.v_proj", (D, G, K)),
        "w_o": stacked("self_attn.o_proj", (H, K, D)),
        "mlp_norm": stacked("post_attention_layernorm"),
        "w_gate": stacked("mlp.gate_proj"),
        "w_up": stacked("mlp.up_proj"),
        "w_down": stacked("mlp.down_proj"),
    }

    def fill(path, leaf):
        value = values[path[-2].name]
        assert value.shape == leaf.shape, path
        return sharding.put(value, leaf.sharding.spec)

    mine = jax.eval_shape(lambda: Llama(config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(fill, mine)


def random(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def tokens(rows, length, seed=2):
    return np.random.default_rng(seed).integers(0, 64, (rows, length), np.int32)


def pt(array):
    return torch.tensor(np.asarray(array))


def whole(tokens_BL):
    """One segment per row, no padding."""
    positions_BL = np.broadcast_to(
        np.arange(tokens_BL.shape[1], dtype=np.int32), tokens_BL.shape
    )
    return Layout(np.ones_like(positions_BL), positions_BL)


def on_mesh(layout):
    return Layout(*(sharding.put_rows(np.asarray(part)) for part in layout[:2]))


# Toy models: most of the time goes into compiling.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
hidden = jax.jit(
    Llama.hidden, static_argnames=("dtype", "remat"), compiler_options=FAST
)
extend = jax.jit(Llama.extend, compiler_options=FAST)
prefill = jax.jit(Llama.prefill, static_argnames="length", compiler_options=FAST)


@jax.jit
def logits(model, tokens_BL, layout):
    return model.logits(model.hidden(tokens_BL, layout))


def close(found, expected, tolerance):
    if isinstance(expected, torch.Tensor):
        expected = expected.detach().numpy()
    np.testing.assert_allclose(
        np.asarray(found), np.asarray(expected), rtol=tolerance, atol=tolerance
    )


# --- module by module -----------------------------------------------------------


def test_rms_norm_equals_transformers():
    norm = published().model.norm
    x_BLD = 0.05 * random(2, 3, 32)
    found = layers.rms_norm(x_BLD, jnp.asarray(norm.weight.detach()), CONFIG.norm_eps)
    close(found, norm(pt(x_BLD)), 1e-6)


ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {
        "factor": 4.0,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "original_max_position_embeddings": 64,
    },
}
OURS = {
    "low_freq_factor": "low_factor",
    "high_freq_factor": "high_factor",
    "original_max_position_embeddings": "original_length",
}


def rope_of(kind, theta=500.0):
    options = {OURS.get(name, name): value for name, value in ROPES[kind].items()}
    options.setdefault("original_length", CONFIG.max_length)
    return layers.Rope(theta=theta, kind=kind, **options)


def published_rope(kind, theta=500.0):
    return {"rope_type": kind, "rope_theta": theta, **ROPES[kind]}


@pytest.mark.parametrize("length", [16, 200])
@pytest.mark.parametrize("kind", ROPES)
def test_rope_frequencies_equal_transformers(kind, length):
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=8,
        max_position_embeddings=CONFIG.max_length,
        rope_parameters=published_rope(kind),
    )
    if kind == "default":
        expected, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    found, found_scale = rope_of(kind).frequencies(32, length)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
    assert found_scale == pytest.approx(scale, abs=1e-12)


def test_every_scaling_kind_of_rope_is_compared():
    assert set(ROPES) == set(layers.Rope.KINDS)


def test_yarn_takes_the_attention_factor_of_the_config():
    rope = dataclasses.replace(rope_of("yarn"), attention_factor=0.7)
    assert rope.frequencies(32, 16)[1] == 0.7


@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_rotation_equals_transformers(kind):
    model = published(rope=published_rope(kind)).model
    q_BLHK = random(2, 5, 8, 6)
    positions_BL = jnp.array([[0, 1, 2, 3, 4], [9, 8, 0, 1, 60]])
    tables = layers.rope_tables(rope_of(kind), 6, positions_BL, 5)
    cos, sin = model.rotary_emb(pt(q_BLHK), pt(positions_BL))
    expected, _ = apply_rotary_pos_emb(
        pt(q_BLHK).transpose(1, 2), torch.zeros(2, 8, 5, 6), cos, sin
    )
    close(layers.rotate(q_BLHK, tables), expected.transpose(1, 2), 1e-5)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_embeddings_are_rows_of_the_table(sizes):
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        model = ours(published())
        tokens_BL = tokens(8, 9)
        found = jax.jit(Llama.embed, static_argnums=2)(
            model, sharding.put_rows(tokens_BL), jnp.float32
        )
        assert found.sharding.spec == sharding.ACT_BLD
        np.testing.assert_array_equal(
            found, np.asarray(model.embedding[...])[tokens_BL]
        )


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_token_beyond_the_vocabulary_is_not_a_number(sizes):
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        model = ours(published())
        tokens_BL = tokens(8, 3)
        tokens_BL[1, 2], tokens_BL[2, 0], tokens_BL[7, 1] = -1, 64, 10**6
        found = np.asarray(model.embed(sharding.put_rows(tokens_BL), jnp.float32))
    wrong_BL = (tokens_BL < 0) | (tokens_BL >= 64)
    np.testing.assert_array_equal(np.isnan(found).all(-1), wrong_BL)
    assert np.isnan(found).sum() == 3 * CONFIG.width


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_gradient_of_a_frequent_word_adds_up_in_float32(sizes):
    """In bfloat16 a sum of ones ends at 256 (but not on a CPU, which sums in float32
    whatever it is told)."""
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        model = ours(published())
        ids_BL = sharding.put_rows(np.full((8, 1000), 40, np.int32))

        def total(model):
            return model.embed(ids_BL, jnp.bfloat16).astype(jnp.float32).sum()

        program = str(jax.make_jaxpr(jax.grad(total))(model))
        found = np.asarray(jax.jit(jax.grad(total))(model).embedding[...])
    assert re.findall(r"(\w+)\[[^=]*= scatter-add", program) == ["f32"]
    assert (found[40] == 8000).all()
    assert not found[:40].any()


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_attention_equals_transformers(kv_heads):
    config = dataclasses.replace(CONFIG, kv_heads=kv_heads)
    reference = published(config)
    model = ours(reference, config)
    block = jax.tree.map(lambda x: x[0], model.layers)
    x_BLD = random(2, 7, 32)
    layout = Layout(*map(jnp.asarray, whole(np.zeros((2, 7)))[:2]))
    tables = layers.rope_tables(config.rope, 6, layout.positions_BL, 7)

    @jax.jit
    def run(block, x_BLD):
        q, k, v = block.project_qkv(x_BLD, tables, config.norm_eps)
        mask_BLM = attending.attention_mask(layout, layout, causal=True)
        mixed = attending.attention(q, k, v, mask_BLM)
        w_o = layers.use(block.w_o, mixed.dtype)
        found = layers.linear(mixed, w_o, contract=2)
        return found, block.finish(x_BLD, mixed, config.norm_eps)

    found, found_block = run(block, x_BLD)
    layer = reference.model.layers[0]
    x = pt(x_BLD)
    mask = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    expected, _ = layer.self_attn(
        layer.input_layernorm(x),
        reference.model.rotary_emb(x, pt(layout.positions_BL)),
        mask,
    )
    close(found, expected, 1e-5)
    whole_block = layer(
        x,
        attention_mask=mask,
        position_embeddings=reference.model.rotary_emb(x, pt(layout.positions_BL)),
    )
    close(found_block, whole_block, 1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["default", "llama3"])
def test_logits_equal_transformers(tied, kind):
    config = dataclasses.replace(CONFIG, tied=tied, rope=rope_of(kind))
    reference = published(config, published_rope(kind))
    tokens_BL = tokens(2, 20)
    found = logits(ours(reference, config), tokens_BL, whole(tokens_BL))
    close(found, reference(pt(tokens_BL).long()).logits, 1e-5)


def test_dynamic_rope_beyond_the_original_length_equals_transformers():
    config = dataclasses.replace(CONFIG, rope=rope_of("dynamic"), layers=1)
    reference = published(config, published_rope("dynamic"))
    tokens_BL = tokens(1, 80)
    found = logits(ours(reference, config), tokens_BL, whole(tokens_BL))
    close(found, reference(pt(tokens_BL).long()).logits, 1e-4)


# --- masks ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    return published()


@pytest.fixture
def model(reference):
    return ours(reference)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    tokens_BL = tokens(1, 10)
    expected = hidden(model, tokens_BL, whole(tokens_BL))
    pad = ((0, 0), (10, 0)) if side == "left" else ((0, 0), (0, 10))
    here = slice(10, None) if side == "left" else slice(0, 10)
    layout = Layout(*(np.pad(part, pad) for part in whole(tokens_BL)[:2]))
    padded = np.pad(tokens_BL, pad, constant_values=7)
    found = hidden(model, padded, layout)
    assert np.isfinite(found).all()
    close(found[:, here], expected, 1e-5)


def test_packed_segments_equal_separate_rows(model):
    parts = [tokens(1, length, seed=length) for length in (7, 10)]
    rest = np.zeros((1, 3), np.int32)
    layouts = [whole(part) for part in parts]
    segments = [np.full_like(part, i + 1) for i, part in enumerate(parts)]
    positions = [layout.positions_BL for layout in layouts]
    layout = Layout(
        np.concatenate([*segments, rest], 1), np.concatenate([*positions, rest], 1)
    )
    found = np.asarray(hidden(model, np.concatenate([*parts, rest], 1), layout))
    close(found[:, :7], hidden(model, parts[0], layouts[0]), 1e-5)
    close(found[:, 7:17], hidden(model, parts[1], layouts[1]), 1e-5)


def test_later_and_foreign_tokens_have_exactly_no_influence(model):
    """The gradient of one state with respect to all embeddings."""
    segments_BL = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 0, 0]], np.int32)
    positions_BL = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 0, 0]], np.int32)
    layout = on_mesh(Layout(segments_BL, positions_BL))
    tokens_BL = jnp.arange(10, dtype=jnp.int32)[None]  # each its own embedding

    @jax.jit
    def influence(model, site):
        def state(model):
            h_BLD = model.hidden(tokens_BL, layout)
            here_BL1 = (jnp.arange(10) == site)[None, :, None]
            return jnp.where(here_BL1, jnp.sin(h_BLD), 0.0).sum()

        return jnp.abs(jax.grad(state)(model).embedding[...]).sum(axis=1)[:10]

    for site, seen in ((2, {0, 1, 2}), (6, {4, 5, 6}), (7, {4, 5, 6, 7})):
        found = np.asarray(influence(model, site))
        assert set(np.flatnonzero(found)) == seen
        assert found[sorted(seen)].min() > 1e-4


# --- cache ----------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_equals_uncached(model, side):
    """Prompts of two lengths in one prefill, then token by token."""
    lengths, new, prompt = (6, 3), 4, 6
    tokens_BL = tokens(2, prompt + new)
    expected = [
        np.asarray(hidden(model, row[None, : n + new], whole(row[None, : n + new])))[0]
        for row, n in zip(tokens_BL, lengths, strict=True)
    ]
    columns = np.arange(prompt)[None]
    length_B = np.array(lengths)[:, None]
    shift = prompt - length_B if side == "left" else np.zeros_like(length_B)
    positions_BL = columns - shift
    live_BL = (positions_BL >= 0) & (positions_BL < length_B)
    positions_BL = np.where(live_BL, positions_BL, 0).astype(np.int32)
    prompts_BL = np.take_along_axis(tokens_BL, positions_BL, 1)
    layout = on_mesh(Layout(live_BL.astype(np.int32), positions_BL))
    put = sharding.put_rows
    found, cache = prefill(model, put(prompts_BL), layout, prompt + new + 2)
    for row, n in enumerate(lengths):
        close(found[row][live_BL[row]], expected[row][:n], 1e-5)
    for step in range(new):
        at = (length_B + step).astype(np.int32)
        token_B1 = sharding.put_rows(np.take_along_axis(tokens_BL, at, 1))
        layout = on_mesh(Layout(np.ones((2, 1), np.int32), at))
        found, cache = extend(model, token_B1, layout, cache, prompt + step)
        for row, n in enumerate(lengths):
            close(found[row, 0], expected[row][n + step], 1e-5)


def test_long_rows_equal_the_same_row_read_into_a_cache(model):
    """Several blocks of attention, each of which skips what lies behind it."""
    length = 2 * attention_xla.BLOCK
    tokens_BL = sharding.put_rows(tokens(1, length))
    segments_BL = np.where(np.arange(length) < 50, 1, 2)[None].astype(np.int32)
    positions_BL = np.arange(length)[None] - np.where(segments_BL == 1, 0, 50)
    layout = on_mesh(Layout(segments_BL, positions_BL.astype(np.int32)))
    start, end = (
        on_mesh(Layout(*(x[:, part] for x in layout[:2])))
        for part in (slice(0, 70), slice(70, length))
    )
    first, cache = prefill(model, tokens_BL[:, :70], start, length)
    second, _ = extend(model, tokens_BL[:, 70:], end, cache, 70)
    found = hidden(model, tokens_BL, layout)
    close(found, jnp.concatenate([first, second], axis=1), 1e-5)


# --- training, and meshes -------------------------------------------------------


def batch():
    """Eight rows of two segments each."""
    tokens_BL = tokens(8, 12)
    segments_BL = np.where(np.arange(12) < 7, 1, 2)[None] + np.zeros((8, 1))
    positions_BL = np.where(np.arange(12) < 7, np.arange(12), np.arange(12) - 7)[None]
    positions_BL = positions_BL + np.zeros((8, 1))
    return [
        sharding.put_rows(x.astype(np.int32))
        for x in (tokens_BL, segments_BL, positions_BL, np.roll(tokens_BL, -1, 1))
    ]


def loss_and_gradient(model, batch, remat="none", stream=sharding.ACT_BLD):
    tokens_BL, segments_BL, positions_BL, targets_BL = batch

    def loss(model):
        layout = Layout(segments_BL, positions_BL)
        h_BLD = model.hidden(tokens_BL, layout, remat=remat, stream=stream)
        return -losses.token_log_probabilities(model.logits(h_BLD), targets_BL).mean()

    return jax.value_and_grad(loss)(model)


run = jax.jit(loss_and_gradient, static_argnums=(2, 3), compiler_options=FAST)


@pytest.fixture(scope="module")
def expected(reference):
    with jax.set_mesh(sharding.make_mesh(1, 1, 1)):
        return jax.tree.map(np.asarray, run(ours(reference), batch(), "none"))


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_remat_changes_no_gradient(model, expected, remat):
    found = run(model, batch(), remat)
    jax.tree.map(lambda a, b: close(a, b, 1e-6), found, expected)


@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_loss_and_gradients_are_the_same_on_every_mesh(reference, expected, sizes):
    """On (1, 1, 8) two key/value heads meet eight devices."""
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        model = ours(reference)
        found = run(model, batch(), "none")
        for weight, moment in zip(
            jax.tree.leaves(model), jax.tree.leaves(found[1]), strict=True
        ):
            assert moment.sharding == weight.sharding
        jax.tree.map(lambda a, b: close(a, b, 1e-5), found, expected)


@pytest.mark.parametrize(
    ("sizes", "remat"),
    [((1, 1, 1), "none"), ((2, 1, 4), "mlp"), ((2, 2, 2), "none")],
    ids=str,
)
def test_tokens_split_between_layers_change_nothing(reference, expected, sizes, remat):
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        model = ours(reference)
        found = run(model, batch(), remat, sharding.stream_spec(True, 12))
        for weight, moment in zip(
            jax.tree.leaves(model), jax.tree.leaves(found[1]), strict=True
        ):
            assert moment.sharding == weight.sharding
        jax.tree.map(lambda a, b: close(a, b, 1e-5), found, expected)


@pytest.mark.parametrize(("sequence", "tokens"), [(False, "12"), (True, "12@tensor")])
def test_what_is_kept_between_layers_is_split_by_tokens(reference, sequence, tokens):
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        stream = sharding.stream_spec(sequence, 12)
        step = functools.partial(loss_and_gradient, remat="full", stream=stream)
        program = str(jax.make_jaxpr(step)(ours(reference), batch()))
        assert f"f32[2,8@(data,fsdp),{tokens},32]" in program  # of both layers


@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2)], ids=str)
def test_cached_reading_is_the_same_on_every_mesh(reference, sizes):
    tokens_BL = tokens(8, 6)
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        model = ours(reference)
        layout = on_mesh(whole(tokens_BL))
        start, end = (
            on_mesh(Layout(*(x[:, part] for x in layout[:2])))
            for part in (slice(0, 4), slice(4, 6))
        )
        put = sharding.put_rows
        first, cache = prefill(model, put(tokens_BL[:, :4]), start, 7)
        second, _ = extend(model, put(tokens_BL[:, 4:]), end, cache, 4)
        found = np.concatenate([first, second], axis=1)
    close(found, hidden(ours(reference), tokens_BL, whole(tokens_BL)), 1e-5)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_optimizer_moments_are_sharded_like_their_weights(reference, sizes):
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        model = ours(reference)
        tx = optim.optimizer(lambda step: 1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0)
        state = jax.jit(tx.init)(model)
        moments = [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if any(getattr(part, "name", "") in ("mu", "nu") for part in path)
        ]
        weights = jax.tree.leaves(model)
        assert len(moments) == 2 * len(weights)
        for weight, moment in zip(weights + weights, moments, strict=True):
            assert moment.shape == weight.shape
            assert moment.sharding.is_equivalent_to(weight.sharding, weight.ndim)
        split = [w for w in weights if not w.sharding.is_fully_replicated]
        assert {w.ndim for w in split} >= {2, 3, 4}
        part = model.embedding[...].addressable_shards[0].data.shape
        assert part == (64 // sizes[2], 32 // sizes[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 9, "kv_heads": 3}, r"attention heads = 9 .* = 8; .* is 3"),
        ({"mlp_width": 20}, r"MLP width = 20 .* = 8; .* is 5"),
        ({"vocab_size": 100}, r"vocabulary = 100 .* = 8; .* is 5"),
    ],
)
def test_sizes_that_do_not_divide_are_told(change, words):
    config = dataclasses.replace(CONFIG, **change)
    with (
        jax.set_mesh(sharding.make_mesh(1, 1, 8)),
        pytest.raises(ValueError, match=words),
    ):
        Llama(config, jax.random.key(0))
    config = dataclasses.replace(CONFIG, width=36)
    with (
        jax.set_mesh(sharding.make_mesh(1, 8, 1)),
        pytest.raises(ValueError, match=r"LM width = 36 .*fsdp = 8; .* is 6"),
    ):
        Llama(config, jax.random.key(0))
