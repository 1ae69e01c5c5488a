"""Documents to passages: read, clean, split, and store for random access by id."""

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import (
    ArrayRecordReader,
    ArrayRecordWriter,
)

from radit_jax.batch import Passage
from radit_jax.data.jsonl import read_rows

FIELDS = ("id", "title", "section", "text")

# Control characters, lone surrogates (no tokenizer accepts them) and three invisible
# marks. Zero-width joiners stay: Persian and Hindi spell words with them.
_DROPPED = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b\ufeff\ud800-\udfff]"
)

_TABLE = "shards.json"
_DOCUMENTS = "documents.npy"
_FORMAT = 1
# One record per group: a read then decompresses one passage and no neighbours.
_WRITER_OPTIONS = "group_size:1"
# The reader's own advice for random access.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class Document(NamedTuple):
    """One text of the corpus, before it is split."""

    id: str
    title: str
    section: str  # "" when the file does not say
    text: str


class CorpusCounts(NamedTuple):
    """What ``write_passages`` saw and wrote."""

    documents: int  # read, the empty ones included
    empty_documents: int  # whose text held no word
    duplicate_passages: int  # dropped, because their display text had come before
    passages: int  # written
    words: int  # in the written passages, titles not counted
    shards: int


def read_documents(path: str | Path) -> Iterator[Document]:
    """Yield the documents of a JSONL file.

    Every row has ``id`` (string or integer), ``title`` and ``text``, and may have
    ``section``. Memory: some 70 bytes per document, for the check that ids are unique.

    Args:
        path: A UTF-8 file with one JSON object per line.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A row is malformed, or its id has occurred before.
    """
    seen: set[int] = set()
    for row in read_rows(path):
        row.check_names(FIELDS)
        document = Document(
            id=row.identifier("id"),
            title=row.text("title"),
            section=row.text("section", default=""),
            text=row.text("text"),
        )
        key = _hash(document.id)
        if key in seen:
            raise row.error(
                f'id "{document.id}" has occurred before; every document needs its own'
            )
        seen.add(key)
        yield document


