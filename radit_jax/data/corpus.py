"""The corpus as a store of passages with random access by id, and how it is made."""

import json
import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from radit_jax.batch import Passage
from radit_jax.data import parts, shards
from radit_jax.data.documents import Document, read_documents
from radit_jax.data.duplicates import (
    BAND_BUCKET_BITS,
    Buckets,
    Marks,
    band_rows,
    repeats,
    similar,
)
from radit_jax.data.jsonl import RecordError
from radit_jax.data.parts import Part
from radit_jax.data.shards import CorpusCounts
from radit_jax.data.split import clean, split_passages

# The door of the corpus, whichever file a name comes from.
__all__ = [
    "CorpusCounts",
    "Document",
    "PassageStore",
    "clean",
    "read_documents",
    "split_passages",
    "write_passages",
]

log = logging.getLogger(__name__)

# The reader's own advice for random access.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def write_passages(
    documents: Iterable[Document | RecordError],
    folder: str | Path,
    max_words: int,
    passages_per_shard: int = 100_000,
    keep_lines: bool = True,
    near_duplicates: float = 0.0,
) -> CorpusCounts:
    """Split documents and write their passages as ArrayRecord shards.

    Ids count from 0 in the order of the documents, whatever the size of the shards.
    Of passages with the same display text only the first is written. While it works,
    the folder holds scratch files of about the size of the text besides.

    Memory does not depend on the documents, but for a bit per passage and a 256th of
    their hashes.

    Args:
        documents: As ``read_corpus`` yields them; damaged records are counted.
        folder: Where to write; made if need be. Shards already in it are replaced.
        max_words: The most words in a passage (see ``split_passages``), of documents
            that do not say it themselves.
        passages_per_shard: The most passages in a file.
        keep_lines: As in ``split_passages``.
        near_duplicates: Also drop a passage whose Jaccard similarity to an earlier one,
            over runs of five words, is at least this; 0: do not. 99 % of the pairs at
            the threshold are found, and of more similar ones even more. Scratch files
            of some 350 bytes per passage come on top.

    Returns:
        What was read, dropped and written.

    Raises:
        ValueError: There is no passage at all, two documents share an id, or a size or
            share is out of range.
    """
    check_settings(passages_per_shard, near_duplicates)
    folder = Path(folder)
    shards.clear(folder)
    with parts.scratch(folder) as scratch:
        part = parts.cut(documents, scratch / "part", 0, max_words, keep_lines)
        check_passages([part])
        log.info("cut %d passages; now dropping duplicates", part.passages)
        parts.check_ids(_id_suspects(part, scratch / "ids"), [part])
        dropped = Marks(part.passages)
        _drop_equal(part, dropped, scratch / "keys")
        equal = dropped.count()
        if near_duplicates:
            _drop_similar(part, dropped, scratch / "bands", near_duplicates)
        log.info("dropped %d passages; now writing the others", dropped.count())
        spans = Buckets(scratch / "spans", columns=3)
        for rows in parts.spans(part, dropped, first=0):
            spans.add(rows)
        shards.write_documents(folder / shards.DOCUMENTS, spans, spans.rows)
        kept = parts.count_kept(part, dropped)
        records = parts.kept_records(part, dropped)
        for at in range(-(-kept.passages // passages_per_shard)):
            path = shards.shard_path(folder, at)
            shards.write_shard(path, islice(records, passages_per_shard))
        return shards.write_table(
            folder, [part], [kept], equal, max_words, passages_per_shard
        )


def check_settings(passages_per_shard: int, near_duplicates: float) -> None:
    """Refuse settings that make no sense.

    Raises:
        ValueError: A size or share is out of range.
    """
    if passages_per_shard < 1:
        raise ValueError(f"passages_per_shard is {passages_per_shard}, expected >= 1")
    if not 0 <= near_duplicates <= 1:
        raise ValueError(
            f"near_duplicates is {near_duplicates}, expected a similarity from 0 (none "
            "is dropped) to 1, such as 0.8"
        )


def check_passages(found: Sequence[Part]) -> None:
    """Refuse a corpus without a word.

    Raises:
        ValueError: No part has a passage.
    """
    if not any(part.passages for part in found):
        documents = sum(part.documents for part in found)
        raise ValueError(
            f"the corpus is empty: no word in the text of {documents} documents"
        )


def _id_suspects(part: Part, folder: Path) -> np.ndarray:
    buckets = Buckets(folder, columns=2)
    for rows in parts.document_rows(part):
        buckets.add(rows)
    return parts.suspects(repeats(rows) for rows in buckets)


def _drop_equal(part: Part, dropped: Marks, folder: Path) -> None:
    buckets = Buckets(folder, columns=2)
    for rows in parts.passage_rows(part):
        buckets.add(rows)
    for rows in buckets:
        dropped.mark(repeats(rows)[1])


def _drop_similar(part: Part, dropped: Marks, folder: Path, threshold: float) -> None:
    buckets = Buckets(folder, columns=2, bits=BAND_BUCKET_BITS)
    for positions, texts in parts.texts(part, dropped):
        buckets.add(band_rows(positions, texts, threshold))
    with parts.TextReader([part.folder]) as text:
        for rows in buckets:
            dropped.mark(similar(rows, text, threshold))


class PassageStore:
    """The passages of a folder by id; cheap to open, and to send to a worker process.

    Ids are 0 .. N-1. A negative id is an error, not a count from the end, because -1
    stands for "no passage" in ``Retrieved``.

    Raises:
        FileNotFoundError: The folder, its table or a shard is missing.
        ValueError: The table is unreadable, or a shard is truncated.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        table = _read_table(self.folder)
        self.counts = CorpusCounts(**table["counts"])
        self._starts: list[int] = [0, *accumulate(table["records"])]
        for at, size in enumerate(table["bytes"]):
            _check_shard(shards.shard_path(self.folder, at), size)
        if not (self.folder / shards.DOCUMENTS).is_file():
            raise FileNotFoundError(f"{self.folder / shards.DOCUMENTS}: missing")
        self._readers: dict[int, ArrayRecordReader] = {}
        self._spans: np.ndarray | None = None

    def __reduce__(self) -> tuple[type["PassageStore"], tuple[Path]]:
        # Readers hold file handles and threads; a worker opens its own.
        return PassageStore, (self.folder,)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, id: int | np.integer) -> Passage:
        return self.get([int(id)])[0]

    def __iter__(self) -> Iterator[Passage]:
        for start in range(0, len(self), 1024):
            yield from self.get(range(start, min(start + 1024, len(self))))

    def get(self, ids: Sequence[int] | np.ndarray) -> list[Passage]:
        """The passages with these ids, in this order; repeats are allowed.

        Args:
            ids: Each in 0 .. N-1.

        Raises:
            IndexError: An id is out of range.
        """
        wanted: dict[int, list[tuple[int, int]]] = {}  # shard -> (place, record)
        for place, id in enumerate(ids):
            id = int(id)
            if not 0 <= id < len(self):
                raise IndexError(
                    f"passage {id} is out of range, {self.folder} holds 0 to"
                    f" {len(self) - 1}"
                )
            shard = bisect_right(self._starts, id) - 1
            wanted.setdefault(shard, []).append((place, id - self._starts[shard]))
        found: dict[int, Passage] = {}
        for shard, places in wanted.items():
            payloads = self._reader(shard).read([record for _, record in places])
            for (place, record), payload in zip(places, payloads, strict=True):
                found[place] = parts.decode(self._starts[shard] + record, payload)
        return [found[place] for place in range(len(found))]

    def of_document(self, document: str) -> range:
        """Ids of the passages of a document; an empty range if there are none."""
        if self._spans is None:
            self._spans = np.load(self.folder / shards.DOCUMENTS, mmap_mode="r")
        hashes, firsts, counts = self._spans
        key = parts.hash_text(document)
        for at in range(int(np.searchsorted(hashes, key)), len(hashes)):
            if hashes[at] != key:
                break
            first = int(firsts[at])
            # Hashes of two ids can coincide; the passage says whose it is.
            if self[first].document == document:
                return range(first, first + int(counts[at]))
        return range(0)

    def _reader(self, shard: int) -> ArrayRecordReader:
        if shard not in self._readers:
            self._readers[shard] = ArrayRecordReader(
                str(shards.shard_path(self.folder, shard)), _READER_OPTIONS
            )
        return self._readers[shard]


def _read_table(folder: Path) -> dict[str, Any]:
    path = folder / shards.TABLE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing, so {folder} holds no finished passages; "
            "run the corpus stage"
        )
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: unreadable ({error})") from error
    if not isinstance(table, dict) or table.get("format") != shards.FORMAT:
        raise ValueError(
            f"{path}: expected the table of a passage folder, format {shards.FORMAT}"
        )
    return table


def _check_shard(path: Path, size: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: shard missing; run the corpus stage again")
    actual = path.stat().st_size
    if actual != size:
        raise ValueError(
            f"{path}: shard has {actual:,} bytes, expected {size:,}: truncated or"
            " replaced; copy it again, or run the corpus stage again"
        )
