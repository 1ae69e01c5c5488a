import json
import subprocess
import sys

import numpy as np
import pytest
from report_samples import (
    SYSTEMS,
    all_generations,
    answer_rows,
    cells,
    generation,
    passage,
)

from radit_jax.evaluation.files import (
    read_differences,
    read_generations,
    read_rows,
)
from radit_jax.evaluation.records import (
    Row,
    Values,
    answer_values,
    compare,
    measure,
)
from radit_jax.evaluation.report import write_report
from radit_jax.inference.ensemble import vote

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8) + (8).to_bytes(4) + (6).to_bytes(4)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "report"
    generations = all_generations()
    rows = answer_rows(generations)
    hits = np.array([1.0, 0.0, 1.0, 1.0])
    rows += [
        measure(Values("DRAGON+", "factbook", metric, hits), seed=0)
        for metric in ("mrr", "gold@1", "answer@5", "answer@1")
    ]
    differences = compare(answer_values(generations), [SYSTEMS], seed=0)
    write_report(folder, rows, generations, differences, examples=4)
    return folder, rows, generations


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
    assert read_rows(folder) == rows
    expected = compare(answer_values(generations), [SYSTEMS], seed=0)
    assert read_differences(folder) == expected
    assert expected[0].value == 0.5
    assert read_generations(folder / "generations.jsonl") == generations


def section(folder, title):
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert f"## {title}\n" in text
    return text.split(f"## {title}\n")[1].split("\n## ")[0].strip()


def test_markdown_has_all_sections(written):
    folder, rows, _ = written
    header, _, closed, _ = cells(section(folder, "Answers"))
    assert header == ["system", "factbook EM (n = 20)"]
    assert closed[1] == f"25.0 [{100 * rows[0].lo:.1f}, {100 * rows[0].hi:.1f}]"
    assert cells(section(folder, "All metrics"))[0][-2:] == ["EM", "F1"]
    assert cells(section(folder, "Retrieval"))[0][-1] == "MRR"
    assert len(cells(section(folder, "Paired differences"))) == 2 + 2
    assert cells(section(folder, "Kinds of questions"))[0] == ["kind", "n", *SYSTEMS]
    assert "![Answers](results.png)" in section(folder, "Plots")
    assert section(folder, "Generations").count("- Gold: ") == 4


def test_only_what_there_is_is_plotted(written):
    folder, _, _ = written
    pictures = sorted(path.name for path in folder.glob("**/*.png"))
    assert pictures == ["results.png", "retrieval.png"]


def test_one_metric_alone_is_shown_once(tmp_path):
    given = [g._replace(metrics={"em": g.value}) for g in all_generations()]
    write_report(tmp_path, answer_rows(given), given)
    text = (tmp_path / "results.md").read_text()
    assert "## All metrics" not in text
    assert "## Retrieval" not in text
    assert "## Paired differences" not in text


def ensemble(i):
    """Right at first, with fewer passages than the wrong answer has."""
    read = [passage(answer="Paris" if k == 0 else "Lyon", weight=0.3) for k in range(3)]
    said = "Paris" if i % 2 else "Lyon"
    read = read if said == "Lyon" else read[:1] * 3
    return generation("RA-DIT", i, float(i % 2), passages=tuple(read), confidence=0.6)


def test_a_vote_shows_what_fewer_passages_say(tmp_path):
    given = [ensemble(i) for i in range(4)]
    given += [generation("closed book", i, 0.0) for i in range(4)]
    write_report(tmp_path, answer_rows(given), given, vote=vote)
    lines = cells(section(tmp_path, "Number of passages"))[2:]
    assert [[*line[:2], line[2].split()[0]] for line in lines] == [
        ["none", "closed book", "0.0"],
        ["top-1", "RA-DIT", "100.0"],
        ["top-3", "RA-DIT", "50.0"],
    ]
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["calibration.png", "passages.png", "results.png"]
    assert cells(section(tmp_path, "Calibration"))[2][:4] == [
        *("RA-DIT", "all", "4", "60.0")
    ]
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 3
    assert "Number of passages" in page


def test_figures_are_copied_into_the_report(tmp_path):
    (tmp_path / "curves.png").write_bytes(PNG)
    given = all_generations()
    figures = {
        "R-FT: <loss>": tmp_path / "curves.png",
        "R-FT (loss)": tmp_path / "curves.png",
    }
    folder = tmp_path / "report"
    write_report(folder, answer_rows(given), given, figures=figures)
    copied = sorted(path.name for path in (folder / "figures").iterdir())
    assert copied == ["1_r_ft_loss.png", "2_r_ft_loss.png"]
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "<figcaption>R-FT: &lt;loss&gt;</figcaption>" in page
    assert 'width="8" height="6"' in page
    assert "figures/1_r_ft_loss.png" in section(folder, "Plots")


def test_what_makes_no_sense_is_refused(tmp_path):
    row = Row("a", "x", "em", 0.5, 4, 0.0, 1.0)
    given = generation("a", 0, 1.0)

    def write(rows, generations, **more):
        write_report(tmp_path / "report", rows, generations, **more)

    with pytest.raises(ValueError, match="two rows for a / x / em"):
        write([row, row], [])
    with pytest.raises(ValueError, match="two generations for a / factbook / q0"):
        write([row], [given, given])
    for bad in ({"value": 52.0}, {"lo": 0.9, "hi": 0.1}, {"n": 0}, {"value": np.nan}):
        with pytest.raises(ValueError, match=r"must have value, lo <= hi in \[0, 1\]"):
            write([row._replace(**bad)], [])
    with pytest.raises(ValueError, match="no row has a metric of answers"):
        write([row._replace(metric="mrr")], [])
    for bad, message in [
        ({"metrics": {"em": 2.0}}, "em 2"),
        ({"metrics": {"em": 1.0, "f1": float("nan")}}, "f1 nan"),
        ({"confidence": 1.5}, "confidence 1.5"),
        ({"choices": ("x",), "choice_scores": (1.0, 2.0)}, "2 scores for 1 choices"),
        ({"choices": ("x",), "choice_scores": (-np.inf,)}, "choice scores"),
        ({"passages": (passage(weight=float("nan")),)}, "passage 3 has weight nan"),
        (
            {"passages": (passage(log_probability=-np.inf),)},
            "passage 3 has log_probability -inf",
        ),
    ]:
        with pytest.raises(ValueError, match=f"'q0' of factbook: {message}"):
            write([row], [given._replace(**bad)])
    with pytest.raises(FileNotFoundError, match="'loss': there is no file"):
        write([row], [given], figures={"loss": tmp_path / "none.png"})
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"'loss': .*text.png is no PNG"):
        write([row], [given], figures={"loss": tmp_path / "text.png"})
    assert not (tmp_path / "report").exists(), "a refused report leaves no half of one"


def test_importing_report_imports_neither_jax_nor_matplotlib():
    code = (
        "import sys, radit_jax.evaluation.report as _;"
        "assert not {'jax', 'torch', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
