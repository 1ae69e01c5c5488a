import json
import subprocess
import sys

import numpy as np
import pytest

from radit_jax.evaluation import report
from radit_jax.evaluation.report import Generation, Row, SourcePassage, Values

SYSTEMS = ("closed book", "RA-DIT")


def passage(id=3, text="Paris is the capital."):
    return SourcePassage(id, "France", "Cities", text, 0.75, "Paris")


def generation(system, i, em, dataset="factbook", kind="capital", **fields):
    base = Generation(
        system=system,
        dataset=dataset,
        question_id=f"q{i}",
        kind=kind,
        question=f"What is the capital of country {i}?",
        answers=("Paris", "City of Light"),
        prediction="Paris" if em else "Lyon",
        passages=() if system == "closed book" else (passage(),),
        em=em,
        f1=max(em, 0.25),
    )
    return base._replace(**fields)


def answer_rows(generations):
    return [report.measure(v, seed=0) for v in report.answer_values(generations)]


def all_generations():
    # Of 20 questions the closed book gets 5 right and RA-DIT 15, 5 of them shared.
    return [
        generation(system, i, float(i < right), kind="capital" if i % 2 else "area")
        for system, right in zip(SYSTEMS, (5, 15), strict=True)
        for i in range(20)
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "report"
    generations = all_generations()
    rows = answer_rows(generations)
    hits = np.array([1.0, 0.0, 1.0, 1.0])
    rows += [
        report.measure(Values("DRAGON+", "factbook", metric, hits), seed=0)
        for metric in ("mrr", "gold@1", "answer@5", "answer@1")
    ]
    differences = report.compare(report.answer_values(generations), [SYSTEMS], seed=0)
    report.write_report(folder, rows, generations, differences, examples=4)
    return folder, rows, generations


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


def test_json_has_the_rows(written):
    folder, rows, _ = written
    results = json.loads((folder / "results.json").read_text())
    assert len(results) == len(rows) == 8
    assert results[0] == {
        "system": "closed book",
        "dataset": "factbook",
        "metric": "em",
        "value": 0.25,
        "n": 20,
        "ci95": [rows[0].lo, rows[0].hi],
    }


def test_what_was_written_is_read_back(written):
    folder, rows, generations = written
    assert report.read_rows(folder) == rows
    expected = report.compare(report.answer_values(generations), [SYSTEMS], seed=0)
    assert report.read_differences(folder) == expected
    assert expected[0].value == 0.5


def test_generations_are_kept_as_given(written):
    folder, _, generations = written
    lines = (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(generations) == 40
    for line, given in zip(lines, generations, strict=True):
        read = json.loads(line)
        passages = tuple(SourcePassage(**p) for p in read.pop("passages"))
        answers = tuple(read.pop("answers"))
        assert Generation(**read, answers=answers, passages=passages) == given


def section(folder, title):
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert f"## {title}\n" in text
    return text.split(f"## {title}\n")[1].split("\n## ")[0].strip()


def cells(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_answer_table(written):
    header, rule, *lines = cells(section(written[0], "Answers"))
    assert header == ["system", "factbook EM (n = 20)", "factbook F1 (n = 20)"]
    assert rule == ["---", "---:", "---:"]
    assert [line[0] for line in lines] == [*SYSTEMS]  # the retriever has no answers
    em = written[1][0]
    assert lines[0][1] == f"25.0 [{100 * em.lo:.1f}, {100 * em.hi:.1f}]"


def test_retrieval_table_is_in_the_fields_order(written):
    header, _, line = cells(section(written[0], "Retrieval"))
    metrics = ["answer@1", "answer@5", "gold@1", "MRR"]
    assert header == ["dataset", "n", "system", *metrics]
    assert line[:3] == ["factbook", "4", "DRAGON+"]
    assert line[3].startswith("75.0 [")


def test_kinds_table(written):
    title = "Exact match by kind of question: factbook"
    header, _, *lines = cells(section(written[0], title))
    assert header == ["kind", "n", *SYSTEMS]
    # Even questions ask for the area: 0, 2, 4 and 0 .. 14 are right.
    assert lines == [["area", "10", "30.0", "80.0"], ["capital", "10", "20.0", "70.0"]]


def test_paired_table(written):
    _, _, em, f1 = cells(section(written[0], "Paired differences"))
    assert em[:3] == ["factbook", "RA-DIT over closed book", "EM"]
    assert em[3].startswith("+50.0 [+")
    assert float(em[4]) == pytest.approx(2 / 2**10, abs=0.002)  # 10 wins, no loss
    assert em[5] == "20"
    assert f1[3].startswith("+37.5 [+")


def test_pairs_match_by_question_not_by_place():
    first = [generation("a", i, float(i < 10)) for i in range(20)]
    second = [generation("b", i, float(i < 10)) for i in reversed(range(20))]
    values = report.answer_values(first + second)
    text = report._differences_section(report.compare(values, [("a", "b")], seed=0))
    assert cells(text)[2][3:] == ["+0.0 [+0.0, +0.0]", "1.000", "20"]


def test_retrievers_are_compared_on_every_metric_and_dataset():
    hits = {"start": [1.0, 0.0, 0.0, 0.0], "tuned": [1.0, 1.0, 1.0, 0.0]}
    values = [
        Values(name, dataset, metric, np.array(hit))
        for name, hit in hits.items()
        for dataset in ("x", "y")
        for metric in ("gold@1", "mrr")
    ]
    found = report.compare(values, [("start", "tuned")], seed=0)
    assert [(d.dataset, d.metric, d.value) for d in found] == [
        (dataset, metric, 0.5) for dataset in ("x", "y") for metric in ("gold@1", "mrr")
    ]
    line = report.text_report([], (), found).splitlines()[2]
    assert line.startswith("x        tuned over start  gold@1  +50.0 [+0.0, +100.0]")


def test_examples_show_both_sides(written):
    text = section(written[0], "Generations")
    assert text.startswith(
        "Drawn at random (seed 0): 2 of the 10 questions on which systems differ in "
        "exact match, 2 of the 10 others."
    )
    assert text.count("**What is the capital") == 4
    assert text.count("- ✗ closed book: Lyon\n- ✓ RA-DIT: Paris") == 2
    assert text.count("- Gold: Paris; City of Light") == 4
    assert "- Top passage: *France: Cities* — Paris is the capital." in text


def test_passages_are_told_apart_and_shortened():
    text = report._examples_section(
        [
            generation("a", 0, 1.0, passages=(passage(1, "word " * 400),)),
            generation("b", 0, 0.0, passages=(passage(2, "other"),)),
        ],
        examples=1,
        seed=0,
    )
    assert "- Top passage of a: *France: Cities* — word word" in text
    assert "- Top passage of b: *France: Cities* — other" in text
    assert max(map(len, text.splitlines())) < 320


def test_texts_cannot_break_the_page():
    wild = "a | b\n# *head* <b>x</b> &amp; [x](y) `c` _d_ snake_case 5 < 6"
    assert report._escape(wild) == (
        r"a \| b # \*head\* \<b>x\</b> \&amp; [x\](y) \`c\` \_d\_ snake_case 5 < 6"
    )


def test_missing_numbers_show_as_a_dash():
    rows = [
        Row("a", "x", "em", 0.5, 4, 0.0, 1.0),
        Row("b", "y", "em", 0.25, 8, 0.0, 0.5),
    ]
    _, *lines = report._answer_cells(rows)
    assert lines == [
        ["a", "50.0 [0.0, 100.0]", "-"],
        ["b", "-", "25.0 [0.0, 50.0]"],
    ]


def test_text_table_is_aligned():
    rows = [
        Row("LM", "factbook", "em", 0.05, 20, 0.0, 0.1),
        Row("LM", "factbook", "f1", 0.125, 20, 0.1, 0.2),
        Row("LM-FT", "factbook", "em", 1.0, 20, 1.0, 1.0),
        Row("LM", "nq", "em", 0.5, 3610, 0.484, 0.516),
        Row("LM", "nq", "mrr", 0.5, 3610, 0.4, 0.6),
    ]
    assert report.text_report(rows).splitlines() == [
        "dataset      n  system                    EM                 F1",
        "--------  ----  ------  --------------------  -----------------",
        "factbook    20  LM           5.0 [0.0, 10.0]  12.5 [10.0, 20.0]",
        "            20  LM-FT   100.0 [100.0, 100.0]                  -",
        "nq        3610  LM         50.0 [48.4, 51.6]                  -",
        "",
        "retrieval      nq (n = 3610)",
        "---------  -----------------",
        "LM MRR     50.0 [40.0, 60.0]",
    ]
    assert report.text_report([]) == ""


def test_text_report_shows_answers_side_by_side():
    rows = answer_rows(all_generations())
    shown = report.text_report(rows, all_generations(), examples=3).split("\n\n")
    assert len(shown) == 1 + 3
    question, closed, open_ = shown[1].splitlines()
    assert question.startswith("What is the capital of country ")
    assert question.endswith("?  (factbook; Paris / City of Light)")
    # The first two are among those on which the systems differ.
    assert closed == "  - closed book  Lyon"
    assert open_ == "  + RA-DIT       Paris   [France: Cities]"
    assert report.text_report(rows, all_generations(), examples=0).count("\n\n") == 0


def test_doubles_and_impossible_values_are_refused(tmp_path):
    row = Row("a", "x", "em", 0.5, 4, 0.0, 1.0)
    given = generation("a", 0, 1.0)

    def write(rows, generations):
        report.write_report(tmp_path / "report", rows, generations)

    with pytest.raises(ValueError, match="two rows for a / x / em"):
        write([row, row], [])
    with pytest.raises(ValueError, match="two generations for a / factbook / q0"):
        write([row], [given, given])
    for bad in ({"value": 52.0}, {"lo": 0.9, "hi": 0.1}, {"n": 0}, {"value": np.nan}):
        with pytest.raises(ValueError, match=r"must have value, lo <= hi in \[0, 1\]"):
            write([row._replace(**bad)], [])
    with pytest.raises(ValueError, match="'q0' of factbook: em 2"):
        write([row], [given._replace(em=2.0)])
    infinite = passage()._replace(weight=float("nan"))
    with pytest.raises(ValueError, match="passage 3 has weight nan"):
        write([row], [given._replace(passages=(infinite,))])
    values = Values("a", "x", "em", np.array([1.0]))
    with pytest.raises(ValueError, match=r"cannot compare 'b'.* \['a'\]"):
        report.compare([values], [("a", "b")], seed=0)
    other = values._replace(system="b", dataset="y")
    with pytest.raises(ValueError, match="only one of them has em on x"):
        report.compare([values, other], [("a", "b")], seed=0)
    answered = report.answer_values([given, generation("b", 1, 1.0)])
    with pytest.raises(ValueError, match="only one of them answered question 'q0'"):
        report.compare(answered, [("a", "b")], seed=0)
    with pytest.raises(ValueError, match="no row has metric 'em'"):
        write([row._replace(metric="f1")], [])
    written = tmp_path / "report"
    assert not list(written.iterdir()), "a refused report leaves no half of one"


def test_numbers_from_arrays_can_be_written(tmp_path):
    odd = passage()._replace(id=np.int64(7), weight=np.float32(0.5))
    given = generation("a", 0, np.float32(1.0), passages=(odd,))
    other = generation("a", 1, np.float64(0.0))
    report.write_report(tmp_path, answer_rows([given, other]), [given, other])
    line = (tmp_path / "generations.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["passages"][0]["id"] == 7
    assert json.loads(line)["em"] == 1.0


def test_plot_is_readable_at_800_pixels(written):
    from matplotlib.image import imread

    picture = imread(written[0] / "results.png")
    assert picture.shape[1] == 1600
    colours = {
        tuple(np.round(255 * c).astype(int))
        for c in picture[::7, ::7, :3].reshape(-1, 3)
    }
    for colour in report._COLOURS[:2]:
        assert tuple(bytes.fromhex(colour[1:])) in colours
    assert tuple(bytes.fromhex(report._COLOURS[2][1:])) not in colours


@pytest.mark.filterwarnings("error")  # of an axis without extent
def test_many_datasets_fill_a_grid(tmp_path):
    rows = [Row("a", f"set {i}", "em", 0.0, 4, 0.0, 0.0) for i in range(4)]
    report.plot_results(rows, tmp_path / "all_zero.png")
    assert (tmp_path / "all_zero.png").stat().st_size > 1000


def test_importing_report_imports_neither_jax_nor_matplotlib():
    code = (
        "import sys, radit_jax.evaluation.report as _;"
        "assert not {'jax', 'torch', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
