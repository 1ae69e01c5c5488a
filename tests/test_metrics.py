import inspect
import os
import re
import string
import subprocess
import sys
from math import comb

import numpy as np
import pytest

from radit_jax.evaluation import metrics

AWKWARD = [
    "",
    "the",
    "The  Quick,\tbrown\nfox",
    "A.",
    "a-an-the",
    "the-end an d",
    "well-known U.S.A.",
    "An apple; another theme",
    "don't 'quote' \"this\"",
    "1,234.50 $",
    "\u2018a\u2019 \u2013 the\u2014b",  # typographic quotes and dashes stay
    "caf\u00e9 A\u0301 \u0130stanbul STRASSE \u00df",
    "\u00a0the\u2003cat\u200b",
    "_a_ the_cat",
    "\u00e0 la carte",
    "e=mc^2 `x` ~{y}|z\\",
    "THE A AN",
]


def squad_oracle(text):
    """The published rule, one character at a time."""
    kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
    words = re.split(r"(\w+)", kept)  # words at odd places
    for i in range(1, len(words), 2):
        if words[i] in ("a", "an", "the"):
            words[i] = " "
    return " ".join("".join(words).split())


@pytest.mark.parametrize("text", AWKWARD)
def test_normalise_is_squads(text):
    assert metrics.normalise(text) == squad_oracle(text)


def test_normalise_by_hand():
    assert (
        metrics.normalise("The U.S.A.'s well-known  A-team") == "usas wellknown ateam"
    )
    assert metrics.normalise("The End, a. An") == "end"


def test_exact_match_takes_any_alias():
    assert metrics.exact_match("the Nile.", ["Amazon", "Nile"]) == 1.0
    assert metrics.exact_match("Nile river", ["Amazon", "Nile"]) == 0.0
    # Both normalise to nothing: the published script calls that a match, with F1 0.
    assert metrics.exact_match("the", ["a"]) == 1.0
    assert metrics.f1("the", ["a"]) == 0.0


def test_f1_is_the_best_alias():
    # "nile river" and "river nile delta": 2 common of 2 and 3 tokens.
    assert metrics.f1("Nile river", ["x", "river Nile delta"]) == pytest.approx(4 / 5)
    # A repeated token counts as often as both have it: 1 common of 2 and 1.
    assert metrics.f1("no no", ["no"]) == pytest.approx(2 / 3)
    assert metrics.f1("abc", ["def"]) == 0.0


def test_answers_must_be_a_filled_list():
    for metric in (*metrics.METRICS.values(), metrics.contains_answer):
        with pytest.raises(ValueError, match="without gold answers"):
            metric("x", [])
        with pytest.raises(ValueError, match="expected a list"):
            metric("x", "answer")


# EM and F1 by torchmetrics 1.9.0 (functional.text.squad), ROUGE-L by torchmetrics 1.9.0
# (rouge_score: accumulate="best", use_stemmer=False), which tokenises and aligns by
# itself, and by rouge-score 0.1.2 alike; accuracy, and EM and F1 again, by
# kilt/eval_downstream.py of facebookresearch/KILT at 847377e.
GOLDEN = [
    # prediction, answers, EM, F1, accuracy, ROUGE-L
    ("The Nile.", ["Nile"], 1, 1, 0, 2 / 3),
    ("the end", ["The End", "end"], 1, 1, 0, 1),
    ("", ["Nile"], 0, 0, 0, 0),
    (" \n", ["Nile"], 0, 0, 0, 0),
    ("The An", ["Nile"], 0, 0, 0, 0),
    ("\u2018The Wall\u2019", ["The Wall"], 0, 0, 0, 1),
    ("\u2019Twas the night", ["'Twas the night"], 0, 0.5, 0, 1),
    ("don\u2019t know", ["don't know"], 0, 0.5, 0, 1),
    ("1939\u20131945", ["1939-1945"], 0, 0, 0, 1),
    ("1939\u20131945", ["1939 \u2013 1945", "1939\u20131945"], 1, 1, 1, 1),
    ("1,234,567 people", ["1234567 people"], 1, 1, 0, 1 / 3),
    ("1,234,567", ["1 234 567"], 0, 0, 0, 1),
    ("3.14", ["3,14"], 1, 1, 0, 1),
    ("mccartney", ["McCartney"], 1, 1, 0, 1),
    ("STRASSE", ["stra\u00dfe"], 0, 0, 0, 0),
    ("well-known", ["well known"], 0, 0, 0, 1),
    ("the co-operative", ["cooperative"], 1, 1, 0, 0),
    ("Caf\u00e9 M\u00fcller", ["Cafe Muller"], 0, 0, 0, 0),
    ("Cafe\u0301", ["Caf\u00e9"], 0, 0, 0, 0),
    ("\u5317\u4eac", ["\u5317\u4eac"], 1, 1, 1, 0),  # no letter of ROUGE's
    ("Burma, also Myanmar", ["Myanmar", "Burma", "Burma (Myanmar)"], 0, 0.8, 0, 0.8),
    ("Myanmar", ["Burma", "Myanmar"], 1, 1, 1, 1),
    ("the cat the cat sat", ["cat sat on a mat", "the cat"], 0, 4 / 7, 0, 4 / 7),
    ("sat cat", ["cat sat"], 0, 1, 0, 0.5),
    ("runs quickly.", ["running quickly", "he ran"], 0, 0.5, 0, 0.5),  # no stems
    ("It rains. It pours.", ["It rains and it pours."], 0, 8 / 9, 0, 8 / 9),
    ("one\ntwo three", ["one two\nthree four"], 0, 6 / 7, 0, 6 / 7),
    ("true", ["true"], 1, 1, 1, 1),
    ("True.", ["true"], 1, 1, 0, 1),
    (" Nile ", ["Nile\n"], 1, 1, 1, 1),
]


