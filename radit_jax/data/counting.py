"""Batches that count what they are made of."""

from collections.abc import Callable, Mapping, Sequence
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

    _reading = False  # whether there is something to close

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
        self._reading = True

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

    def counted(self, state: Mapping[str, Any]) -> np.ndarray:
        """The counts in a state of all processes together."""
        return np.asarray(state["counts"], np.int64)

    def close(self) -> None:
        """Stop reading ahead.

        Grain asks for it when it forgets an iterator, even one that never began.
        """
        if self._reading:
            self._reading = False
            self._batches.close()
            super().close()


class Streams:
    """Batches whose rows come from several streams, each read and packed by itself.

    The streams are the same however many processes share them, and a batch has the same
    number of rows of each, so that a run may go on with another number of processes.

    Args:
        streams: by number, those of this process.
        axis: of the rows in a batch's arrays.
    """

    def __init__(self, streams: Mapping[int, CountingBatches], axis: int):
        self._streams = dict(sorted(streams.items()))
        self._axis = axis
        some = next(iter(self._streams.values()))
        self.names, self.columns = some.names, some.columns

    def __next__(self) -> Any:
        """The next batch of this process: the rows of one stream after the other's."""
        parts = [next(stream) for stream in self._streams.values()]
        arrays = zip(*parts, strict=True)
        return type(parts[0])(*(np.concatenate(a, self._axis) for a in arrays))

    def get_state(self) -> dict[str, Any]:
        """Position and counts of each stream of this process, by its number."""
        return {str(i): stream.get_state() for i, stream in self._streams.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go to a position, given the streams of all processes.

        Raises:
            ValueError: it was that of another number of streams.
        """
        for i, stream in self._streams.items():
            if str(i) not in state:
                raise ValueError(
                    f"the position in the data is that of {len(state)} streams, and "
                    f"stream {i} is not among them"
                )
            stream.set_state(state[str(i)])

    def counted(self, state: Mapping[str, Any]) -> np.ndarray:
        """The counts in a state of all processes together, of all streams."""
        some = next(iter(self._streams.values()))
        return np.sum([some.counted(one) for one in state.values()], axis=0)

    def close(self) -> None:
        """Stop reading ahead."""
        for stream in self._streams.values():
            stream.close()


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
