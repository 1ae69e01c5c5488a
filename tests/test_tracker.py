import json
import logging
import math
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from absl import logging as absl_logging

from radit_jax import tracker
from radit_jax.tracker import Tracker, plot_curves, progress


@pytest.fixture
def said(caplog):
    """The log lines, at the level a user sees."""
    caplog.set_level("INFO", logger=absl_logging.get_absl_logger().name)
    return lambda: [record.getMessage() for record in caplog.records]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def events(folder):
    """The TensorBoard events of a folder, oldest file first."""
    # Not at the top: unless the tracker imports it first, it brings torch along.
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=os.path.getmtime):
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars(folder):
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


def test_metrics_reach_the_file_at_once(tmp_path):
    with Tracker(tmp_path / "new" / "run") as run:
        run.log(5, {"loss": np.float32(0.5), "tokens_per_second": 100}, prefix="train")
        # Not closed yet: this is what a kill would leave.
        row = {"step": 5, "train/loss": 0.5, "train/tokens_per_second": 100.0}
        assert rows(tmp_path / "new" / "run") == [row]
        run.log(5, {"loss": 0.25}, prefix="validation")
    assert rows(tmp_path / "new" / "run")[1] == {"step": 5, "validation/loss": 0.25}


def test_tensorboard_has_the_scalars_and_the_config(tmp_path):
    with Tracker(tmp_path, config_summary={"batch": 64}) as run:
        run.log(3, {"loss": 0.5})
    assert scalars(tmp_path) == [(3, "train/loss", 0.5)]
    text = [v for e in events(tmp_path) for v in e.summary.value if "config" in v.tag]
    assert b"batch: 64" in text[0].tensor.string_val[0]


def test_log_lines_are_aligned(tmp_path, said):
    with Tracker(tmp_path) as run:
        run.log(5, {"loss": 0.5, "learning_rate": 1e-5}, prefix="train")
        run.log(1000, {"loss": 12.25, "learning_rate": 3.25e-6}, prefix="train")
    assert said() == [
        "step       5  train       loss        0.5  learning_rate      1e-05",
        "step    1000  train       loss      12.25  learning_rate   3.25e-06",
    ]


def test_nan_is_null_and_said(tmp_path, said):
    with Tracker(tmp_path) as run:
        run.log(7, {"loss": math.nan, "norm": math.inf, "rate": 1.0})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == (
        '{"step": 7, "train/loss": null, "train/norm": null, "train/rate": 1.0}\n'
    )
    assert said()[:2] == ["step 7: train/loss is nan", "step 7: train/norm is inf"]
    assert scalars(tmp_path) == [(7, "train/rate", 1.0)]


def test_names_and_values_are_checked(tmp_path):
    with Tracker(tmp_path) as run:
        with pytest.raises(ValueError, match="name 3 is a int, not a str"):
            run.log(1, {"loss": 1.0, 3: 1.0})
        with pytest.raises(ValueError, match=r"metric 'b' is array.*not a scalar"):
            run.log(1, {"a": 1.0, "b": np.zeros(2)})
        for prefix in ("", "train/inner"):
            with pytest.raises(ValueError, match="must be a word"):
                run.log(1, {"loss": 1.0}, prefix=prefix)
    assert rows(tmp_path) == []
    assert scalars(tmp_path) == []


def log_steps(folder, steps, **arguments):
    with Tracker(folder, **arguments) as run:
        for step in steps:
            run.log(step, {"loss": float(step)})


def test_resume_drops_what_will_be_computed_again(tmp_path):
    log_steps(tmp_path, range(6))
    log_steps(tmp_path, range(3, 8), resume_step=3)
    assert [row["step"] for row in rows(tmp_path)] == list(range(8))
    # TensorBoard drops later steps of older files when it sees a session start.
    starts = [e.step for e in events(tmp_path) if e.session_log.status]
    assert starts == [3]
    log_steps(tmp_path, range(2), resume_step=0)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1]


def test_a_half_written_last_line_is_dropped(tmp_path, said):
    log_steps(tmp_path, range(3))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    log_steps(tmp_path, [2], resume_step=2)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
    assert any("half-written" in line for line in said())


def test_a_lost_line_end_costs_nothing(tmp_path):
    log_steps(tmp_path, range(2))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    log_steps(tmp_path, [2], resume_step=2)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "an object with a step"),
        ('{"loss": 1.0}', "an object with a step"),
    ],
)
def test_damage_elsewhere_is_an_error(tmp_path, line, complaint):
    path = tmp_path / "metrics.jsonl"
    damaged = f'{{"step": 0}}\n{line}\n{{"step": 2}}\n'
    path.write_text(damaged)
    with pytest.raises(ValueError, match=f"line 2: .*{complaint}"):
        Tracker(tmp_path, resume_step=2)
    assert path.read_text() == damaged


def test_a_fresh_run_does_not_mix_with_an_old_one(tmp_path):
    log_steps(tmp_path, range(3))
    with pytest.raises(ValueError, match="already has metrics up to step 2"):
        Tracker(tmp_path)
    assert len(rows(tmp_path)) == 3


def test_wandb_is_optional_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb, or leave wandb_project"):
        Tracker(tmp_path / "run", wandb_project="radit")
    assert not (tmp_path / "run").exists()


def test_wandb_gets_the_metrics(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finish"),
    )
    init = types.SimpleNamespace(init=lambda **given: calls.append(given) or run)
    monkeypatch.setitem(sys.modules, "wandb", init)
    with Tracker(tmp_path, {"batch": 64}, wandb_project="radit") as tracked:
        tracked.log(4, {"loss": 0.5, "norm": math.nan})
    assert calls[0]["project"] == "radit"
    assert calls[0]["config"] == {"batch": 64}
    assert calls[1:] == [(4, {"train/loss": 0.5}), "finish"]


