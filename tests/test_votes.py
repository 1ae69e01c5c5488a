import math

import pytest
from report_samples import generation, passage

from radit_jax.evaluation.votes import CURVE_DEPTHS, TABLE_DEPTHS, revote, vote_first
from radit_jax.inference.ensemble import vote


def said(answer, probability, weight):
    log_probability = math.log(probability)
    return passage(answer=answer, log_probability=log_probability, weight=weight)


# Lyon has 0.5 x 0.6 = 0.30; Paris 0.3 x 0.5 + 0.2 x 0.9 = 0.33.
THREE = (said("Lyon", 0.6, 0.5), said("Paris", 0.5, 0.3), said("paris!", 0.9, 0.2))


def voting(i=0, passages=THREE, **fields):
    given = generation("RA-DIT", i, 1.0, passages=passages, metrics={"em": 1.0})
    whole = vote_first(given, len(passages), vote) or ""
    return given._replace(prediction=whole, **fields)


def test_the_first_passages_vote_as_the_ensemble_does():
    # "paris!" is shown: its 0.18 is more than the 0.15 of the other way to write it.
    assert [vote_first(voting(), k, vote) for k in (1, 2, 3)] == [
        *("Lyon", "Lyon", "paris!")
    ]
    assert vote_first(voting(), 10, vote) == "paris!"


def test_weights_of_the_first_passages_sum_to_one():
    seen = []

    def watched(texts, log_probabilities, weights, normalize):
        seen.append(list(weights))
        return vote(texts, log_probabilities, weights, normalize)

    for k in (1, 2, 3):
        vote_first(voting(), k, watched)
    assert seen[0] == [1.0]
    assert seen[1] == pytest.approx([0.625, 0.375])
    assert seen[2] == pytest.approx([0.5, 0.3, 0.2])


@pytest.mark.parametrize("field", ["answer", "log_probability", "weight"])
def test_without_what_a_passage_says_there_is_no_vote(field):
    unknown = (THREE[0], THREE[1]._replace(**{field: None}))
    assert vote_first(voting(passages=unknown), 1, vote) == "Lyon"
    assert vote_first(voting(passages=unknown), 2, vote) is None


def test_rows_by_number_of_passages():
    # The second question has two passages; all of them have voted at 2.
    short = (said("Lyon", 0.9, 0.1), said("Paris", 0.9, 0.9))
    found = revote([voting(0), voting(1, short)], vote, seed=0)
    assert [(d.passages, d.row.metric, d.row.value, d.row.n) for d in found.rows] == [
        (1, "em", 0.0, 2),
        (2, "em", 0.5, 2),
        (3, "em", 1.0, 2),
    ]
    assert found.left_out == []
    assert set(TABLE_DEPTHS) <= set(CURVE_DEPTHS)


def test_the_metric_is_the_datasets_own():
    given = voting(metrics={"f1": 1.0}, answers=("Paris Lyon",))
    assert [d.row.value for d in revote([given], vote, 0).rows] == pytest.approx(
        [2 / 3, 2 / 3, 2 / 3]
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"prediction": "Lyon"},  # another way of mixing
        {"choices": ("Paris", "Lyon")},
        {"metrics": {"unheard_of": 1.0}},
        {"passages": (THREE[0], passage(log_probability=None))},
    ],
    ids=["prediction", "choices", "metric", "unknown"],
)
def test_what_is_no_such_vote_is_left_out_and_said(fields):
    good = voting(0)
    odd = voting(0, dataset="odd")._replace(**fields)
    found = revote([good, odd], vote, seed=0)
    assert {d.row.dataset for d in found.rows} == {"factbook"}
    assert found.left_out == [("odd", "RA-DIT")]


def test_one_passage_has_no_curve_and_none_is_told_apart():
    single = generation("gold", 0, 1.0)
    closed = generation("closed book", 0, 1.0)
    found = revote([closed, single], vote, seed=0)
    assert found == ([], [], ["closed book"])
