"""Stage ``index``: passages/ -> index/, with the context encoder."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from radit_jax import sharding
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tokenize import Tokenizer, load_tokenizer
from radit_jax.models.encoder import Encoder, EncoderConfig
from radit_jax.models.huggingface import load_encoder, read_encoder_config
from radit_jax.retrieval.embed import EmbeddingStore, EmbedStats, embed_passages
from radit_jax.retrieval.index import Built, ScannSettings, build_index
from radit_jax.stages.stage import (
    Stage,
    compute_dtype,
    field_fingerprint,
    section,
    settings_of,
)
from radit_jax.tracker import progress

Encode = Callable[[np.ndarray, np.ndarray], jax.Array]
Tokenize = Callable[[list[str]], list[list[int]]]


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The index section and the context encoder's content."""
    index = section(config.index)
    # How fast the index is searched is no part of what it holds.
    del index["threads"]
    if not index["shards"]:
        # One per process, of which there may be another number when it goes on.
        del index["shards"]
    return index | {
        "encoder": context_fingerprint(config),
        "pooling": section(config.pooling),
        "dtype": config.dtype,
    }


def context_folder(config: ConfigDict) -> str:
    """The context tower; one folder serves as both unless a second one is given."""
    return config.context_encoder or config.encoder


def context_fingerprint(config: ConfigDict) -> str:
    """Of the context tower's content."""
    return field_fingerprint(
        config, "context_encoder" if config.context_encoder else "encoder"
    )


def tower(
    config: ConfigDict, folder: str, max_length: int
) -> tuple[Encode, Tokenize, int]:
    """A loaded encoder as the two functions that retrieval works with.

    Encoders are small beside a language model: each process has a whole one on its own
    devices, and what they encode needs no other process.

    Returns:
        ``encode`` (token ids and mask to embeddings), ``tokenize``, and the longest
        input in tokens: the config's, or the checkpoint's own if that is less.
    """
    with jax.set_mesh(sharding.own_mesh()):
        encoder = load_tower(config, folder)
    length = min(max_length, encoder.config.max_length)
    encode = functools.partial(encoding(config), encoder)
    return encode, tokenizing(load_tokenizer(folder), length), length


def load_tower(config: ConfigDict, folder: str) -> Encoder:
    """An encoder, pooled as its metadata or else the config says."""
    return load_encoder(
        folder,
        pooling=config.pooling.kind or None,
        normalize=config.pooling.normalize,
    )


def tower_config(config: ConfigDict, folder: str) -> EncoderConfig:
    """The shape of an encoder, pooled as ``load_tower`` does it."""
    return read_encoder_config(
        folder, config.pooling.kind or None, config.pooling.normalize
    )


def score_temperature(config: ConfigDict, field: str) -> float:
    """Temperature of the softmax over a question's passages, p_R.

    Args:
        config: of the run.
        field: dotted name of the setting; None there means 1.

    Raises:
        ValueError: it is not positive, or not set for an encoder that normalises.
    """
    name, setting = field.split(".")
    temperature = config[name][setting]
    if temperature is None and tower_config(config, config.encoder).normalize:
        raise ValueError(
            f"{field} is not set, and this encoder normalises: its scores lie within "
            "[-1, 1], and the weights of its passages would be flat whatever they are. "
            f"Try --config.{field}=0.05"
        )
    if temperature is not None and temperature <= 0:
        raise ValueError(f"{field} = {temperature} must be positive")
    return 1.0 if temperature is None else temperature


def make_encode(
    dtype: jnp.dtype,
) -> Callable[[Encoder, jax.Array, jax.Array], jax.Array]:
    """The jitted function from token ids and mask, rows on the mesh, to embeddings."""

    @jax.jit
    def apply(encoder: Encoder, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return encoder(tokens, mask, dtype)

    return apply


def encoding(
    config: ConfigDict,
) -> Callable[[Encoder, np.ndarray, np.ndarray], jax.Array]:
    """Embeddings of a host batch by an encoder that may change, compiled once.

    Batch and encoder are those of this process, on its ``own_mesh``.
    """
    apply = make_encode(compute_dtype(config))

    def encode(
        encoder: Encoder, tokens_BL: np.ndarray, mask_BL: np.ndarray
    ) -> jax.Array:
        with jax.set_mesh(sharding.own_mesh()):
            return apply(encoder, *map(sharding.put_rows, (tokens_BL, mask_BL)))

    return encode


def row_multiple() -> int:
    """What the rows of a batch of ``encoding`` are a multiple of."""
    with jax.set_mesh(sharding.own_mesh()):
        return sharding.row_shards()


def tokenizing(tokenizer: Tokenizer, max_length: int) -> Tokenize:
    """Texts to token ids as the encoder wants them, cut to ``max_length``."""
    return functools.partial(
        tokenizer.encode_batch, max_length=max_length, add_special_tokens=True
    )


class DisplayTexts:
    """What the encoder reads of each passage, by id."""

    def __init__(self, store: PassageStore):
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, id: int) -> str:
        return self.store[id].display


def embed_corpus(
    config: ConfigDict,
    store: PassageStore,
    encode: Encode,
    tokenize: Tokenize,
    length: int,
    folder: Path,
) -> EmbedStats:
    """Embed every passage into a folder, each process its share of the shards; those
    that are there are kept."""
    with progress(len(store), "index", "passages") as bar:
        return embed_passages(
            DisplayTexts(store),
            tokenize,
            encode,
            folder,
            shard_size=config.index.shard_size,
            batch_tokens=config.index.batch_tokens,
            max_length=length,
            row_multiple=row_multiple(),
            progress=bar,
        )


def build_structure(config: ConfigDict, folder: Path) -> Built:
    """Build what is searched beside the embeddings of a folder, all processes
    together."""
    return build_index(
        config.index.kind,
        EmbeddingStore(folder),
        folder,
        settings=settings_of(ScannSettings, config.index),
        shards=config.index.shards,
        seed=config.seed,
    )


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Embed every passage, then build the structure that is searched."""
    store = PassageStore(Path(config.workdir) / "passages")
    side = tower(config, context_folder(config), config.index.max_tokens)
    stats = embed_corpus(config, store, *side, folder)
    built = build_structure(config, folder)
    return {
        "passages": len(store),
        "passages_per_second": round(stats.passages_per_second, 1),
        "padding": round(stats.padding, 4),
        "shapes": stats.shapes,
        "kind": built.kind,
        "structure": built.structure,
        "shards": built.shards,
        "recall_at_10": round(built.recall_at_10, 4),
    }


STAGE = Stage("index", ("passages",), ("encoder",), settings, build)
