"""Which passages repeat an earlier one, found in memory that does not grow with them.

Equal texts have equal keys (63-bit hashes). Keys and positions go to buckets by the top
bits of the key, and a bucket fits into memory. Texts that are only similar share a key
of at least one *band* of their MinHash signatures [1] with high probability; pairs that
do are then compared exactly.

[1] Broder 1997, On the resemblance and containment of documents; Leskovec, Rajaraman,
Ullman, Mining of Massive Datasets, chapter 3.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

KEY_BITS = 63  # of a key, a non-negative int64
BUCKET_BITS = 8
BAND_BUCKET_BITS = 10  # a passage has many band keys
# Rows that ``Buckets`` keeps in memory before it writes them.
_HELD = 2**18

SHINGLE_WORDS = 5
PERMUTATIONS = 128
# The share of pairs exactly as similar as the threshold that banding is to find.
_RECALL = 0.99
# The most earlier passages of a bucket that one is compared with, which keeps the time
# linear where thousands share a phrase.
_LEADERS = 8
# Texts that are hashed at a time: an array of some 13 MB.
_BATCH = 64


class Marks:
    """A bit for each of ``size`` things, at first unset.

    Args:
        size: How many.
        bits: What ``bits`` of other marks was; None: none is set.
    """

    def __init__(self, size: int, bits: np.ndarray | None = None):
        self.size = size
        self.bits = np.zeros(-(-size // 8), np.uint8) if bits is None else bits

    def mark(self, positions: np.ndarray) -> None:
        """Set the bits at some positions."""
        np.bitwise_or.at(
            self.bits,
            positions >> 3,
            np.left_shift(1, positions & 7).astype(np.uint8),
        )

    def between(self, start: int, stop: int) -> np.ndarray:
        """Bool array: which of ``start`` to ``stop`` are set."""
        first = start >> 3
        bits = np.unpackbits(self.bits[first : -(-stop // 8)], bitorder="little")
        return bits[start - 8 * first : stop - 8 * first].view(bool)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Bool array: which of some positions are set."""
        return (self.bits[positions >> 3] >> (positions & 7).astype(np.uint8) & 1) == 1

    def count(self) -> int:
        """How many are set."""
        return int(np.bitwise_count(self.bits).sum())


class Buckets:
    """Rows of integers, put together by the top bits of the first column.

    Iterating yields bucket after bucket, in ascending order of these bits; within one,
    rows keep the order in which they were added. They are on disk, unless they are few.

    Args:
        folder: Where the files go; made, and must not be there.
        columns: Of a row, the first one a key.
        bits: So many top bits of the key make a bucket.
    """

    def __init__(self, folder: Path, columns: int, bits: int = BUCKET_BITS):
        self.rows = 0  # added so far
        self._folder = folder
        self._columns = columns
        self._bits = bits
        self._held = [np.zeros((0, columns), np.int64)]
        self._count = 0  # of rows that are held
        folder.mkdir(parents=True)

    def add(self, rows: np.ndarray) -> None:
        """Add rows, int64 [rows, columns]."""
        self._held.append(rows)
        self._count += len(rows)
        self.rows += len(rows)
        if self._count >= _HELD:
            self._flush()

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._count == self.rows:
            for _, rows in split_rows(np.concatenate(self._held), self._bits):
                yield rows
            return
        self._flush()
        for bucket in range(2**self._bits):
            file = self._folder / f"{bucket:05d}"
            if file.is_file():
                yield np.fromfile(file, np.int64).reshape(-1, self._columns)

    def _flush(self) -> None:
        for bucket, rows in split_rows(np.concatenate(self._held), self._bits):
            with (self._folder / f"{bucket:05d}").open("ab") as file:
                rows.tofile(file)
        del self._held[1:]
        self._count = 0


def split_rows(
    rows: np.ndarray, bits: int = BUCKET_BITS
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the bucket and the rows of it, int64 [rows, columns], for every bucket."""
    buckets = rows[:, 0] >> (KEY_BITS - bits)
    order = np.argsort(buckets, kind="stable")
    rows, buckets = rows[order], buckets[order]
    for start, stop in pairwise(_borders(buckets)):
        yield int(buckets[start]), rows[start:stop]


def repeats(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which keys of a bucket have occurred before.

    Args:
        rows: (key, position), int64, in any order.

    Returns:
        Positions of the first occurrence and of the repeated one, in the order of the
        latter; int64 [repeats].
    """
    rows = _sorted(rows)
    borders = _borders(rows[:, 0])
    first = np.repeat(borders[:-1], np.diff(borders))
    again = np.flatnonzero(first != np.arange(len(rows)))
    positions = rows[:, 1]
    order = again[np.argsort(positions[again])]
    return positions[first[order]], positions[order]


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))]


