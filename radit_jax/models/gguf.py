"""GGUF files of the Llama architecture, converted once to the Hugging Face layout."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from radit_jax.models.safetensors import INDEX

log = logging.getLogger(__name__)

# Bytes of float32 weights per safetensors shard, and so about the memory in use.
SHARD = 2**30

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Llama 3's way of cutting text before BPE.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = ("smollm", "gpt-2", "llama-bpe")


def convert_gguf(file: str | Path, folder: str | Path) -> Path:
    """Write a GGUF file as a Hugging Face folder, float32; instant when it is there.

    Args:
        file: GGUF version 2 or 3, ``general.architecture`` = llama, any quantisation
            that the ``gguf`` package can undo.
        folder: gets ``config.json``, safetensors, ``tokenizer.json`` and
            ``tokenizer_config.json``; complete as soon as it exists.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a GGUF, truncated, another architecture or tokenizer.
    """
    file, folder = Path(file), Path(folder)
    if folder.is_dir():
        return folder
    reader = _open(file)
    config = _config(file, reader)
    log.info("%s: converting to %s", file, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: the processes of a pod may all convert to the same disk.
    partial = Path(
        tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent)
    )
    try:
        partial.chmod(0o755)  # mkdtemp's are private
        _write_tokenizer(file, reader, partial)
        config["tie_word_embeddings"] = "lm_head.weight" not in _write_weights(
            file, reader, config, partial
        )
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _open(file: Path) -> Any:
    # Imported here: only users of GGUF files pay for it.
    from gguf import GGUFReader

    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such GGUF file")
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{file}: not a GGUF file (it begins with {magic!r})")
    try:
        reader = GGUFReader(str(file))
    except (ValueError, IndexError) as error:
        if "GGMLQuantizationType" in str(error):
            raise ValueError(f"{file}: unknown quantisation: {error}") from error
        raise ValueError(f"{file}: truncated or damaged GGUF ({error})") from error
    for tensor in reader.tensors:
        if int(tensor.data_offset) + int(tensor.n_bytes) > file.stat().st_size:
            raise ValueError(f"{file}: truncated: {tensor.name} is not all there")
    return reader


def _get(file: Path, reader: Any, name: str, default: Any = None) -> Any:
    field = reader.get_field(name)
    if field is not None:
        return field.contents()
    if default is None:
        raise ValueError(f"{file}: has no {name}")
    return default


def _config(file: Path, reader: Any) -> dict[str, Any]:
    architecture = _get(file, reader, "general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{file}: general.architecture is {architecture!r}, expected 'llama'"
        )
    if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise ValueError(
            f"{file}: has baked-in RoPE factors (Llama 3.1 and later); use the "
            "model's Hugging Face folder, which names the scaling"
        )

    # Embeddings may have more rows than there are tokens.
    rows = {t.name: int(t.shape[1]) for t in reader.tensors if len(t.shape) == 2}
    if "token_embd.weight" not in rows:
        raise ValueError(f"{file}: has no tensor token_embd.weight")

    def get(name: str, default: Any = None) -> Any:
        return _get(file, reader, f"llama.{name}", default)

    heads, width = int(get("attention.head_count")), int(get("embedding_length"))
    scaling = get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ValueError(f"{file}: RoPE scaling {scaling!r}; none and linear are known")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": int(get("feed_forward_length")),
        "num_hidden_layers": int(get("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv", heads)),
        "head_dim": int(get("attention.key_length", width // heads)),
        "max_position_embeddings": int(get("context_length")),
        "rms_norm_eps": float(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(get("rope.freq_base", 10_000.0)),
        "vocab_size": rows["token_embd.weight"],
        "torch_dtype": "float32",
    }
    if scaling == "linear":
        config["rope_scaling"] = {
            "rope_type": "linear",
            "factor": float(get("rope.scaling.factor")),
        }
    for name in ("bos", "eos"):
        id = reader.get_field(f"tokenizer.ggml.{name}_token_id")
        if id is not None:
            config[f"{name}_token_id"] = int(id.contents())
    return config


def _tensors(
    file: Path, reader: Any, config: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face name and float32 array of every tensor."""
    from gguf.quants import dequantize

    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    for tensor in reader.tensors:
        try:
            array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(
                f"{file}: {tensor.name} is quantised as {tensor.tensor_type.name}, "
                f"which cannot be undone ({error})"
            ) from error
        # GGUF counts axes from the innermost one.
        array = array.reshape([int(n) for n in reversed(tensor.shape)])
        if tensor.name in _TOP:
            yield _TOP[tensor.name], array
            continue
        parts = tensor.name.split(".")
        known = len(parts) == 4 and parts[2] in _LAYER
        if not known or (parts[0], parts[3]) != ("blk", "weight"):
            raise ValueError(f"{file}: unknown tensor {tensor.name}")
        if parts[2] in heads:
            # llama.cpp interleaves the halves that RoPE rotates; take them apart.
            rows, columns = array.shape
            array = (
                array.reshape(heads[parts[2]], -1, 2, columns)
                .swapaxes(1, 2)
                .reshape(rows, columns)
            )
        yield f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight", array


def _write_weights(
    file: Path, reader: Any, config: dict[str, Any], folder: Path
) -> set[str]:
    """Safetensors shards and their index; names of all arrays."""
    weight_map: dict[str, str] = {}
    held: dict[str, np.ndarray] = {}

    def flush() -> None:
        if held:
            name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(held, folder / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(held, name))
            held.clear()

    for name, array in _tensors(file, reader, config):
        held[name] = np.ascontiguousarray(array)
        if sum(array.nbytes for array in held.values()) >= SHARD:
            flush()
    flush()
    total = sum((folder / name).stat().st_size for name in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return set(weight_map)


def _write_tokenizer(file: Path, reader: Any, folder: Path) -> None:
    """The vocabulary, merges and special tokens of a GGUF as a fast tokenizer."""
    kind = _get(file, reader, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(
            f"{file}: tokenizer model {kind!r}; byte-level BPE ('gpt2') can be "
            "converted. For others use the model's Hugging Face folder"
        )
    pre = _get(file, reader, "tokenizer.ggml.pre", "gpt-2")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{file}: pre-tokenizer {pre!r} is not one of {', '.join(PRE_TOKENIZERS)}"
        )
    tokens = _get(file, reader, "tokenizer.ggml.tokens")
    types = _get(file, reader, "tokenizer.ggml.token_type")
    merges = [
        tuple(m.split(" ", 1)) for m in _get(file, reader, "tokenizer.ggml.merges")
    ]
    model = models.BPE(
        vocab={token: id for id, token in enumerate(tokens)},
        merges=merges,
        # Llama 3 takes a word of the vocabulary whole, merges or not.
        ignore_merges=pre == "llama-bpe",
    )
    tokenizer = tokenizers.Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level]
        )
    elif pre == "llama-bpe":
        split = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    # Type 3 is "control", type 4 "user defined" in the GGUF specification.
    control = [t for t, k in zip(tokens, types, strict=True) if k == 3]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in control]
    )
    defined = [t for t, k in zip(tokens, types, strict=True) if k == 4]
    tokenizer.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in defined])
    tokenizer.save(str(folder / "tokenizer.json"))
    said: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        id = reader.get_field(f"tokenizer.ggml.{key}_token_id")
        if id is not None:
            said[f"{name}_token"] = tokens[int(id.contents())]
    add_bos = reader.get_field("tokenizer.ggml.add_bos_token")
    said["add_bos_token"] = bool(add_bos.contents()) if add_bos is not None else False
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2) + "\n")
