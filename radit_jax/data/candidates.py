"""Batches for R-FT: questions, their candidate passages, and targets.

numpy only, like the rest of this room. Embeddings are read row by row from the index,
in the threads that read ahead: no more of it is ever in memory than the batches at
hand.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np

from radit_jax.batch import Candidates, Passage
from radit_jax.data.counting import Counted, CountingBatches

# What is counted of the questions a run reads, in this order.
SEEN = ("examples", "tokens")
UNNAMED = "questions"  # of a part whose questions name no dataset


@runtime_checkable
class Embeddings(Protocol):
    """Passage embeddings by id."""

    def __getitem__(self, ids: np.ndarray, /) -> np.ndarray:
        """Rows [*ids.shape, E], float32."""
        ...


@runtime_checkable
class Passages(Protocol):
    """Passages by id."""

    def get(self, ids: np.ndarray) -> list[Passage]:
        """One for each id."""
        ...


# From ids [B, C] (none of them -1) to the fields of Candidates that hold the passages.
Gather = Callable[[np.ndarray], Mapping[str, np.ndarray]]


def gather_embeddings(embeddings: Embeddings) -> Gather:
    """Passages as rows of the index, never encoded again."""
    return lambda ids_BC: {"passages_BCE": embeddings[ids_BC]}


def gather_tokens(
    passages: Passages, tokenize: Callable[[list[str]], list[list[int]]], length: int
) -> Gather:
    """Passages as tokens for a context encoder that trains.

    Args:
        passages: the corpus.
        tokenize: of the context encoder, at most ``length`` tokens.
        length: L of a passage.
    """

    def gather(ids_BC: np.ndarray) -> Mapping[str, np.ndarray]:
        texts = [passage.display for passage in passages.get(ids_BC.ravel())]
        tokens_NL, mask_NL = _fill(tokenize(texts), length)
        shape = (*ids_BC.shape, length)
        return {
            "passage_tokens_BCL": tokens_NL.reshape(shape),
            "passage_mask_BCL": mask_NL.reshape(shape),
        }

    return gather


def _fill(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens filled up to a length, and which of them are real; [rows, length]."""
    tokens_BL = np.zeros((len(rows), length), np.int32)
    sizes_B1 = np.array([[len(row)] for row in rows])
    for tokens_L, row in zip(tokens_BL, rows, strict=True):
        tokens_L[: len(row)] = row
    return tokens_BL, np.arange(length) < sizes_B1


class Questions(NamedTuple):
    """What R-FT learns from, one row per question."""

    tokens: Sequence[Sequence[int]]  # for the query encoder
    ids: np.ndarray  # int64 [questions, C], candidate passages; -1: none
    log_targets: np.ndarray  # float32 [questions, C], log p_LSR
    # float32 [tokens of its answer, C] of each question, where the loss asks for it.
    token_log_p: Sequence[np.ndarray] | None = None
    datasets: Sequence[str] = ()  # name of each question's, for the count