def test_torch_and_jax_stay_out(tmp_path):
    code = (
        "import sys; from radit_jax.tracker import Tracker, progress;"
        "assert not {'jax', 'matplotlib', 'tensorboardX', 'tqdm'} & set(sys.modules);"
        "run = Tracker(sys.argv[1]); run.log(0, {'loss': 1.0}); run.close();"
        "assert 'torch' not in sys.modules; assert 'jax' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def curve_lines(monkeypatch, path, png):
    """What ``plot_curves`` draws, by the title of the panel."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: figures.append(self), raising=True
    )
    plot_curves(path, png)
    return {
        axes.get_title(loc="left"): {
            line.get_label(): list(zip(*line.get_data(), strict=True))
            for line in axes.lines
        }
        for axes in figures[0].axes
    }


def test_curves_show_every_series(tmp_path, monkeypatch):
    with Tracker(tmp_path) as run:
        for step in range(3):
            run.log(
                step,
                {
                    "loss": 2.0 - step,
                    "learning_rate": 0.5,
                    "tokens_per_second": 10 + step,
                },
            )
        run.log(2, {"loss": 3.0}, prefix="validation")
        run.log(2, {"loss": 4.0}, prefix="test")
    drawn = curve_lines(monkeypatch, tmp_path / "metrics.jsonl", tmp_path / "x.png")
    assert drawn == {
        "training loss": {"train": [(0, 2.0), (1, 1.0), (2, 0.0)]},
        "validation loss": {"validation": [(2, 3.0)], "test": [(2, 4.0)]},
        "learning rate": {"train": [(0, 0.5), (1, 0.5), (2, 0.5)]},
        "tokens per second": {"train": [(0, 10), (1, 11), (2, 12)]},
    }


def test_curves_are_a_picture_with_gaps_for_nan(tmp_path, monkeypatch):
    path, png = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    path.write_text('{"step": 1, "train/loss": null}\n{"step": 2, "train/lo')
    plot_curves(path, png)
    assert png.read_bytes().startswith(b"\x89PNG")
    ((step, value),) = curve_lines(monkeypatch, path, png)["training loss"]["train"]
    assert step == 1
    assert math.isnan(value)


def test_curves_say_what_was_not_logged(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    texts = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **style: texts.append(s))
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n')
    curve_lines(monkeypatch, path, tmp_path / "curves.png")
    assert texts == ["not logged"] * 3


def test_curves_of_nothing_are_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="no metrics to plot"):
        plot_curves(path, tmp_path / "curves.png")


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)  # pytest -s
    monkeypatch.setattr(
        tracker, "time", types.SimpleNamespace(monotonic=lambda: now.seconds)
    )
    return now


def test_progress_without_a_terminal_logs_now_and_then(said, clock):
    with progress(11200, "index", "passages") as bar:
        for _ in range(35):
            clock.seconds += 1
            bar.update(210)
    assert said() == [
        "index: 3150/11200 passages, 210/s, 0:38 left",
        "index: 6300/11200 passages, 210/s, 0:23 left",
        "index: 7350/11200 passages, 210/s, took 0:35",
    ]


def test_progress_over_an_iterable(said, clock):
    seen = []
    for item in progress([1, 2, 3], "score", "batches"):
        seen.append(item)
        clock.seconds += 4000
    assert seen == [1, 2, 3]
    assert said() == [
        "score: 1/3 batches, 0.00025/s, 2:13:20 left",
        "score: 2/3 batches, 0.00025/s, 1:06:40 left",
        "score: 3/3 batches, 0.00025/s, took 3:20:00",
    ]


def test_progress_of_unknown_length(said, clock):
    for _ in progress(iter("ab"), "read", "lines"):
        clock.seconds += 16
    for _ in progress(iter("ab"), "read", "lines", total=2):
        pass
    assert said() == [
        "read: 1 lines, 0.062/s",
        "read: 2 lines, 0.062/s",
        "read: 2 lines, 0.062/s, took 0:32",
        "read: 2/2 lines, took 0:00",
    ]


def test_progress_that_fails_says_how_far_it_came(said, clock):
    def fail(bar):
        with bar:
            bar.update(2)
            raise RuntimeError

    bar = progress(5, "embed", "batches")
    with pytest.raises(RuntimeError):
        fail(bar)
    bar.close()
    assert said() == ["embed: 2/5 batches, took 0:00"]


def test_what_an_earlier_run_did_is_no_speed(said, clock):
    with progress(100, "training", "steps") as bar:
        bar.skip(40)
        for _ in range(4):
            clock.seconds += 5
            bar.update(10)
    assert said() == [
        "training: 70/100 steps, 2/s, 0:15 left",
        "training: 80/100 steps, 2/s, took 0:20",
    ]


def test_log_lines_do_not_run_into_the_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    record = logging.LogRecord("absl", logging.INFO, "", 0, "step 3", None, None)
    handler = absl_logging.get_absl_handler()
    with progress(40, "training", "steps") as bar:
        bar.update(3)
        handler.filter(record)
        assert capsys.readouterr().err.endswith("\r")
    handler.filter(record)
    assert not capsys.readouterr().err.endswith("\r")


def test_progress_on_a_terminal_is_a_bar(said, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress(40, "index", "passages") as bar:
        bar.update(40)
    shown = capsys.readouterr().err
    assert "index: 100%" in shown
    assert "40/40" in shown
    assert "passages/s" in shown
    assert said() == []
