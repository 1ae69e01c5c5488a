import inspect
import subprocess
import sys

import numpy as np
import pytest

from radit_jax.data import evaluation_sets, prompts
from radit_jax.evaluation import metrics
from radit_jax.evaluation.tasks import (
    TASKS,
    UNCONDITIONAL,
    Task,
    mixed_option_score,
    option_score,
    task_of,
)

# RA-DIT Table 11: metric and score of every set.
TABLE_11 = {
    "mmlu": ("accuracy", "nll"),
    **dict.fromkeys(("nq", "tqa", "hopo"), ("em", "nll")),
    "eli5": ("rouge_l", "nll_token"),
    **dict.fromkeys(("fever", "aida", "zsre", "trex"), ("accuracy", "nll")),
    "wow": ("f1", "nll_token"),
    **dict.fromkeys(("boolq", "obqa"), ("accuracy", "nll_compl")),
    **dict.fromkeys(("piqa", "siqa", "hellaswag"), ("accuracy", "nll_char")),
    **dict.fromkeys(("winogrande", "arc_e", "arc_c"), ("accuracy", "nll_char")),
    # Other versions of NQ and TriviaQA.
    **dict.fromkeys(("nq_kilt", "tqa_kilt", "tqa_wikipedia"), ("em", "nll")),
}
SCORES = ("nll", "nll_char", "nll_token", "nll_compl")

# Options such as "4" and "the fourth planet": the long one is less likely as a whole,
# likelier by the character and the token, and likely whatever is asked.
LOG_P_O = np.array([-4.0, -6.0, -5.0])
CHARACTERS_O = np.array([1, 17, 4])
TOKENS_O = np.array([1, 3, 5])
GIVEN_O = np.array([-5.0, -5.5, -7.5])


def oracle(kind, log_p, characters, tokens, given):
    """Of one option, in probabilities."""
    p = np.exp(log_p)
    return {
        "nll": p,
        "nll_char": p ** (1 / characters),
        "nll_token": p ** (1 / tokens),
        "nll_compl": p / np.exp(given),
    }[kind]


def test_every_evaluation_set_has_a_task():
    assert set(TASKS) == {spec.name for spec in evaluation_sets.SPECS}


@pytest.mark.parametrize("name", TABLE_11)
def test_metric_and_score_are_table_11s(name):
    assert (TASKS[name].metrics[0], TASKS[name].score) == TABLE_11[name]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_whole(name):
    task = TASKS[name]
    assert set(task.metrics) <= set(metrics.METRICS)
    assert len(set(task.metrics)) == len(task.metrics)
    generates = task.kind == "generate"
    assert (task.max_new_tokens > 0) == generates == bool(task.stop)


def test_what_has_choices_chooses():
    chosen = {name for name, task in TASKS.items() if task.kind == "choose"}
    commonsense = {s.name for s in evaluation_sets.SPECS if s.category == "commonsense"}
    assert chosen == commonsense | {"mmlu", "fever"}


def test_the_answer_marker_is_what_completions_follow():
    assert UNCONDITIONAL in prompts.ANSWER_MARKERS


def test_a_file_of_ones_own_has_a_default_task():
    assert task_of("mine", False) == Task("generate", "nll", ("em", "f1"), 32, ("\n",))
    assert task_of("mine", True) == Task("choose", "nll", ("accuracy",))


def test_a_known_set_has_its_own_task():
    assert task_of("piqa", True) == TASKS["piqa"]
    assert task_of("wow", False) == TASKS["wow"]


def test_no_choices_to_choose_from_are_refused():
    with pytest.raises(ValueError, match=r"'fever'.* have no .choices."):
        task_of("fever", False)


@pytest.mark.parametrize(("kind", "best"), list(zip(SCORES, (0, 1, 2, 2), strict=True)))
def test_option_score_is_its_definition(kind, best):
    found_O = option_score(kind, LOG_P_O, CHARACTERS_O, TOKENS_O, GIVEN_O)
    expected = [
        oracle(kind, *option)
        for option in zip(LOG_P_O, CHARACTERS_O, TOKENS_O, GIVEN_O, strict=True)
    ]
    np.testing.assert_allclose(np.exp(found_O), expected, rtol=1e-12)
    assert found_O.argmax() == best


def test_option_score_by_hand():
    log_p_O, two = np.array([-6.0, -2.0]), np.array([3, 2])
    assert option_score("nll", log_p_O).tolist() == [-6, -2]
    assert option_score("nll_char", log_p_O, characters=two).tolist() == [-2, -1]
    assert option_score("nll_token", log_p_O, tokens=two).tolist() == [-2, -1]
    compl = option_score(
        "nll_compl", log_p_O, log_p_unconditional=np.array([-9.0, -4.0])
    )
    assert compl.tolist() == [3, 2]


@pytest.mark.parametrize("kind", SCORES)
def test_several_prompts_score_as_one_by_one(kind):
    log_p_CO = np.random.default_rng(0).uniform(-9, 0, (4, 3)).astype(np.float32)
    rest = (CHARACTERS_O, TOKENS_O, GIVEN_O)
    found_CO = option_score(kind, log_p_CO, *rest)
    alone = [option_score(kind, log_p_O, *rest) for log_p_O in log_p_CO]
    np.testing.assert_array_equal(found_CO, alone)
    assert found_CO.dtype == np.float64


