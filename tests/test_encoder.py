"""The encoder against transformers' BertModel, its pooling, and padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from radit_jax import sharding
from radit_jax.models import layers
from radit_jax.models.encoder import Encoder, EncoderConfig

MESHES = [(1, 1, 1), (2, 2, 2)]
CONFIG = EncoderConfig(
    vocab_size=61,  # divides by nothing, as BERT's 30,522
    width=32,
    layers=2,
    heads=4,
    mlp_width=48,
    max_length=24,
    norm_eps=1e-3,  # large enough to show where it is added
)
LENGTHS = (5, 9, 1, 12, 7, 12, 3, 8)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(sharding.make_mesh(1, 1, 1)):
        yield


@pytest.fixture(scope="module")
def reference():
    """A BertModel with random weights, biases and norms among them."""
    torch.manual_seed(0)
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.width,
            num_hidden_layers=CONFIG.layers,
            num_attention_heads=CONFIG.heads,
            intermediate_size=CONFIG.mlp_width,
            max_position_embeddings=CONFIG.max_length,
            layer_norm_eps=CONFIG.norm_eps,
            attn_implementation="eager",
        ),
        add_pooling_layer=False,
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.1, 0.2)
    return model


def ours(model, config=CONFIG):
    """Our encoder with the weights of transformers' one, on the current mesh."""
    D, H, K = config.width, config.heads, config.head_size
    theirs = {name: w.detach().numpy() for name, w in model.named_parameters()}

    def stacked(name, *shape):
        found = [theirs[f"encoder.layer.{i}.{name}"].T for i in range(config.layers)]
        return np.stack([w.reshape(shape or w.shape) for w in found])

    values = {
        "words": theirs["embeddings.word_embeddings.weight"],
        "positions": theirs["embeddings.position_embeddings.weight"],
        "types": theirs["embeddings.token_type_embeddings.weight"],
        "norm": theirs["embeddings.LayerNorm.weight"],
        "norm_bias": theirs["embeddings.LayerNorm.bias"],
        "w_q": stacked("attention.self.query.weight", D, H, K),
        "b_q": stacked("attention.self.query.bias", H, K),
        "w_k": stacked("attention.self.key.weight", D, H, K),
        "b_k": stacked("attention.self.key.bias", H, K),
        "w_v": stacked("attention.self.value.weight", D, H, K),
        "b_v": stacked("attention.self.value.bias", H, K),
        "w_o": stacked("attention.output.dense.weight", H, K, D),
        "b_o": stacked("attention.output.dense.bias"),
        "attention_norm": stacked("attention.output.LayerNorm.weight"),
        "attention_norm_bias": stacked("attention.output.LayerNorm.bias"),
        "w_up": stacked("intermediate.dense.weight"),
        "b_up": stacked("intermediate.dense.bias"),
        "w_down": stacked("output.dense.weight"),
        "b_down": stacked("output.dense.bias"),
        "mlp_norm": stacked("output.LayerNorm.weight"),
        "mlp_norm_bias": stacked("output.LayerNorm.bias"),
    }

    def fill(path, leaf):
        value = values[path[-2].name]
        assert value.shape == leaf.shape, path
        return sharding.put(value, leaf.sharding.spec)

    mine = jax.eval_shape(lambda: Encoder(config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(fill, mine)


def batch():
    """Eight rows of different lengths, padded on the right with a real word's id."""
    mask_BL = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    words = np.random.default_rng(0).integers(1, 61, mask_BL.shape)
    return np.where(mask_BL, words, 3).astype(np.int32), mask_BL


def run(model, tokens_BL, mask_BL, jitted=jax.jit(Encoder.__call__)):  # noqa: B008
    rows = sharding.put_rows(tokens_BL), sharding.put_rows(mask_BL)
    return np.asarray(jitted(model, *rows))


def expected_embeddings(reference, pooling, normalize):
    tokens_BL, mask_BL = map(torch.tensor, batch())
    with torch.no_grad():
        states = reference(tokens_BL.long(), attention_mask=mask_BL).last_hidden_state
    if pooling == "cls":
        pooled = states[:, 0]
    else:
        pooled = (states * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True)
    return torch.nn.functional.normalize(pooled) if normalize else pooled


def test_layer_norm_equals_torch():
    x, scale, bias = np.random.default_rng(0).normal(3, 2, (3, 4, 5, 6)).astype("f")
    scale, bias = scale[0, 0], bias[0, 0]
    found = layers.layer_norm(*map(jnp.asarray, (x, scale, bias)), 1e-3)
    expected = torch.nn.functional.layer_norm(
        torch.tensor(x), (6,), torch.tensor(scale), torch.tensor(bias), 1e-3
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize(
    ("pooling", "normalize"), [("cls", False), ("mean", True), ("mean", False)]
)
def test_embeddings_equal_transformers(reference, pooling, normalize, sizes):
    config = dataclasses.replace(CONFIG, pooling=pooling, normalize=normalize)
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        found = run(ours(reference, config), *batch())
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        found, expected_embeddings(reference, pooling, normalize), rtol=1e-5, atol=1e-5
    )
    lengths = np.linalg.norm(found, axis=1)
    assert np.allclose(lengths, 1, atol=1e-6) == normalize


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_on_either_side_changes_nothing(reference, pooling):
    model = ours(reference, dataclasses.replace(CONFIG, pooling=pooling))
    tokens_BL, mask_BL = batch()
    expected = run(model, tokens_BL, mask_BL)
    for pad in ((0, 4), (4, 0), (2, 2)):
        padded = np.pad(tokens_BL, ((0, 0), pad), constant_values=5)
        mask = np.pad(mask_BL, ((0, 0), pad))
        np.testing.assert_allclose(run(model, padded, mask), expected, atol=1e-5)
    shifts = mask_BL.shape[1] - mask_BL.sum(1)
    left = [
        np.stack([np.roll(row, shift) for row, shift in zip(x, shifts, strict=True)])
        for x in (tokens_BL, mask_BL)
    ]
    np.testing.assert_allclose(run(model, *left), expected, atol=1e-5)


def test_rows_of_the_same_batch_do_not_touch_each_other(reference):
    model = ours(reference, dataclasses.replace(CONFIG, pooling="mean"))
    tokens_BL, mask_BL = batch()
    alone = run(model, tokens_BL[:1], mask_BL[:1])
    tokens_BL[1:] = 7
    mask_BL[1:] = True
    np.testing.assert_allclose(run(model, tokens_BL, mask_BL)[:1], alone, atol=1e-6)


def test_a_row_of_nothing_but_padding_stays_finite(reference):
    config = dataclasses.replace(CONFIG, pooling="mean", normalize=True)
    tokens_BL, mask_BL = batch()
    mask_BL[0] = False
    assert np.isfinite(run(ours(reference, config), tokens_BL, mask_BL)).all()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_bfloat16_stays_near_and_returns_float32(reference, pooling):
    config = dataclasses.replace(CONFIG, pooling=pooling, normalize=True)
    model = ours(reference, config)
    rows = [sharding.put_rows(x) for x in batch()]
    found = jax.jit(Encoder.__call__, static_argnums=3)(model, *rows, jnp.bfloat16)
    assert found.dtype == jnp.float32
    expected = expected_embeddings(reference, pooling, True)
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_wrong_configs_are_told():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"'max' is not one of .*cls.*mean"):
        Encoder(dataclasses.replace(CONFIG, pooling="max"), key)
    with (
        jax.set_mesh(sharding.make_mesh(1, 1, 8)),
        pytest.raises(ValueError, match=r"attention heads = 4 .* = 8; .* is 4"),
    ):
        Encoder(CONFIG, key)


def test_rows_longer_than_the_table_of_positions_are_told(reference):
    tokens_BL = np.ones((1, 25), np.int32)
    with pytest.raises(ValueError, match=r"rows of 25 tokens .* 24 positions"):
        run(ours(reference), tokens_BL, tokens_BL > 0)
