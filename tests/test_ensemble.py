"""Weights and votes of the parallel ensemble against numbers worked by hand."""

import numpy as np
import pytest

from radit_jax.inference.ensemble import passage_weights, vote


def scores(*values):
    return np.asarray([values], np.float32)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 7.0])
def test_weights_are_the_softmax_of_the_scores(temperature):
    rng = np.random.default_rng(0)
    scores_BC = rng.standard_normal((4, 5)).astype(np.float32)
    weights_BC = np.exp(scores_BC.astype(np.float64) / temperature)
    weights_BC /= weights_BC.sum(1, keepdims=True)
    found_BC = passage_weights(scores_BC, temperature)
    np.testing.assert_allclose(found_BC, weights_BC, rtol=1e-4)
    assert found_BC.dtype == np.float32


def test_scores_of_hundreds_stay_finite():
    """DRAGON+'s dot products are in the hundreds."""
    np.testing.assert_allclose(
        passage_weights(scores(400.0, 400.0, -400.0), 1.0), [[0.5, 0.5, 0.0]]
    )


def test_where_there_is_no_passage_there_is_no_weight():
    np.testing.assert_allclose(
        passage_weights(scores(1.0, 1.0, -np.inf), 1.0), [[0.5, 0.5, 0.0]]
    )


def test_a_low_temperature_trusts_the_best_passage():
    assert passage_weights(scores(0.9, 0.8), 0.001)[0, 0] == pytest.approx(1.0)
    even = passage_weights(scores(0.9, 0.8), 1e6)[0]
    np.testing.assert_allclose(even, [0.5, 0.5], atol=1e-6)


def test_votes_for_the_same_answer_add_up():
    votes = vote(
        ["Paris", "Rome", "paris"],
        [np.log(0.5), np.log(0.9), np.log(0.4)],
        [0.4, 0.35, 0.25],
        str.lower,
    )
    assert [v.text for v in votes] == ["Rome", "Paris"]
    assert [v.weight for v in votes] == pytest.approx([0.315, 0.3])
    votes = vote(["Paris", "Rome", "paris"], [0.0] * 3, [0.3, 0.4, 0.3], str.lower)
    assert [v.text for v in votes] == ["Paris", "Rome"]
    assert votes[0].weight == pytest.approx(0.6)


def test_the_likeliest_spelling_is_shown():
    votes = vote(["paris", "PARIS"], [np.log(0.2), np.log(0.3)], [0.5, 0.5], str.lower)
    assert votes[0].text == "PARIS"


def test_one_passage_is_plain_decoding():
    weights_C = passage_weights(scores(3.0), 1.0)[0]
    votes = vote(["Paris"], [np.log(0.5)], weights_C.tolist(), str.lower)
    assert votes == [("Paris", pytest.approx(0.5))]


def test_of_equal_votes_the_better_passage_wins():
    votes = vote(["Rome", "Paris"], [0.0, 0.0], [0.5, 0.5], str.lower)
    assert votes[0].text == "Rome"


def test_lists_of_unequal_length_are_an_error():
    with pytest.raises(ValueError, match="argument 3"):
        vote(["Rome"], [0.0], [0.5, 0.5], str.lower)
