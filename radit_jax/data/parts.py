"""Documents that were cut into passages, in scratch files.

Documents are cut once and written to the files of a ``Part``, in their order. What is
dropped is found from hashes of the texts; then the kept passages are copied to shards.
All engines take these steps, so they write the same bytes.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from radit_jax.batch import Passage
from radit_jax.data.documents import Document
from radit_jax.data.duplicates import Marks
from radit_jax.data.jsonl import RecordError
from radit_jax.data.split import cut_text, one_line

_SCRATCH = ".scratch-"
# Of a passage: hash of what it displays, where its record is, and its words.
_PASSAGE = np.dtype(
    [("key", "<i8"), ("offset", "<i8"), ("size", "<u4"), ("words", "<u4")]
)
# Of a document: hash of its id, and how many passages were cut from it.
_DOCUMENT = np.dtype([("key", "<i8"), ("passages", "<i8")])
# Passages or documents that are read or written at a time.
_BLOCK = 4096
# Pairs of documents whose ids are compared where their hashes are the same.
_SUSPECTS = 100
# Parts whose files are open at a time.
_OPEN = 100

# A position in the corpus: number of the part, and of the passage (or document) in it.
_PART_SHIFT = 40
_LOCAL = (1 << _PART_SHIFT) - 1

_dump = json.JSONEncoder(ensure_ascii=False).encode


class Part(NamedTuple):
    """Consecutive documents of the corpus, cut into passages, in scratch files."""

    folder: Path
    number: int  # of the part; parts follow each other in the order of the corpus
    documents: int
    empty: int  # documents without a word
    damaged: int  # records
    passages: int  # before any is dropped

    @property
    def first(self) -> int:
        """Position of its first passage, and of its first document."""
        return self.number << _PART_SHIFT


def hash_text(text: str) -> int:
    """A number that stands for a text: 63 bits, for an int64.

    Two of 40 million texts coincide with a probability of 1 in 10,000.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def decode(id: int, record: bytes) -> Passage:
    """The passage in a record of a shard."""
    return Passage(id=id, **json.loads(record.decode("utf-8", "surrogatepass")))


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder inside another, for as long as it is needed.

    What a killed run left is removed first.
    """
    for stale in folder.glob(f"{_SCRATCH}*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as name:
        yield Path(name)


def cut(
    documents: Iterable[Document | RecordError],
    folder: Path,
    number: int,
    max_words: int,
    keep_lines: bool,
) -> Part:
    """Cut documents into passages, in scratch files.

    Args:
        documents: As ``read_corpus`` yields them.
        folder: Where the files go; made, and must not be there.
        number: Of the part, from 0.
        max_words: Of documents that do not say it themselves.
        keep_lines: As in ``split_passages``.

    Raises:
        ValueError: As what yields the documents.
    """
    folder.mkdir(parents=True)
    documents_seen = empty = damaged = 0
    with _PartWriter(folder) as writer:
        for document in documents:
            if isinstance(document, RecordError):
                damaged += 1
                continue
            documents_seen += 1
            chunks = cut_text(
                document.text, document.max_words or max_words, keep_lines
            )
            empty += not chunks
            writer.add(document, chunks)
    return Part(folder, number, documents_seen, empty, damaged, writer.passages)


def _escaped(text: str) -> str:
    """A cleaned text as inside a JSON string, in a fifth of the time of ``json``: only
    three characters that JSON escapes are left in it."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class _PartWriter:
    """Appends documents and their passages to the files of a part."""

    def __init__(self, folder: Path):
        self.passages = 0
        self._offset = 0
        self._files = {
            name: (folder / name).open("wb")
            for name in ("records", "passages", "documents", "ids")
        }
        self._start()

    def _start(self) -> None:
        self._records: list[bytes] = []
        self._keys: list[int] = []
        self._words: list[int] = []
        self._documents: list[tuple[int, int]] = []
        self._ids: list[str] = []

    def add(self, document: Document, chunks: Sequence[tuple[str, int]]) -> None:
        """Append a document and its chunks, each with its number of words."""
        title, section = one_line(document.title), one_line(document.section)
        # What all its records begin with; the text alone is encoded for each.
        head = (
            f'{{"document": {_dump(document.id)}, "title": {_dump(title)},'
            f' "section": {_dump(section)}, "text": '
        ).encode("utf-8", "surrogatepass")
        for text, words in chunks:
            passage = Passage(0, document.id, title, section, text)
            self._records.append(b'%b"%b"}' % (head, _escaped(text).encode()))
            self._keys.append(hash_text(passage.display))
            self._words.append(words)
        self._documents.append((hash_text(document.id), len(chunks)))
        self._ids.append(f"[{_dump(document.id)}, {_dump(document.place)}]")
        if max(len(self._records), len(self._ids)) >= _BLOCK:
            self._flush()

    def _flush(self) -> None:
        rows = np.zeros(len(self._records), _PASSAGE)
        rows["key"] = self._keys
        rows["size"] = list(map(len, self._records))
        rows["words"] = self._words
        ends = self._offset + np.cumsum(rows["size"], dtype=np.int64)
        rows["offset"] = ends - rows["size"]
        documents = np.array(self._documents, np.int64).reshape(-1, 2)
        self._files["records"].writelines(self._records)
        self._files["passages"].write(rows.tobytes())
        self._files["documents"].write(documents.tobytes())
        self._files["ids"].write(
            "".join(f"{line}\n" for line in self._ids).encode("utf-8", "surrogatepass")
        )
        self._offset += int(rows["size"].sum())
        self.passages += len(rows)
        self._start()

    def __enter__(self) -> "_PartWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self._flush()
        for file in self._files.values():
            file.close()


