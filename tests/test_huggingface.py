"""Folders as transformers writes them: loaded whole, in parts, and refused in words."""

import functools
import json
import types

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file

from radit_jax import sharding
from radit_jax.models import huggingface
from radit_jax.models.attention import Layout
from radit_jax.models.huggingface import (
    check_vocabulary,
    load_encoder,
    load_llama,
    read_encoder_config,
    read_llama_config,
    save,
)
from radit_jax.models.layers import Rope
from radit_jax.models.llama import Llama
from radit_jax.models.safetensors import SINGLE, Planned, read_folder, write_folder

MESHES = [(1, 1, 1), (1, 8, 1), (2, 2, 2)]
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
BERT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
}
TOKENS_BL = np.random.default_rng(0).integers(0, 61, (8, 10), np.int32)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(sharding.make_mesh(1, 1, 1)):
        yield


def save_llama(folder, dtype=torch.float32, shard="1GB", **options):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | options))
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    # Not model.float(): the frequencies of RoPE would stay rounded.
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save_bert(folder, kind=transformers.BertModel, **options):
    torch.manual_seed(0)
    model = kind(transformers.BertConfig(**BERT | options)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.1, 0.2)
    model.save_pretrained(folder)
    return getattr(model, "bert", model)


@pytest.fixture
def llama(tmp_path):
    save_llama(tmp_path)
    return tmp_path


@pytest.fixture
def bert(tmp_path):
    save_bert(tmp_path)
    return tmp_path


def edit(file, **changes):
    """Change fields of a JSON file; None takes a field out."""
    content = json.loads(file.read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None}
    file.write_text(json.dumps(content))


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


@functools.partial(jax.jit, static_argnames="dtype")
def jitted_logits(model, tokens_BL, layout, dtype):
    return model.logits(model.hidden(tokens_BL, layout, dtype))


def logits(model, dtype=np.float32):
    positions_BL = np.broadcast_to(np.arange(10, dtype=np.int32), TOKENS_BL.shape)
    ones_BL = np.ones_like(positions_BL)
    layout = Layout(*(sharding.put_rows(x) for x in (ones_BL, positions_BL)))
    tokens_BL = sharding.put_rows(TOKENS_BL)
    return np.asarray(jitted_logits(model, tokens_BL, layout, dtype))


@jax.jit
def jitted_embeddings(model, tokens_BL):
    return model(tokens_BL, tokens_BL >= 0)


def embeddings(model):
    return np.asarray(jitted_embeddings(model, sharding.put_rows(TOKENS_BL)))


def published_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS_BL).long()).logits.numpy()


def published_embeddings(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS_BL).long()).last_hidden_state[:, 0].numpy()


