import numpy as np
from report_samples import SYSTEMS, all_generations, answer_rows

from radit_jax.evaluation.paper_tables import _average, paper_tables
from radit_jax.evaluation.records import Row
from radit_jax.evaluation.votes import DepthRow, Revoted

DUAL = ("LM + retrieval", "LM + R-FT", "LM-FT + retrieval", "RA-DIT (LM-FT + R-FT)")


def row(system, dataset, value, metric="em", n=4, reach=0.1):
    return Row(system, dataset, metric, value, n, value - reach, value + reach)


def by_title(rows, revoted=None):
    return {table.title: table for table in paper_tables(rows, revoted)}


def test_columns_stand_as_in_the_paper_and_ones_own_after_them():
    datasets = ["test", "wow", "trex", "zsre", "aida", "fever", "hopo", "eli5", "tqa"]
    datasets += ["nq", "mmlu", "obqa", "arc_c", "arc_e", "winogrande", "hellaswag"]
    datasets += ["siqa", "piqa", "boolq", "a_b"]
    found = by_title([row("LM", dataset, 0.5) for dataset in datasets])
    assert [cell.split()[0] for cell in found["Answers"].cells[0]] == [
        *("system", "MMLU", "NQ", "TQA", "ELI5", "HoPo", "FEV", "AIDA", "zsRE"),
        *("T-REx", "WoW", "test", "a_b", "average", "average", "average"),
    ]
    assert found["Answers"].cells[0][-3:] == [
        *("average of 4", "average of 10", "average of own")
    ]
    assert [cell.split()[0] for cell in found["Commonsense reasoning"].cells[0]] == [
        *("system", "BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-E"),
        *("ARC-C", "OBQA", "average"),
    ]
    assert found["Answers"].main
    assert found["Commonsense reasoning"].main


def test_a_column_has_the_tasks_own_metric_n_and_intervals():
    rows = [
        row("LM", "wow", 0.155, "f1", 2500),
        row("LM", "wow", 0.01, "em", 2500, 0.01),
        row("LM + gold passage", "wow", 0.2, "f1", 100),
        row("retriever", "wow", 0.3, "answer@1", 2500),
        row("LM", "mmlu", 0.25, "accuracy", 14042, 0.005),
    ]
    header, lm, gold = by_title(rows)["Answers"].cells
    assert header[:3] == [
        "system",
        "MMLU accuracy (n = 14042)",
        "WoW F1 (n = 100-2500)",
    ]
    assert lm[:3] == ["LM", "25.0 [24.5, 25.5]", "15.5 [5.5, 25.5]"]
    assert gold[:3] == ["LM + gold passage", "-", "20.0 [10.0, 30.0]"]


def test_averages_are_of_what_is_there_and_say_of_how_many():
    rows = [
        row("LM", "mmlu", 0.2, reach=0.03),
        row("LM", "nq", 0.4, reach=0.04),
        row("LM", "wow", 0.9, reach=0.0),
        row("RA-DIT", "nq", 0.5),
    ]
    header, lm, radit = by_title(rows)["Answers"].cells
    assert header[-2:] == ["average of 4", "average of 10"]
    # Half of sqrt(3 ** 2 + 4 ** 2) points; a third of it.
    assert lm[-2:] == ["30.0 [27.5, 32.5], 2 of 4", "50.0 [48.3, 51.7], 3 of 10"]
    assert radit[-2:] == ["50.0 [40.0, 60.0], 1 of 4", "50.0 [40.0, 60.0], 1 of 10"]


def test_averages_of_the_same_or_of_one_dataset_are_no_columns():
    rows = [row("LM", "mmlu", 0.2), row("LM", "nq", 0.4), row("LM", "test", 0.4)]
    header = by_title(rows)["Answers"].cells[0]
    assert [cell for cell in header if "average" in cell] == ["average of 4"]
    assert "average" not in by_title(rows[2:])["Answers"].note


def test_an_average_interval_covers_the_true_mean():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        rows = {}
        for dataset, rate in (("x", 0.2), ("y", 0.5), ("z", 0.9)):
            drawn = (rng.random(200) < rate).astype(float)
            deviation = 1.96 * drawn.std() / np.sqrt(200)
            rows[dataset] = row("LM", dataset, drawn.mean(), reach=deviation)
        numbers = _average(rows, ("x", "y", "z")).split("[")[1].split("]")[0]
        lo, hi = map(float, numbers.split(","))
        inside += lo <= 100 * 1.6 / 3 <= hi
    assert 180 <= inside <= 198


def test_the_dual_ablation_has_the_four_systems_that_retrieve():
    systems = ("LM", *DUAL, "LM-FT + gold passage")
    rows = [row(system, "nq", 0.5) for system in systems]
    table = by_title(rows)["Dual ablation"]
    assert [line[0] for line in table.cells[1:]] == list(DUAL)
    assert "Dual ablation" not in by_title(rows[:2])  # nothing to compare


def depths(dataset, system="LM + retrieval"):
    return [DepthRow(k, row(system, dataset, 0.1 + k / 20)) for k in (1, 2, 3, 5, 10)]


def test_numbers_of_passages_by_system_with_closed_book_first():
    rows = [row(s, d, 0.2) for s in ("LM", "LM + retrieval") for d in ("hopo", "mmlu")]
    rows.append(row("LM", "nq", 0.2))
    rows.append(row("LM + retrieval", "nq", 0.2))
    revoted = Revoted(
        depths("nq") + depths("hopo"), [("mmlu", "LM + retrieval")], ["LM"]
    )
    table = by_title(rows, revoted)["Number of passages"]
    header, *lines = table.cells
    # Table 4 begins with the KILT tasks; MMLU has no vote.
    assert header == ["passages", "system", "HoPo EM (n = 4)", "NQ EM (n = 4)"]
    assert [line[:3] for line in lines] == [
        ["none", "LM", "20.0 [10.0, 30.0]"],
        ["top-1", "LM + retrieval", "15.0 [5.0, 25.0]"],
        ["top-3", "LM + retrieval", "25.0 [15.0, 35.0]"],
        ["top-10", "LM + retrieval", "60.0 [50.0, 70.0]"],
    ]
    assert table.note.endswith("Left out is what is not answered by such a vote: MMLU.")
    partly = revoted._replace(left_out=[("nq", "LM + R-FT")])
    assert ": LM + R-FT on NQ." in by_title(rows, partly)["Number of passages"].note
    assert "Number of passages" not in by_title(rows)
    assert "Number of passages" not in by_title(rows, Revoted([], [], ["LM"]))


def test_cells_know_whose_numbers_they_are():
    rows = [row("LM", "nq", 0.5), row("LM", "test", 0.5), row("RA-DIT", "nq", 0.5)]
    rows += [row("LM", "tqa", 0.5)]
    table = by_title(rows)["Answers"]
    assert table.datasets == ("", "nq", "tqa", "test", "")
    assert table.systems == ("LM", "RA-DIT")
    assert len(table.datasets) == len(table.cells[0])


def test_a_rows_of_generations_fit_the_tables():
    found = by_title(answer_rows(all_generations()))
    assert list(found) == ["Answers"]
    assert [line[0] for line in found["Answers"].cells[1:]] == list(SYSTEMS)
