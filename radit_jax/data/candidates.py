"""Batches for R-FT: questions, their candidate passages as embeddings, and targets.

numpy only, like the rest of this room. Embeddings are gathered row by row from the
memory-mapped index, so that memory does not grow with the corpus.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np

from radit_jax.batch import Candidates


@runtime_checkable
class Embeddings(Protocol):
    """Passage embeddings by id."""

    def __getitem__(self, ids: np.ndarray, /) -> np.ndarray:
        """Rows [*ids.shape, E], float32."""
        ...


class Questions(NamedTuple):
    """What R-FT learns from, one row per question."""

    tokens: Sequence[Sequence[int]]  # for the query encoder
    ids: np.ndarray  # int64 [questions, C], candidate passages; -1: none
    log_targets: np.ndarray  # float32 [questions, C], log p_LSR


class _Gather:
    """One question as arrays of fixed shape."""

    def __init__(self, questions: Questions, embeddings: Embeddings, length: int):
        self.questions = questions
        self.embeddings = embeddings
        self.length = length

    def __call__(self, i: int) -> Candidates:
        tokens = self.questions.tokens[int(i)]
        tokens_L = np.zeros(self.length, np.int32)
        tokens_L[: len(tokens)] = tokens
        mask_L = np.arange(self.length) < len(tokens)
        ids_C = self.questions.ids[int(i)]
        passages_CE = self.embeddings[np.maximum(ids_C, 0)]
        return Candidates(tokens_L, mask_L, passages_CE, self.questions.log_targets[i])


def candidate_batches(
    questions: Questions,
    embeddings: Embeddings,
    rows: int,
    length: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
) -> grain.DatasetIterator[Candidates]:
    """Batches without end, reshuffled each time the questions are exhausted.

    Args:
        questions: at least ``rows`` of them.
        embeddings: of the passages.
        rows: questions per batch, all processes together.
        length: L, tokens of the longest question.
        seed: of the order.
        process: which of ``processes`` this is; each sees its own questions.
        processes: that share a batch.

    Raises:
        ValueError: rows do not divide over the processes, or are more than there are
            questions.
    """
    if rows % processes:
        raise ValueError(
            f"r_ft.rows = {rows} does not divide over {processes} processes"
        )
    if rows > len(questions.tokens):
        raise ValueError(
            f"r_ft.rows = {rows} is more than the {len(questions.tokens)} training "
            "questions that have scores"
        )
    dataset = (
        grain.MapDataset.range(len(questions.tokens))
        .shuffle(seed=seed)
        .repeat(reseed_each_epoch=True)[process::processes]
        .map(_Gather(questions, embeddings, length))
        .batch(rows // processes)
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
    )
    return iter(dataset)