@pytest.mark.parametrize("kind", SCORES)
def test_the_mixture_is_the_mean_probability(kind):
    rng = np.random.default_rng(1)
    log_p_CO = rng.uniform(-6, 0, (3, 3))
    weights_C = rng.dirichlet(np.ones(3))
    rest = (CHARACTERS_O, TOKENS_O, GIVEN_O)
    expected = [
        sum(
            weights_C[c]
            * oracle(kind, log_p_CO[c, o], CHARACTERS_O[o], TOKENS_O[o], GIVEN_O[o])
            for c in range(3)
        )
        for o in range(3)
    ]
    found_O = mixed_option_score(kind, log_p_CO, weights_C, *rest)
    np.testing.assert_allclose(np.exp(found_O), expected, rtol=1e-12)


def test_the_mixture_of_completions_is_divided_once():
    log_p_CO = np.array([[-1.0, -3.0], [-4.0, -2.0]])
    weights_C, given_O = np.array([0.3, 0.7]), np.array([-2.0, -1.0])
    mixed = np.log(weights_C @ np.exp(log_p_CO)) - given_O
    found = mixed_option_score(
        "nll_compl", log_p_CO, weights_C, log_p_unconditional=given_O
    )
    np.testing.assert_allclose(found, mixed, rtol=1e-12)


@pytest.mark.parametrize("kind", SCORES)
def test_one_passage_has_its_own_score(kind):
    rest = (CHARACTERS_O, TOKENS_O, GIVEN_O)
    found_O = mixed_option_score(kind, LOG_P_O[None], np.ones(1), *rest)
    np.testing.assert_allclose(found_O, option_score(kind, LOG_P_O, *rest), rtol=1e-15)


def test_the_mixture_does_not_underflow():
    # exp(-2000) is 0 in float64; of float32 even exp(-104) is.
    log_p_CO = np.array([[-2000.0, -2001.0], [-3000.0, -1999.5]], np.float32)
    weights_C = np.array([0.75, 0.25], np.float32)
    found_O = mixed_option_score("nll", log_p_CO, weights_C)
    second = np.log(0.75 + 0.25 * np.exp(1.5)) - 2001
    np.testing.assert_allclose(found_O, [-2000 + np.log(0.75), second], rtol=1e-12)


def test_float32_scores_lose_nothing_of_what_they_hold():
    # In float32 the two mixtures are equal: its spacing near 40 is 4e-6.
    log_p_CO = np.array([[-40.0, -40.0], [-40.0, -40.000004]], np.float32)
    found_O = mixed_option_score("nll", log_p_CO, np.array([0.9, 0.1], np.float32))
    assert found_O[0] > found_O[1]


def test_a_passage_without_weight_has_no_say():
    log_p_CO = np.array([[-3.0, -2.0], [0.0, -np.inf]])
    found_O = mixed_option_score("nll", log_p_CO, np.array([1.0, 0.0]))
    assert found_O.tolist() == [-3, -2]


def test_an_impossible_option_is_last_and_not_nan():
    log_p_CO = np.array([[-np.inf, -2.0], [-np.inf, -3.0]])
    found_O = mixed_option_score("nll", log_p_CO, np.array([0.5, 0.5]))
    assert found_O[0] == -np.inf
    assert np.isfinite(found_O[1])


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("nll_chars", {}, "'nll_chars' is not one of nll, nll_char"),
        ("nll_char", {"characters": None}, "nll_char needs characters"),
        ("nll_token", {"tokens": None}, "nll_token needs tokens"),
        ("nll_compl", {"log_p_unconditional": None}, "needs log_p_unconditional"),
        ("nll_char", {"characters": np.array([1])}, r"shape \(1,\) for 3 options"),
        ("nll_token", {"tokens": np.array([1, 0, 2])}, "at least 1 each"),
        ("nll", {"log_p": -LOG_P_O}, "log_p is 6.0; expected logarithms"),
        ("nll", {"log_p": np.array([-1, np.nan, -2])}, "log_p is nan"),
        ("nll_compl", {"log_p_unconditional": -GIVEN_O}, "unconditional is 7.5"),
        (
            "nll_compl",
            {"log_p_unconditional": np.array([-1, -np.inf, -1])},
            "-inf for an option",
        ),
    ],
)
def test_what_is_no_score_is_refused(kind, change, message):
    # Under test the annotations would speak first; users run without them.
    arguments = {
        "log_p": LOG_P_O,
        "characters": CHARACTERS_O,
        "tokens": TOKENS_O,
        "log_p_unconditional": GIVEN_O,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(option_score)(kind, **arguments)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.3], "a sum of 1"),
        ([1.5, -0.5], "none negative"),
        ([0.5, np.nan], "a sum of 1"),
        ([1.0], "1 weights for 2 passages"),
    ],
)
def test_weights_that_are_none_are_refused(weights, message):
    log_p_CO = np.array([[-1.0, -2.0], [-3.0, -1.0]])
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(mixed_option_score)("nll", log_p_CO, np.array(weights))


def test_importing_tasks_imports_no_jax():
    code = (
        "import sys, radit_jax.evaluation.tasks as _;"
        "assert not {'jax', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
