"""What a report is made of: generations, values per question, rows and differences.

A metric of answers or of retrieval has one value per question (``Values``), one row of
a table (``Row``), and between two systems one ``Difference``.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from radit_jax.evaluation.metrics import bootstrap_interval, paired_difference


class Row(NamedTuple):
    """One number of the report."""

    system: str
    dataset: str
    metric: str  # "em", "f1", "answer@5", "gold@1", "mrr", ...
    value: float  # mean over the questions, in [0, 1]
    n: int  # questions
    lo: float  # 95 % interval
    hi: float


class Values(NamedTuple):
    """One metric of a system for every question of a dataset."""

    system: str
    dataset: str
    metric: str
    values_N: np.ndarray
    groups_N: np.ndarray | None = None  # questions that are resampled as a whole
    questions: tuple[str, ...] = ()  # their ids


class Difference(NamedTuple):
    """By how much one system beats another on the same questions."""

    dataset: str
    first: str
    second: str
    metric: str
    value: float  # second - first
    n: int
    lo: float  # 95 % interval, paired bootstrap
    hi: float
    p_value: float  # two-sided, of a sign-flip permutation test


class SourcePassage(NamedTuple):
    """A passage a system was given."""

    id: int
    title: str
    section: str
    text: str
    weight: float | None = None  # in the ensemble; None when there was none
    answer: str | None = None  # what the system says from this passage alone
    log_probability: float | None = None  # of that answer, nats
    prompt: str = ""  # exactly what the model read, special tokens shown

    @property
    def heading(self) -> str:
        """Title and section."""
        return f"{self.title}: {self.section}" if self.section else self.title


class Generation(NamedTuple):
    """What one system answered to one question."""

    system: str
    dataset: str
    question_id: str
    kind: str  # kind of question, "" when unknown
    question: str
    answers: tuple[str, ...]  # the gold answers
    prediction: str
    passages: tuple[SourcePassage, ...]  # best first; empty for a closed-book system
    metrics: Mapping[str, float]  # each in [0, 1]; the first is the task's own
    group: str = ""  # what the question is about; groups are resampled as a whole
    prompt: str = ""  # of a system that reads no passage
    confidence: float | None = None  # share of the ensemble's probability behind it
    choices: tuple[str, ...] = ()  # options of a multiple-choice question
    choice_scores: tuple[float, ...] = ()  # of the options; the highest is predicted

    @property
    def metric(self) -> str:
        """Name of the task's own metric."""
        return next(iter(self.metrics))

    @property
    def value(self) -> float:
        """The task's own metric."""
        return float(self.metrics[self.metric])


class Picture(NamedTuple):
    """A PNG file of the report."""

    title: str
    file: str  # from the report's folder


# Metrics of which a value between 0 and 1 says more than right or wrong.
GRADED = ("f1", "rouge_l")


def mark(metric: str, value: float) -> str:
    """A sign for right or wrong; of a graded metric the value."""
    if metric in GRADED:
        return f"{value:.2f}"
    return "✓" if value == 1 else "✗"


def unique(items: Iterable[str]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(items))


def is_retrieval(metric: str) -> bool:
    """Whether a metric is of retrieved passages; the others are of answers."""
    return metric == "mrr" or metric.startswith(("answer@", "gold@"))


def own_metrics(rows: Sequence[Row]) -> dict[str, str]:
    """Dataset -> the metric of its task, which is the first of its answer metrics."""
    found: dict[str, str] = {}
    for row in rows:
        if not is_retrieval(row.metric):
            found.setdefault(row.dataset, row.metric)
    return found


def measure(values: Values, seed: int, resamples: int = 10_000) -> Row:
    """The row of a metric, from its value for every question.

    Args:
        values: of a system on a dataset.
        seed: of the interval.
        resamples: of the interval.

    Raises:
        ValueError: as ``metrics.bootstrap_interval``.
    """
    values_N = values.values_N
    lo, hi = bootstrap_interval(values_N, seed, resamples, values.groups_N)
    mean = float(values_N.mean(dtype=np.float64))
    return Row(*values[:3], mean, len(values_N), lo, hi)


