"""Whether the ensemble is as often right as it is sure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from radit_jax.evaluation.records import Generation, by_system

BINS = 10


class Bin(NamedTuple):
    """Answers of about one confidence."""

    n: int
    confidence: float  # mean
    correct: float  # share
    lo: float  # 95 % interval of the share (Wilson)
    hi: float


class Calibration(NamedTuple):
    """How well a system's confidence foretells that it is right."""

    system: str
    dataset: str  # "": all
    n: int
    confidence: float  # mean
    correct: float  # share
    error: float  # expected calibration error
    bins: tuple[Bin, ...]  # those that are not empty, by confidence


def calibration(
    system: str,
    dataset: str,
    confidences_N: Float[np.ndarray, "N"],
    correct_N: Float[np.ndarray, "N"],
) -> Calibration:
    """Confidence in BINS bins of equal width against the share that is right.

    The expected calibration error is the mean distance of the two over the bins,
    weighted by the number of answers in each.

    Args:
        system: whose answers.
        dataset: "" for all.
        confidences_N: in [0, 1].
        correct_N: 1 where right, else 0.
    """
    places = np.minimum((confidences_N * BINS).astype(int), BINS - 1)
    bins = []
    for place in np.unique(places):
        inside = places == place
        right = float(correct_N[inside].mean())
        n = int(inside.sum())
        sure = float(confidences_N[inside].mean())
        bins.append(Bin(n, sure, right, *_wilson(right, n)))
    return Calibration(
        system,
        dataset,
        len(correct_N),
        float(confidences_N.mean()),
        float(correct_N.mean()),
        sum(b.n * abs(b.confidence - b.correct) for b in bins) / len(correct_N),
        tuple(bins),
    )


def _wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share; not empty at 0 and 1 as a bootstrap is."""
    z = 1.96
    middle = share + z * z / (2 * n)
    reach = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def calibrations(generations: Sequence[Generation]) -> list[Calibration]:
    """Of every system that says how sure it is, on every dataset and on all together.

    Only datasets whose own metric is right or wrong count, and only answers that could
    have been others: one passage alone is always of one opinion.
    """
    graded = {g.dataset for g in generations if g.value not in (0, 1)}
    by_name: dict[str, list[Calibration]] = {}
    pooled: dict[str, list[list[float]]] = {}
    for (dataset, system), ours in by_system(generations).items():
        if dataset in graded:
            continue
        found = [
            [g.confidence, g.value]
            for g in ours
            if g.confidence is not None and (len(g.passages) > 1 or g.choices)
        ]
        if not found:
            continue
        pairs = np.array(found, np.float64)
        made = calibration(system, dataset, pairs[:, 0], pairs[:, 1])
        by_name.setdefault(system, []).append(made)
        pooled.setdefault(system, []).extend(found)
    result = []
    for system, of_datasets in by_name.items():
        pairs = np.array(pooled[system], np.float64)
        result.append(calibration(system, "", pairs[:, 0], pairs[:, 1]))
        result += of_datasets
    return result
