"""The files of a passage folder, as they are written."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from radit_jax.data.parts import Kept, Part

TABLE = "shards.json"
DOCUMENTS = "documents.npy"
FORMAT = 1
# One record per group: a read then decompresses one passage and no neighbours.
_WRITER_OPTIONS = "group_size:1"


class CorpusCounts(NamedTuple):
    """What ``write_passages`` saw and wrote."""

    documents: int  # read, the empty ones included
    empty_documents: int  # whose text held no word
    duplicate_passages: int  # dropped, because their display text had come before
    passages: int  # written
    words: int  # in the written passages, titles not counted
    shards: int
    near_duplicates: int = 0  # dropped, because a similar one had come before
    damaged_records: int = 0  # left out, because no document could be read from them


def clear(folder: Path) -> None:
    """Make a folder ready to be written; shards already in it are removed.

    Whoever reads the folder looks for the table first, so it goes first and is written
    last: an interrupted run leaves no store.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE).unlink(missing_ok=True)
    for stale in folder.glob("passages-*.array_record*"):
        stale.unlink()


def shard_path(folder: Path, at: int) -> Path:
    """The file of a shard."""
    return folder / f"passages-{at:05d}.array_record"


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Write records as ArrayRecord."""
    writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
    for record in records:
        writer.write(record)
    writer.close()


def write_documents(path: Path, buckets: Iterable[np.ndarray], count: int) -> None:
    """Write the table of documents, one bucket in memory at a time.

    It is sorted by hash, so that a lookup is a binary search in a memory-mapped row.

    Args:
        path: The file, as ``numpy.save`` would write int64 [3, documents].
        buckets: What ``spans`` yielded, int64 [documents, 3], by ascending hashes from
            one bucket to the next.
        count: Of documents in all buckets.
    """
    shape = {"descr": "<i8", "fortran_order": False, "shape": (3, count)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, shape)
        start = file.tell()
        done = 0
        for rows in buckets:
            rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
            for at, column in enumerate(rows.T):
                file.seek(start + 8 * (at * count + done))
                file.write(column.tobytes())
            done += len(rows)


def write_table(
    folder: Path,
    parts: Sequence[Part],
    kept: Sequence[Kept],
    equal: int,
    max_words: int,
    passages_per_shard: int,
) -> CorpusCounts:
    """Write the table that makes a folder a passage store.

    Args:
        folder: With all shards in it.
        parts: Of the corpus.
        kept: Of every part.
        equal: Passages that were dropped because they are equal to an earlier one.
        max_words: For the record.
        passages_per_shard: The most passages in a file.
    """
    passages = sum(part.passages for part in kept)
    full, rest = divmod(passages, passages_per_shard)
    records = [passages_per_shard] * full + [rest] * (rest > 0)
    counts = CorpusCounts(
        documents=sum(part.documents for part in parts),
        empty_documents=sum(part.empty for part in parts),
        duplicate_passages=equal,
        passages=passages,
        words=sum(part.words for part in kept),
        shards=len(records),
        near_duplicates=sum(part.passages for part in parts) - passages - equal,
        damaged_records=sum(part.damaged for part in parts),
    )
    table = {
        "format": FORMAT,
        "max_words": max_words,
        "records": records,
        "bytes": [shard_path(folder, at).stat().st_size for at in range(len(records))],
        "counts": counts._asdict(),
    }
    (folder / TABLE).write_text(json.dumps(table), encoding="utf-8")
    return counts