@pytest.mark.parametrize(("prediction", "answers", "em", "f1", "acc", "rouge"), GOLDEN)
def test_metrics_have_the_values_of_published_implementations(
    prediction, answers, em, f1, acc, rouge
):
    found = metrics.score(("em", "f1", "accuracy", "rouge_l"), prediction, answers)
    expected = {"em": em, "f1": f1, "accuracy": acc, "rouge_l": rouge}
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "answer", "name", "kilt"),
    [
        # Of two texts that normalise to nothing torchmetrics' squad has EM 1 and F1 1
        # (F1 by SQuAD v2's rule); v1.1's script and KILT's have EM 1 and F1 0.
        ("the", "a", "em", 1),
        ("the", "a", "f1", 0),
        ("A", "A", "f1", 0),
        # Who says nothing has not answered. torchmetrics has 1 for both, v1.1 for EM.
        ("", "The", "em", 0),
        ("", "The", "f1", 0),
    ],
)
def test_where_published_implementations_differ_ours_is_kilts(
    prediction, answer, name, kilt
):
    assert metrics.score([name], prediction, [answer]) == {name: kilt}


@pytest.mark.parametrize(
    ("prediction", "answer", "value"),
    [  # KILT's values, of the package rouge 1.0.1, differ:
        ("McCartney", "mccartney", 1),  # 0, cases differ
        ("True!", "True", 1),  # 0, punctuation is part of a word
        ("cat cat cat", "cat", 0.5),  # 1, a word counts once
    ],
)
def test_rouge_l_is_not_kilts(prediction, answer, value):
    assert metrics.rouge_l(prediction, [answer]) == pytest.approx(value)


def test_accuracy_takes_no_blank_answer():
    assert metrics.accuracy(" ", ["", "x"]) == 0.0


def test_score_keeps_the_order_of_names():
    found = metrics.score(("f1", "em"), "Nile river", ["Nile"])
    assert list(found.items()) == [("f1", pytest.approx(2 / 3)), ("em", 0.0)]
    assert metrics.score((), "x", ["x"]) == {}


def test_score_names_the_nearest_metric():
    with pytest.raises(ValueError, match=r"'rougel' is not one of em, .* 'rouge_l'"):
        metrics.score(["em", "rougel"], "x", ["x"])
    with pytest.raises(ValueError, match="without gold answers"):
        metrics.score(["em"], "x", [])


@pytest.mark.parametrize(
    ("passage", "answer", "found"),
    [
        ("Paris is in France.", "france", True),
        ("a political party", "art", False),
        ("from 1939-45", "1939", True),
        ("It is 1,939 m high", "939", True),  # "," is a token of its own, as in DPR
        ("the U.S. dollar", "U.S.", True),
        ("the U.S. dollar", "US", False),
        ("New South York", "New York", False),
        ("New\n  York", "new york", True),
        ("Caf\u00e9 noir", "CAFE\u0301", True),  # composed and decomposed
        ("Cafe noir", "caf\u00e9", False),
        ("\u0939\u093f\u0928\u094d\u0926\u0940", "\u0939", False),  # marks join words
        ("soft\u00adhyphen", "hyphen", True),
        ("anything", "", False),
        ("anything", " \t", False),
        ("", "x", False),
        ("", "", False),
    ],
)
def test_contains_answer_matches_whole_tokens(passage, answer, found):
    assert metrics.contains_answer(passage, [answer]) is found
    assert metrics.contains_answer(passage, ["not there", answer]) is found


