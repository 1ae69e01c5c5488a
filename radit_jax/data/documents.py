"""The files of a corpus, and the documents in them."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from radit_jax.data.damage import Damage
from radit_jax.data.jsonl import Damaged, RecordError, Row, read_rows, why_missing

FIELDS = ("id", "title", "section", "text")
RAW_TEXT = "raw_content"  # what CommonCrawl extractions (CCNet) call the text
MAX_DAMAGED = "corpus.max_damaged"  # the field that says how many may be damaged

TEXT_ENDING = ".txt"
PARQUET_ENDING = ".parquet"
# Of what is taken from a folder or a glob; a file that is named alone may end in
# anything and is JSONL then.
ENDINGS = (
    *(".jsonl", ".jsonl.gz", ".json", ".json.gz", ".ndjson", ".ndjson.gz"),
    *(PARQUET_ENDING, TEXT_ENDING),
)

# Rows of a Parquet file in memory at a time, and bytes of a column read ahead.
_PARQUET_ROWS = 1024
_PARQUET_BUFFER = 2**20


class Document(NamedTuple):
    """One text of the corpus, before it is split."""

    id: str
    title: str  # "" when the file does not say: CommonCrawl
    section: str  # "" when the file does not say
    text: str
    max_words: int = 0  # of a passage cut from it; 0: as of the rest of the corpus
    place: str = ""  # file and record it was read from


class CorpusFile(NamedTuple):
    """A file of documents, or a folder of text files."""

    path: Path  # of text files: the folder that their ids start from
    pattern: str = ""  # of text files: a glob below ``path``; "": a file of records
    prefix: str = ""  # of ids; "": none
    max_words: int = 0  # see ``Document``

    def texts(self) -> list[str]:
        """Text files below ``path``, in the order of their names."""
        return [name for name in _matches(self) if name.endswith(TEXT_ENDING)]

    def files(self) -> list[Path]:
        """All files that are read."""
        if not self.pattern:
            return [self.path]
        return [self.path / name for name in self.texts()]


def find_files(documents: str) -> list[CorpusFile]:
    """The files that ``corpus.documents`` names, in the order of the corpus.

    Args:
        documents: ``PATH`` or ``PATH@WORDS``, several separated by commas. A path is a
            file, a folder or a glob; ``WORDS`` is the most words of a passage cut from
            its documents.

    Returns:
        In the order named; those of a folder or glob in the order of their names.
        Where there are several, their prefix is their path below the folder that holds
        them all, with ``.`` for ``/``: it must not add a level to the hierarchy that a
        ``/`` makes in ids.

    Raises:
        FileNotFoundError: There is no such file, or none to read in a folder or glob.
        ValueError: A file is named twice, text files stand beside files of records, or
            nothing is named.
    """
    found: list[CorpusFile] = []
    for entry in filter(None, (entry.strip() for entry in documents.split(","))):
        found += _entry_files(*_split_words(entry))
    if not found:
        raise ValueError("corpus.documents names no file")
    places: set[tuple[str, str]] = set()
    for file in found:
        place = (os.path.abspath(file.path), file.pattern)
        if place in places:
            raise ValueError(
                f"corpus.documents names {file.path} twice; its documents would all be "
                "duplicates"
            )
        places.add(place)
    if len(found) == 1:
        return found
    parents = [os.path.dirname(os.path.abspath(file.path)) for file in found]
    base = os.path.commonpath(parents)
    below = [os.path.relpath(os.path.abspath(file.path), base) for file in found]
    return [
        file._replace(prefix=name.replace(os.sep, "."))
        for file, name in zip(found, below, strict=True)
    ]


def _split_words(entry: str) -> tuple[str, int]:
    """``PATH@WORDS`` -> the path and the number, 0 if there is none."""
    match = re.fullmatch(r"(.+)@(\d+)", entry)
    if match is None or Path(entry).expanduser().exists():
        return entry, 0
    if int(match[2]) < 1:
        raise ValueError(f"corpus.documents: {entry}: expected at least 1 word")
    return match[1].strip(), int(match[2])


def _entry_files(entry: str, max_words: int) -> list[CorpusFile]:
    path = Path(entry).expanduser()
    if path.is_file():
        if path.suffix == TEXT_ENDING:
            return [CorpusFile(path.parent, glob.escape(path.name), "", max_words)]
        return [CorpusFile(path, "", "", max_words)]
    if path.is_dir():
        base, pattern = path, "**/*"
    elif glob.has_magic(entry):
        base, pattern = _split_glob(path)
    else:
        raise FileNotFoundError(f"corpus.documents: {path}: {why_missing(path)}")
    matches = CorpusFile(base, pattern, "", max_words)
    names = [name for name in _matches(matches) if name.endswith(ENDINGS)]
    if not names:
        raise FileNotFoundError(
            f"corpus.documents: {entry}: no file in it ends in {', '.join(ENDINGS)}"
        )
    texts = [name for name in names if name.endswith(TEXT_ENDING)]
    if not texts:
        return [CorpusFile(base / name, "", "", max_words) for name in names]
    if len(texts) < len(names):
        other = next(name for name in names if not name.endswith(TEXT_ENDING))
        raise ValueError(
            f"corpus.documents: {entry}: holds text files ({texts[0]}) beside files of "
            f"records ({other}); say which are meant: {entry}/*.txt or {entry}/*"
            f"{Path(other).suffix}"
        )
    return [matches]


def _matches(file: CorpusFile) -> list[str]:
    """What files fit its pattern, in the order of their names."""
    names = glob.glob(file.pattern, root_dir=file.path, recursive=True)
    return sorted(name for name in names if (file.path / name).is_file())


def _split_glob(path: Path) -> tuple[Path, str]:
    """The folder before the first wildcard, and the rest."""
    parts = path.parts
    at = next(at for at, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:at]), os.path.join(*parts[at:])


def read_corpus(
    files: Iterable[CorpusFile], max_damaged: float = 0.0
) -> Iterator[Document | RecordError]:
    """The documents of several files, one after the other; see ``read_file``."""
    for file in files:
        yield from read_file(file, max_damaged)


def read_documents(path: str | Path) -> Iterator[Document]:
    """The documents of one file, none of which may be damaged; see ``read_file``."""
    for document in read_file(CorpusFile(Path(path))):
        assert isinstance(document, Document)
        yield document


def read_file(
    file: CorpusFile, max_damaged: float = 0.0
) -> Iterator[Document | RecordError]:
    """Yield the documents of a file, a few records in memory at a time.

    A record of a JSONL file (which may be compressed, ``.gz``) or a Parquet file has
    ``text``, or ``raw_content`` in its place, and may have ``id`` (string or integer),
    ``title`` and ``section``. Without an id it gets ``FILE:RECORD``. A text file is one
    document: its path is the id, its name the title.

    Args:
        file: See ``find_files``.
        max_damaged: The share of its records that may be damaged: not JSON, not UTF-8,
            or without a text. It is looked at from the 1000th record on.

    Yields:
        A document, or in place of a damaged record what is wrong with it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file as a whole is damaged, or too many records are.
    """
    if file.pattern:
        read = _read_texts
    elif file.path.suffix == PARQUET_ENDING:
        read = _read_parquet
    else:
        read = _read_jsonl
    damage = Damage(MAX_DAMAGED, max_damaged)
    for document in read(file, damage.lost):
        damage.records += isinstance(document, Document)
        yield document
    try:
        damage.finish()
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _read_jsonl(file: CorpusFile, lost: Damaged) -> Iterator[Document | RecordError]:
    unread: list[RecordError] = []
    names: tuple[str, ...] = ()

    def lost_line(error: RecordError) -> None:
        lost(error)
        unread.append(error)

    for row in read_rows(file.path, lost_line):
        yield from unread
        unread.clear()
        try:
            # Comparing names is slow, and few rows differ in them from the one before.
            if tuple(row.values) != names:
                row.check_names((*FIELDS[:-1], _text_field(row)))
                names = tuple(row.values)
            document = _document(row, file)
        except RecordError as error:
            lost(error)
            yield error
            continue
        yield document
    yield from unread


def _read_parquet(file: CorpusFile, lost: Damaged) -> Iterator[Document | RecordError]:
    import pyarrow
    from pyarrow import parquet

    if not file.path.is_file():
        raise FileNotFoundError(f"{file.path}: {why_missing(file.path)}")
    try:
        table = parquet.ParquetFile(file.path, buffer_size=_PARQUET_BUFFER)
        there = table.schema_arrow.names
        header = Row(file.path, 0, dict.fromkeys(there, ""), "record")
        header.check_names((*FIELDS[:-1], _text_field(header)))
        header.text(_text_field(header))
        columns = [name for name in (*FIELDS, RAW_TEXT) if name in there]
        record = 0
        for batch in table.iter_batches(_PARQUET_ROWS, columns=columns):
            values = [_column_values(column) for column in batch.columns]
            for fields in zip(*values, strict=True):
                record += 1
                row = Row(file.path, record, {}, "record")
                try:
                    for name, value in zip(batch.schema.names, fields, strict=True):
                        row.values[name] = _decoded(row, name, value)
                    document = _document(row, file)
                except RecordError as error:
                    lost(error)
                    yield error
                    continue
                yield document
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file.path}: damaged Parquet file ({error})") from error


def _column_values(column: Any) -> list[Any]:
    """Of a Parquet column; strings as bytes, for one that is not UTF-8 is one record's
    damage, and decoding them all at once would fail for all."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type):
        column = column.cast(pyarrow.binary())
    elif pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()


