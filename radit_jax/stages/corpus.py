"""Stage ``corpus``: documents -> passages/."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from radit_jax.data.corpus import read_documents, write_passages
from radit_jax.stages.stage import Stage, field_fingerprint, section
from radit_jax.tracker import progress


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The corpus section, with the content of the documents for their path."""
    return section(config.corpus) | {
        "documents": field_fingerprint(config, "corpus.documents")
    }


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Split the documents into passages."""
    corpus = config.corpus
    documents = read_documents(corpus.documents)
    counts = write_passages(
        progress(documents, "corpus", "documents"),
        folder,
        corpus.max_words,
        corpus.passages_per_shard,
        corpus.keep_lines,
    )
    return counts._asdict()


STAGE = Stage("passages", (), ("corpus.documents",), settings, build)
