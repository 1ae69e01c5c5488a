"""Weights in the Hugging Face layout: one table per architecture, streamed into place.

A row of a table gives the checkpoint's name of an array, ours, and the axes of both in
the letters of the dimension key. ``HK,D`` to ``DHK`` says that the checkpoint's first
axis is heads times head size, and ours are apart and behind the width; reading a slice
of ours and writing the checkpoint's back both follow from it.
"""

import difflib
import functools
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import ArrayLike, DTypeLike

from radit_jax import processes, sharding
from radit_jax.models.encoder import Encoder, EncoderConfig
from radit_jax.models.layers import Rope
from radit_jax.models.llama import Llama, LlamaConfig
from radit_jax.models.safetensors import (
    INDEX,
    PICKLES,
    Planned,
    Tensor,
    read_folder,
    read_json,
    write_folder,
)

log = logging.getLogger(__name__)

Model = TypeVar("Model", Llama, Encoder)


class Row(NamedTuple):
    """One kind of array; ``{}`` in the name stands for the layer."""

    theirs: str
    ours: str
    their_axes: str  # comma-separated; two letters are one axis of both, flattened
    our_axes: str


LLAMA = (
    Row("model.embed_tokens.weight", "embedding", "V,D", "VD"),
    Row("model.layers.{}.input_layernorm.weight", "layers.attention_norm", "D", "D"),
    Row("model.layers.{}.self_attn.q_proj.weight", "layers.w_q", "HK,D", "DHK"),
    Row("model.layers.{}.self_attn.k_proj.weight", "layers.w_k", "GK,D", "DGK"),
    Row("model.layers.{}.self_attn.v_proj.weight", "layers.w_v", "GK,D", "DGK"),
    Row("model.layers.{}.self_attn.o_proj.weight", "layers.w_o", "D,HK", "HKD"),
    Row("model.layers.{}.post_attention_layernorm.weight", "layers.mlp_norm", "D", "D"),
    Row("model.layers.{}.mlp.gate_proj.weight", "layers.w_gate", "F,D", "DF"),
    Row("model.layers.{}.mlp.up_proj.weight", "layers.w_up", "F,D", "DF"),
    Row("model.layers.{}.mlp.down_proj.weight", "layers.w_down", "D,F", "FD"),
    Row("model.norm.weight", "final_norm", "D", "D"),
    Row("lm_head.weight", "head", "V,D", "VD"),
)
_BLOCK = "encoder.layer.{}."
BERT = (
    Row("embeddings.word_embeddings.weight", "words", "V,D", "VD"),
    Row("embeddings.position_embeddings.weight", "positions", "L,D", "LD"),
    Row("embeddings.token_type_embeddings.weight", "types", "L,D", "LD"),
    Row("embeddings.LayerNorm.weight", "norm", "D", "D"),
    Row("embeddings.LayerNorm.bias", "norm_bias", "D", "D"),
    Row(_BLOCK + "attention.self.query.weight", "layers.w_q", "HK,D", "DHK"),
    Row(_BLOCK + "attention.self.query.bias", "layers.b_q", "HK", "HK"),
    Row(_BLOCK + "attention.self.key.weight", "layers.w_k", "HK,D", "DHK"),
    Row(_BLOCK + "attention.self.key.bias", "layers.b_k", "HK", "HK"),
    Row(_BLOCK + "attention.self.value.weight", "layers.w_v", "HK,D", "DHK"),
    Row(_BLOCK + "attention.self.value.bias", "layers.b_v", "HK", "HK"),
    Row(_BLOCK + "attention.output.dense.weight", "layers.w_o", "D,HK", "HKD"),
    Row(_BLOCK + "attention.output.dense.bias", "layers.b_o", "D", "D"),
    Row(
        _BLOCK + "attention.output.LayerNorm.weight", "layers.attention_norm", "D", "D"
    ),
    Row(
        _BLOCK + "attention.output.LayerNorm.bias",
        "layers.attention_norm_bias",
        "D",
        "D",
    ),
    Row(_BLOCK + "intermediate.dense.weight", "layers.w_up", "F,D", "DF"),
    Row(_BLOCK + "intermediate.dense.bias", "layers.b_up", "F", "F"),
    Row(_BLOCK + "output.dense.weight", "layers.w_down", "D,F", "FD"),
    Row(_BLOCK + "output.dense.bias", "layers.b_down", "D", "D"),
    Row(_BLOCK + "output.LayerNorm.weight", "layers.mlp_norm", "D", "D"),
    Row(_BLOCK + "output.LayerNorm.bias", "layers.mlp_norm_bias", "D", "D"),
)
# Arrays of a checkpoint that the models have no use for.
IGNORED = ("rotary_emb.inv_freq", "pooler.", "cls.", "embeddings.position_ids")
# bert-base-uncased itself has TensorFlow's names of old.
OLD_ENDINGS = {
    ".LayerNorm.gamma": ".LayerNorm.weight",
    ".LayerNorm.beta": ".LayerNorm.bias",
}