def clean(text: str) -> str:
    """Collapse white space within lines, drop blank lines and control characters.

    Line breaks stay, since they often mark units of meaning: paragraphs, list items,
    rows of a table.
    """
    lines = (" ".join(_DROPPED.sub("", line).split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def split_passages(
    document: Document, max_words: int, keep_lines: bool = True
) -> list[str]:
    """Cut a document's text into chunks of about equal size.

    The rule of RA-DIT (section 4, after Atlas): a text of W words becomes
    ceil(W / max_words) chunks that are as equal as possible. If the text has lines,
    every border moves to the line break nearest to it, and there may be a chunk more,
    where the lines do not fit otherwise; only a line of more than ``max_words`` words
    is itself cut, into equal parts. Linear in the length of the text.

    Args:
        document: Its text is cleaned first (see ``clean``).
        max_words: The most words, separated by white space, in a chunk.
        keep_lines: Whether borders respect line breaks and the chunks keep them. If
            not, the text counts as one line.

    Returns:
        The chunks in order; none for a text without words.

    Raises:
        ValueError: ``max_words`` is not positive.
    """
    if max_words < 1:
        raise ValueError(f"max_words is {max_words}, expected at least 1")
    text = clean(document.text)
    lines = text.split("\n") if keep_lines else [text.replace("\n", " ")]
    units = [part for line in lines for part in _cut_line(line, max_words)]
    ends = list(accumulate(count for _, count in units))
    chunks = []
    first = start = 0  # the next unit, and the words before it
    while first < len(units):
        left = ends[-1] - start
        target = start + left / _ceil_divide(left, max_words)
        # Units up to `last` fit; each has at most max_words, so at least one does.
        last = bisect_right(ends, start + max_words, lo=first)
        after = bisect_left(ends, target, lo=first, hi=last)
        near = [at for at in (after - 1, after) if first <= at < last]
        border = min(near, key=lambda at: abs(ends[at] - target)) + 1
        chunks.append("\n".join(part for part, _ in units[first:border]))
        first, start = border, ends[border - 1]
    return chunks


def _cut_line(line: str, max_words: int) -> list[tuple[str, int]]:
    words = line.split()
    if not words:
        return []
    parts = _ceil_divide(len(words), max_words)
    borders = [len(words) * at // parts for at in range(parts + 1)]
    return [
        (" ".join(words[start:stop]), stop - start) for start, stop in pairwise(borders)
    ]


def _ceil_divide(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def write_passages(
    documents: Iterable[Document],
    folder: str | Path,
    max_words: int,
    passages_per_shard: int = 100_000,
    keep_lines: bool = True,
) -> CorpusCounts:
    """Split documents and write their passages as ArrayRecord shards.

    Ids count from 0 in the order of the documents, whatever the size of the shards.
    Of passages with the same display text only the first is written. Memory: some
    70 bytes per passage and 170 per document, and one document's text.

    Args:
        documents: Their ids must be unique, as ``read_documents`` makes sure.
        folder: Where to write; made if need be. Shards already in it are replaced.
        max_words: The most words in a passage (see ``split_passages``).
        passages_per_shard: The most passages in a file.
        keep_lines: As in ``split_passages``.

    Returns:
        What was read, dropped and written.

    Raises:
        ValueError: There is no passage at all, or a size is not positive.
    """
    if passages_per_shard < 1:
        raise ValueError(f"passages_per_shard is {passages_per_shard}, expected >= 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Whoever reads the folder looks for the table first, so it goes first and is
    # written last: an interrupted run leaves no store.
    (folder / _TABLE).unlink(missing_ok=True)
    for stale in folder.glob("passages-*.array_record"):
        stale.unlink()

    seen: set[int] = set()
    spans: list[tuple[int, int, int]] = []  # (hash of the id, first passage, count)
    records: list[int] = []  # per shard
    writer: ArrayRecordWriter | None = None
    read = empty = duplicates = words = passages = 0
    for document in documents:
        read += 1
        chunks = split_passages(document, max_words, keep_lines)
        empty += not chunks
        first = passages
        for text in chunks:
            passage = Passage(
                id=passages,
                document=document.id,
                title=_one_line(document.title),
                section=_one_line(document.section),
                text=text,
            )
            key = _hash(passage.display)
            if key in seen:
                duplicates += 1
                continue
            seen.add(key)
            if passages % passages_per_shard == 0:
                if writer is not None:
                    writer.close()
                writer = ArrayRecordWriter(
                    str(_shard(folder, len(records))), _WRITER_OPTIONS
                )
                records.append(0)
            assert writer is not None
            writer.write(_encode(passage))
            records[-1] += 1
            passages += 1
            words += text.count(" ") + text.count("\n") + 1
        if passages > first:
            spans.append((_hash(document.id), first, passages - first))
    if writer is None:
        raise ValueError(
            f"the corpus is empty: no word in the text of {read} documents"
        )
    writer.close()
    # Sorted by hash, so that a lookup is a binary search in a memory-mapped row.
    np.save(folder / _DOCUMENTS, np.array(sorted(spans), np.int64).T.copy())
    counts = CorpusCounts(read, empty, duplicates, passages, words, len(records))
    table = {
        "format": _FORMAT,
        "max_words": max_words,
        "records": records,
        "bytes": [_shard(folder, at).stat().st_size for at in range(len(records))],
        "counts": counts._asdict(),
    }
    (folder / _TABLE).write_text(json.dumps(table), encoding="utf-8")
    return counts


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
            _check_shard(_shard(self.folder, at), size)
        if not (self.folder / _DOCUMENTS).is_file():
            raise FileNotFoundError(f"{self.folder / _DOCUMENTS}: missing")
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
                found[place] = _decode(self._starts[shard] + record, payload)
        return [found[place] for place in range(len(found))]

    def of_document(self, document: str) -> range:
        """Ids of the passages of a document; an empty range if there are none."""
        if self._spans is None:
            self._spans = np.load(self.folder / _DOCUMENTS, mmap_mode="r")
        hashes, firsts, counts = self._spans
        key = _hash(document)
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
                str(_shard(self.folder, shard)), _READER_OPTIONS
            )
        return self._readers[shard]


def _shard(folder: Path, at: int) -> Path:
    return folder / f"passages-{at:05d}.array_record"


def _one_line(text: str) -> str:
    return clean(text).replace("\n", " ")


def _hash(text: str) -> int:
    # 63 bits: an int64 in the table. Two of 40 million texts coincide with a
    # probability of 1 in 10,000.
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def _encode(passage: Passage) -> bytes:
    values = passage._asdict()
    del values["id"]  # its position says it
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _decode(id: int, payload: bytes) -> Passage:
    return Passage(id=id, **json.loads(payload.decode("utf-8", "surrogatepass")))


def _read_table(folder: Path) -> dict[str, Any]:
    path = folder / _TABLE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing, so {folder} holds no finished passages; "
            "run the corpus stage"
        )
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: unreadable ({error})") from error
    if not isinstance(table, dict) or table.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: expected the table of a passage folder, format {_FORMAT}"
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
