"""GGUF files, written here, against the models they were made from."""

import dataclasses
import json
import os
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from tokenizers import models, pre_tokenizers, trainers

from radit_jax import sharding
from radit_jax.models.attention import Layout
from radit_jax.models.gguf import convert_gguf
from radit_jax.models.huggingface import load_llama
from radit_jax.models.llama import Llama

TEXTS = [
    "In 1984, it cost $12,345.67!",
    "don't   stop\n\n\tat  naïve café 😀",
    " leading and trailing ",
    "",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(sharding.make_mesh(1, 1, 1)):
        yield


@pytest.fixture(scope="module")
def bpe():
    """Vocabulary and merges of a byte-level BPE, special tokens first."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=288,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    model = json.loads(backend.to_str())["model"]
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    return vocab, [" ".join(merge) for merge in model["merges"]]


@dataclasses.dataclass
class File:
    """What a test wants to be in its GGUF."""

    kind: Kind = Kind.F32
    tied: bool = True
    rows: int = 288  # of the embedding
    architecture: str = "llama"
    tokenizer: str = "gpt2"
    pre: str = "smollm"
    add_bos: bool = False
    heads: int = 4
    metadata: dict = dataclasses.field(default_factory=dict)
    tensors: dict = dataclasses.field(default_factory=dict)


def permute(w, heads):
    """llama.cpp's order of the rows of q and k (its convert_hf_to_gguf.py)."""
    halves = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:])
    return halves.swapaxes(1, 2).reshape(w.shape)