# --- weights --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "shard", "tied"),
    [
        (torch.float32, "1GB", False),
        (torch.float32, "20KB", True),
        (torch.bfloat16, "20KB", False),
        (torch.float16, "1GB", True),
    ],
)
def test_llama_folders_load(tmp_path, dtype, shard, tied):
    reference = save_llama(tmp_path, dtype, shard, tie_word_embeddings=tied)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "20KB")
    model = load_llama(tmp_path)
    assert (model.head is None) == tied
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {np.dtype("f")}
    np.testing.assert_allclose(
        logits(model), published_logits(reference), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_llama_loads_onto_every_mesh(tmp_path, sizes):
    reference = save_llama(tmp_path, shard="20KB", head_dim=6)
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        model = load_llama(tmp_path)
        built = jax.eval_shape(lambda: Llama(model.config, jax.random.key(0)))
        for found, wanted in zip(
            jax.tree.leaves(model), jax.tree.leaves(built), strict=True
        ):
            assert found.sharding.spec == wanted.sharding.spec
        found = logits(model)
    np.testing.assert_allclose(found, published_logits(reference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_weights_held_in_the_type_of_compute_compute_the_same(llama, sizes):
    found = []
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
            model = load_llama(llama, dtype)
            assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {dtype}
            found.append(logits(model, ml_dtypes.bfloat16))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_bert_folders_load(tmp_path, sizes):
    reference = save_bert(tmp_path)
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        found = embeddings(load_encoder(tmp_path))
    np.testing.assert_allclose(found, published_embeddings(reference), atol=1e-5)


def test_bert_with_a_prefix_and_heads_loads(tmp_path):
    reference = save_bert(tmp_path, transformers.BertForPreTraining)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {name.split(".")[0] for name in names} == {"bert", "cls"}
    assert any(name.startswith("bert.pooler.") for name in names)
    found = embeddings(load_encoder(tmp_path))
    np.testing.assert_allclose(found, published_embeddings(reference), atol=1e-5)


def test_names_of_old_checkpoints_load(tmp_path):
    reference = save_bert(tmp_path)

    def rename(weights):
        for name in list(weights):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            old = old.replace("LayerNorm.bias", "LayerNorm.beta")
            weights[old] = weights.pop(name)
        weights["embeddings.position_ids"] = np.arange(24)[None]

    edit_weights(tmp_path, rename)
    found = embeddings(load_encoder(tmp_path))
    np.testing.assert_allclose(found, published_embeddings(reference), atol=1e-5)

    reference = save_llama(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(tmp_path, lambda weights: weights.update({name: np.ones(2)}))
    np.testing.assert_allclose(
        logits(load_llama(tmp_path)), published_logits(reference), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_each_device_reads_only_its_part(llama, monkeypatch, sizes):
    original, count = huggingface.read_part, {"elements": 0}

    def read_part(*args):
        part = original(*args)
        count["elements"] += part.size
        return part

    monkeypatch.setattr(huggingface, "read_part", read_part)
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        model = load_llama(llama)
    leaves = jax.tree.leaves(model)
    # Whichever devices hold the same part, it is read once.
    held = sum(
        sum({str(s.index): s.data.size for s in leaf.addressable_shards}.values())
        for leaf in leaves
    )
    assert count["elements"] == held == sum(leaf.size for leaf in leaves)


def test_slices_are_cut_before_they_are_read():
    """The memory map is asked for no more than the slice."""
    asked = []

    class Map:
        array = np.arange(12 * 4, dtype=np.float32).reshape(12, 4)

        def __getitem__(self, index):
            asked.append(self.array[index].size)
            return self.array[index]

    row = huggingface.Row("w", "w", "HK,D", "DHK")
    sizes = {"D": 4, "H": 6, "K": 2}
    found = huggingface.read_part.__wrapped__(
        Map(), row, sizes, (slice(1, 3), slice(2, 4), slice(None))
    )
    expected = Map.array.reshape(6, 2, 4).transpose(2, 0, 1)[1:3, 2:4]
    np.testing.assert_array_equal(found, expected)
    assert asked == [8]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_parts_of_a_file_are_those_of_its_arrays(tmp_path, dtype):
    rng = np.random.default_rng(0)
    arrays = {
        "wide": rng.standard_normal((7, 12)).astype(dtype),
        "flat": rng.standard_normal(5).astype(dtype),
    }
    plans = [Planned(n, a.shape, lambda a=a: a) for n, a in arrays.items()]
    assert write_folder(tmp_path, plans, np.dtype(dtype), 10**6) == [SINGLE]
    found = read_folder(tmp_path)
    for name, cuts in {
        "wide": [(slice(2, 5), slice(3, 9)), (slice(0, 7), slice(0, 12))],
        "flat": [(slice(1, 4),), (slice(None),)],
    }.items():
        for cut in cuts:
            part = found[name].parts[cut]
            assert part.dtype == dtype
            np.testing.assert_array_equal(part, arrays[name][cut])


# --- export -----------------------------------------------------------------------


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_llama_is_written_as_transformers_reads_it(tmp_path, sizes, tied):
    reference = save_llama(tmp_path / "theirs", tie_word_embeddings=tied)
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        model = load_llama(tmp_path / "theirs")
        files = save(
            model, tmp_path / "ours", tmp_path / "theirs", np.dtype(np.float32), 30_000
        )
    assert len(files) > 2
    assert all((tmp_path / "ours" / f).stat().st_size < 33_000 for f in files)
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == "{}"
    again, loading = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(loading.values()), loading
    for ours, theirs in zip(again.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    np.testing.assert_array_equal(published_logits(again), published_logits(reference))


def test_files_of_another_dtype_are_rounded_once(llama, tmp_path):
    save(load_llama(llama), tmp_path / "ours", llama, np.dtype(ml_dtypes.bfloat16))
    written = load_torch_file(tmp_path / "ours" / "model.safetensors")
    original = load_torch_file(llama / "model.safetensors")
    assert written.keys() == original.keys()
    for name, array in original.items():
        assert torch.equal(written[name], array.to(torch.bfloat16))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16


def test_an_encoder_is_written_as_transformers_reads_it(bert, tmp_path):
    reference = transformers.BertModel.from_pretrained(bert)
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    save(load_encoder(bert), tmp_path / "ours", bert, np.dtype(np.float32))
    again = transformers.BertModel.from_pretrained(
        tmp_path / "ours", add_pooling_layer=False
    )
    np.testing.assert_array_equal(
        published_embeddings(again), published_embeddings(reference)
    )
    assert (tmp_path / "ours" / "1_Pooling" / "config.json").is_file()


# --- configurations -------------------------------------------------------------


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Rope(500.0)),
        ({"rope_type": "default"}, Rope(500.0)),
        ({"type": "linear", "factor": 2}, Rope(500.0, "linear", 2.0, 64)),
        (
            # The length of a dynamic model is its own, whatever else is written.
            {
                "rope_type": "dynamic",
                "factor": 2.0,
                "original_max_position_embeddings": 16,
            },
            Rope(500.0, "dynamic", 2.0, 64),
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.5,
                "high_freq_factor": 3.0,
                "original_max_position_embeddings": 16,
            },
            Rope(500.0, "llama3", 8.0, 16, 1.5, 3.0),
        ),
        (
            {
                "rope_type": "yarn",
                "original_max_position_embeddings": 16,
                "beta_fast": 30,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            Rope(500.0, "yarn", 4.0, 16, beta_fast=30.0, attention_factor=1.0),
        ),
    ],
)
def test_both_spellings_of_rope_are_read(llama, options, expected, nested):
    changes = {"rope_parameters": None, "rope_scaling": None, "rope_theta": None}
    if nested:
        changes["rope_parameters"] = {"rope_theta": 500.0, **options}
    else:
        changes |= {"rope_theta": 500.0, "rope_scaling": options or None}
    edit(llama / "config.json", **changes)
    assert read_llama_config(llama).rope == expected


def test_fields_of_llama_are_read(llama):
    edit(llama / "config.json", head_dim=None, num_key_value_heads=None)
    config = read_llama_config(llama)
    assert (config.head_size, config.kv_heads, config.mlp_width) == (4, 8, 48)
    assert (config.vocab_size, config.max_length, config.layers) == (64, 64, 2)
    assert config.norm_eps == 1e-6


SWITCHES = {
    "word_embedding_dimension": 32,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": True,
    "pooling_mode_max_tokens": False,
}


def sentence_transformer(folder, pooling, normalize):
    kinds = ["Transformer", "Pooling", *["Normalize"] * normalize]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    ("pooling", "normalize", "expected"),
    [
        (SWITCHES, True, ("mean", True)),
        (SWITCHES, False, ("mean", False)),
        (
            SWITCHES
            | {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
            True,
            ("cls", True),
        ),
        ({"pooling_mode": "mean"}, True, ("mean", True)),
        ({"pooling_mode": "cls"}, False, ("cls", False)),
    ],
)
def test_metadata_of_sentence_transformers_are_read(bert, pooling, normalize, expected):
    sentence_transformer(bert, pooling, normalize)
    config = read_encoder_config(bert)
    assert (config.pooling, config.normalize) == expected
    assert read_encoder_config(bert, *expected) == config
    other = "cls" if expected[0] == "mean" else "mean"
    with pytest.raises(ValueError, match=f"pooling = '{other}' .*contradicts"):
        read_encoder_config(bert, pooling=other)
    with pytest.raises(ValueError, match=r"normalize = .*contradicts"):
        load_encoder(bert, normalize=not expected[1])


def test_a_folder_that_says_nothing_is_read_like_dragon(bert):
    config = read_encoder_config(bert)
    assert (config.pooling, config.normalize) == ("cls", False)
    config = read_encoder_config(bert, "mean", True)
    assert (config.pooling, config.normalize) == ("mean", True)


@pytest.mark.parametrize(
    ("pooling", "words"),
    [
        (SWITCHES | {"pooling_mode_cls_token": True}, r"pooling .* is not supported"),
        ({"pooling_mode": "max"}, r"max.* is not supported; cls and mean are"),
        ({}, r"is not supported; cls and mean are"),
    ],
)
def test_unknown_poolings_are_told(bert, pooling, words):
    sentence_transformer(bert, pooling, True)
    with pytest.raises(ValueError, match=words):
        read_encoder_config(bert)


def test_broken_metadata_are_told(bert):
    sentence_transformer(bert, SWITCHES, True)
    (bert / "1_Pooling" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"1_Pooling/config\.json"):
        read_encoder_config(bert)
    dense = [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    (bert / "modules.json").write_text(json.dumps(dense))
    with pytest.raises(ValueError, match=r"modules\.json: module Dense"):
        read_encoder_config(bert)
    (bert / "modules.json").write_text("[")
    with pytest.raises(ValueError, match=r"modules\.json: not valid JSON"):
        read_encoder_config(bert)


# --- errors in words ------------------------------------------------------------


def test_missing_folders_and_files_are_told(llama):
    with pytest.raises(FileNotFoundError, match="nowhere: no such model folder"):
        load_llama(llama / "nowhere")
    (llama / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected model\.safetensors or"):
        load_llama(llama)
    (llama / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"pickled .*pytorch_model\.bin.*Convert"):
        load_llama(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        load_llama(llama)
    (llama / "config.json").unlink()
    for load in (load_llama, load_encoder):
        with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
            load(llama)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, r"no field hidden_size"),
        (
            {"num_hidden_layers": None, "num_hidden_layer": 2},
            r"no field num_hidden_layers; the nearest is num_hidden_layer$",
        ),
        ({"model_type": "gemma"}, r"model_type is 'gemma'; supported: 'llama'"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
        ({"attention_bias": True}, r"attention_bias is True"),
        ({"mlp_bias": True}, r"mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is"),
        ({"model_type": "mistral", "sliding_window": 8}, r"sliding_window is 8"),
        ({"vocab_size": "64"}, r"vocab_size is '64', expected a positive integer"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers is 0, expected a positive"),
        (
            {"hidden_size": 30, "head_dim": None},
            r"hidden_size = 30 is no multiple of num_attention_heads = 8",
        ),
        ({"num_key_value_heads": 3}, r"heads = 8 is no multiple of .*heads = 3"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            r"RoPE scaling 'longrope' is not supported; known are .*yarn",
        ),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            r"RoPE scaling 'linear' needs a factor",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8}},
            r"'llama3' needs a low_freq_factor",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 8, "truncate": False}},
            r"truncate is False",
        ),
    ],
)
def test_configs_that_are_not_supported_are_told(llama, changes, words):
    edit(llama / "config.json", **changes)
    with pytest.raises(ValueError, match=words) as error:
        load_llama(llama)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize("load", [load_llama, load_encoder])
