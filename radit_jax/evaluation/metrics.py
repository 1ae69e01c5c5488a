"""Metrics of answers and of retrieval, and how sure of them we are.

A metric is a value per question. The values of all questions are kept in one array
``values_N`` (``N`` counts questions in this file) and averaged once: an average updated
as it goes gives neither an interval nor a paired test, and is easy to get wrong.

Of the metrics of answers, EM and F1 are those of SQuAD v1.1, whose normalisation is
that of KILT's ``eval_downstream.py`` too. KILT's accuracy normalises nothing, and
neither does ours. Two rules are KILT's and not SQuAD's: a blank prediction is wrong
whatever the answers, and a blank answer makes nothing right. KILT's ROUGE-L is another
one than ours; see ``rouge_l``.
"""

import difflib
import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")

# How many passages count, in ``retrieval_values``.
DEPTHS = (1, 5, 10)

# Random draws held at once by the resampling; bounds memory to about 50 MB.
_DRAWS = 1 << 21


def normalise(text: str) -> str:
    """Lowercase, without ASCII punctuation, English articles and extra whitespace.

    The order is that of SQuAD's ``evaluate-v1.1.py`` and matters: punctuation is
    deleted before articles are looked for, so "A." is an article and "well-known"
    becomes "wellknown".
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals any normalised answer, else 0.0.

    As in KILT, who says nothing is wrong, also where an answer is nothing but an
    article; to SQuAD's script that is a match.

    Raises:
        ValueError: if there are no answers.
    """
    _require_answers(answers)
    if not prediction.strip():
        return 0.0
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is an answer, space around it aside, else 0.0.

    That is KILT's accuracy, strict exact match: case, articles and punctuation count.
    What is chosen among options is one of them letter by letter; what is generated has
    to be the answer, no more ("Paris." for "Paris" is wrong).

    Raises:
        ValueError: if there are no answers.
    """
    _require_answers(answers)
    said = prediction.strip()
    return float(bool(said) and said in {answer.strip() for answer in answers})


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Token F1 of the prediction against the answer it fits best (SQuAD v1.1).

    As in the published script, two texts without a token in common score 0, also
    when both are empty after normalisation.

    Raises:
        ValueError: if there are no answers.
    """
    _require_answers(answers)
    predicted = normalise(prediction).split()
    return max(_token_f1(predicted, normalise(answer).split()) for answer in answers)


def _token_f1(predicted: list[str], gold: list[str]) -> float:
    common = (Counter(predicted) & Counter(gold)).total()
    return 2.0 * common / (len(predicted) + len(gold)) if common else 0.0


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """F-measure of ROUGE-L against the answer it fits best, by ``rouge-score``.

    The longest common subsequence of words is that of the whole texts. Words are
    lowercase runs of a-z and 0-9; all else, letters with accents included, parts them,
    so that a text in another script scores 0. As in KILT, words are not stemmed.
    KILT has its ROUGE-L from the package ``rouge``: words are what spaces part, in
    their case and with their punctuation, sentences (between full stops) are aligned
    one by one, and a word counts once however often it occurs. Either value can be the
    higher.

    Raises:
        ValueError: if there are no answers.
    """
    _require_answers(answers)
    return float(_rouge().score_multi(answers, prediction)["rougeL"].fmeasure)


@functools.cache
def _rouge() -> "RougeScorer":
    # It imports NLTK for its stemmer, which takes longer than this package does.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = MappingProxyType(
    {"em": exact_match, "f1": f1, "accuracy": accuracy, "rouge_l": rouge_l}
)


def score(
    names: Sequence[str], prediction: str, answers: Sequence[str]
) -> dict[str, float]:
    """The metrics of a prediction, in the order of their names.

    Args:
        names: of METRICS.
        prediction: what the system says; "": nothing.
        answers: what is right.

    Raises:
        ValueError: a name that is none, or there are no answers.
    """
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, 1)
            raise ValueError(
                f"metric {name!r} is not one of {', '.join(METRICS)}"
                + (f"; {near[0]!r}?" if near else "")
            )
    return {name: METRICS[name](prediction, answers) for name in names}


def contains_answer(passage_text: str, answers: Sequence[str]) -> bool:
    """Whether any answer's words stand in the passage, contiguous and in order.

    The tokens are those of DPR's ``has_answer``: runs of letters, digits and marks,
    every other visible character on its own, NFD and lowercase. So "1939" is found in
    "1939-45", but "art" is not found in "party". An answer without a token is in no
    passage (DPR's is in every passage).

    Raises:
        ValueError: if there are no answers.
    """
    _require_answers(answers)
    passage = _spaced_tokens(passage_text)
    needles = (_spaced_tokens(answer) for answer in answers)
    return any(needle in passage for needle in needles if needle.strip())