def passage_rows(part: Part) -> Iterator[np.ndarray]:
    """Yield the rows (hash of the display text, position) of its passages in blocks.

    Yields:
        int64 [passages, 2].
    """
    return _key_rows(part, "passages", _PASSAGE)


def document_rows(part: Part) -> Iterator[np.ndarray]:
    """Yield the rows (hash of the id, position) of its documents in blocks.

    Yields:
        int64 [documents, 2].
    """
    return _key_rows(part, "documents", _DOCUMENT)


def _key_rows(part: Part, name: str, kind: np.dtype) -> Iterator[np.ndarray]:
    first = part.first
    for rows in _blocks(part, name, kind):
        positions = np.arange(first, first + len(rows))
        yield np.stack([rows["key"], positions], axis=1)
        first += len(rows)


def _blocks(part: Part, name: str, kind: np.dtype) -> Iterator[np.ndarray]:
    with (part.folder / name).open("rb") as file:
        while block := file.read(_BLOCK * kind.itemsize):
            yield np.frombuffer(block, kind)


def by_part(positions: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of the part and the places in it, for every part of some
    positions."""
    numbers = positions >> _PART_SHIFT
    for number in np.unique(numbers).tolist():
        yield number, positions[numbers == number] & _LOCAL


def suspects(repeated: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Positions of the first documents that share the hash of their id.

    Args:
        repeated: What ``duplicates.repeats`` found in the rows of all documents.
    """
    pairs = [np.stack(found) for found in repeated]
    first, again = np.concatenate([np.zeros((2, 0), np.int64), *pairs], axis=1)
    # The error will name the first; others are there in case that is a mere collision.
    earliest = np.argsort(again)[:_SUSPECTS]
    return np.unique([first[earliest], again[earliest]])


def check_ids(positions: np.ndarray, parts: Sequence[Part]) -> None:
    """Refuse documents that share an id.

    Args:
        positions: Of documents that share the hash of their id, ascending.
        parts: All of them.

    Raises:
        ValueError: Two ids are the same; with the places of both documents.
    """
    seen: dict[str, str] = {}
    for number, places in by_part(positions):
        wanted = set(places.tolist())
        with (parts[number].folder / "ids").open("rb") as file:
            for place, line in enumerate(file):
                if place not in wanted:
                    continue
                id, where = json.loads(line.decode("utf-8", "surrogatepass"))
                where = where or f"document {place + 1}"
                if id in seen:
                    raise ValueError(
                        f'{where}: id "{id}" has occurred before, in {seen[id]}; every '
                        "document needs its own"
                    )
                seen[id] = where


def texts(part: Part, dropped: Marks) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yield positions and display texts of the kept passages of a part in blocks."""
    with (part.folder / "records").open("rb") as file:
        for places, rows in _kept_blocks(part, dropped):
            if len(places):
                records = _read_records(file, rows)
                yield part.first + places, [decode(0, r).display for r in records]


class TextReader:
    """Display texts of passages by position.

    Args:
        folders: Of all parts.
    """

    def __init__(self, folders: Sequence[Path]):
        self._folders = folders
        self._files: dict[int, tuple[BinaryIO, BinaryIO]] = {}

    def __call__(self, position: int) -> str:
        """The text of one passage."""
        number, place = position >> _PART_SHIFT, position & _LOCAL
        if number not in self._files:
            if len(self._files) == _OPEN:
                self._close(next(iter(self._files)))
            folder = self._folders[number]
            self._files[number] = (
                (folder / "passages").open("rb"),
                (folder / "records").open("rb"),
            )
        passages, records = self._files[number]
        passages.seek(place * _PASSAGE.itemsize)
        (row,) = np.frombuffer(passages.read(_PASSAGE.itemsize), _PASSAGE)
        records.seek(row["offset"])
        return decode(0, records.read(int(row["size"]))).display

    def __enter__(self) -> "TextReader":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for number in list(self._files):
            self._close(number)

    def _close(self, number: int) -> None:
        for file in self._files.pop(number):
            file.close()


def kept_records(part: Part, dropped: Marks, skip: int = 0) -> Iterator[bytes]:
    """Yield the records of the passages that are kept, in order.

    Args:
        part: Where they are.
        dropped: The passages that are not.
        skip: So many of the kept ones are passed over.
    """
    with (part.folder / "records").open("rb") as file:
        for places, rows in _kept_blocks(part, dropped):
            yield from _read_records(file, rows[skip:])
            skip = max(skip - len(places), 0)


def _kept_blocks(part: Part, dropped: Marks) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield places and rows of the passages that are kept."""
    start = 0
    for rows in _blocks(part, "passages", _PASSAGE):
        kept = np.flatnonzero(~dropped.between(start, start + len(rows)))
        yield start + kept, rows[kept]
        start += len(rows)


def _read_records(file: BinaryIO, rows: np.ndarray) -> Iterator[bytes]:
    """Of consecutive passages, some of which may be left out."""
    if not len(rows):
        return
    first = int(rows["offset"][0])
    starts = (rows["offset"] - first).tolist()
    stops = (rows["offset"] + rows["size"] - first).tolist()
    file.seek(first)
    block = file.read(stops[-1])
    for start, stop in zip(starts, stops, strict=True):
        yield block[start:stop]


class Kept(NamedTuple):
    """What is left of a part."""

    passages: int
    words: int


def count_kept(part: Part, dropped: Marks) -> Kept:
    """How many passages of a part are kept, and their words."""
    words = sum(int(rows["words"].sum()) for _, rows in _kept_blocks(part, dropped))
    return Kept(part.passages - dropped.count(), words)


def spans(part: Part, dropped: Marks, first: int) -> Iterator[np.ndarray]:
    """Yield where the passages of the documents are, in blocks.

    Args:
        part: Of the corpus.
        dropped: Its passages that are not kept.
        first: Id of the first one that is.

    Yields:
        int64 [documents, 3]: hash of the document's id, id of its first passage, and
        number of passages, of the documents that have some.
    """
    start = 0
    for rows in _blocks(part, "documents", _DOCUMENT):
        borders = np.concatenate([[0], np.cumsum(rows["passages"])])
        kept = ~dropped.between(start, start + int(borders[-1]))
        before = np.concatenate([[0], np.cumsum(kept)])[borders]
        counts = np.diff(before)
        found = np.stack([rows["key"], first + before[:-1], counts], axis=1)
        yield found[counts > 0]
        start += int(borders[-1])
        first += int(before[-1])
