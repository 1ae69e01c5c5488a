"""Prompts in rows of one length: what several begin with is read once.

Prompts of a few-shot question differ in their passage alone, and questions about one
passage begin with it. A row holds several prompts, each a segment that may go on from a
beginning which stands in the row once (``models.attention.Layout``). So nothing is
padded but the ends of rows, and one shape serves prompts of all lengths.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from radit_jax import sharding
from radit_jax.batch import Array

# Lengths of rows: few, so that few programs are compiled.
BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
# Rows are at least this long, if there is enough to fill them: prompts fit better.
LONG_ROW = 512
# They are twice as long if that saves this share of what is read, because more prompts
# with one beginning fit into a row.
WORTH_LONGER = 0.1
# Tokens that a beginning has at least: bundles are harder to fit in than prompts.
LEAST_SHARED = 24
# Prompts of one beginning that stand together at most.
MOST_PROMPTS = 32
# Prompts that a row has places for, in terms of those that fill it on average.
SHORT_PROMPTS = 1.25
# Batches that units of several bundles may still go into.
OPEN_BATCHES = 4


class Bundle(NamedTuple):
    """Prompts with one beginning."""

    beginning: int  # tokens; 0 for a prompt alone
    places: list[int]  # of the prompts

    def size(self, prompts: Sequence[Sequence[int]]) -> int:
        """Tokens that are read."""
        own = sum(len(prompts[place]) - self.beginning for place in self.places)
        return self.beginning + own


class Shape(NamedTuple):
    """Of all batches of a call, but for the number of rows."""

    row_tokens: int
    prompts: int  # in a row at most
    rows: int  # at most; a multiple of the row shards


class PromptRows(NamedTuple):
    """A batch of packed prompts; numpy on the host, jax on the mesh.

    A prompt has a segment of its own, even if the whole of it is the beginning of
    others: what it is continued with stands in it.
    """

    tokens_BL: Array  # int32
    segment_ids_BL: Array  # int32; 0 is padding
    positions_BL: Array  # int32, of a token in its prompt
    prefix_ids_BL: Array  # int32, segment that a token's own goes on from; 0: none
    owners_BQ: Array  # int32, place of each prompt of a row; -1: none
    sites_BQ: Array  # int32, where its last token stands
    lengths_BQ: Array  # int32, tokens of the prompt
    segments_BQ: Array  # int32, its own segment
    prefixes_BQ: Array  # int32, the segment it goes on from; 0: none


def bundles(prompts: Sequence[Sequence[int]], row_tokens: int) -> list[Bundle]:
    """Prompts in bundles that save the most tokens, among neighbours in sorted order.

    Args:
        prompts: token ids.
        row_tokens: the most that a bundle may take up.
    """
    order = sorted(range(len(prompts)), key=lambda place: tuple(prompts[place]))
    common = [_common(prompts[a], prompts[b]) for a, b in itertools.pairwise(order)]
    saved, starts = [0], [0]  # of the best bundles of the first n, and the last's start
    for end in range(1, len(order) + 1):
        best, start = saved[end - 1], end - 1
        beginning = total = len(prompts[order[end - 1]])
        for first in range(end - 2, max(end - MOST_PROMPTS, 0) - 1, -1):
            beginning = min(beginning, common[first])
            total += len(prompts[order[first]])
            saving = (end - first - 1) * beginning
            # With more prompts it takes up more, and less is common.
            if beginning < LEAST_SHARED or total - saving > row_tokens:
                break
            if saved[first] + saving > best:
                best, start = saved[first] + saving, first
        saved.append(best)
        starts.append(start)
    found = []
    end = len(order)
    while end:
        start = starts[end]
        beginning = min(common[start : end - 1], default=0)
        found.append(Bundle(beginning, order[start:end]))
        end = start
    return found


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))


def packing_for(
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    new: int,
    batch_tokens: int,
) -> tuple[Shape, list[list[Bundle]]]:
    """The shape of batches for these prompts, and what goes into them.

    Args:
        prompts: token ids; at least one.
        groups: places of prompts that must be in one batch, and share among themselves
            alone. No groups: all prompts are on their own, and any may share.
        new: tokens that each is continued with.
        batch_tokens: of a batch, new ones included; at least a row on each device.

    Returns:
        The shape, and units of bundles that must be in one batch.
    """
    longest, total = max(map(len, prompts)), sum(map(len, prompts))
    shards = sharding.row_shards()
    # Not longer than the budget, new tokens included, nor than there are tokens.
    share = total / (total + new * len(prompts))
    most = min(int(batch_tokens * share), total) // shards
    row_tokens = _bucket(max(longest, min(LONG_ROW, most)))
    units = _units(prompts, groups, row_tokens)
    while 2 * row_tokens <= most:
        longer = _units(prompts, groups, _bucket(2 * row_tokens))
        if _read(prompts, longer) > (1 - WORTH_LONGER) * _read(prompts, units):
            break
        row_tokens, units = _bucket(2 * row_tokens), longer
    bundled = [part for parts in units for part in parts]
    # More than fill a row on average, so that short ones find room.
    average = row_tokens * len(prompts) / _read(prompts, units)
    per_row = max(
        math.ceil(SHORT_PROMPTS * average),
        *(len(part.places) for part in bundled),
    )
    per_row = min(per_row, len(prompts))
    room = batch_tokens // (row_tokens + per_row * new) // shards * shards
    # At worst no bundle fits beside another.
    least = max(map(len, units))
    return Shape(row_tokens, per_row, max(room, -(-least // shards) * shards)), units


def _bucket(tokens: int) -> int:
    """The length of a row with room for so many tokens."""
    return next((bucket for bucket in BUCKETS if tokens <= bucket), tokens)


def _units(
    prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[int]], row_tokens: int
) -> list[list[Bundle]]:
    """Bundles that must be in one batch; without groups each is on its own."""
    if not groups:
        return [[part] for part in bundles(prompts, row_tokens)]
    return [
        [
            Bundle(part.beginning, [group[place] for place in part.places])
            for part in bundles([prompts[place] for place in group], row_tokens)
        ]
        for group in groups
    ]


def _read(prompts: Sequence[Sequence[int]], units: Sequence[Sequence[Bundle]]) -> int:
    """Tokens that are read in all."""
    return sum(part.size(prompts) for parts in units for part in parts)


class _Batches:
    """Rows that are being filled, batch after batch."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.tokens = np.zeros(0, np.int64)  # that are left of each row
        self.prompts = np.zeros(0, np.int64)  # the same
        self.rows: list[list[Bundle]] = []

    def add(self, parts: Sequence[Bundle], sizes: Sequence[int]) -> None:
        """Put bundles, given with their sizes, where they fit first; into one batch."""
        first = max(len(self.rows) - OPEN_BATCHES * self.shape.rows, 0)
        starts = range(first, len(self.rows), self.shape.rows)
        # A bundle alone may go anywhere.
        spans = (
            [(0, len(self.rows))]
            if len(parts) == 1
            else [(start, start + self.shape.rows) for start in starts]
        )
        for start, end in spans:
            if self._place(parts, sizes, start, end):
                return
        start, more = len(self.rows), self.shape.rows
        self.tokens = np.append(self.tokens, np.full(more, self.shape.row_tokens))
        self.prompts = np.append(self.prompts, np.full(more, self.shape.prompts))
        self.rows += [[] for _ in range(more)]
        placed = self._place(parts, sizes, start, start + more)
        assert placed, "a batch has room for every unit"

    def _place(
        self, parts: Sequence[Bundle], sizes: Sequence[int], start: int, end: int
    ) -> bool:
        """Put bundles into some of the rows, all of them or none."""
        tokens, prompts = self.tokens[start:end].copy(), self.prompts[start:end].copy()
        chosen = []
        for part, size in zip(parts, sizes, strict=True):
            fits = (tokens >= size) & (prompts >= len(part.places))
            if not fits.any():
                return False
            row = int(fits.argmax())
            tokens[row] -= size
            prompts[row] -= len(part.places)
            chosen.append(start + row)
        self.tokens[start:end], self.prompts[start:end] = tokens, prompts
        for row, part in zip(chosen, parts, strict=True):
            self.rows[row].append(part)
        return True