class _Batch:
    """Questions as arrays: their part of the mixture and place in it, [rows, 2]."""

    def __init__(
        self,
        parts: Sequence[Questions],
        gather: Gather,
        length: int,
        process: int,
        processes: int,
        names: Sequence[str],
    ):
        self.numbers = {name: number for number, name in enumerate(names)}
        self.parts = parts
        self.gather = gather
        self.length = length
        self.process = process
        self.processes = processes
        self.longest = max(
            (len(rows) for part in parts for rows in part.token_log_p or ()), default=0
        )

    def __call__(self, places: np.ndarray) -> Counted:
        # The length is that of all processes' rows: they run one program together.
        rows = [(self.parts[part], i) for part, i in places.tolist()]
        size = max(len(part.tokens[i]) for part, i in rows)
        size_of_part = len(rows) // self.processes
        start = self.process * size_of_part
        mine = rows[start : start + size_of_part]
        tokens_BL, mask_BL = _fill(
            [part.tokens[i] for part, i in mine], min(_rounded(size), self.length)
        )
        ids_BC = np.stack([part.ids[i] for part, i in mine])
        seen_NS = np.zeros((len(self.numbers), len(SEEN)), np.int64)
        # Counted of all processes' rows: the position is that of them all.
        for part, i in rows:
            number = self.numbers[part.datasets[i] if part.datasets else UNNAMED]
            seen_NS[number] += 1, len(part.tokens[i])
        batch = Candidates(
            tokens_BL,
            mask_BL,
            ids_BC.astype(np.int32),
            np.stack([part.log_targets[i] for part, i in mine]),
            token_log_p_BTC=self._token_log_p(mine, ids_BC),
            **self.gather(np.maximum(ids_BC, 0)),
        )
        return Counted(batch, seen_NS)

    def _token_log_p(
        self, rows: Sequence[tuple[Questions, int]], ids_BC: np.ndarray
    ) -> np.ndarray | None:
        if not self.longest:
            return None
        shape = (len(rows), self.longest, ids_BC.shape[1])
        found_BTC = np.zeros(shape, np.float32)
        for found_TC, (part, i) in zip(found_BTC, rows, strict=True):
            assert part.token_log_p is not None
            found_TC[: len(part.token_log_p[i])] = part.token_log_p[i]
        return np.where(ids_BC[:, None] >= 0, found_BTC, 0.0)


def _place(part: int, i: int) -> np.ndarray:
    """Of a question: its part of the mixture, and which it is there."""
    return np.array([part, i])


def _rounded(size: int) -> int:
    """The next multiple of 8: few shapes to compile, little padding."""
    return -(-size // 8) * 8


class CandidateBatches(CountingBatches):
    """Batches without end, reshuffled each time the questions are exhausted.

    The position is Grain's own and survives ``replace``, which puts other candidates
    and targets in the place of the same questions.

    Args:
        parts: questions, and the share of each part in the mixture.
        gather: see ``Gather``.
        rows: questions per batch, all processes together.
        length: the most tokens of a question; a batch is as long as its longest.
        seed: of the order.
        process: which of ``processes`` this is; each has its own rows of a batch, one
            after the other, and the order of questions does not depend on how many
            there are.
        processes: that share a batch.

    Raises:
        ValueError: rows do not divide over the processes, or are more than there are
            questions.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Questions, float]],
        gather: Gather,
        rows: int,
        length: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ):
        count = sum(len(questions.tokens) for questions, _ in parts)
        if rows % processes:
            raise ValueError(
                f"r_ft.rows = {rows} does not divide over {processes} processes"
            )
        if rows > count:
            raise ValueError(
                f"r_ft.rows = {rows} is more than the {count} training questions that "
                "have scores"
            )

        names = dict.fromkeys(
            name
            for questions, _ in parts
            for name in (questions.datasets or (UNNAMED,))
        )

        def start(
            parts: Sequence[tuple[Questions, float]],
        ) -> grain.DatasetIterator[Counted]:
            sources = [
                grain.MapDataset.range(len(questions.tokens))
                .shuffle(seed=seed + at)
                .repeat(reseed_each_epoch=True)
                .map(functools.partial(_place, at))
                for at, (questions, _) in enumerate(parts)
            ]
            mixed = grain.MapDataset.mix(sources, [share for _, share in parts])
            fill = _Batch(
                [questions for questions, _ in parts],
                gather,
                length,
                process,
                processes,
                tuple(names),
            )
            options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
            return iter(mixed.batch(rows).map(fill).to_iter_dataset(options))

        self._start = start
        super().__init__(functools.partial(start, parts), tuple(names), SEEN)

    def replace(self, parts: Sequence[tuple[Questions, float]]) -> None:
        """Go on at the same position with other candidates for the same questions."""
        self.restart(functools.partial(self._start, parts))