def test_a_config_without_a_model_type_is_told(llama, bert, load):
    folder = llama if load is load_llama else bert
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    for content, words in ((config, "no field model_type"), ([], "a JSON object")):
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=words):
            load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "roberta"}, r"model_type is 'roberta'; supported: 'bert'"),
        ({"hidden_act": "relu"}, r"hidden_act is 'relu'"),
        ({"position_embedding_type": "relative_key"}, r"position_embedding_type"),
        ({"intermediate_size": None}, r"no field intermediate_size"),
    ],
)
def test_encoders_that_are_not_supported_are_told(bert, changes, words):
    edit(bert / "config.json", **changes)
    with pytest.raises(ValueError, match=words):
        load_encoder(bert)


def test_weights_that_do_not_fit_are_told(llama):
    name = "model.layers.1.mlp.up_proj.weight"

    def rename(weights):
        weights[name.replace("up_proj", "upp_proj")] = weights.pop(name)

    whole = (llama / "model.safetensors").read_bytes()
    edit_weights(llama, rename)
    with pytest.raises(ValueError, match=rf"no {name}; the nearest is .*upp_proj"):
        load_llama(llama)

    (llama / "model.safetensors").write_bytes(whole)
    extra = "model.layers.2.mlp.up_proj.weight"
    edit_weights(llama, lambda weights: weights.update({extra: np.ones(3)}))
    with pytest.raises(ValueError, match=rf"1 arrays .* does not have, {extra}"):
        load_llama(llama)

    (llama / "model.safetensors").write_bytes(whole)
    edit_weights(llama, lambda weights: weights.update({name: np.ones((48, 31))}))
    with pytest.raises(ValueError, match=rf"{name} has shape \(48, 31\).*\(48, 32\)"):
        load_llama(llama)