def _borders(keys: np.ndarray) -> np.ndarray:
    """Where every run of equal keys starts, and where the last one ends."""
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    return np.append(starts, len(keys))


def similar(
    rows: np.ndarray, text: Callable[[int], str], threshold: float
) -> np.ndarray:
    """Which passages of a bucket of band keys are near-duplicates of an earlier one.

    Args:
        rows: (band key, position), int64, in any order.
        text: Of the passage at a position.
        threshold: The least Jaccard similarity of near-duplicates.

    Returns:
        Their positions, int64.
    """
    rows = _sorted(rows)
    found: list[int] = []
    for start, stop in pairwise(_borders(rows[:, 0])):
        if stop - start < 2:
            continue
        leaders: list[frozenset[tuple[str, ...]]] = []
        for position in rows[start:stop, 1].tolist():
            own = shingles(text(position))
            if any(jaccard(own, other) >= threshold for other in leaders):
                found.append(position)
            elif len(leaders) < _LEADERS:
                leaders.append(own)
    return np.array(found, np.int64)


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """The runs of five words in a text; the whole text if it is shorter."""
    words = text.split()
    last = max(len(words) - SHINGLE_WORDS, 0)
    return frozenset(
        tuple(words[start : start + SHINGLE_WORDS]) for start in range(last + 1)
    )


def jaccard(one: frozenset, other: frozenset) -> float:
    """Size of the intersection over that of the union."""
    common = len(one & other)
    return common / (len(one) + len(other) - common)


@lru_cache
def banding(threshold: float) -> tuple[int, int]:
    """Number of bands, and rows of the signature in each.

    Two texts of similarity s share a band of r rows with probability s^r. The more rows
    the fewer pairs are compared for nothing, so there are as many as still let pairs at
    the threshold share one of the bands with a probability of 99 %.
    """
    for rows in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= _RECALL:
            return bands, rows
    return PERMUTATIONS, 1


def band_rows(
    positions: np.ndarray, texts: Sequence[str], threshold: float
) -> np.ndarray:
    """Rows (band key, position) of texts; see ``band_keys``.

    Returns:
        int64 [texts * bands, 2].
    """
    keys = band_keys(texts, threshold)
    rows = np.stack([keys, np.broadcast_to(positions[:, None], keys.shape)], axis=2)
    return rows.reshape(-1, 2)


def band_keys(texts: Sequence[str], threshold: float) -> np.ndarray:
    """Keys of the bands of texts.

    Args:
        texts: Each has a word.
        threshold: See ``banding``.

    Returns:
        int64 [texts, bands]; the same whatever process computes it.
    """
    bands, rows = banding(threshold)
    blocks = [
        _signatures(texts[start : start + _BATCH])
        for start in range(0, len(texts), _BATCH)
    ]
    signatures = np.concatenate(blocks)[:, : bands * rows].reshape(-1, bands, rows)
    # A band's number is part of its key: equal rows of two bands mean nothing.
    keys = np.broadcast_to(np.arange(bands, dtype=np.uint64), signatures.shape[:2])
    for row in range(rows):
        keys = _mix(keys * np.uint64(_ODD) + signatures[:, :, row].astype(np.uint64))
    return (keys >> np.uint64(64 - KEY_BITS)).astype(np.int64)


_ODD = 0x9E3779B97F4A7C15


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Scatter 64-bit integers (the finaliser of SplitMix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _signatures(texts: Sequence[str]) -> np.ndarray:
    """MinHash: the least hash of a text's shingles, for each of the hash functions.

    Returns:
        uint32 [texts, functions].
    """
    hashes: list[int] = []
    starts: list[int] = []
    places: list[int] = []
    for text in texts:
        words = [zlib.crc32(word) for word in text.encode().split()]
        count = max(len(words) - SHINGLE_WORDS, 0) + 1
        starts.append(len(places))
        places += range(len(hashes), len(hashes) + count)
        hashes += words + [0] * (SHINGLE_WORDS - len(words))
    words_of_all = np.array(hashes, np.uint64)
    at = np.array(places)
    found = np.zeros(len(at), np.uint64)
    for word in range(SHINGLE_WORDS):
        found = _mix(found * np.uint64(_ODD) + words_of_all[at + word])
    # Linear hash functions a * x + b modulo 2^32, a odd, of the well-scattered x. A row
    # per function: the minimum then runs over neighbours in memory.
    seeds = _mix(np.arange(1, 2 * PERMUTATIONS + 1, dtype=np.uint64)) >> np.uint64(32)
    factors, offsets = seeds.astype(np.uint32).reshape(2, PERMUTATIONS, 1)
    values = (factors | np.uint32(1)) * (found >> np.uint64(32)).astype(np.uint32)
    values += offsets
    return np.minimum.reduceat(values, starts, axis=1).T
