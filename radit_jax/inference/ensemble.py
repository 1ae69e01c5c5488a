"""Parallel retrieval ensemble: one prompt per passage, answers mixed by weight."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Vote(NamedTuple):
    """One unique answer and the weight behind it."""

    text: str
    weight: float


def passage_weights(
    scores_BC: Float[np.ndarray, "B C"], temperature: float
) -> Float[np.ndarray, "B C"]:
    """p_R(c|x): softmax of the raw retrieval scores in float32 (RA-DIT eq. 2).

    Args:
        scores_BC: dot products; -inf where there is no passage.
        temperature: 1 for DRAGON+, whose scores are raw dot products; encoders that
            normalise have scores within [-1, 1] and need a small one.
    """
    scaled_BC = scores_BC.astype(np.float32) / temperature
    scaled_BC = scaled_BC - scaled_BC.max(axis=1, keepdims=True)
    weights_BC = np.exp(scaled_BC)
    return weights_BC / weights_BC.sum(axis=1, keepdims=True)


def vote(
    texts: Sequence[str],
    log_probabilities: Sequence[float],
    weights: Sequence[float],
    normalize: Callable[[str], str],
) -> list[Vote]:
    """Unique answers with their p_R-weighted probability, best first.

    RA-DIT decodes every augmented prompt on its own and sums, per unique answer, the
    weighted probability of the prompts that gave it. Answers that normalise to the
    same string are one; it is shown as its likeliest prompt wrote it.
    """
    totals: dict[str, float] = {}
    shown: dict[str, tuple[float, str]] = {}
    for text, log_probability, weight in zip(
        texts, log_probabilities, weights, strict=True
    ):
        probability = float(weight * np.exp(log_probability))
        name = normalize(text)
        totals[name] = totals.get(name, 0.0) + probability
        # Of equals the better passage's: they come first.
        if name not in shown or probability > shown[name][0]:
            shown[name] = (probability, text)
    ranked = sorted(totals, key=lambda name: -totals[name])
    return [Vote(shown[name][1], totals[name]) for name in ranked]
