"""Batches for R-FT: questions, their candidate passages, and targets.

numpy only, like the rest of this room. Embeddings are gathered row by row from the
memory-mapped index, in the threads that read ahead: no more of it is ever in memory
than the batches at hand.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np

from radit_jax.batch import Candidates, Passage


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


# From ids [C] (none of them -1) to the fields of Candidates that hold the passages.
Gather = Callable[[np.ndarray], Mapping[str, np.ndarray]]


def gather_embeddings(embeddings: Embeddings) -> Gather:
    """Passages as rows of the index, never encoded again."""
    return lambda ids_C: {"passages_BCE": embeddings[ids_C]}


def gather_tokens(
    passages: Passages, tokenize: Callable[[list[str]], list[list[int]]], length: int
) -> Gather:
    """Passages as tokens for a context encoder that trains.

    Args:
        passages: the corpus.
        tokenize: of the context encoder, at most ``length`` tokens.
        length: L of a passage.
    """

    def gather(ids_C: np.ndarray) -> Mapping[str, np.ndarray]:
        rows = tokenize([passage.display for passage in passages.get(ids_C)])
        filled = [_fill(row, length) for row in rows]
        tokens, masks = zip(*filled, strict=True)
        return {
            "passage_tokens_BCL": np.stack(tokens),
            "passage_mask_BCL": np.stack(masks),
        }

    return gather


def _fill(tokens: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens filled up to a length, and which of them are real."""
    tokens_L = np.zeros(length, np.int32)
    tokens_L[: len(tokens)] = tokens
    return tokens_L, np.arange(length) < len(tokens)


class Questions(NamedTuple):
    """What R-FT learns from, one row per question."""

    tokens: Sequence[Sequence[int]]  # for the query encoder
    ids: np.ndarray  # int64 [questions, C], candidate passages; -1: none
    log_targets: np.ndarray  # float32 [questions, C], log p_LSR
    # float32 [tokens of its answer, C] of each question, where the loss asks for it.
    token_log_p: Sequence[np.ndarray] | None = None


class _Row:
    """One question as arrays of fixed shape."""

    def __init__(self, questions: Questions, gather: Gather, length: int, longest: int):
        self.questions = questions
        self.gather = gather
        self.length = length
        self.longest = longest

    def __call__(self, i: int) -> Candidates:
        i = int(i)
        tokens_L, mask_L = _fill(self.questions.tokens[i], self.length)
        ids_C = self.questions.ids[i]
        token_log_p_TC = None
        if self.questions.token_log_p is not None:
            found = np.where(ids_C >= 0, self.questions.token_log_p[i], 0.0)
            missing = self.longest - len(found)
            token_log_p_TC = np.pad(found, ((0, missing), (0, 0))).astype(np.float32)
        return Candidates(
            tokens_L,
            mask_L,
            ids_C.astype(np.int32),
            self.questions.log_targets[i],
            token_log_p_BTC=token_log_p_TC,
            **self.gather(np.maximum(ids_C, 0)),
        )


class CandidateBatches:
    """Batches without end, reshuffled each time the questions are exhausted.

    The position is Grain's own and survives ``replace``, which puts other candidates
    and targets in the place of the same questions.

    Args:
        parts: questions, and the share of each part in the mixture.
        gather: see ``Gather``.
        rows: questions per batch, all processes together.
        length: L, tokens of the longest question.
        seed: of the order.
        process: which of ``processes`` this is; each sees its own questions.
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

        def start(
            parts: Sequence[tuple[Questions, float]],
        ) -> grain.DatasetIterator[Candidates]:
            longest = max(
                (len(rows) for q, _ in parts for rows in q.token_log_p or ()), default=0
            )
            sources = [
                grain.MapDataset.range(len(questions.tokens))
                .shuffle(seed=seed + at)
                .repeat(reseed_each_epoch=True)
                .map(_Row(questions, gather, length, longest))
                for at, (questions, _) in enumerate(parts)
            ]
            shares = [share for _, share in parts]
            mixed = grain.MapDataset.mix(sources, shares)[process::processes]
            batched = mixed.batch(rows // processes)
            options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
            return iter(batched.to_iter_dataset(options))

        self._start = start
        self._batches = start(parts)

    def replace(self, parts: Sequence[tuple[Questions, float]]) -> None:
        """Go on at the same position with other candidates for the same questions."""
        position = self._batches.get_state()
        self._batches.close()
        self._batches = self._start(parts)
        self._batches.set_state(position)

    def __next__(self) -> Candidates:
        """The next batch, numpy."""
        return next(self._batches)

    def get_state(self) -> dict:
        """The position, JSON-serialisable."""
        return self._batches.get_state()

    def set_state(self, state: dict) -> None:
        """Go to a position."""
        self._batches.set_state(state)

    # As Orbax saves and restores it: a Grain iterator's own way.

    async def save(self, directory: Any) -> Any:
        """See ``orbax.checkpoint.v1.handlers.StatefulCheckpointable``."""
        return await self._batches.save(directory)

    async def load(self, directory: Any) -> Any:
        """See ``orbax.checkpoint.v1.handlers.StatefulCheckpointable``."""
        return await self._batches.load(directory)

    def close(self) -> None:
        """Stop reading ahead."""
        self._batches.close()
