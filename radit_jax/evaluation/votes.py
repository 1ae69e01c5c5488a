"""What the ensemble would have said with fewer passages."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from radit_jax.evaluation.metrics import METRICS, normalise
from radit_jax.evaluation.records import (
    Generation,
    Row,
    by_system,
    measure,
    unique,
    values_of,
)

# RA-DIT Table 4; the curve has more points.
TABLE_DEPTHS = (1, 3, 10)
CURVE_DEPTHS = (*range(1, 11), 15, 20, 30, 50, 100)
# Of intervals of which there are many: systems times datasets times depths.
RESAMPLES = 1000


class Voted(Protocol):
    """An answer that passages voted for."""

    @property
    def text(self) -> str:
        """The answer."""


# Answers of passages, their log-probabilities and weights, and what makes two answers
# one -> answers, best first. See ``radit_jax.inference.ensemble.vote``.
Vote = Callable[
    [Sequence[str], Sequence[float], Sequence[float], Callable[[str], str]],
    Sequence[Voted],
]


class DepthRow(NamedTuple):
    """A row for the first passages of a system."""

    passages: int
    row: Row


class Revoted(NamedTuple):
    """Rows by number of passages, and what has none."""

    rows: list[DepthRow]
    left_out: list[tuple[str, str]]  # (dataset, system), where it would mislead
    without: list[str]  # systems that read no passage


def vote_first(generation: Generation, passages: int, vote: Vote) -> str | None:
    """What the first passages of a system say together; weights are made to sum to 1.

    Args:
        generation: with answer, log-probability and weight of every passage.
        passages: how many, or all there are if these are fewer.
        vote: see ``Vote``.

    Returns:
        The answer; None where a passage's answer, log-probability or weight is unknown.
    """
    texts, log_probabilities, weights = [], [], []
    for passage in generation.passages[:passages]:
        known = (passage.answer, passage.log_probability, passage.weight)
        if known[0] is None or known[1] is None or known[2] is None:
            return None
        texts.append(known[0])
        log_probabilities.append(known[1])
        weights.append(known[2])
    if not texts or sum(weights) <= 0:
        return None
    if len(texts) < len(generation.passages):
        # Not where all vote: rounding must not decide what was a tie.
        weights = [weight / sum(weights) for weight in weights]
    return vote(texts, log_probabilities, weights, normalise)[0].text


def revote(generations: Sequence[Generation], vote: Vote, seed: int) -> Revoted:
    """Every system that reads several passages, by how many of them vote.

    A system whose own prediction is not what all its passages vote for (it chose
    among options, or mixed its passages another way) is left out: fewer of them would
    show another system.

    Args:
        generations: of all systems.
        vote: the ensemble's rule.
        seed: of the intervals.
    """
    rows: list[DepthRow] = []
    left_out = []
    for (dataset, system), ours in by_system(generations).items():
        most = max(len(g.passages) for g in ours)
        if most < 2:
            continue
        metric = ours[0].metric
        voted = all(vote_first(g, most, vote) == g.prediction for g in ours)
        if not voted or metric not in METRICS or any(g.choices for g in ours):
            left_out.append((dataset, system))
            continue
        depths = [*(depth for depth in CURVE_DEPTHS if depth < most), most]
        values_ND = [_values(g, depths, vote) for g in ours]
        for depth, values in zip(depths, zip(*values_ND, strict=True), strict=True):
            row = measure(values_of(ours, metric, values), seed, RESAMPLES)
            rows.append(DepthRow(depth, row))
    reading = {g.system for g in generations if g.passages}
    without = [s for s in unique(g.system for g in generations) if s not in reading]
    return Revoted(rows, left_out, without)


def _values(generation: Generation, depths: Sequence[int], vote: Vote) -> list[float]:
    """The task's own metric by number of passages."""
    known: dict[str, float] = {}
    found = []
    for depth in depths:
        said = vote_first(generation, depth, vote)
        assert said is not None  # all of them together had an answer
        # Mostly it is what one passage fewer said, and some metrics are slow.
        if said not in known:
            known[said] = METRICS[generation.metric](said, generation.answers)
        found.append(known[said])
    return found
