"""Stage ``corpus``: documents -> passages/."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from radit_jax.artifacts import fingerprint
from radit_jax.data.corpus import write_passages
from radit_jax.data.documents import CorpusFile, find_files, read_corpus
from radit_jax.stages.stage import Stage, section
from radit_jax.tracker import progress

ENGINES = ("single", "beam")
# They say how the work is done; the passages are the same.
_WITHOUT_EFFECT = ("engine", "beam_options")


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The corpus section, with the content of the documents for their paths.

    Raises:
        FileNotFoundError: as ``find_files``.
        ValueError: as ``find_files``, or an unknown engine.
    """
    corpus = config.corpus
    if corpus.engine not in ENGINES:
        raise ValueError(f"corpus.engine = {corpus.engine!r} is not one of {ENGINES}")
    kept = section(corpus)
    for name in _WITHOUT_EFFECT:
        del kept[name]
    return kept | {"documents": _content(find_files(corpus.documents))}


def _content(files: list[CorpusFile]) -> str:
    """A hash of all that the documents of some files depend on."""
    found = [
        [
            file.prefix,
            file.max_words,
            # The path of a text file below the folder is its id.
            [(str(p.relative_to(file.path)), fingerprint(p)) for p in file.files()],
        ]
        for file in files
    ]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Split the documents into passages.

    Raises:
        FileNotFoundError: as ``find_files``.
        ValueError: as ``read_file`` and ``write_passages``.
            Also: the Beam engine without Apache Beam.
    """
    corpus = config.corpus
    files = find_files(corpus.documents)
    rules = {
        "max_words": corpus.max_words,
        "passages_per_shard": corpus.passages_per_shard,
        "keep_lines": corpus.keep_lines,
        "near_duplicates": corpus.near_duplicates,
    }
    if corpus.engine == "beam":
        beam = _beam()
        counts = beam.write_passages(
            files, folder, corpus.max_damaged, corpus.beam_options, **rules
        )
    else:
        documents = progress(
            read_corpus(files, corpus.max_damaged), "corpus", "documents"
        )
        counts = write_passages(documents, folder, **rules)
    return counts._asdict()


def _beam() -> ModuleType:
    """The Beam engine, imported where it is wanted: an extra that takes seconds."""
    try:
        from radit_jax.data import beam
    except ImportError as error:
        raise ValueError(
            f"corpus.engine = 'beam' needs Apache Beam ({error}): pip install "
            "'radit-jax[beam]', or leave corpus.engine at 'single'"
        ) from error
    return beam


def check(config: ConfigDict) -> None:
    """Whether the documents are there.

    Raises:
        FileNotFoundError, ValueError: as ``find_files``.
    """
    find_files(config.corpus.documents)


STAGE = Stage("passages", (), ("corpus.documents",), settings, build, check, alone=True)
