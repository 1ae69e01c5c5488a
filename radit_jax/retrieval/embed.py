"""Embeddings of texts: how they are made, and the files that keep them.

``embeddings-00000.npy``, ``embeddings-00001.npy``, ... hold ``shard_size`` rows each,
float32, row ``i`` of the whole being the embedding of passage ``i``;
``embeddings.json`` says how many passages there are, so a missing shard is noticed.
A shard is written under another name and renamed, so one that is there is whole.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from radit_jax import processes

# Rounding a text up to the next length wastes little, least where passages of 100 words
# lie; the list is short, because each length is a program or two to compile.
BUCKET_LENGTHS = (32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)

# Batches that the device may be working on while the host prepares the next one.
IN_FLIGHT = 2

_LAYOUT = "embeddings.json"
_FORMAT = 1

Tokenize = Callable[[list[str]], list[list[int]]]
Encode = Callable[
    [Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]],
    Float[Array, "B E"] | Float[np.ndarray, "B E"],
]


@runtime_checkable
class Texts(Protocol):
    """Texts by position: a list, or anything that reads one at a time."""

    def __len__(self) -> int:
        """Number of texts."""
        ...

    def __getitem__(self, position: int, /) -> str:
        """The text at a position, counted from 0."""
        ...


@runtime_checkable
class Progress(Protocol):
    """Who is told how far the work is."""

    def skip(self, n: int) -> None:
        """n passages had been done by an earlier run."""
        ...

    def update(self, n: int) -> None:
        """n more passages are done."""
        ...


class EmbedStats(NamedTuple):
    """What one call of ``embed_passages`` did; shards found whole are not counted."""

    passages: int
    seconds: float
    passages_per_second: float
    padding: float  # share of the encoded tokens that were padding, 0 .. 1
    shapes: tuple[tuple[int, int], ...]  # distinct (rows, length): compiled programs


class EmbeddingStore:
    """The embeddings of a folder as one array that stays on disk.

    Opening is cheap, and only the rows asked for are read.

    Args:
        folder: where ``embed_passages`` or ``write_embeddings`` left the shards.

    Raises:
        FileNotFoundError: the folder has no embeddings, or a shard is missing.
        ValueError: a shard is truncated, or not of the expected shape and type.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        size, self.shard_size = _read_layout(self.folder)
        self._shards: list[np.memmap] = []
        for shard, (start, stop) in enumerate(_shard_ranges(size, self.shard_size)):
            path = _shard_path(self.folder, shard)
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing: the embeddings of passages {start} to "
                    f"{stop - 1} were not written; run the index stage again, it goes "
                    "on from the first missing shard"
                )
            width = self._shards[0].shape[1] if self._shards else None
            self._shards.append(_open_shard(path, stop - start, width))
        self.shape = (size, self._shards[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, ids: Int[np.ndarray, "*dims"]) -> Float32[np.ndarray, "..."]:
        """Gathers rows in any order, repeats allowed; shape ``ids.shape + (width,)``.

        Raises:
            IndexError: an id is negative or not below the number of passages.
        """
        flat_ids = ids.reshape(-1)
        if flat_ids.size and (flat_ids.min() < 0 or flat_ids.max() >= len(self)):
            raise IndexError(
                f"{self.folder}: passage ids from {flat_ids.min()} to {flat_ids.max()} "
                f"were asked for, there are {len(self)} passages"
            )
        gathered = np.empty((flat_ids.size, self.shape[1]), np.float32)
        shards = flat_ids // self.shard_size
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            self._read(
                int(shard), flat_ids[here] - shard * self.shard_size, here, gathered
            )
        return gathered.reshape(*ids.shape, self.shape[1])

    def _read(
        self, shard: int, rows: np.ndarray, at: np.ndarray, gathered: np.ndarray
    ) -> None:
        """Rows of a shard to their places.

        Read, not mapped: for every row that is touched the kernel maps its neighbours
        too, and soon the whole index counts as this process' memory.
        """
        mapped = self._shards[shard]
        size = mapped.itemsize * mapped.shape[1]
        with _shard_path(self.folder, shard).open("rb", buffering=0) as file:
            for row, place in zip(rows.tolist(), at.tolist(), strict=True):
                data = os.pread(file.fileno(), size, mapped.offset + row * size)
                gathered[place] = np.frombuffer(data, np.float32)

    def rows(self, start: int, stop: int) -> Float32[np.ndarray, "N E"]:
        """Rows ``start`` to ``stop``, cut at the end; read, not mapped."""
        stop = min(stop, len(self))
        if stop <= start:
            return np.empty((0, self.shape[1]), np.float32)
        rows = np.empty((stop - start, self.shape[1]), np.float32)
        for shard in range(start // self.shard_size, (stop - 1) // self.shard_size + 1):
            base = shard * self.shard_size
            first, last = max(start, base), min(stop, base + self.shard_size)
            mapped = self._shards[shard]
            with _shard_path(self.folder, shard).open("rb", buffering=0) as file:
                file.seek(mapped.offset + (first - base) * mapped[0].nbytes)
                into = (
                    rows[first - start : last - start].reshape(-1).view(np.uint8).data
                )
                # One call reads 2 GiB at most.
                while len(into):
                    read = file.readinto(into)
                    if not read:
                        raise ValueError(f"{file.name} was cut while it was read")
                    into = into[read:]
        return rows


@runtime_checkable
class Rows(Protocol):
    """An array, or anything that gives its rows by slices."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, rows: slice, /) -> Float[np.ndarray, "n E"]:
        """Some rows."""
        ...


def write_embeddings(
    embeddings_NE: Rows,
    folder: str | os.PathLike[str],
    shard_size: int = 16384,
) -> EmbeddingStore:
    """Writes embeddings that are already there as a store, and opens it."""
    folder = Path(folder)
    _start_layout(folder, len(embeddings_NE), shard_size)
    for shard, (start, stop) in enumerate(
        _shard_ranges(len(embeddings_NE), shard_size)
    ):
        rows = np.ascontiguousarray(embeddings_NE[start:stop], np.float32)
        _write_shard(_shard_path(folder, shard), rows)
    return EmbeddingStore(folder)


def embed_passages(
    texts: Texts,
    tokenize: Tokenize,
    encode: Encode,
    folder: str | os.PathLike[str],
    *,
    shard_size: int = 16384,
    batch_tokens: int = 8192,
    max_length: int = 512,
    row_multiple: int = 1,
    pad_id: int = 0,
    progress: Progress | None = None,
) -> EmbedStats:
    """Embeds every text into a store; shards that are already there are kept.

    Texts are read, tokenised and encoded one shard at a time, so memory does not grow
    with the corpus; the next shard is tokenised while the device encodes this one.
    Several processes deal the shards out among each other, and all return when all are
    done.

    Args:
        texts: the passages, by id.
        tokenize: token ids of each text, cut to ``max_length``.
        encode: embeddings of a padded batch, usually a jitted function on the mesh.
        folder: where the shards go.
        shard_size: passages per file, and what is lost at most when a run is stopped.
        batch_tokens: rows x length of a batch, padding included.
        max_length: tokens of the longest text.
        row_multiple: rows of a batch are a multiple of this; over a mesh, the number
            of devices that share the rows.
        pad_id: token that fills a row up; its mask is False.
        progress: told of the passages done.

    Returns:
        How much was done by all processes, how fast, and how much of what this one
        encoded was padding.

    Raises:
        ValueError: there are no texts; a text is longer than ``max_length`` or has no
            tokens; an embedding is not finite; or the shards in the folder are damaged
            or belong to another corpus, shard size or encoder.
    """
    folder = Path(folder)
    if len(texts) == 0:
        raise ValueError("there are no passages to embed; is the corpus empty?")
    if processes.first():
        _start_layout(folder, len(texts), shard_size)
    processes.barrier("layout of embeddings")
    processes.wait_for(folder / _LAYOUT)
    width: int | None = None
    todo, done = [], 0
    ranges = list(enumerate(_shard_ranges(len(texts), shard_size)))
    for shard, (start, stop) in ranges[processes.index() :: processes.count()]:
        path = _shard_path(folder, shard)
        if path.exists():
            width = _open_shard(path, stop - start, width).shape[1]
            done += stop - start
        else:
            todo.append((path, start, stop))
    if progress and done:
        progress.skip(done)

    def read(start: int, stop: int) -> list[list[int]]:
        return _tokenize(tokenize, [texts[i] for i in range(start, stop)])

    encoder = _BucketEncoder(encode, batch_tokens, max_length, row_multiple, pad_id)
    started, embedded = time.perf_counter(), 0
    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as reader:
        ahead = reader.submit(read, *todo[0][1:]) if todo else None
        for following, (path, start, stop) in enumerate(todo, 1):
            assert ahead is not None
            tokens = ahead.result()
            if following < len(todo):
                ahead = reader.submit(read, *todo[following][1:])
            rows: np.ndarray | None = None
            for positions, embeddings_BE in encoder(tokens, "passage", start):
                if rows is None:
                    rows = np.empty((stop - start, embeddings_BE.shape[1]), np.float32)
                rows[positions] = embeddings_BE
                embedded += len(positions)
                if progress:
                    progress.update(len(positions))
            assert rows is not None
            if width not in (None, rows.shape[1]):
                raise ValueError(
                    f"{folder}: the encoder gives embeddings of width {rows.shape[1]}, "
                    f"the shards already there have width {width}; they were made by "
                    "another encoder, embed into an empty folder"
                )
            width = rows.shape[1]
            _write_shard(path, rows)
    embedded = sum(processes.gather(embedded))
    for shard, _ in ranges:
        processes.wait_for(_shard_path(folder, shard))
    seconds = time.perf_counter() - started
    return EmbedStats(
        embedded,
        seconds,
        embedded / seconds if embedded else 0.0,
        encoder.padding,
        tuple(sorted(encoder.shapes)),
    )


def embed_queries(
    texts: list[str],
    tokenize: Tokenize,
    encode: Encode,
    *,
    batch_tokens: int = 8192,
    max_length: int = 512,
    row_multiple: int = 1,
    pad_id: int = 0,
) -> Float32[np.ndarray, "B E"]:
    """Embeddings of queries, in order; the arguments are those of ``embed_passages``.

    Raises:
        ValueError: there are no queries; one is longer than ``max_length`` or has no
            tokens; an embedding is not finite.
    """
    if not texts:
        raise ValueError("there are no queries to embed")
    encoder = _BucketEncoder(encode, batch_tokens, max_length, row_multiple, pad_id)
    rows: np.ndarray | None = None
    for positions, embeddings_BE in encoder(_tokenize(tokenize, texts), "query", 0):
        if rows is None:
            rows = np.empty((len(texts), embeddings_BE.shape[1]), np.float32)
        rows[positions] = embeddings_BE
    assert rows is not None
    return rows


class _BucketEncoder:
    """Encodes token lists in padded batches of a few shapes, and counts the padding.

    Per length there are two numbers of rows, a full batch and a quarter of one for
    what is left over, so at most two programs are compiled per bucket.
    """

    def __init__(
        self,
        encode: Encode,
        batch_tokens: int,
        max_length: int,
        row_multiple: int,
        pad_id: int,
    ):
        for name, value in (
            ("batch_tokens", batch_tokens),
            ("max_length", max_length),
            ("row_multiple", row_multiple),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._encode = encode
        self._batch_tokens = batch_tokens
        self._lengths = [n for n in BUCKET_LENGTHS if n < max_length] + [max_length]
        self._row_multiple = row_multiple
        self._pad_id = pad_id
        self._tokens = 0
        self._slots = 0
        self.shapes: set[tuple[int, int]] = set()

    @property
    def padding(self) -> float:
        """Share of the encoded tokens that were padding."""
        return 1 - self._tokens / self._slots if self._slots else 0.0

    def __call__(
        self, tokens: list[list[int]], what: str, first: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (positions, embeddings); ``what`` and ``first`` name a text."""
        lengths = np.array([len(row) for row in tokens])
        for position in np.flatnonzero((lengths == 0) | (lengths > self._lengths[-1])):
            raise ValueError(
                f"{what} {first + position} has {lengths[position]} tokens, expected 1 "
                f"to {self._lengths[-1]} (max_length); the tokenizer must truncate"
            )
        # The device works on one batch while the next is laid out and an earlier one
        # is copied back.
        in_flight: deque[tuple[np.ndarray, object]] = deque()
        for positions, rows, length in self._batches(lengths):
            tokens_BL, mask_BL = self._pad(tokens, positions, rows, length)
            in_flight.append((positions, self._encode(tokens_BL, mask_BL)))
            if len(in_flight) > IN_FLIGHT:
                yield self._fetch(*in_flight.popleft(), what, first)
        while in_flight:
            yield self._fetch(*in_flight.popleft(), what, first)

    def _batches(self, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
        """Yields (positions, rows, length), texts of like length together."""
        order = np.argsort(lengths, kind="stable")
        buckets = np.searchsorted(self._lengths, lengths[order])
        for bucket in np.unique(buckets):
            length = self._lengths[bucket]
            positions = order[buckets == bucket]
            full = self._whole(self._batch_tokens // length)
            quarter = self._whole(full // 4)
            while len(positions):
                # Left-over texts go in quarters where these come out smaller.
                quarters = -(-len(positions) // quarter) * quarter
                rows = quarter if quarters < full else full
                yield positions[:rows], rows, length
                positions = positions[rows:]

    def _whole(self, rows: int) -> int:
        return max(rows // self._row_multiple, 1) * self._row_multiple

    def _pad(
        self, tokens: list[list[int]], positions: np.ndarray, rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        tokens_BL = np.full((rows, length), self._pad_id, np.int32)
        mask_BL = np.zeros((rows, length), bool)
        for row in range(rows):
            # A row without a text repeats the first one: a mask that is False
            # throughout would make attention and mean pooling divide by zero.
            ids = tokens[positions[row if row < len(positions) else 0]]
            tokens_BL[row, : len(ids)] = ids
            mask_BL[row, : len(ids)] = True
        self.shapes.add((rows, length))
        self._tokens += int(mask_BL[: len(positions)].sum())
        self._slots += rows * length
        return tokens_BL, mask_BL

    def _fetch(
        self, positions: np.ndarray, embeddings: object, what: str, first: int
    ) -> tuple[np.ndarray, np.ndarray]:
        embeddings_BE = np.asarray(embeddings, np.float32)[: len(positions)]
        for row in np.flatnonzero(~np.isfinite(embeddings_BE).all(axis=1)):
            raise ValueError(
                f"the embedding of {what} {first + positions[row]} is not finite; "
                "check the encoder's weights and its compute type"
            )
        return positions, embeddings_BE


def _tokenize(tokenize: Tokenize, texts: list[str]) -> list[list[int]]:
    tokens = tokenize(texts)
    if len(tokens) != len(texts):
        raise ValueError(f"tokenize gave {len(tokens)} lists for {len(texts)} texts")
    return tokens


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"embeddings-{shard:05d}.npy"


def _shard_ranges(size: int, shard_size: int) -> list[tuple[int, int]]:
    return [
        (start, min(start + shard_size, size)) for start in range(0, size, shard_size)
    ]


def _start_layout(folder: Path, size: int, shard_size: int) -> None:
    """Writes ``embeddings.json``, or checks that the one there says the same."""
    if size < 1 or shard_size < 1:
        raise ValueError(
            f"{folder}: needs at least 1 passage and 1 passage per shard, got {size} "
            f"and {shard_size}"
        )
    if (folder / _LAYOUT).exists():
        found = _read_layout(folder)
        if found != (size, shard_size):
            raise ValueError(
                f"{folder} holds embeddings of {found[0]} passages in shards of "
                f"{found[1]}, expected {size} in shards of {shard_size}; embed into an "
                "empty folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    layout = {"format": _FORMAT, "passages": size, "shard_size": shard_size}
    temporary = folder / f"{_LAYOUT}.tmp"
    temporary.write_text(json.dumps(layout, indent=2) + "\n")
    temporary.replace(folder / _LAYOUT)


def _read_layout(folder: Path) -> tuple[int, int]:
    path = folder / _LAYOUT
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {folder} holds no embeddings")
    layout = json.loads(path.read_text())
    if layout.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: expected format {_FORMAT}, found {layout.get('format')}; it was "
            "written by another version"
        )
    return layout["passages"], layout["shard_size"]


def _write_shard(path: Path, rows: np.ndarray) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        np.save(file, rows)
        # The rename must not reach the disk before the rows do.
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _open_shard(path: Path, rows: int, width: int | None) -> np.memmap:
    """Memory-maps a shard; ``width`` is None where any will do."""
    expected = f"float32 ({rows}, {'any width' if width is None else width})"
    remedy = "delete this file and run the index stage again"
    try:
        shard = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); expected {expected}; {remedy}"
        ) from error
    if (
        shard.dtype != np.float32
        or shard.ndim != 2
        or len(shard) != rows
        or width not in (None, shard.shape[1])
    ):
        raise ValueError(
            f"{path}: expected {expected}, found {shard.dtype} {shard.shape}; {remedy}"
        )
    return shard
