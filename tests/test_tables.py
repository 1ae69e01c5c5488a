import pytest
from report_samples import SYSTEMS, all_generations

from radit_jax.evaluation import tables
from radit_jax.evaluation.calibration import Calibration
from radit_jax.evaluation.records import Row, answer_values, compare


def row(system, dataset, value, metric="em", n=4, reach=0.1):
    return Row(system, dataset, metric, value, n, value - reach, value + reach)


def test_datasets_of_the_same_metrics_share_a_table():
    rows = [
        row("LM", "nq", 0.5),
        row("LM", "nq", 0.6, "f1"),
        row("LM", "mmlu", 0.25, "accuracy"),
        row("LM", "test", 0.5),
        row("LM", "test", 0.7, "f1"),
        row("R", "test", 0.7, "mrr"),
    ]
    both, choice = tables.metric_tables(rows)
    assert both.cells[0] == ["dataset", "n", "system", "EM", "F1"]
    assert [line[0] for line in both.cells[1:]] == ["NQ", "test"]
    assert choice.cells == [
        ["dataset", "n", "system", "accuracy"],
        ["MMLU", "4", "LM", "25.0 [15.0, 35.0]"],
    ]


def test_retrieval_table_is_in_the_fields_order():
    metrics = ("mrr", "gold@1", "answer@20", "answer@5", "answer@1")
    rows = [row("DRAGON+", "factbook", 0.5, metric) for metric in metrics]
    table = tables.retrieval_table([*rows, row("LM", "factbook", 0.2)])
    header = ["dataset", "n", "system", "answer@1", "answer@5", "gold@1", "MRR"]
    assert table.cells[0] == [*header, "answer@20"]
    assert table.cells[1][:4] == ["factbook", "4", "DRAGON+", "50.0 [40.0, 60.0]"]
    assert tables.retrieval_table([row("LM", "factbook", 0.2)]) is None


def test_kinds_show_the_datasets_metric():
    given = all_generations()
    (table,) = tables.kind_tables(given)
    assert table.note == "factbook: EM."
    # Even questions ask for the area: 0, 2, 4 and 0 .. 14 are right.
    assert table.cells == [
        ["kind", "n", *SYSTEMS],
        ["area", "10", "30.0", "80.0"],
        ["capital", "10", "20.0", "70.0"],
    ]
    graded = [g._replace(metrics={"f1": 0.5}) for g in given if g.system == "RA-DIT"]
    (table,) = tables.kind_tables([*graded, given[0]._replace(kind="", dataset="x")])
    assert table.note == "factbook: F1."
    assert table.cells[1] == ["area", "10", "50.0"]


def test_paired_table():
    differences = compare(answer_values(all_generations()), [SYSTEMS], seed=0)
    header, em, f1 = tables.difference_table(differences).cells
    assert header == ["dataset", "comparison", "metric", "difference", "p", "n"]
    assert em[:3] == ["factbook", "RA-DIT over closed book", "EM"]
    assert em[3].startswith("+50.0 [+")
    assert float(em[4]) == pytest.approx(2 / 2**10, abs=0.002)  # 10 wins, no loss
    assert em[5] == "20"
    assert f1[3].startswith("+37.5 [+")
    sure = differences[0]._replace(p_value=0.0001)
    assert tables.difference_table([sure]).cells[1][4] == "< 0.001"
    assert tables.difference_table([]) is None


def test_calibration_table_names_the_datasets():
    found = [
        Calibration("a", "", 8, 0.5, 0.25, 0.1234, ()),
        Calibration("a", "nq", 8, 0.5, 0.25, 0.1234, ()),
    ]
    assert tables.calibration_table(found).cells[1:] == [
        ["a", "all", "8", "50.0", "25.0", "12.3"],
        ["a", "NQ", "8", "50.0", "25.0", "12.3"],
    ]
    assert tables.calibration_table([]) is None