class _Spacing(dict[int, str]):
    """``str.translate`` table that sets tokens apart; filled as characters turn up."""

    def __missing__(self, code: int) -> str:
        major = unicodedata.category(chr(code))[0]
        if major in "LNM":  # letter, number, mark: part of a word
            spaced = chr(code)
        elif major in "ZC":  # separator, control
            spaced = " "
        else:
            spaced = f" {chr(code)} "
        self[code] = spaced
        return spaced


_SPACING = _Spacing()


def _spaced_tokens(text: str) -> str:
    # A space on either side of every token makes a substring search, which runs in C,
    # a search for a sub-sequence of whole tokens.
    tokens = unicodedata.normalize("NFD", text).translate(_SPACING).lower().split()
    return f" {' '.join(tokens)} "


def _require_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str):
        raise ValueError(f"answers is the string {answers!r}; expected a list of them")
    if not answers:
        raise ValueError("a question without gold answers cannot be scored")


def answer_at(hits_NC: Bool[np.ndarray, "N C"], k: int) -> Float[np.ndarray, "N"]:
    """Per question, 1.0 if any of its k best passages is a hit.

    With hits from ``contains_answer`` this is answer@k, DPR's top-k accuracy.

    Args:
        hits_NC: whether a passage is a hit; passages best first.
        k: how many passages count.

    Raises:
        ValueError: if there is no question, or k is not in 1 .. C.
    """
    _require_depth(hits_NC, k)
    return np.asarray(hits_NC[:, :k].any(axis=1), np.float64)


def recall_at(
    ids_NC: Integer[np.ndarray, "N C"], gold_ids: Sequence[Collection[int]], k: int
) -> Float[np.ndarray, "N"]:
    """Per question, the share of its gold passages among its k best.

    Args:
        ids_NC: passage ids, best first; -1 where there was none.
        gold_ids: for each question the ids of the passages that ought to be found.
        k: how many passages count.

    Raises:
        ValueError: if a question has no gold ids, or k is not in 1 .. C.
    """
    _require_depth(ids_NC, k)
    gold = _gold_sets(gold_ids, len(ids_NC))
    return np.array(
        [
            len(wanted.intersection(row)) / len(wanted)
            for wanted, row in zip(gold, ids_NC[:, :k].tolist(), strict=True)
        ]
    )


def reciprocal_rank(
    ids_NC: Integer[np.ndarray, "N C"], gold_ids: Sequence[Collection[int]]
) -> Float[np.ndarray, "N"]:
    """Per question, 1 / rank of its first gold passage, 0 where none was retrieved.

    Args:
        ids_NC: passage ids, best first; -1 where there was none.
        gold_ids: for each question the ids of the passages that ought to be found.

    Raises:
        ValueError: if a question has no gold ids.
    """
    _require_depth(ids_NC, 1)
    gold = _gold_sets(gold_ids, len(ids_NC))
    ranks = (
        next((rank for rank, id in enumerate(row, 1) if id in wanted), np.inf)
        for wanted, row in zip(gold, ids_NC.tolist(), strict=True)
    )
    return 1.0 / np.fromiter(ranks, np.float64, len(ids_NC))


def retrieval_values(
    ids_NC: Integer[np.ndarray, "N C"],
    hits_NC: Bool[np.ndarray, "N C"],
    gold_ids: Sequence[Collection[int]],
) -> dict[str, Float[np.ndarray, "N"]]:
    """answer@k, and gold@k and ``mrr`` where every question has gold passages.

    One of a question's gold passages is enough: several only tie.

    Args:
        ids_NC: passage ids, best first.
        hits_NC: whether a passage contains an answer.
        gold_ids: for each question the ids of its gold passages; empty: unknown.

    Returns:
        Name of a metric to its value for every question.
    """
    depths = [k for k in DEPTHS if k <= ids_NC.shape[1]]
    values = {f"answer@{k}": answer_at(hits_NC, k) for k in depths}
    if all(gold_ids):
        gold_NC = np.array(
            [np.isin(ids, list(g)) for ids, g in zip(ids_NC, gold_ids, strict=True)]
        )
        values |= {f"gold@{k}": answer_at(gold_NC, k) for k in depths}
        values["mrr"] = reciprocal_rank(ids_NC, gold_ids)
    return values


def mrr(
    ids_NC: Integer[np.ndarray, "N C"], gold_ids: Sequence[Collection[int]]
) -> float:
    """Mean reciprocal rank, cut off at C; see ``reciprocal_rank``."""
    return float(reciprocal_rank(ids_NC, gold_ids).mean())


def _require_depth(ranked_NC: Shaped[np.ndarray, "N C"], k: int) -> None:
    questions, depth = ranked_NC.shape
    if questions == 0:
        raise ValueError("there is no question to average over")
    if not 1 <= k <= depth:
        raise ValueError(f"k = {k}, but {depth} passages were retrieved per question")


