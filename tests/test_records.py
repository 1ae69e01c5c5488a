import json

import numpy as np
import pytest
from report_samples import SYSTEMS, all_generations, answer_rows, generation, passage

from radit_jax.evaluation.files import read_generations, write_generations
from radit_jax.evaluation.records import (
    Row,
    Values,
    answer_values,
    compare,
    mark,
    own_metrics,
)


def test_rows_are_means_of_whole_arrays():
    rows = answer_rows(all_generations())
    values = {(row.system, row.metric): row.value for row in rows}
    assert values == {
        ("closed book", "em"): 0.25,
        ("closed book", "f1"): (5 + 15 * 0.25) / 20,
        ("RA-DIT", "em"): 0.75,
        ("RA-DIT", "f1"): (15 + 5 * 0.25) / 20,
    }
    assert all(row.n == 20 and row.lo < row.value < row.hi for row in rows)


def test_every_dataset_has_its_own_metrics():
    choice = {"accuracy": 1.0}
    given = [
        generation("a", 0, 1.0),
        generation("a", 0, 1.0, "mmlu", metrics=choice),
        generation("a", 0, 1.0, "wow", metrics={"f1": 0.5, "em": 0.0}),
    ]
    rows = [Row(*v[:3], 0.5, 1, 0, 1) for v in answer_values(given)]
    assert [(row.dataset, row.metric) for row in rows] == [
        *[("factbook", "em"), ("factbook", "f1"), ("mmlu", "accuracy")],
        *[("wow", "f1"), ("wow", "em")],
    ]
    rows.insert(0, Row("retriever", "wow", "mrr", 0.5, 1, 0, 1))
    assert own_metrics(rows) == {"wow": "f1", "factbook": "em", "mmlu": "accuracy"}


def test_metrics_of_a_dataset_must_agree():
    for other in ({"em": 1.0}, {"f1": 1.0, "em": 1.0}, {}):
        given = [generation("a", 0, 1.0), generation("b", 7, 1.0, metrics=other)]
        with pytest.raises(ValueError, match="b on question 'q7' of factbook has"):
            answer_values(given)


def test_only_graded_metrics_show_their_value():
    assert [mark("em", v) for v in (1.0, 0.0)] == ["✓", "✗"]
    assert [mark("accuracy", v) for v in (1.0, 0.0)] == ["✓", "✗"]
    assert [mark("rouge_l", v) for v in (1.0, 0.216, 0.0)] == ["1.00", "0.22", "0.00"]
    assert mark("f1", 0.5) == "0.50"


def test_groups_widen_the_interval():
    def width(**fields):
        generations = [generation("RA-DIT", i, float(i < 20)) for i in range(40)]
        grouped = [
            g._replace(**{key: of(i) for key, of in fields.items()})
            for i, g in enumerate(generations)
        ]
        em = answer_rows(grouped)[0]
        return em.hi - em.lo

    assert width(group=lambda i: f"country {i // 10}") > 2 * width()


def test_generations_are_read_as_they_were_written(tmp_path):
    given = [
        *all_generations(),
        generation("a", 0, 1.0, "mmlu")._replace(
            choices=("Paris", "Lyon"),
            choice_scores=(-0.5, -2.0),
            confidence=0.8,
            prompt="<s>\u2028Q: é?",
            passages=(passage(prompt="<s>Background"), passage(4, answer=None)),
        ),
    ]
    write_generations(tmp_path / "g.jsonl", given)
    assert read_generations(tmp_path / "g.jsonl") == given
    text = (tmp_path / "g.jsonl").read_bytes()
    assert len(text.split(b"\n")) == 41 + 1
    assert "é".encode() in text


def test_numbers_from_arrays_can_be_written(tmp_path):
    odd = passage(np.int64(7), weight=np.float32(0.5))
    given = generation("a", 0, 1.0, passages=(odd,), metrics={"em": np.float32(1.0)})
    write_generations(tmp_path / "g.jsonl", [given])
    read = json.loads((tmp_path / "g.jsonl").read_text())
    assert read["passages"][0]["id"] == 7
    assert read["metrics"] == {"em": 1.0}
    endless = given._replace(confidence=float("inf"))
    with pytest.raises(ValueError, match="JSON"):
        write_generations(tmp_path / "g.jsonl", [endless])


def test_pairs_match_by_question_not_by_place():
    first = [generation("a", i, float(i < 10)) for i in range(20)]
    second = [generation("b", i, float(i < 10)) for i in reversed(range(20))]
    found = compare(answer_values(first + second), [("a", "b")], seed=0)
    assert [(d.metric, d.value, d.lo, d.hi, d.p_value) for d in found] == [
        ("em", 0.0, 0.0, 0.0, 1.0),
        ("f1", 0.0, 0.0, 0.0, 1.0),
    ]


def test_systems_are_compared_on_what_both_answered():
    # Nothing is retrieved for commonsense tasks: a system that retrieves has no answer.
    given = all_generations() + [
        generation(SYSTEMS[0], i, 1.0, "piqa", metrics={"accuracy": 1.0})
        for i in range(2)
    ]
    found = compare(answer_values(given), [SYSTEMS], seed=0)
    assert [(d.dataset, d.metric) for d in found] == [
        ("factbook", "em"),
        ("factbook", "f1"),
    ]
    assert found[0].value == 0.5


def test_retrievers_are_compared_on_every_metric_and_dataset():
    hits = {"start": [1.0, 0.0, 0.0, 0.0], "tuned": [1.0, 1.0, 1.0, 0.0]}
    values = [
        Values(name, dataset, metric, np.array(hit))
        for name, hit in hits.items()
        for dataset in ("x", "y")
        for metric in ("gold@1", "mrr")
    ]
    found = compare(values, [("start", "tuned")], seed=0)
    assert [(d.dataset, d.metric, d.value) for d in found] == [
        (dataset, metric, 0.5) for dataset in ("x", "y") for metric in ("gold@1", "mrr")
    ]


def test_what_cannot_be_paired_is_refused():
    values = Values("a", "x", "em", np.array([1.0]))
    with pytest.raises(ValueError, match=r"cannot compare 'b'.* \['a'\]"):
        compare([values], [("a", "b")], seed=0)
    other = values._replace(system="b", dataset="y")
    with pytest.raises(ValueError, match="no common dataset"):
        compare([values, other], [("a", "b")], seed=0)
    other = values._replace(system="b", metric="f1")
    with pytest.raises(ValueError, match="only one of them has em on x"):
        compare([values, other], [("a", "b")], seed=0)
    answered = answer_values([generation("a", 0, 1.0), generation("b", 1, 1.0)])
    with pytest.raises(ValueError, match="only one of them answered question 'q0'"):
        compare(answered, [("a", "b")], seed=0)
