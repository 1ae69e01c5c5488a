"""The training loop with a toy step: cadence, resuming, signals, broken losses."""

import json
import os
import signal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radit_jax import sharding
from radit_jax.checkpoint import Checkpoints
from radit_jax.loop import NonFiniteLoss, Schedule, Stopped, TrainState, fit
from radit_jax.tracker import Tracker

SCHEDULE = Schedule(steps=8, log_every=1, validate_every=4, save_every=2)


@jax.jit
def step(state, x):
    """A running product with noise, so that order, data and key all matter."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    w = state.params["w"] * 0.9 + x + 0.1 * jax.random.normal(key, (3,))
    metrics = {"loss": jnp.sum(w), "grad_norm": jnp.sum(x), "tokens": jnp.float32(3)}
    params = {"w": w}
    return TrainState(state.step + 1, params, state.opt_state, state.rng), metrics


def initial(value=1.0):
    return TrainState(
        step=jnp.int32(0),
        params={"w": jnp.full(3, value)},
        opt_state={"mu": jnp.zeros(3)},
        rng=jax.random.key_data(jax.random.key(7)),
    )


def batches():
    rows = grain.MapDataset.range(1000).shuffle(seed=0).repeat()
    rows = rows.map(lambda i: np.full(3, i % 7, np.float32))
    return iter(rows.to_iter_dataset())


def run(folder, state=None, schedule=SCHEDULE, **changes):
    """Train in a folder; returns the final weights."""
    checkpoints = Checkpoints(folder / "checkpoints", 1, "loss")
    latest = checkpoints.latest
    arguments = {
        "step": step,
        "batches": batches(),
        "place": jnp.asarray,
        "validate": lambda params: {"loss": float(jnp.sum(params["w"]))},
        "checkpoints": checkpoints,
        "schedule": schedule,
    } | changes
    try:
        with Tracker(folder, resume_step=0 if latest is None else latest + 1) as track:
            found = fit(state or initial(), tracker=track, **arguments)
    finally:
        checkpoints.close()
    return np.asarray(found.params["w"])


def rows(folder, name):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [(row["step"], row[name]) for row in found if name in row]


def saved_steps(folder):
    return sorted(
        int(file.name)
        for file in (folder / "checkpoints").iterdir()
        if file.name.isdigit()
    )


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(sharding.make_mesh()):
        yield


@pytest.fixture
def plain(tmp_path):
    """Weights and losses of a run that nothing interrupts."""
    folder = tmp_path / "plain"
    return run(folder), rows(folder, "train/loss")


def breaking_at(number, error):
    """A ``place`` that raises when it sees batch ``number``."""
    seen = []

    def place(x):
        seen.append(x)
        if len(seen) == number:
            raise error
        return jnp.asarray(x)

    return place


def test_it_logs_validates_and_saves_when_due(tmp_path):
    schedule = Schedule(steps=7, log_every=3, validate_every=4, save_every=100)
    run(tmp_path, schedule=schedule)
    assert [s for s, _ in rows(tmp_path, "train/loss")] == [3, 6, 7]
    assert [s for s, _ in rows(tmp_path, "validation/loss")] == [0, 4, 7]
    for name in ("seconds/data", "seconds/step", "tokens_per_second"):
        assert [s for s, _ in rows(tmp_path, f"train/{name}")] == [3, 6, 7]


def test_a_finished_run_is_not_trained_on(tmp_path):
    expected = run(tmp_path)
    found = run(tmp_path, place=breaking_at(1, AssertionError("trained on")))
    np.testing.assert_array_equal(found, expected)


def test_a_crashed_run_goes_on_bit_for_bit(tmp_path, plain):
    with pytest.raises(RuntimeError, match="cable"):
        run(tmp_path, place=breaking_at(6, RuntimeError("cable")))
    assert saved_steps(tmp_path)[-1] == 4
    np.testing.assert_array_equal(run(tmp_path), plain[0])
    assert rows(tmp_path, "train/loss") == plain[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_stops_and_the_run_goes_on(tmp_path, plain, number):
    seen = []

    def place(x):
        seen.append(x)
        if len(seen) == 3:
            os.kill(os.getpid(), number)
        return jnp.asarray(x)

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="stopped by a signal at step 3 of 8; saved in"):
        run(tmp_path, place=place)
    assert signal.getsignal(number) is before
    assert saved_steps(tmp_path)[-1] == 3
    np.testing.assert_array_equal(run(tmp_path), plain[0])
    assert rows(tmp_path, "train/loss") == plain[1]


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path, plain):
    def validate(params):
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(params)
        return {"loss": 0.0}

    seen = []
    np.testing.assert_array_equal(run(tmp_path, validate=validate), plain[0])


def poisoned(at, leaf):
    """A step whose loss, gradient norm or weights break at optimizer step ``at``."""

    def broken(state, x):
        state, metrics = step(state, x)
        bad = jnp.where(state.step == at, jnp.inf, 0.0)
        if leaf == "weights":
            state.params["w"] = state.params["w"].at[1].add(bad)
        else:
            metrics[leaf] = metrics[leaf] + bad
        return state, metrics

    return broken


@pytest.mark.parametrize("leaf", ["loss", "grad_norm", "weights"])
@pytest.mark.parametrize(("log_every", "at", "kept"), [(1, 5, 4), (100, 4, 2)])
def test_a_broken_step_stops_the_run_before_it_is_saved(
    tmp_path, log_every, leaf, at, kept
):
    schedule = Schedule(8, log_every, 100, 2)
    name, named = {"weights": ("a weight", at + at % 2)}.get(leaf, (leaf, at))
    words = f"^({name}|loss) is .* at step {named}.* of step {kept}, is from before"
    with pytest.raises(NonFiniteLoss, match=words):
        run(tmp_path, step=poisoned(at, leaf), schedule=schedule)
    assert saved_steps(tmp_path)[-1] == kept
    assert all(np.isfinite(v) for _, v in rows(tmp_path, "train/loss"))
    # What is kept is good: with the cause mended the run goes on.
    assert np.isfinite(run(tmp_path, schedule=schedule)).all()


def test_weights_that_are_broken_from_the_start_are_not_saved(tmp_path):
    with pytest.raises(
        NonFiniteLoss, match=r"validation loss is nan at step 0\. No checkpoint was"
    ):
        run(tmp_path, initial(float("nan")))
    assert saved_steps(tmp_path) == []


def test_a_validation_that_breaks_stops_the_run(tmp_path):
    values = iter([1.0, float("nan")])
    with pytest.raises(NonFiniteLoss, match=r"validation loss is nan at step 4.* 2,"):
        run(tmp_path, validate=lambda params: {"loss": next(values)})
    assert saved_steps(tmp_path)[-1] == 2


def test_an_error_in_a_save_stops_the_run_with_the_earlier_checkpoint(
    tmp_path, monkeypatch
):
    from radit_jax.checkpoint import CheckpointError

    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, "loss")
    save = checkpoints._checkpointer.save_checkpointables_async

    def full(at, *args, **kwargs):
        if at == 4:
            raise OSError(28, "No space left on device")
        return save(at, *args, **kwargs)

    monkeypatch.setattr(checkpoints._checkpointer, "save_checkpointables_async", full)
    with pytest.raises(CheckpointError, match=r"checkpoint 4 .*complete one is step 2"):
        run(tmp_path, checkpoints=checkpoints)
