"""Inputs of the ``:tiny`` variants: a toy world, and random weights of toy models.

Everything is in the layout of real inputs, so that ``:tiny`` runs the very code that
real runs use, in seconds. The numbers it ends with mean nothing.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

PLACES = 48
FACTS = {
    "Geography": ("capital", "river", "mountain"),
    "Economy": ("currency", "export", "port"),
}
SYLLABLES = ("ba", "do", "ki", "lu", "me", "no", "ra", "su", "ti", "vo", "za", "pe")

LM: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
ENCODER: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 128,
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
}


def write_tiny(folder: Path, seed: int) -> dict[str, int]:
    """Write documents, questions, a language model and an encoder.

    Args:
        folder: where ``documents.jsonl``, ``train.jsonl``, ``dev.jsonl``,
            ``test.jsonl``, ``lm/`` and ``encoder/`` go.
        seed: of names, facts and weights.

    Returns:
        Rows per file.
    """
    rng = np.random.default_rng(seed)
    documents, questions = _world(rng)
    rng.shuffle(questions)
    files = {
        "documents": documents,
        "train": questions[:-60],
        "dev": questions[-60:-40],
        "test": questions[-40:],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    texts = [row["text"] for row in documents] + [q["question"] for q in questions]
    _write_lm(folder / "lm", texts, rng)
    _write_encoder(folder / "encoder", texts, rng)
    return {name: len(rows) for name, rows in files.items()}


def _name(rng: np.random.Generator) -> str:
    return "".join(rng.choice(SYLLABLES, 3)).capitalize()


def _world(rng: np.random.Generator) -> tuple[list[dict], list[dict]]:
    documents, questions = [], []
    for i in range(PLACES):
        place = f"{_name(rng)}{i}"
        for section, facts in FACTS.items():
            document = f"place{i}/{section.lower()}"
            lines = []
            for fact in facts:
                answer = _name(rng)
                lines.append(f"The {fact} of {place} is {answer}.")
                questions.append(
                    {
                        "id": f"{i}-{fact}",
                        "question": f"What is the {fact} of {place}?",
                        "answers": [answer],
                        "kind": fact,
                        "document": document,
                        "evidence": lines[-1],
                    }
                )
            documents.append(
                {
                    "id": document,
                    "title": place,
                    "section": section,
                    "text": "\n".join(lines),
                }
            )
    return documents, questions


def _write_lm(folder: Path, texts: list[str], rng: np.random.Generator) -> None:
    """A byte-level BPE tokenizer and a random Llama."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A multiple of eight, so that the vocabulary divides over every test mesh.
    size = -(-tokenizer.get_vocab_size() // 8) * 8
    config = LM | {
        "vocab_size": size,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    D, F = LM["hidden_size"], LM["intermediate_size"]
    q, kv = LM["num_attention_heads"] * 4, LM["num_key_value_heads"] * 4
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size, D)}
    for i in range(LM["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, shape in {
            "self_attn.q_proj": (q, D),
            "self_attn.k_proj": (kv, D),
            "self_attn.v_proj": (kv, D),
            "self_attn.o_proj": (D, q),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
        }.items():
            shapes[f"{layer}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (D,)
    tokens = {"bos_token": special[1], "eos_token": special[2], "pad_token": special[2]}
    _write_model(folder, config, shapes, rng, tokenizer, tokens)


def _write_encoder(folder: Path, texts: list[str], rng: np.random.Generator) -> None:
    """A WordPiece tokenizer and a random BERT, mean-pooled and normalised."""
    # Not trained: WordPiece training breaks ties another way each time, and the same
    # seed has to give the same files.
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word
        for text in texts
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    letters = sorted(set("".join(words)))
    frequent = sorted(words, key=lambda word: (-words[word], word))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces = dict.fromkeys(
        [*special, *letters, *(f"##{c}" for c in letters), *frequent]
    )
    vocabulary = {piece: i for i, piece in enumerate([*pieces][:512])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    # So that a text which spells "[SEP]" is told from the token.
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    size = tokenizer.get_vocab_size()
    D, F = ENCODER["hidden_size"], ENCODER["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (size, D),
        "embeddings.position_embeddings.weight": (128, D),
        "embeddings.token_type_embeddings.weight": (2, D),
        "embeddings.LayerNorm.weight": (D,),
        "embeddings.LayerNorm.bias": (D,),
    }
    for i in range(ENCODER["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for name, shape in {
            "attention.self.query": (D, D),
            "attention.self.key": (D, D),
            "attention.self.value": (D, D),
            "attention.output.dense": (D, D),
            "attention.output.LayerNorm": (D,),
            "intermediate.dense": (F, D),
            "output.dense": (D, F),
            "output.LayerNorm": (D,),
        }.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = (shape[0],)
    tokens = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    config = ENCODER | {"vocab_size": size, "pad_token_id": 0}
    _write_model(
        folder, config, shapes, rng, tokenizer, tokens | {"pad_token": "[PAD]"}
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": D, "pooling_mode_mean_tokens": True}
    _json(folder / "1_Pooling" / "config.json", pooling)
    kinds = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": path,
            "type": f"sentence_transformers.{kind}",
        }
        for i, (path, kind) in enumerate(
            zip(
                kinds,
                ("models.Transformer", "models.Pooling", "models.Normalize"),
                strict=True,
            )
        )
    ]
    _json(folder / "modules.json", modules)


def _write_model(
    folder: Path,
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    tokens: dict[str, str],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, shape in shapes.items():
        if name.lower().endswith("norm.weight"):
            weights[name] = np.ones(shape, np.float32)
        else:
            weights[name] = rng.normal(0, 0.1, shape).astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _json(folder / "config.json", config)
    tokenizer.save(str(folder / "tokenizer.json"))
    _json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            **tokens,
        },
    )


def _json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
