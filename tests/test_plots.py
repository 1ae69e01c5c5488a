import numpy as np
import pytest
from matplotlib.image import imread

from radit_jax.evaluation import plots
from radit_jax.evaluation.calibration import calibration
from radit_jax.evaluation.records import Row
from radit_jax.evaluation.votes import DepthRow, Revoted

# An axis without extent, a legend without entries, a glyph that no font has.
pytestmark = pytest.mark.filterwarnings("error")


def row(system, dataset="x", value=0.5, metric="em"):
    return Row(system, dataset, metric, value, 4, 0.8 * value, min(1.0, 1.2 * value))


def colours_of(png):
    """Which of the plots' colours a picture has."""
    picture = np.round(255 * imread(png)[:, :, :3]).astype(int)
    there = {tuple(colour) for colour in np.unique(picture.reshape(-1, 3), axis=0)}
    return [
        place
        for place, colour in enumerate(plots.COLOURS)
        if tuple(bytes.fromhex(colour[1:])) in there
    ]


def test_results_are_readable_at_800_pixels(tmp_path):
    plots.plot_results([row("a"), row("b")], tmp_path / "x.png")
    assert imread(tmp_path / "x.png").shape[1] == 1600
    assert colours_of(tmp_path / "x.png") == [0, 1]


def test_every_dataset_is_shown_by_its_own_metric(tmp_path):
    rows = [row("a", "x"), row("a", "y", metric="f1"), row("b", "y", metric="em")]
    plots.plot_results(rows, tmp_path / "x.png")
    assert colours_of(tmp_path / "x.png") == [0]  # b has a second metric alone
    with pytest.raises(ValueError, match="no row has a metric of answers"):
        plots.plot_results([row("a", metric="mrr")], tmp_path / "y.png")


def test_many_datasets_fill_a_grid(tmp_path):
    rows = [row("a", f"set {i}", 0.0) for i in range(4)]
    plots.plot_results(rows, tmp_path / "all_zero.png")
    more = [row("a", f"set {i}", 0.5) for i in range(7)]
    plots.plot_results(more, tmp_path / "more.png")
    few, many = (imread(tmp_path / f"{name}.png") for name in ("all_zero", "more"))
    assert many.shape[0] > 1.3 * few.shape[0]  # three lines of panels, not two


def test_a_curve_has_a_point_per_depth_and_one_at_none(tmp_path):
    rows = [row("closed"), row("gold"), row("RAG")]
    revoted = Revoted(
        [DepthRow(k, row("RAG", value=0.1 * k)) for k in (1, 2, 3)], [], ["closed"]
    )
    plots.plot_passages(rows, revoted, tmp_path / "x.png")
    assert colours_of(tmp_path / "x.png") == [0, 2]  # the gold passage is no ensemble
    plots.plot_passages(rows, revoted._replace(without=[]), tmp_path / "y.png")
    assert colours_of(tmp_path / "y.png") == [2]


def test_calibration_has_a_panel_per_system_in_its_colour(tmp_path):
    sure = np.array([0.25, 0.75, 1.0])
    right = np.array([0.0, 1.0, 1.0])
    found = [
        calibration(system, dataset, sure, right)
        for system in ("b", "c")
        for dataset in ("", "x")
    ]
    rows = [row(system) for system in ("a", "b", "c")]
    plots.plot_calibration(rows, found, tmp_path / "x.png")
    pooled = [each for each in found if not each.dataset]
    plots.plot_calibration(rows, pooled, tmp_path / "pooled.png")
    assert (imread(tmp_path / "x.png") == imread(tmp_path / "pooled.png")).all()
    # The first one is also that of the diagonal.
    assert colours_of(tmp_path / "x.png") == [0, 1, 2]


def test_retrieval_shows_retrievers_and_no_systems(tmp_path):
    rows = [row("LM"), row("LM-FT"), row("RA-DIT")]
    rows += [row("retriever", metric=m) for m in ("answer@1", "mrr")]
    rows += [row("R-FT", dataset, metric="mrr") for dataset in ("x", "y")]
    plots.plot_retrieval(rows, tmp_path / "x.png")
    assert colours_of(tmp_path / "x.png") == [0, 1]