def test_damaged_files_are_told(llama):
    file = llama / "model.safetensors"
    whole = file.read_bytes()
    for content, words in (
        (whole[:-4], r"model\.safetensors: truncated: .* should end at byte"),
        (whole[:100], r"truncated, or not a safetensors file"),
        (b"", r"truncated, or not a safetensors file"),
        (b"\x08" + b"\0" * 7 + b"{broken}" + whole, r"not a safetensors file"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            load_llama(llama)
    save_file({"w": np.ones(3, np.int16)}, file)
    with pytest.raises(ValueError, match="w has dtype I16; known are"):
        load_llama(llama)


def test_damaged_indexes_are_told(tmp_path):
    save_llama(tmp_path, shard="20KB")
    index = tmp_path / "model.safetensors.index.json"
    shard = max(tmp_path.glob("*.safetensors"))
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"names {shard.name}, which is miss"):
        load_llama(tmp_path)
    for content, words in (("{", "not valid JSON"), ("{}", "no weight_map")):
        index.write_text(content)
        with pytest.raises(ValueError, match=words):
            load_llama(tmp_path)


def test_tokenizers_of_other_models_are_told(llama):
    config = read_llama_config(llama)
    check_vocabulary(types.SimpleNamespace(vocab_size=64), config)
    with pytest.raises(ValueError, match="tokenizer has 65 tokens, the model only 64"):
        check_vocabulary(types.SimpleNamespace(vocab_size=65), config)


def test_loading_needs_a_mesh(llama):
    with (
        jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())),
        pytest.raises(ValueError, match="loaded onto a mesh"),
    ):
        load_llama(llama)
