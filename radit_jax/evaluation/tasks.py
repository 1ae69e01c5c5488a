"""What is asked of a system on every evaluation set, and how options are compared.

The sets are those of RA-DIT Tables 2 and 3 by their names in the registry; metric and
score are Table 11's. What the paper leaves open is said where it is decided.

In this file ``O`` counts the options of a question and ``C`` the passages it is read
with.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Integer, Real

Kind = Literal["generate", "choose"]
Score = Literal["nll", "nll_char", "nll_token", "nll_compl"]

# What an option follows where nothing was asked, for ``nll_compl``.
UNCONDITIONAL = "Answer:"

# How far above 0 a log-probability, or from 1 the sum of weights, may be for rounding.
_ROUNDING = 1e-3


class Task(NamedTuple):
    """What a system does with the questions of a dataset, and how it is judged."""

    kind: Kind  # say the answer, or pick one of the example's choices
    # What is compared, see ``option_score``: of options, or of the answers that were
    # generated from different passages.
    score: Score
    metrics: tuple[str, ...]  # of ``metrics.METRICS``, the task's own first
    max_new_tokens: int = 0  # of an answer that is generated
    stop: tuple[str, ...] = ()  # ends such an answer


# The paper says neither how long answers may be nor what ends them. Names, dates and
# titles fit into 32 tokens. A base model goes on with another question in a new line.
_SHORT = Task("generate", "nll", ("em", "f1"), 32, ("\n",))

# Accuracy on entity linking and slot filling is KILT's: what is generated has to be the
# title or a name, letter by letter. The paper does not say so, nor whether titles were
# chosen from a list. EM beside it shows what strictness about case and articles costs.
_NAMED = _SHORT._replace(metrics=("accuracy", "em", "f1"))

# One line of dialogue; Wizard of Wikipedia's are a sentence or two.
_SAID = Task("generate", "nll_token", ("f1", "rouge_l"), 64, ("\n",))

# ELI5's answers have paragraphs, so that a new line does not end one; what begins the
# next demonstration does.
_EXPLAINED = Task(
    "generate", "nll_token", ("rouge_l", "f1"), 256, ("\nQ:", "\nBackground:")
)

_CHOSEN = Task("choose", "nll", ("accuracy",))
_CHOSEN_BY_CHARACTER = _CHOSEN._replace(score="nll_char")
_CHOSEN_BY_COMPLETION = _CHOSEN._replace(score="nll_compl")

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "mmlu": _CHOSEN,
        "nq": _SHORT,
        "tqa": _SHORT,
        "tqa_wikipedia": _SHORT,
        "nq_kilt": _SHORT,
        "tqa_kilt": _SHORT,
        "eli5": _EXPLAINED,
        "hopo": _SHORT,
        # Two labels, true and false. Whether the paper generates them is not stated;
        # the likelier of the two is never anything else.
        "fever": _CHOSEN,
        "aida": _NAMED,
        "zsre": _NAMED,
        "trex": _NAMED,
        "wow": _SAID,
        "boolq": _CHOSEN_BY_COMPLETION,
        "piqa": _CHOSEN_BY_CHARACTER,
        "siqa": _CHOSEN_BY_CHARACTER,
        "hellaswag": _CHOSEN_BY_CHARACTER,
        "winogrande": _CHOSEN_BY_CHARACTER,
        "arc_e": _CHOSEN_BY_CHARACTER,
        "arc_c": _CHOSEN_BY_CHARACTER,
        "obqa": _CHOSEN_BY_COMPLETION,
    }
)


def task_of(dataset: str, has_choices: bool) -> Task:
    """The task of a dataset.

    A file of one's own is one of short answers, EM and F1, or where its examples have
    choices one of choosing by ``nll``.

    Args:
        dataset: a name of TASKS, or any other.
        has_choices: whether the dataset's examples have choices.

    Raises:
        ValueError: options are to be chosen from, and there are none.
    """
    task = TASKS.get(dataset, _CHOSEN if has_choices else _SHORT)
    if task.kind == "choose" and not has_choices:
        raise ValueError(
            f"dataset {dataset!r}: the task is to choose among options, but its "
            'examples have no "choices"; add them or give the file another name'
        )
    return task


def option_score(
    kind: Score,
    log_p: Float[np.ndarray, "*C O"],
    characters: Integer[np.ndarray, "O"] | None = None,
    tokens: Integer[np.ndarray, "O"] | None = None,
    log_p_unconditional: Float[np.ndarray, "O"] | None = None,
) -> Float[np.ndarray, "*C O"]:
    """By what options are compared (RA-DIT Table 11); the highest is the prediction.

    ==========  ==========================================
    nll         log p(y|x)
    nll_char    log p(y|x) / characters of y
    nll_token   log p(y|x) / tokens of y
    nll_compl   log p(y|x) - log p(y|"Answer:")
    ==========  ==========================================

    The paper's names are of negative log-likelihoods, the smallest of which is best;
    these are the same with the other sign. Where ``y`` is the text that follows a blank
    as well as the option, its characters count too.

    Args:
        kind: which of them.
        log_p: natural logarithm of p(y|x) per option, summed over its tokens; any
            number of prompts at once.
        characters: of the text whose log-probability it is, without the space between
            it and the prompt; for nll_char.
        tokens: of that text; for nll_token.
        log_p_unconditional: log p(y|UNCONDITIONAL), for nll_compl.

    Returns:
        float64.

    Raises:
        ValueError: an unknown kind, what it needs is missing or not one per option, a
            count below 1, or a logarithm that is none of a probability.
    """
    log_p = _log_probabilities(log_p, "log_p")
    options = log_p.shape[-1]
    if kind == "nll":
        return log_p
    if kind == "nll_char":
        return log_p / _counts(characters, "characters", kind, options)
    if kind == "nll_token":
        return log_p / _counts(tokens, "tokens", kind, options)
    if kind == "nll_compl":
        name = "log_p_unconditional"
        given = _per_option(log_p_unconditional, name, kind, options)
        given = _log_probabilities(given, name)
        if np.isneginf(given).any():
            raise ValueError(f"{name} is -inf for an option; nothing can be above it")
        return log_p - given
    raise ValueError(
        f"score {kind!r} is not one of nll, nll_char, nll_token, nll_compl"
    )


def mixed_option_score(
    kind: Score,
    log_p_CO: Float[np.ndarray, "C O"],
    weights_C: Float[np.ndarray, "C"],
    characters: Integer[np.ndarray, "O"] | None = None,
    tokens: Integer[np.ndarray, "O"] | None = None,
    log_p_unconditional: Float[np.ndarray, "O"] | None = None,
) -> Float[np.ndarray, "O"]:
    """Logarithm of the options' mean probability over passages, weighted by p_R.

    That is ``log sum_c p_R(c|x) exp(score_c)`` with the score of ``option_score``:

    - nll: the mixture of RA-DIT eq. 2, ``log sum_c p_R(c|x) p(y|x,c)``;
    - nll_char, nll_token: of the geometric mean probability of a character or a token.
      The paper does not say how length and passages combine; dividing the logarithm of
      the mixture instead would let one passage decide about long options;
    - nll_compl: the mixture of eq. 2 divided by p(y|"Answer:"), which no passage
      changes.

    With one passage it is that passage's score.

    Args:
        kind: as of ``option_score``, like the three last ones.
        log_p_CO: natural logarithm of p(y|x,c).
        weights_C: p_R(c|x); they sum to 1.
        characters: of the options.
        tokens: of the options.
        log_p_unconditional: log p(y|UNCONDITIONAL).

    Returns:
        float64, summed without underflow.

    Raises:
        ValueError: as of ``option_score``, or the weights are not one per passage, not
            negative and of sum 1.
    """
    scores_CO = option_score(kind, log_p_CO, characters, tokens, log_p_unconditional)
    weights_C = weights_C.astype(np.float64)
    if weights_C.shape != scores_CO.shape[:1]:
        raise ValueError(f"{weights_C.size} weights for {len(scores_CO)} passages")
    if not ((weights_C >= 0).all() and abs(weights_C.sum() - 1) <= _ROUNDING):
        raise ValueError(
            f"weights are {weights_C.tolist()}; expected none negative and a sum of 1"
        )
    with np.errstate(divide="ignore"):  # a weight may be 0
        log_weights_C = np.log(weights_C)
    return np.logaddexp.reduce(log_weights_C[:, None] + scores_CO, axis=0)


def _log_probabilities(
    values: Float[np.ndarray, "*C O"], name: str
) -> Float[np.ndarray, "*C O"]:
    # A negative log-likelihood in its place would turn the order round.
    if not (values <= _ROUNDING).all():  # nan neither
        raise ValueError(
            f"{name} is {values.max()}; expected logarithms of probabilities, at most 0"
        )
    return values.astype(np.float64)


def _counts(
    values: Integer[np.ndarray, "O"] | None, name: str, kind: Score, options: int
) -> Integer[np.ndarray, "O"]:
    counts = _per_option(values, name, kind, options)
    if not (counts >= 1).all():
        raise ValueError(f"{name} are {counts.tolist()}; expected at least 1 each")
    return counts


def _per_option(
    values: Real[np.ndarray, "O"] | None, name: str, kind: Score, options: int
) -> Real[np.ndarray, "O"]:
    if values is None:
        raise ValueError(f"{kind} needs {name}")
    if values.shape != (options,):
        raise ValueError(f"{name} of shape {values.shape} for {options} options")
    return values
