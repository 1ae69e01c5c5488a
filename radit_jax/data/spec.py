"""What is known of a published dataset: where it is, how it reads, how it is used."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from radit_jax.batch import Example
from radit_jax.data.jsonl import Row

# From one record to its examples: none where it is to be left out, several where it
# holds several questions. ``Row.error`` is raised for one that is not as published.
Read = Callable[[Row], Sequence[Example]]
# From all records of a split to those that ``Read`` takes, where one example is spread
# over several of them.
Gather = Callable[[Iterator[Row]], Iterator[Row]]

# What a dataset's given context is for in LM-FT (RA-DIT footnote 4): nothing, instead
# of retrieval, or besides it.
CONTEXT_ROLES = ("none", "only", "add")


class Spec(NamedTuple):
    """A published dataset."""

    name: str  # as RA-DIT's tables have it, in lower case
    category: str  # of RA-DIT Table 1, or the benchmark an evaluation set is part of
    read: Read
    hub: str  # "OWNER/NAME" on the Hugging Face hub; "" where it is not there
    # "train", "dev", "test" -> the split as published; one that is absent has none.
    splits: Mapping[str, str]
    columns: tuple[str, ...]  # top-level fields of a record that ``read`` needs
    licence: str  # as published
    template: str = "qa"  # of its examples, see data.prompts
    config: str = ""  # of the hub dataset, where it has several
    tfds: str = ""  # "NAME" or "NAME/CONFIG" in TensorFlow Datasets; "": not there
    context: str = "none"  # one of CONTEXT_ROLES
    used: str = ""  # "L" in LM-FT, "R" in R-FT, "LR" in both, "E" in evaluation
    size: int = 0  # training examples (RA-DIT Table 1); of "E": those of the test
    search: bool = True  # whether passages are retrieved for it
    gather: Gather | None = None
    note: str = ""  # what was chosen where the paper is silent