def _decoded(row: Row, name: str, value: Any) -> Any:
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise row.error(
            f'field "{name}" is not UTF-8 at byte {error.start} ({error.reason})'
        ) from error


def _read_texts(file: CorpusFile, lost: Damaged) -> Iterator[Document | RecordError]:
    for name in file.texts():
        path = file.path / name
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            damage = RecordError(
                f"{path}: not UTF-8 at byte {error.start} ({error.reason}); save the "
                "file as UTF-8"
            )
            lost(damage)
            yield damage
            continue
        id = _prefixed(file, Path(name).as_posix())
        yield Document(id, path.stem, "", text, file.max_words, str(path))


def _document(row: Row, file: CorpusFile) -> Document:
    if row.values.get("id") is None:
        id = f"{file.prefix or file.path.name}:{row.line}"
    else:
        id = _prefixed(file, row.identifier("id"))
    return Document(
        id=id,
        # Unchecked: what cannot be shown is dropped later, and odd characters of a web
        # page are no reason to drop the page.
        title=row.text("title", default="", checked=False),
        section=row.text("section", default="", checked=False),
        text=row.text(_text_field(row), checked=False),
        max_words=file.max_words,
        place=row.place,
    )


def _prefixed(file: CorpusFile, id: str) -> str:
    return f"{file.prefix}:{id}" if file.prefix else id


def _text_field(row: Row) -> str:
    return RAW_TEXT if RAW_TEXT in row.values and "text" not in row.values else "text"
