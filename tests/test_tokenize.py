"""Tokenizers of all three file formats, and what a checkpoint says about them."""

import itertools
import json
import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from radit_jax.data.tiny import write_tiny
from radit_jax.data.tokenize import load_tokenizer

TEXTS = [
    "Where was Marie Curie born?",
    "In 1984, it cost $12,345.67 (about 1,000 zł)!",
    "  two  spaces,\ttabs\n\nand lines ",
    "naïve café, Łódź, Αθήνα, 東京, 😀👍🏽",
    "",
]


def byte_level(folder, config=None, frame=False, **files):
    """A byte-level BPE tokenizer trained on TEXTS, saved as checkpoints are."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if frame:
        backend.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    backend.enable_padding(length=7)
    backend.enable_truncation(5)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if config is None:
        config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    write(folder, {"tokenizer_config.json": config, **files})
    return folder


def write(folder, files):
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", "."]


def wordpiece(folder, **options):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    write(
        folder,
        {
            "tokenizer_config.json": {
                "cls_token": "[CLS]",
                "sep_token": "[SEP]",
                "pad_token": "[PAD]",
                **options,
            }
        },
    )
    return folder


# --- encoding and decoding ------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tmp_path, text):
    tokenizer = load_tokenizer(byte_level(tmp_path))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("said", [None, False])
def test_padding_and_truncation_of_the_file_are_off(tmp_path, said):
    config = {"eos_token": "</s>", "add_bos_token": said}
    tokenizer = load_tokenizer(byte_level(tmp_path, config))
    ids = tokenizer.encode("a")
    assert len(ids) == 1
    assert len(tokenizer.encode("a b c d e f g h i")) > 5
    assert tokenizer.encode_batch(["a", "a b c d e f g h i"])[0] == ids


def test_a_batch_is_its_texts_one_by_one(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path, frame=True))
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(t) for t in TEXTS]
    framed = tokenizer.encode_batch(TEXTS, add_special_tokens=True)
    assert framed == [[0, *tokenizer.encode(t)] for t in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_truncation_cuts_the_text_and_keeps_the_frame(tmp_path):
    tokenizer = load_tokenizer(wordpiece(tmp_path))
    texts = ["the cats sat.", "the cat", ""]
    whole = tokenizer.encode_batch(texts, add_special_tokens=True)
    assert whole == [[2, 5, 6, 7, 8, 9, 3], [2, 5, 6, 3], [2, 3]]
    cut = tokenizer.encode_batch(texts, max_length=4, add_special_tokens=True)
    assert cut == [[2, 5, 6, 3], [2, 5, 6, 3], [2, 3]]
    assert tokenizer.encode_batch(texts, max_length=2) == [[5, 6], [5, 6], []]
    with pytest.raises(ValueError, match="at least 3 tokens, found 2"):
        tokenizer.encode_batch(texts, max_length=2, add_special_tokens=True)
    with pytest.raises(ValueError, match="at least 1 tokens, found 0"):
        tokenizer.encode_batch(texts, max_length=0)


def test_special_tokens_spelled_in_a_text_are_text(tmp_path):
    lm = load_tokenizer(byte_level(tmp_path / "lm"))
    ids = lm.encode("a </s> b")
    assert lm.eos_id not in ids
    assert lm.decode(ids) == "a </s> b"
    assert lm.decode([*lm.encode("a"), lm.eos_id]) == "a"
    encoder = load_tokenizer(wordpiece(tmp_path / "encoder"))
    (row,) = encoder.encode_batch(["the [SEP] cat"], add_special_tokens=True)
    assert row.count(encoder.eos_id) == 1


def test_a_pickled_tokenizer_is_the_same(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path, frame=True))
    copy = pickle.loads(pickle.dumps(tokenizer))
    texts = [*TEXTS, "a </s> b", "x" * 200]
    assert copy.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert copy.encode("a </s> b") == tokenizer.encode("a </s> b")
    assert copy.decode([0, *copy.encode("ab")]) == "ab"
    for name in ("bos_id", "eos_id", "pad_id", "vocab_size", "add_bos"):
        assert getattr(copy, name) == getattr(tokenizer, name), name


# --- what the checkpoint says ---------------------------------------------------


def test_special_ids_come_from_the_tokenizer_then_from_the_model(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path / "a"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    # Tokens may be written out as objects.
    folder = byte_level(tmp_path / "b", {"eos_token": {"content": "</s>", "id": 9}})
    assert load_tokenizer(folder).eos_id == 1
    # Llama 3's chat models end in several ways.
    files = {"config.json": {"bos_token_id": 0, "eos_token_id": [1, 2]}}
    tokenizer = load_tokenizer(byte_level(tmp_path / "c", {}, **files))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    encoder = load_tokenizer(wordpiece(tmp_path / "d"))
    assert (encoder.bos_id, encoder.eos_id, encoder.pad_id) == (2, 3, 0)
    files = {"special_tokens_map.json": {"eos_token": "</s>"}}
    tokenizer = load_tokenizer(byte_level(tmp_path / "e", {}, **files))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)


@pytest.mark.parametrize(
    ("said", "frame", "expected"),
    [
        (True, False, True),
        (False, True, False),
        (None, True, True),
        (None, False, False),
    ],
)
def test_add_bos_is_said_by_the_config_or_shown_by_the_frame(
    tmp_path, said, frame, expected
):
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": said}
    folder = byte_level(tmp_path, config, frame)
    assert load_tokenizer(folder).add_bos is expected


def test_vocabulary_counts_up_to_the_largest_added_token(tmp_path):
    folder = byte_level(tmp_path)
    size = load_tokenizer(folder).vocab_size
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert size == backend.get_vocab_size()
    backend.add_special_tokens(["<|extra|>"])
    backend.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).vocab_size == size + 1


def test_errors_are_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"none of tokenizer.*weights\.bin"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"eos_token: expected .* fine-tuning"):
        load_tokenizer(byte_level(tmp_path / "a", {"bos_token": "<s>"}))
    with pytest.raises(ValueError, match=r"eos_token: .* '<end>', which is not in it"):
        load_tokenizer(byte_level(tmp_path / "b", {"eos_token": "<end>"}))
    folder = byte_level(tmp_path / "c")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(folder)


# --- vocab.txt ------------------------------------------------------------------


@pytest.mark.parametrize("lowercase", [True, False])
def test_vocabulary_file_equals_transformers(tmp_path, lowercase):
    from transformers import BertTokenizer

    folder = wordpiece(tmp_path, do_lower_case=lowercase)
    reference = BertTokenizer.from_pretrained(folder, local_files_only=True)
    texts = ["The cats sat.", "the 東cat  sat", "thé cat\nunseen", ""]
    found = load_tokenizer(folder).encode_batch(texts, add_special_tokens=True)
    assert found == reference(texts)["input_ids"]


def test_a_vocabulary_file_that_is_not_berts_is_refused(tmp_path):
    folder = wordpiece(tmp_path)
    (folder / "vocab.txt").write_text("<s>\n</s>\nthe\n")
    with pytest.raises(ValueError, match=r"no \[UNK\], \[CLS\], \[SEP\]"):
        load_tokenizer(folder)


# --- tokenizer.model ------------------------------------------------------------


def varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number, value):
    """A protocol-buffers field: bytes, float or integer."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


