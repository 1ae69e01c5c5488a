import numpy as np
import pytest
from report_samples import generation, passage

from radit_jax.evaluation.calibration import calibration, calibrations

TWO = (passage(1), passage(2))


def test_expected_calibration_error_by_hand():
    # Bins: 0.15 and 0.19 (one of two right), 0.92 (right), and 1.0 in the same one.
    sure = np.array([0.15, 0.19, 0.92, 1.0])
    right = np.array([1.0, 0.0, 1.0, 0.0])
    found = calibration("a", "x", sure, right)
    assert [(b.n, b.confidence, b.correct) for b in found.bins] == [
        (2, pytest.approx(0.17), 0.5),
        (2, pytest.approx(0.96), 0.5),
    ]
    assert found.error == pytest.approx((2 * 0.33 + 2 * 0.46) / 4)
    assert found[:5] == ("a", "x", 4, pytest.approx(0.565), 0.5)


def test_perfect_calibration_has_no_error():
    right = np.array([1.0] * 3 + [0.0])
    assert calibration("a", "x", np.full(4, 0.75), right).error == 0.0


def test_intervals_are_wilsons():
    # Published values for 0, 5 and 10 of 10.
    wanted = {0: (0.0, 0.2775), 5: (0.2366, 0.7634), 10: (0.7225, 1.0)}
    for count, interval in wanted.items():
        right = np.array([1.0] * count + [0.0] * (10 - count))
        (only,) = calibration("a", "x", np.full(10, 0.5), right).bins
        assert (only.lo, only.hi) == pytest.approx(interval, abs=1e-4)


def test_all_datasets_come_first_and_then_each():
    given = [
        generation("a", i, float(i < 3), dataset, passages=TWO, confidence=sure)
        for dataset, sure in (("x", 0.75), ("y", 0.25))
        for i in range(4)
    ]
    pooled, x, y = calibrations(given)
    assert [(c.dataset, c.n) for c in (pooled, x, y)] == [("", 8), ("x", 4), ("y", 4)]
    assert (x.error, y.error, pooled.error) == (0.0, 0.5, 0.25)


def test_only_answers_that_could_be_others_count():
    alone = generation("a", 0, 1.0, confidence=1.0)
    closed = generation("closed book", 0, 1.0, confidence=1.0)
    silent = generation("b", 0, 1.0, passages=TWO)
    assert calibrations([alone, closed, silent]) == []
    chosen = closed._replace(choices=("Paris", "Lyon"))
    assert [c.system for c in calibrations([alone, chosen])] == ["closed book"] * 2


def test_graded_answers_are_neither_right_nor_wrong():
    given = [
        generation("a", i, 1.0, "wow", passages=TWO, confidence=0.5)._replace(
            metrics={"f1": value}
        )
        for i, value in enumerate((1.0, 0.4))
    ]
    assert calibrations(given) == []