def write(path, bpe, file):
    """A GGUF file at ``path``; returns transformers' model with the same weights."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=file.rows,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=file.heads,
            num_key_value_heads=2,
            intermediate_size=96,
            max_position_embeddings=128,
            rms_norm_eps=1e-3,
            tie_word_embeddings=file.tied,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            initializer_range=0.2,
        )
    ).eval()
    vocab, merges = bpe
    writer = gguf.GGUFWriter(path, file.architecture)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(file.heads)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-3)
    writer.add_tokenizer_model(file.tokenizer)
    writer.add_tokenizer_pre(file.pre)
    writer.add_token_list(vocab)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocab) - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(file.add_bos)
    for name, value in file.metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(name, value)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            array = weight.numpy()
            kind = Kind.F32 if array.ndim == 1 else file.kind
            if kind != Kind.F32:
                quantised = gguf.quants.quantize(array, kind)
                weight.copy_(torch.tensor(gguf.quants.dequantize(quantised, kind)))
            if "q_proj" in name or "k_proj" in name:
                array = permute(array, file.heads if "q_proj" in name else 2)
            parts = name.removesuffix(".weight").split(".")
            theirs = NAMES.get(".".join(parts[:2])) or NAMES.get(parts[0])
            if "layers" in parts:
                theirs = f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}"
            array = (
                array.copy() if kind == Kind.F32 else gguf.quants.quantize(array, kind)
            )
            writer.add_tensor(f"{theirs}.weight", array, raw_dtype=kind)
    for name, array in file.tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def logits(model, tokens_BL):
    positions_BL = np.broadcast_to(np.arange(tokens_BL.shape[1]), tokens_BL.shape)
    layout = Layout(np.ones_like(tokens_BL), positions_BL.astype(np.int32))
    return np.asarray(_logits(model, tokens_BL, layout))


@jax.jit
def _logits(model: Llama, tokens_BL, layout):
    return model.logits(model.hidden(tokens_BL, layout))


TOKENS_BL = np.random.default_rng(0).integers(0, 280, (2, 12), np.int32)


# --- weights --------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
def test_logits_equal_those_of_the_model_in_the_file(tmp_path, bpe, kind, tied):
    reference = write(tmp_path / "m.gguf", bpe, File(kind, tied))
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    model = load_llama(folder)
    assert model.config.tied is tied
    expected = reference(torch.tensor(TOKENS_BL).long()).logits.detach().numpy()
    np.testing.assert_allclose(logits(model, TOKENS_BL), expected, atol=1e-4)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    again = again(torch.tensor(TOKENS_BL).long()).logits.detach().numpy()
    np.testing.assert_allclose(again, expected, atol=1e-5)


def test_embeddings_may_be_padded_beyond_the_vocabulary(tmp_path, bpe):
    write(tmp_path / "m.gguf", bpe, File(rows=320))
    model = load_llama(convert_gguf(tmp_path / "m.gguf", tmp_path / "hf"))
    assert model.config.vocab_size == 320


def test_linear_scaling_is_carried_over(tmp_path, bpe):
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write(tmp_path / "m.gguf", bpe, File(metadata=scaling))
    rope = load_llama(convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")).config.rope
    assert (rope.kind, rope.factor, rope.theta) == ("linear", 4.0, 500.0)


def test_many_small_shards_are_one_model(tmp_path, bpe, monkeypatch):
    reference = write(tmp_path / "m.gguf", bpe, File())
    monkeypatch.setattr("radit_jax.models.gguf.SHARD", 20_000)
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert len(list(folder.glob("*.safetensors"))) > 3
    expected = reference(torch.tensor(TOKENS_BL).long()).logits.detach().numpy()
    np.testing.assert_allclose(
        logits(load_llama(folder), TOKENS_BL), expected, atol=1e-4
    )


# --- tokenizer ------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe"])
def test_transformers_and_we_read_the_same_tokenizer(tmp_path, bpe, pre, add_bos):
    from radit_jax.data.tokenize import load_tokenizer

    write(tmp_path / "m.gguf", bpe, File(pre=pre, add_bos=add_bos))
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    tokenizer = load_tokenizer(folder)
    published = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == published.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
    assert published.convert_tokens_to_ids(SPECIAL) == [0, 1, 2]
    assert published.tokenize("a<|im_end|>")[-1] == "<|im_end|>"
    for name in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{name}_id") == getattr(
            published, f"{name}_token_id"
        )
    assert tokenizer.decode([*tokenizer.encode("a"), *(0, 1, 2)]) == "a"
    assert tokenizer.add_bos is add_bos
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 288)
    digits = [tokenizer.decode([id]).strip() for id in tokenizer.encode("1984 12,345")]
    assert ("12" in digits or "19" in digits) is (pre != "smollm")


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["IT", "'", "S", "Ġ", "1", "2", "3", "4", "5", "Ċ", "Ċ", "x"]),
        ("gpt-2", ["IT", "'", "S", "Ġ12345", "Ċ", "Ċ", "x"]),
        ("llama-bpe", ["IT", "'S", "Ġ", "123", "45", "ĊĊ", "x"]),
    ],
)
def test_text_is_split_before_merging_as_llama_cpp_does(tmp_path, bpe, pre, pieces):
    write(tmp_path / "m.gguf", bpe, File(pre=pre))
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = backend.pre_tokenizer.pre_tokenize_str("IT'S 12345\n\nx")
    assert [piece for piece, _ in found] == pieces


def test_llama_3_takes_a_known_word_whole(tmp_path, bpe):
    """A word of the vocabulary that no merges lead to."""
    vocab, merges = bpe
    merges = [m for m in merges if vocab[-1] not in (*m.split(), m.replace(" ", ""))]
    vocab = [*vocab[:-1], "zqzq"]
    found = {}
    for pre in ("llama-bpe", "gpt-2"):
        write(tmp_path / f"{pre}.gguf", (vocab, merges), File(pre=pre))
        folder = convert_gguf(tmp_path / f"{pre}.gguf", tmp_path / pre)
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        found[pre] = backend.encode("zqzq").tokens
    assert found == {"llama-bpe": ["zqzq"], "gpt-2": ["z", "q", "z", "q"]}


# --- conversion -----------------------------------------------------------------


def test_a_folder_that_is_there_is_used_as_it_is(tmp_path, bpe):
    write(tmp_path / "m.gguf", bpe, File())
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    (folder / "mark").touch()
    (tmp_path / "m.gguf").unlink()
    assert convert_gguf(tmp_path / "m.gguf", folder) == folder
    assert (folder / "mark").exists()


def test_a_conversion_that_fails_leaves_nothing(tmp_path, bpe):
    extra = {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    write(tmp_path / "m.gguf", bpe, File(tensors=extra))
    with pytest.raises(ValueError, match=r"unknown tensor blk\.0\.attn_q\.bias"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "models" / "hf")
    assert [path.name for path in tmp_path.rglob("*")] in (
        ["m.gguf"],
        ["m.gguf", "models"],
        ["models", "m.gguf"],
    )


def test_two_processes_may_convert_the_same_file(tmp_path, bpe, monkeypatch):
    """The other one finishes first, while this one is at work."""
    from radit_jax.models import gguf as ours

    write(tmp_path / "m.gguf", bpe, File())
    work = ours._write_tokenizer

    def interrupted(*arguments):
        monkeypatch.setattr(ours, "_write_tokenizer", work)
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
        (tmp_path / "hf" / "mark").touch()
        work(*arguments)

    monkeypatch.setattr(ours, "_write_tokenizer", interrupted)
    folder = convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert (folder / "mark").exists()
    assert load_llama(folder).config.layers == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m.gguf"]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (File(architecture="gemma"), "general.architecture is 'gemma', expected"),
        (File(tokenizer="llama"), "tokenizer model 'llama'.*Hugging Face folder"),
        (File(pre="tekken"), "'tekken' is not one of smollm, gpt-2, llama-bpe"),
        (
            File(metadata={"llama.rope.scaling.type": "longrope"}),
            "RoPE scaling 'longrope'",
        ),
        (
            File(tensors={"rope_freqs.weight": np.ones(8, np.float32)}),
            r"RoPE factors \(Llama 3\.1 and later\)",
        ),
        (
            File(tensors={"blk.0.ffn_gate_inp.weight": np.ones((2, 64), np.float32)}),
            "unknown tensor blk.0.ffn_gate_inp",
        ),
    ],
)
def test_files_that_do_not_fit_are_told(tmp_path, bpe, file, words):
    write(tmp_path / "m.gguf", bpe, file)
    with pytest.raises(ValueError, match=words):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_files_that_are_no_gguf_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such GGUF file"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    (tmp_path / "m.gguf").write_bytes(b"PK\3\4 a zip")
    with pytest.raises(ValueError, match="not a GGUF file"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")


def test_a_file_cut_anywhere_is_told(tmp_path, bpe):
    whole, cut = tmp_path / "m.gguf", tmp_path / "cut.gguf"
    write(whole, bpe, File())
    data = whole.read_bytes()
    # The header is small beside the weights: cut it in more places.
    for size in [*range(4, 9000, 331), *range(9000, len(data), len(data) // 15)]:
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf: (truncated|has no)"):
            convert_gguf(cut, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_unknown_quantisation_is_told(tmp_path, bpe):
    write(tmp_path / "m.gguf", bpe, File())
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    # Tensor info: name, number of axes (uint32), axes (uint64), kind (uint32).
    name = b"blk.0.attn_v.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    for kind, words in ((99, "unknown quantisation: .*99"), (24, "quantised as I8")):
        data[at : at + 4] = kind.to_bytes(4, "little")
        (tmp_path / "m.gguf").write_bytes(data)
        with pytest.raises(ValueError, match=words):
            convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")


# --- the demo's model -----------------------------------------------------------


@pytest.mark.slow
def test_smollm2_equals_transformers(tmp_path):
    cache = os.environ.get("RADIT_CACHE") or Path.home() / ".cache" / "radit_jax"
    file = Path(cache, "smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not file.exists():
        pytest.skip(f"{file} is missing; the demo recipe fetches it")
    folder = convert_gguf(file, tmp_path / "hf")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens_BL = np.array([tokenizer.encode("The capital of France is")], np.int32)
    expected = reference(torch.tensor(tokens_BL).long()).logits.detach().numpy()
    found = logits(load_llama(folder), tokens_BL)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    # That the rows of q and k are in order shows in what it knows.
    assert tokenizer.decode(found[0, -1].argmax()) == " Paris"
