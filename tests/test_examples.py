import pytest
from report_samples import all_generations, generation

from radit_jax.evaluation.examples import choose, sample_questions


def test_half_of_the_questions_are_those_where_systems_differ():
    found = choose(all_generations(), 6, seed=1)
    assert found[1:] == (3, 10, 3, 10)
    differ = [len({g.value for g in answered}) > 1 for answered in found.questions]
    assert differ == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("alike", "found"), [(1, (5, 5, 1, 1)), (5, (1, 1, 5, 5))])
def test_where_one_side_is_short_the_other_fills_up(alike, found):
    given = [
        generation(system, i, float(i < right))
        for system, right in (("a", 6), ("b", alike))
        for i in range(6)
    ]
    assert choose(given, 6, seed=0)[1:] == found
    assert choose(given, 100, seed=0)[1:] == found
    assert len(choose(given, 100, seed=0).questions) == 6


def test_large_datasets_leave_room_for_small_ones():
    sizes = {"large": 50, "small": 3, "middle": 12}
    given = [
        generation(system, i, 1.0, dataset)
        for system in ("a", "b")
        for dataset, size in sizes.items()
        for i in range(size)
    ]
    counts = dict.fromkeys(sizes, 0)
    found = sample_questions(given, 23, seed=0)
    for answered in found:
        assert [g.system for g in answered] == ["a", "b"]
        counts[answered[0].dataset] += 1
    assert counts == {"large": 10, "small": 3, "middle": 10}
    assert found == sample_questions(given, 23, seed=0)
    assert found != sample_questions(given, 23, seed=1)
    assert len(sample_questions(given, 1000, seed=0)) == 65