def test_answer_at_looks_at_the_first_k():
    hits_NC = np.array([[0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 0]], bool)
    assert metrics.answer_at(hits_NC, 1).tolist() == [0, 0, 0, 1]
    assert metrics.answer_at(hits_NC, 2).tolist() == [1, 0, 0, 1]
    assert metrics.answer_at(hits_NC, 3).tolist() == [1, 1, 0, 1]


IDS_NC = np.array([[7, 3, 5], [1, 2, -1], [4, 9, 8]])
GOLD = [[3, 5], [2], {6}]


def test_retrieval_values_by_hand():
    hits_NC = np.array([[False, True, True], [True, False, False], [False] * 3])
    found = metrics.retrieval_values(IDS_NC, hits_NC, GOLD)
    assert {name: values.tolist() for name, values in found.items()} == {
        "answer@1": [0, 1, 0],
        "gold@1": [0, 0, 0],
        "mrr": [0.5, 0.5, 0],
    }
    unknown = metrics.retrieval_values(IDS_NC, hits_NC, [[3], [], [6]])
    assert list(unknown) == ["answer@1"]


def test_recall_by_hand():
    assert metrics.recall_at(IDS_NC, GOLD, 1).tolist() == [0, 0, 0]
    assert metrics.recall_at(IDS_NC, GOLD, 2).tolist() == [0.5, 1, 0]
    assert metrics.recall_at(IDS_NC, GOLD, 3).tolist() == [1, 1, 0]


def test_mrr_by_hand():
    assert metrics.reciprocal_rank(IDS_NC, GOLD).tolist() == [0.5, 0.5, 0]
    assert metrics.mrr(IDS_NC, GOLD) == pytest.approx(1 / 3)


def test_ranked_lists_are_checked():
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k = {k}, but 3 passages"):
            metrics.recall_at(IDS_NC, GOLD, k)
    with pytest.raises(ValueError, match="no question"):
        metrics.answer_at(np.zeros((0, 3), bool), 1)
    with pytest.raises(ValueError, match="question 1 has gold ids"):
        metrics.mrr(IDS_NC, [[3], [], [6]])
    with pytest.raises(ValueError, match="question 0 has gold ids"):
        metrics.mrr(IDS_NC, [[-1], [1], [6]])  # would match the padding
    with pytest.raises(ValueError, match="2 lists of gold ids for 3"):
        metrics.mrr(IDS_NC, GOLD[:2])


def test_one_right_answer_in_a_hundred_is_one_percent():
    # A running average that starts over at a falsy 0.0 says 1.0 here.
    values_N = np.array(99 * [0.0] + [1.0])
    lo, hi = metrics.bootstrap_interval(values_N, seed=0)
    assert lo == 0.0
    assert 0.02 <= hi <= 0.04


def test_interval_is_the_binomial_one():
    # The bootstrap of n zeros and ones is binomial: its quantiles are known exactly.
    n, p = 60, 0.4
    values_N = np.array([1.0] * 24 + [0.0] * 36)
    cdf = np.cumsum([comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)])
    exact = [int(np.searchsorted(cdf, q)) / n for q in (0.025, 0.975)]
    interval = metrics.bootstrap_interval(values_N, seed=1)
    np.testing.assert_allclose(interval, exact, atol=1 / n + 1e-9)
    assert interval == metrics.bootstrap_interval(values_N, seed=1)


def test_interval_in_parts_is_the_same_quantity(monkeypatch):
    values_N = np.random.default_rng(0).random(50)
    whole = metrics.bootstrap_interval(values_N, seed=0)
    monkeypatch.setattr(metrics, "_DRAWS", 50 * 7)  # 7 resamples at a time
    np.testing.assert_allclose(
        metrics.bootstrap_interval(values_N, seed=0), whole, atol=1e-12
    )