@runtime_checkable
class _Tokenizer(Protocol):
    vocab_size: int


def load_llama(folder: str | Path, dtype: DTypeLike = np.float32) -> Llama:
    """The language model of a folder, on the current mesh.

    Args:
        folder: Hugging Face folder.
        dtype: of the weights in memory: float32 to train them. What only reads with
            them loses nothing by that of its compute, to which they are cast anyway.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: another architecture, or weights that do not fit the config.
    """
    folder = Path(folder)
    config = read_llama_config(folder)
    rows = [row for row in LLAMA if not (config.tied and row.ours == "head")]
    ignored = (*IGNORED, "lm_head.") if config.tied else IGNORED
    return _load(folder, lambda key: Llama(config, key), rows, ignored, dtype=dtype)


def load_encoder(
    folder: str | Path, pooling: str | None = None, normalize: bool | None = None
) -> Encoder:
    """One tower of the dual encoder, on the current mesh.

    Args:
        folder: Hugging Face or sentence-transformers folder.
        pooling: only if the checkpoint's metadata do not say.
        normalize: the same.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: as ``load_llama``; or arguments contradict the metadata.
    """
    folder = Path(folder)
    config = read_encoder_config(folder, pooling, normalize)
    return _load(folder, lambda key: Encoder(config, key), BERT, IGNORED, "bert.")


def _load(
    folder: Path,
    build: Callable[[jax.Array], Model],
    rows: Sequence[Row],
    ignored: Sequence[str],
    prefix: str = "",
    dtype: DTypeLike = np.float32,
) -> Model:
    """Fill the abstract model array by array; each device's part is read alone."""
    if jax.sharding.get_mesh().empty:
        raise ValueError(
            "weights are loaded onto a mesh; with jax.set_mesh(sharding.make_mesh())"
        )
    tensors = {}
    for name, tensor in read_folder(folder).items():
        name = name.removeprefix(prefix)
        for old, new in OLD_ENDINGS.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        tensors[name] = tensor
    key = jax.eval_shape(lambda: jax.random.key(0))
    abstract = jax.eval_shape(build, key)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    table = {row.ours: row for row in rows}
    used: set[str] = set()
    filled = []
    for path, leaf in leaves:
        # nnx.Param wraps its array in a last step of the path, ``value``.
        row = table[".".join(str(part.name) for part in path[:-1])]
        filled.append(_place(folder, row, leaf.update(dtype=dtype), tensors, used))
    unknown = sorted(
        name
        for name in set(tensors) - used
        if not any(part in name for part in ignored)
    )
    if unknown:
        raise ValueError(
            f"{folder}: {len(unknown)} arrays that this architecture does not have, "
            f"{unknown[0]} for one"
        )
    return jax.tree_util.tree_unflatten(treedef, filled)


