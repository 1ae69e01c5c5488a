"""Batches that count what they are made of."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np


class Counted(NamedTuple):
    """A batch, and what it is made of."""

    batch: Any
    counts: np.ndarray  # int64 [..., datasets, columns]; summed over the leading axes


class CountingBatches(grain.DatasetIterator):
    """Batches without end that count, by dataset, what they are made of.

    Position and counts are saved and restored together, so that the counts of a run
    that was stopped are those of one that was not.

    Args:
        start: begins to read.
        names: of the datasets.
        columns: what is counted.
    """

    def __init__(
        self,
        start: Callable[[], grain.DatasetIterator[Counted]],
        names: Sequence[str],
        columns: Sequence[str],
    ):
        super().__init__()
        self.names = tuple(names)
        self.columns = tuple(columns)
        self.counts = np.zeros((len(self.names), len(self.columns)), np.int64)
        self._batches = start()

    def __next__(self) -> Any:
        """The next batch, numpy."""
        batch, counts = next(self._batches)
        self.counts += counts.reshape(-1, *self.counts.shape).sum(axis=0)
        return batch

    def get_state(self) -> dict:
        """The position and the counts, JSON-serialisable."""
        return {
            "position": self._batches.get_state(),
            "counts": self.counts.tolist(),
        }

    def set_state(self, state: dict) -> None:
        """Go to a position, and count on from there."""
        self._batches.set_state(state["position"])
        self.counts = np.asarray(state["counts"], np.int64)

    def restart(self, start: Callable[[], grain.DatasetIterator[Counted]]) -> None:
        """Go on at the same position of another reading of the same examples."""
        position = self._batches.get_state()
        self._batches.close()
        self._batches = start()
        self._batches.set_state(position)

    def close(self) -> None:
        """Stop reading ahead."""
        self._batches.close()
        super().close()


def report(
    names: Sequence[str], columns: Sequence[str], counts: np.ndarray
) -> dict[str, dict[str, int | float]]:
    """Dataset -> its counts, and its share of the examples.

    Args:
        names: of the datasets.
        columns: what was counted; the first one is the number of examples.
        counts: int64 [datasets, columns].
    """
    total = max(int(counts[:, 0].sum()), 1)
    return {
        name: {**dict(zip(columns, row, strict=True)), "share": row[0] / total}
        for name, row in zip(names, counts.tolist(), strict=True)
    }