MERGED = ["he", "▁t", "▁the", "re", "er", "▁h", "here", "th", "▁th", "an", "ana", "na"]
CHARACTERS = ["▁", *"abehnrt."]
SPECIAL = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
PIECES = [
    *((text, 0.0, kind) for text, kind in SPECIAL),
    *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)),
    *((text, -float(rank), 1) for rank, text in enumerate(MERGED)),
    *((text, -1000.0 - rank, 1) for rank, text in enumerate(CHARACTERS)),
]
SCORES = {text: score for text, score, kind in PIECES if kind == 1}
IDS = {text: id for id, (text, _, _) in enumerate(PIECES)}


def sentencepiece(folder, model_type=2, dummy_prefix=1):
    """A Llama-2 folder: the file of SentencePiece and the names of its tokens."""
    data = b"".join(
        field(1, field(1, text.encode()) + field(2, score) + field(3, kind))
        for text, score, kind in PIECES
    )
    data += field(2, field(1, b"corpus.txt") + field(3, model_type) + field(35, 1))
    data += field(3, field(1, b"identity") + field(3, dummy_prefix))
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(data)
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    write(folder, {"tokenizer_config.json": config})
    return folder


def merge_greedily(text, prefix="▁"):
    """SentencePiece's BPE: merge the best-scored neighbours until there are none."""
    parts = list(prefix + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [a + b for a, b in itertools.pairwise(parts)]
        best = max((SCORES.get(pair, -1e9) for pair in pairs), default=-1e9)
        if best == -1e9:
            break
        at = next(i for i, pair in enumerate(pairs) if SCORES.get(pair, -1e9) == best)
        parts[at : at + 2] = [pairs[at]]
    ids = []
    for part in parts:
        known = [IDS[part]] if part in IDS else [3 + byte for byte in part.encode()]
        ids += known
    return ids


@pytest.mark.parametrize("prefix", ["▁", ""])
def test_sentencepiece_merges_by_score_with_byte_fallback(tmp_path, prefix):
    folder = sentencepiece(tmp_path, dummy_prefix=int(prefix != ""))
    tokenizer = load_tokenizer(folder)
    rng = random.Random(0)
    texts = ["there the  banana.", "é 😀 the", ""]
    texts += ["".join(rng.choices("abehnrt .x", k=30)) for _ in range(50)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == merge_greedily(text, prefix), text
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    assert tokenizer.vocab_size == len(PIECES)
    assert tokenizer.eos_id not in tokenizer.encode("a</s>")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(texts[0]) == tokenizer.encode(texts[0])


def test_other_sentencepiece_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model_type: expected BPE"):
        load_tokenizer(sentencepiece(tmp_path, model_type=1))
    folder = sentencepiece(tmp_path)
    data = (folder / "tokenizer.model").read_bytes()
    for damaged in (data[: len(data) // 2], data[:-3], b"\xff" * 20, b"version 1"):
        (folder / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tokenizer\.model: "):
            load_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match="it has no pieces"):
        load_tokenizer(folder)


# --- imports, and published tokenizers ------------------------------------------


def test_importing_it_starts_no_framework():
    code = (
        "import sys, radit_jax.data.tokenize\n"
        "heavy = {'jax', 'torch', 'transformers', 'tensorflow'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def cached(*parts):
    folder = os.environ.get("RADIT_CACHE") or Path.home() / ".cache" / "radit_jax"
    path = Path(folder, *parts)
    if not path.exists():
        pytest.skip(f"{path} is missing; the demo recipe fetches it")
    return path


PROBES = [*TEXTS, "x = 3.14159\n\tif x > 2:\n", "don't I'll we're", "2024-07-14T08:05"]


@pytest.mark.slow
def test_smollm2_equals_transformers_and_parts_digits(tmp_path):
    from transformers import AutoTokenizer

    from radit_jax.models.gguf import convert_gguf

    file = cached("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = load_tokenizer(convert_gguf(file, tmp_path / "hf"))
    reference = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True
    )
    for text in PROBES:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == reference.encode(text, add_special_tokens=False), text
        digits = [
            t for t in map(tokenizer.decode, zip(ids)) if any(map(str.isdigit, t))
        ]
        assert all(len(t) == 1 for t in digits), digits
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert ids == (1, 2, 2)
    assert (tokenizer.vocab_size, tokenizer.add_bos) == (49152, False)


@pytest.mark.slow
def test_minilm_equals_transformers():
    from transformers import AutoTokenizer

    folder = cached("minilm")
    tokenizer = load_tokenizer(folder)
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = [*PROBES, "long " * 300]
    found = tokenizer.encode_batch(texts, max_length=256, add_special_tokens=True)
    expected = reference(texts, truncation=True, max_length=256, padding=False)
    assert found == expected["input_ids"]
    assert len(found[-1]) == 256
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert ids == (101, 102, 0)


def test_both_ends_of_a_text_are_stretches_of_whole_words(tmp_path):
    write_tiny(tmp_path, seed=0)
    tokenizer = load_tokenizer(tmp_path / "encoder")
    text = "The capital of Bado is Kilu.  The river of Bado is Mera."
    whole = tokenizer.encode(text)
    cut = 0
    for tokens in range(2, len(whole) // 2 + 1):
        first, last = tokenizer.ends(text, tokens)
        for part, expected in ((first, whole[:tokens]), (last, whole[-tokens:])):
            found = tokenizer.encode(part)
            assert text.startswith(first)
            assert text.endswith(last)
            assert set(part.split()) <= {*text.split(), "Kilu", "Mera", "."}
            kept = len(found)
            cut += kept < tokens
            assert found == (expected[:kept] if part is first else expected[-kept:])
    assert cut > 0
    assert tokenizer.ends(text, len(whole) // 2 + 1) is None
    assert tokenizer.ends("Kilukilukilukilu", 1) is None