def pack(
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    new: int,
    batch_tokens: int,
) -> list[PromptRows]:
    """Batches of packed prompts; arguments as of ``packing_for``."""
    shape, units = packing_for(prompts, groups, new, batch_tokens)
    sized = [([part.size(prompts) for part in parts], parts) for parts in units]
    # Large ones first: what is left is filled with small ones.
    sized.sort(key=lambda unit: -sum(unit[0]))
    batches = _Batches(shape)
    for sizes, parts in sized:
        batches.add(parts, sizes)
    return [
        _filled(prompts, batches.rows[start : start + shape.rows], shape)
        for start in range(0, len(batches.rows), shape.rows)
    ]


def _filled(
    prompts: Sequence[Sequence[int]], packed: Sequence[Sequence[Bundle]], shape: Shape
) -> PromptRows:
    """The arrays of a batch; of one that is not full only a part of the rows, in coarse
    steps, so that few programs are compiled."""
    shards = sharding.row_shards()
    used, most = -(-sum(map(bool, packed)) // shards), shape.rows // shards
    while used <= most // 2:
        most //= 2
    step = -(-most // 4)
    rows = min(-(-used // step) * step, most) * shards
    tokens = np.zeros((rows, shape.row_tokens), np.int32)
    found = PromptRows(
        *(tokens, *np.zeros((3, *tokens.shape), np.int32)),
        *np.zeros((5, rows, shape.prompts), np.int32),
    )
    found.owners_BQ[:] = -1
    for row, parts in enumerate(packed[:rows]):
        end = segment = slot = 0
        for part in parts:
            prefix = 0
            start = end
            if part.beginning:
                segment += 1
                prefix = segment
                end = _write(
                    found, row, end, prompts[part.places[0]][: part.beginning], 0
                )
                found.segment_ids_BL[row, start:end] = prefix
            for place in part.places:
                segment += 1
                own = prompts[place][part.beginning :]
                begin, end = end, _write(found, row, end, own, part.beginning)
                found.segment_ids_BL[row, begin:end] = segment
                found.prefix_ids_BL[row, begin:end] = prefix
                found.owners_BQ[row, slot] = place
                found.sites_BQ[row, slot] = (
                    end - 1 if own else start + part.beginning - 1
                )
                found.lengths_BQ[row, slot] = len(prompts[place])
                found.segments_BQ[row, slot] = segment
                found.prefixes_BQ[row, slot] = prefix
                slot += 1
    return found


def _write(
    found: PromptRows, row: int, start: int, tokens: Sequence[int], position: int
) -> int:
    """Write tokens into a row, from a position on; where they end."""
    end = start + len(tokens)
    found.tokens_BL[row, start:end] = tokens
    found.positions_BL[row, start:end] = range(position, position + len(tokens))
    return end