def _gold_sets(gold_ids: Sequence[Collection[int]], questions: int) -> list[set[int]]:
    if len(gold_ids) != questions:
        raise ValueError(f"{len(gold_ids)} lists of gold ids for {questions} questions")
    gold = [set(ids) for ids in gold_ids]
    for question, wanted in enumerate(gold):
        if not wanted or min(wanted) < 0:
            raise ValueError(
                f"question {question} has gold ids {sorted(wanted)}; expected at least "
                "one, none negative (drop questions without a gold passage)"
            )
    return gold


def bootstrap_interval(
    values_N: Float[np.ndarray, "N"],
    seed: int,
    resamples: int = 10_000,
    groups_N: Shaped[np.ndarray, "N"] | None = None,
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron, 1979).

    Questions about one thing (a country, a document) are right or wrong together.
    With ``groups_N`` whole groups are resampled, which widens the interval to what
    the number of independent groups supports (cluster bootstrap).

    Args:
        values_N: one finite value per question.
        seed: of the resampling.
        resamples: how many.
        groups_N: one label per question.

    Raises:
        ValueError: if there is no value, one is not finite, or all share one group.
    """
    totals, sizes = _clusters(values_N, groups_N)
    if resamples < 1:
        raise ValueError(f"resamples = {resamples}; expected at least 1")
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for part in _parts(resamples, len(totals)):
        drawn = rng.integers(len(totals), size=(part.stop - part.start, len(totals)))
        # Groups differ in size, so a resample's number of questions does too.
        means[part] = totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    lo, hi = np.quantile(means, [0.025, 0.975])
    return float(lo), float(hi)


class PairedDifference(NamedTuple):
    """By how much the second of two systems beats the first on the same questions."""

    value: float  # mean(second) - mean(first)
    lo: float  # 95 % interval, paired bootstrap
    hi: float
    p_value: float  # two-sided, sign-flip permutation test
    n: int


def paired_difference(
    first_N: Float[np.ndarray, "N"],
    second_N: Float[np.ndarray, "N"],
    seed: int,
    resamples: int = 10_000,
    groups_N: Shaped[np.ndarray, "N"] | None = None,
) -> PairedDifference:
    """Compare two systems question by question.

    The p-value is that of the sign-flip permutation test: if the systems were alike,
    each question's difference could as well have the other sign. For 0/1 values this
    is the sign test (McNemar's, exact up to the resampling). It is never below
    ``1 / (resamples + 1)``.

    Args:
        first_N: the first system's values.
        second_N: the second system's values, on the same questions in the same order.
        seed: of the resampling.
        resamples: how many, for the interval and for the test.
        groups_N: one label per question; whole groups are drawn and flipped.

    Raises:
        ValueError: as ``bootstrap_interval``, or if the lengths differ.
    """
    if len(first_N) != len(second_N):
        raise ValueError(
            f"paired systems must answer the same questions; one has {len(first_N)} "
            f"values, the other {len(second_N)}"
        )
    gains_N = second_N.astype(np.float64) - first_N
    lo, hi = bootstrap_interval(gains_N, seed, resamples, groups_N)
    totals, _ = _clusters(gains_N, groups_N)
    totals = totals[totals != 0]  # flipping a zero changes nothing
    # Sums of the same numbers in another order differ by rounding: still a tie.
    observed = abs(totals.sum()) - 1e-9 * np.abs(totals).sum()
    rng = np.random.default_rng([seed, 1])  # independent of the bootstrap's draws
    as_extreme = 0
    for part in _parts(resamples, max(1, len(totals))):
        flips = rng.integers(2, size=(part.stop - part.start, len(totals)))
        as_extreme += int((np.abs((2.0 * flips - 1.0) @ totals) >= observed).sum())
    return PairedDifference(
        value=float(gains_N.mean()),
        lo=lo,
        hi=hi,
        p_value=(1 + as_extreme) / (1 + resamples),
        n=len(gains_N),
    )


def _clusters(
    values_N: Float[np.ndarray, "N"], groups_N: Shaped[np.ndarray, "N"] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and size of every group; without groups every question is its own."""
    if len(values_N) == 0:
        raise ValueError("there is no question to average over")
    if not np.isfinite(values_N).all():
        where = int(np.flatnonzero(~np.isfinite(values_N))[0])
        raise ValueError(f"the value of question {where} is {values_N[where]}")
    values_N = values_N.astype(np.float64)
    if groups_N is None:
        return values_N, np.ones(len(values_N))
    if len(groups_N) != len(values_N):
        raise ValueError(f"{len(groups_N)} group labels for {len(values_N)} values")
    labels, group_of = np.unique(groups_N, return_inverse=True)
    if len(labels) < 2:
        raise ValueError(
            f"all questions are in group {labels[0]!r}; an interval over groups needs "
            "two or more (or pass no groups)"
        )
    return np.bincount(group_of, weights=values_N), np.bincount(group_of).astype(float)


def _parts(resamples: int, draws_each: int) -> Iterator[slice]:
    step = max(1, _DRAWS // draws_each)
    for start in range(0, resamples, step):
        yield slice(start, min(start + step, resamples))