def test_copies_of_a_question_do_not_narrow_a_cluster_interval():
    values = np.random.default_rng(0).random(40)
    labels = np.array([f"country {i}" for i in range(40)])
    alone = metrics.bootstrap_interval(values, seed=0)
    copied = metrics.bootstrap_interval(
        np.repeat(values, 10), seed=0, groups_N=np.repeat(labels, 10)
    )
    naive = metrics.bootstrap_interval(np.repeat(values, 10), seed=0)
    np.testing.assert_allclose(copied, alone, atol=0.02)
    assert naive[1] - naive[0] < 0.5 * (copied[1] - copied[0])


def test_cluster_interval_weighs_groups_by_size():
    # Groups of 1 and 3: resamples have means 1, 1/4 (of 4 questions) and 0, not 1/2.
    values_N, groups_N = np.array([1.0, 0.0, 0.0, 0.0]), np.array([0, 1, 1, 1])
    rng_means = metrics.bootstrap_interval(values_N, 0, groups_N=groups_N)
    assert rng_means == (0.0, 1.0)
    all_one = metrics.bootstrap_interval(np.ones(4), 0, groups_N=groups_N)
    assert all_one == (1.0, 1.0)


def test_bad_values_are_refused():
    for empty in (np.zeros(0), np.zeros(0, np.float32)):
        with pytest.raises(ValueError, match="no question"):
            metrics.bootstrap_interval(empty, seed=0)
    with pytest.raises(ValueError, match="question 1 is nan"):
        metrics.bootstrap_interval(np.array([0.0, np.nan]), seed=0)
    with pytest.raises(ValueError, match="in group"):
        metrics.bootstrap_interval(np.ones(3), seed=0, groups_N=np.array(["x"] * 3))
    with pytest.raises(ValueError, match="resamples = 0"):
        metrics.bootstrap_interval(np.ones(3), seed=0, resamples=0)


def test_p_value_is_the_sign_tests():
    # 12 questions only the second gets right, 4 only the first, 20 ties.
    first_N = np.array([0.0] * 12 + [1.0] * 4 + [1.0] * 20)
    second_N = np.array([1.0] * 12 + [0.0] * 4 + [1.0] * 20)
    exact = 2 * sum(comb(16, i) for i in range(12, 17)) / 2**16
    result = metrics.paired_difference(first_N, second_N, seed=0)
    assert result.value == pytest.approx(8 / 36)
    assert result.n == 36
    assert result.lo < result.value < result.hi
    assert result.p_value == pytest.approx(exact, abs=0.01)
    other = metrics.paired_difference(second_N, first_N, seed=0)
    assert other.value == -result.value
    assert other.p_value == pytest.approx(exact, abs=0.01)


def test_pairing_helps():
    # Two systems that differ by 0.1 everywhere: unpaired intervals overlap widely.
    first_N = np.random.default_rng(0).random(100)
    result = metrics.paired_difference(first_N, first_N + 0.1, seed=0)
    np.testing.assert_allclose([result.lo, result.hi], 0.1)
    assert result.p_value == pytest.approx(1 / 10_001)


def test_equal_systems_do_not_differ():
    same = np.array([1.0, 0.0, 1.0])
    assert metrics.paired_difference(same, same, seed=0) == (0.0, 0.0, 0.0, 1.0, 3)


def test_groups_flip_together():
    # Two groups of 20: only four ways to flip them, two of them as extreme.
    gains, groups = np.ones(40), np.repeat([0, 1], 20)
    result = metrics.paired_difference(np.zeros(40), gains, seed=0, groups_N=groups)
    assert result.p_value == pytest.approx(0.5, abs=0.02)


def test_paired_lengths_must_agree():
    # Under test the annotations would speak first; users run without them.
    unchecked = inspect.unwrap(metrics.paired_difference)
    with pytest.raises(ValueError, match="same questions"):
        unchecked(np.zeros(3), np.zeros(1), seed=0)


def test_importing_metrics_imports_no_jax():
    code = (
        "import sys, radit_jax.evaluation.metrics as _;"
        "assert not {'jax', 'torch', 'nltk'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rouge_l_needs_no_network_and_no_nltk_data(tmp_path):
    code = (
        "import socket\n"
        "def refuse(*_): raise OSError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from radit_jax.evaluation import metrics\n"
        "assert metrics.rouge_l('runs well', ['runs']) > 0.6\n"
        "import sys; assert not {'jax', 'torch', 'tensorflow'} & set(sys.modules)"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "NLTK_DATA": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