def _place(
    folder: Path,
    row: Row,
    leaf: jax.ShapeDtypeStruct,
    tensors: Mapping[str, Tensor],
    used: set[str],
) -> jax.Array:
    """One array on the mesh; only the parts of this process' devices are read."""
    stacked = "{}" in row.theirs
    shape = leaf.shape[1:] if stacked else leaf.shape
    sizes = dict(zip(row.our_axes, shape, strict=True))
    groups = row.their_axes.split(",")
    expected = tuple(int(np.prod([sizes[a] for a in group])) for group in groups)
    names = [row.theirs.format(i) for i in range(leaf.shape[0] if stacked else 1)]
    for name in names:
        if name not in tensors:
            near = difflib.get_close_matches(name, tensors, 1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise ValueError(f"{folder}: the weights have no {name}{hint}")
        if tensors[name].shape != expected:
            raise ValueError(
                f"{folder}: {name} has shape {tensors[name].shape}, the config says "
                f"{expected}"
            )
    used.update(names)
    spec = leaf.sharding.spec

    @functools.cache
    def read_once(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        index = tuple(slice(*pair) for pair in bounds)
        layers, index = (index[0], index[1:]) if stacked else (slice(1), index)
        # Cast one by one: no stack of them is there in both types.
        parts = [
            read_part(tensors[name].parts, row, sizes, index).astype(
                leaf.dtype, copy=False
            )
            for name in names[layers]
        ]
        return np.stack(parts) if stacked else parts[0]

    def read(index: Any) -> np.ndarray:
        # Devices that hold the same part share what is read.
        cuts = zip(index, leaf.shape, strict=True)
        return read_once(tuple(cut.indices(size)[:2] for cut, size in cuts))

    placement = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.make_array_from_callback(leaf.shape, placement, read)


@runtime_checkable
class Slices(Protocol):
    """What gives slices of an array: the array itself, or its place in a file."""

    def __getitem__(self, cut: tuple[slice, ...], /) -> np.ndarray:
        """The part; a slice for each axis."""
        ...


def read_part(
    theirs: Slices, row: Row, sizes: Mapping[str, int], index: tuple[slice, ...]
) -> np.ndarray:
    """A slice of our array, read from theirs; float32.

    Args:
        theirs: the checkpoint's array.
        row: the axes of both.
        sizes: letter -> size of our whole array.
        index: the slice, along our axes.
    """
    wanted = {
        axis: part.indices(sizes[axis])[:2]
        for axis, part in zip(row.our_axes, index, strict=True)
    }
    cut, split = [], []
    for group in row.their_axes.split(","):
        inner = int(np.prod([sizes[axis] for axis in group[1:]]))
        if any(wanted[axis] != (0, sizes[axis]) for axis in group[1:]):
            raise ValueError(f"{row.theirs}: only the first of {group} can be sliced")
        begin, end = wanted[group[0]]
        cut.append(slice(begin * inner, end * inner))
        split += [end - begin, *(sizes[axis] for axis in group[1:])]
    order = row.their_axes.replace(",", "")
    part = np.asarray(theirs[tuple(cut)], np.float32).reshape(split)
    return part.transpose([order.index(axis) for axis in row.our_axes])


def save(
    model: Llama | Encoder,
    folder: str | Path,
    like: str | Path,
    dtype: np.dtype,
    shard_bytes: int = 4 * 2**30,
) -> list[str]:
    """Write a model as a Hugging Face folder, array by array.

    No process holds more than one array, and only the first one writes; all must call.

    Args:
        model: on a mesh.
        folder: gets the weights, and whatever else is in ``like``.
        like: the folder that the model was loaded from; its configuration and tokenizer
            are the model's.
        dtype: of the files.
        shard_bytes: of a file of weights at most.

    Returns:
        Names of the files of weights.
    """
    folder, like = Path(folder), Path(like)
    table = {row.ours: row for row in (LLAMA if isinstance(model, Llama) else BERT)}
    arrays: list[Planned] = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        row = table[".".join(str(part.name) for part in path[:-1])]
        stacked = "{}" in row.theirs
        shape = leaf.shape[1:] if stacked else leaf.shape
        sizes = dict(zip(row.our_axes, shape, strict=True))
        theirs = tuple(
            math.prod(sizes[axis] for axis in group)
            for group in row.their_axes.split(",")
        )
        for i in range(leaf.shape[0] if stacked else 1):
            fetch = functools.partial(_theirs, leaf, row, i if stacked else None)
            arrays.append(Planned(row.theirs.format(i), theirs, fetch))
    # Layer by layer, as whoever reads one file after the other wants it.
    arrays.sort(key=lambda array: _layer_of(array.name))
    if processes.first():
        folder.mkdir(parents=True, exist_ok=True)
        unlike = shutil.ignore_patterns("*.safetensors", INDEX, *PICKLES)
        shutil.copytree(like, folder, ignore=unlike, dirs_exist_ok=True)
        config = _config(like)
        # Older versions of transformers read the second name.
        config |= dict.fromkeys(("dtype", "torch_dtype"), dtype.name)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return write_folder(folder, arrays, dtype, shard_bytes, processes.first())


def _layer_of(name: str) -> int:
    """Of an array; -1: before the layers, very large: behind them."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if numbers:
        return numbers[0]
    return -1 if "embed" in name else 10**9


def _theirs(leaf: jax.Array, row: Row, layer: int | None) -> np.ndarray | None:
    """An array, or a layer of it, in the checkpoint's layout; for the first process."""
    ours = sharding.fetch(leaf if layer is None else _layer(leaf, layer))
    if not processes.first():
        return None
    order = row.their_axes.replace(",", "")
    found = ours.transpose([row.our_axes.index(axis) for axis in order])
    sizes = dict(zip(row.our_axes, ours.shape, strict=True))
    groups = row.their_axes.split(",")
    return found.reshape([math.prod(sizes[axis] for axis in g) for g in groups])


@jax.jit
def _layer(stacked: jax.Array, layer: ArrayLike) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such model folder")
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: has no config.json")
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object")
    if "model_type" not in config:
        raise ValueError(f"{file}: no field model_type, so no telling what it is")
    return config


def _size(folder: Path, config: Mapping[str, Any], name: str) -> int:
    size = config.get(name)
    if size is None:
        near = difflib.get_close_matches(name, config, 1)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise ValueError(f"{folder}/config.json: no field {name}{hint}")
    if type(size) is not int or size < 1:
        raise ValueError(
            f"{folder}/config.json: {name} is {size!r}, expected a positive integer"
        )
    return size


def _head_size(folder: Path, config: Mapping[str, Any]) -> int:
    if config.get("head_dim") is not None:
        return _size(folder, config, "head_dim")
    width = _size(folder, config, "hidden_size")
    heads = _size(folder, config, "num_attention_heads")
    if width % heads:
        nearest = max(width // heads, 1) * heads
        raise ValueError(
            f"{folder}/config.json: hidden_size = {width} is no multiple of "
            f"num_attention_heads = {heads}; the nearest is {nearest}"
        )
    return width // heads


def _must_be(
    folder: Path, config: Mapping[str, Any], name: str, allowed: Sequence[Any]
) -> None:
    value = config.get(name, allowed[0])
    if value not in allowed:
        raise ValueError(
            f"{folder}/config.json: {name} is {value!r}; supported: "
            f"{', '.join(map(repr, allowed))}"
        )


def read_llama_config(folder: str | Path) -> LlamaConfig:
    """The shape of a language model from its ``config.json``.

    Mistral folders without a sliding window are Llama in all but name.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: another architecture, or a feature that Llama models do not have.
    """
    folder = Path(folder)
    config = _config(folder)
    _must_be(folder, config, "model_type", ("llama", "mistral"))
    _must_be(folder, config, "hidden_act", ("silu",))
    _must_be(folder, config, "attention_bias", (False, None))
    _must_be(folder, config, "mlp_bias", (False, None))
    _must_be(folder, config, "quantization_config", (None,))
    if config["model_type"] == "mistral":
        _must_be(folder, config, "sliding_window", (None,))
    heads = _size(folder, config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(
            f"{folder}/config.json: num_attention_heads = {heads} is no multiple of "
            f"num_key_value_heads = {kv_heads}"
        )
    length = _size(folder, config, "max_position_embeddings")
    return LlamaConfig(
        vocab_size=_size(folder, config, "vocab_size"),
        width=_size(folder, config, "hidden_size"),
        layers=_size(folder, config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=_head_size(folder, config),
        mlp_width=_size(folder, config, "intermediate_size"),
        max_length=length,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=_rope(folder, config, length),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _rope(folder: Path, config: Mapping[str, Any], length: int) -> Rope:
    """Both layouts: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters``."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10_000.0
    for options in (config, scaling):
        _must_be(folder, options, "partial_rotary_factor", (None, 1.0))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in Rope.KINDS:
        raise ValueError(
            f"{folder}/config.json: RoPE scaling {kind!r} is not supported; known are "
            f"{', '.join(Rope.KINDS)}"
        )
    if kind == "default":
        return Rope(float(theta))
    original = (
        config.get("original_max_position_embeddings")
        or scaling.get("original_max_position_embeddings")
        or length
    )
    if kind == "dynamic":  # counts from the model's own length
        original = length
    factor: Any = scaling.get("factor")
    if factor is None and kind == "yarn":
        factor = length / original
    names = {
        "low_freq_factor": "low_factor",
        "high_freq_factor": "high_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    }
    given = {
        ours: float(scaling[theirs])
        for theirs, ours in names.items()
        if scaling.get(theirs) is not None
    }
    needed = {"factor": factor}
    if kind == "llama3":
        needed |= {name: scaling.get(name) for name in list(names)[:2]}
    for name, value in needed.items():
        if value is None:
            raise ValueError(
                f"{folder}/config.json: RoPE scaling {kind!r} needs a {name}, there is "
                "none"
            )
    if kind == "yarn":
        _must_be(folder, scaling, "truncate", (True, None))
        scale, whole = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if scale and whole and factor > 1 and "attention_factor" not in given:
            # DeepSeek's two scales; without them it is the YaRN paper's.
            growth = 0.1 * math.log(factor)
            given["attention_factor"] = (growth * scale + 1) / (growth * whole + 1)
    return Rope(float(theta), kind, float(factor), int(original), **given)


def read_encoder_config(
    folder: str | Path, pooling: str | None = None, normalize: bool | None = None
) -> EncoderConfig:
    """The shape of an encoder, with pooling and normalisation as its metadata say.

    sentence-transformers folders say both; plain folders, DRAGON+'s among them, say
    nothing: then it is the [CLS] state, not normalised, which is DRAGON+'s way.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: another architecture, or arguments that contradict the metadata.
    """
    folder = Path(folder)
    config = _config(folder)
    _must_be(folder, config, "model_type", ("bert",))
    _must_be(folder, config, "hidden_act", ("gelu",))
    _must_be(folder, config, "position_embedding_type", ("absolute", None))
    _head_size(folder, config)
    said = _pooling(folder)
    for name, given in (("pooling", pooling), ("normalize", normalize)):
        if given is not None and name in said and said[name] != given:
            raise ValueError(
                f"{folder}: {name} = {given!r} of the config contradicts the "
                f"checkpoint's own metadata, {said[name]!r}"
            )
    if not said and pooling is None:
        log.info(
            "%s has no pooling metadata: taking the [CLS] state, as DRAGON+ does",
            folder,
        )
    chosen: dict[str, Any] = {"pooling": "cls", "normalize": False} | said
    if pooling is not None:
        chosen["pooling"] = pooling
    if normalize is not None:
        chosen["normalize"] = normalize
    return EncoderConfig(
        vocab_size=_size(folder, config, "vocab_size"),
        width=_size(folder, config, "hidden_size"),
        layers=_size(folder, config, "num_hidden_layers"),
        heads=_size(folder, config, "num_attention_heads"),
        mlp_width=_size(folder, config, "intermediate_size"),
        max_length=_size(folder, config, "max_position_embeddings"),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        **chosen,
    )


def _pooling(folder: Path) -> dict[str, Any]:
    """What a sentence-transformers folder says; empty for a plain one."""
    if not (folder / "modules.json").is_file():
        return {}
    modules = read_json(folder / "modules.json")
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise ValueError(f"{folder}/modules.json: module {unknown[0]} is not supported")
    said: dict[str, Any] = {"normalize": "Normalize" in kinds}
    if "Pooling" in kinds:
        file = folder / modules[kinds.index("Pooling")]["path"] / "config.json"
        modes = read_json(file)
        # Older files have a switch per mode, newer ones name it.
        on = [
            k for k, v in modes.items() if k.startswith("pooling_mode_") and v is True
        ]
        if not on and "pooling_mode" in modes:
            on = [f"pooling_mode_{modes['pooling_mode']}"]
        names = {
            "pooling_mode_cls_token": "cls",
            "pooling_mode_cls": "cls",
            "pooling_mode_mean_tokens": "mean",
            "pooling_mode_mean": "mean",
        }
        if len(on) != 1 or on[0] not in names:
            raise ValueError(f"{file}: pooling {on} is not supported; cls and mean are")
        said["pooling"] = names[on[0]]
    return said


def check_vocabulary(
    tokenizer: _Tokenizer, config: LlamaConfig | EncoderConfig
) -> None:
    """Refuse a tokenizer that has more tokens than the model.

    Raises:
        ValueError: with both sizes.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{config.vocab_size}: they do not belong together"
        )
