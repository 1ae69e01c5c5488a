"""Damaged records: counted and left out, up to a share that is acceptable."""

import logging

from radit_jax.data.jsonl import RecordError

log = logging.getLogger(__name__)

# So many damaged records are shown in the log, the others only counted.
SHOWN = 3
# The share is first looked at after so many records.
ENOUGH = 1000


class Damage:
    """Counts the records of a file or dataset, and the damaged ones among them.

    Args:
        field: of the config, that says how many may be damaged.
        most: its value, a share of the records.
    """

    def __init__(self, field: str, most: float):
        self.field = field
        self.most = most
        self.records = 0  # the damaged ones included
        self.damaged = 0

    def lost(self, error: RecordError) -> None:
        """Count a record that could not even be read; raises as ``note``."""
        self.records += 1
        self.note(error)

    def note(self, error: RecordError) -> None:
        """Leave out a record that was counted, or raise.

        Raises:
            ValueError: none may be damaged, or there are too many.
        """
        if not self.most:
            raise ValueError(
                f"{error}. To leave such records out, set {self.field} to the share of "
                "them that is acceptable"
            ) from error
        self.damaged += 1
        if self.damaged <= SHOWN:
            log.warning("left out: %s", error)
        if self.damaged > self.most * max(self.records, ENOUGH):
            raise self._too_many(error) from error

    def finish(self) -> None:
        """Judge the share of damaged records once all are counted.

        Raises:
            ValueError: it is too large.
        """
        if self.damaged > self.most * self.records:
            raise self._too_many()
        if self.damaged:
            log.warning("left out %d damaged of %d records", self.damaged, self.records)

    def _too_many(self, last: RecordError | None = None) -> ValueError:
        example = f", such as {last}" if last else ""
        return ValueError(
            f"{self.damaged} of {self.records} records are damaged, more than the "
            f"share of {self.most} that {self.field} allows{example}"
        )