def by_system(
    generations: Iterable[Generation],
) -> dict[tuple[str, str], list[Generation]]:
    """(dataset, system) -> its generations in the order of question ids, so that
    systems can be paired. Datasets and systems stand in their order."""
    found: dict[tuple[str, str], list[Generation]] = {}
    for g in generations:
        found.setdefault((g.dataset, g.system), []).append(g)
    datasets, systems = unique(d for d, _ in found), unique(s for _, s in found)
    keys = [(d, s) for d in datasets for s in systems if (d, s) in found]
    return {key: sorted(found[key], key=lambda g: g.question_id) for key in keys}


def values_of(
    generations: Sequence[Generation], metric: str, values: Sequence[float]
) -> Values:
    """Values of one system on one dataset.

    Args:
        generations: of the system on the dataset.
        metric: what was measured.
        values: of every generation.
    """
    labels = [g.group for g in generations]
    return Values(
        generations[0].system,
        generations[0].dataset,
        metric,
        np.array(values, np.float64),
        np.array(labels) if all(labels) else None,
        tuple(g.question_id for g in generations),
    )


def answer_values(generations: Sequence[Generation]) -> list[Values]:
    """Every system on every dataset of the generations, by the dataset's own metrics.

    Raises:
        ValueError: generations of a dataset that differ in their metrics.
    """
    check_metrics(generations)
    return [
        values_of(ours, metric, [g.metrics[metric] for g in ours])
        for ours in by_system(generations).values()
        for metric in ours[0].metrics
    ]


def check_metrics(generations: Iterable[Generation]) -> None:
    """That generations of one dataset have one list of metrics.

    Raises:
        ValueError: naming the system and the question that has others.
    """
    wanted: dict[str, list[str]] = {}
    for g in generations:
        ours = list(g.metrics)
        if not ours:
            raise ValueError(f"{name_of(g)} has no metric")
        first = wanted.setdefault(g.dataset, ours)
        if ours != first:
            raise ValueError(
                f"{name_of(g)} has metrics {', '.join(ours)}, others of its dataset "
                f"have {', '.join(first)}; expected the same in the same order"
            )


def name_of(generation: Generation) -> str:
    """For errors."""
    g = generation
    return f"{g.system} on question {g.question_id!r} of {g.dataset}"


def compare(
    values: Sequence[Values], pairs: Sequence[tuple[str, str]], seed: int
) -> list[Difference]:
    """(first, second) systems question by question, on every metric of the datasets
    that both answered.

    Raises:
        ValueError: a pair names a system that has no values, or the two have no dataset
            in common, or on one values for different questions or metrics.
    """
    of_system: dict[str, dict[tuple[str, str], Values]] = {}
    for found in values:
        of_system.setdefault(found.system, {})[found.dataset, found.metric] = found
    differences = []
    for first, second in pairs:
        for name in (first, second):
            if name not in of_system:
                raise ValueError(
                    f"cannot compare {name!r}: it has no values; systems that have are "
                    f"{sorted(of_system)}"
                )
        ours, theirs = of_system[first], of_system[second]
        shared = {d for d, _ in ours} & {d for d, _ in theirs}
        if not shared:
            raise ValueError(
                f"cannot pair {first!r} with {second!r}: no common dataset"
            )
        ours, theirs = (
            {key: found for key, found in each.items() if key[0] in shared}
            for each in (ours, theirs)
        )
        if ours.keys() != theirs.keys():
            odd = min(ours.keys() ^ theirs.keys())
            raise ValueError(
                f"cannot pair {first!r} with {second!r}: only one of them has "
                f"{odd[1]} on {odd[0]}"
            )
        for (dataset, metric), mine in ours.items():
            other = theirs[dataset, metric]
            if mine.questions != other.questions:
                odd_ones = {*mine.questions} ^ {*other.questions}
                raise ValueError(
                    f"cannot pair {first!r} with {second!r}: only one of them answered "
                    f"question {min(odd_ones)!r} of {dataset}"
                )
            gain = paired_difference(
                mine.values_N,
                other.values_N,
                seed,
                groups_N=mine.groups_N,
            )
            differences.append(
                Difference(
                    *(dataset, first, second, metric, gain.value, gain.n),
                    *(gain.lo, gain.hi, gain.p_value),
                )
            )
    return differences
