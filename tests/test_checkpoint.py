"""Saving and restoring: other meshes, which ones are kept, and what can go wrong."""

import errno
import os
import shutil
import subprocess

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radit_jax import sharding
from radit_jax.checkpoint import CheckpointError, Checkpoints


def positions():
    """An iterator whose place in the data is saved."""
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def trees(seed=0, rows=16, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "w_up": sharding.put(
                rng.standard_normal((rows, 8)).astype(dtype), sharding.W_DF
            ),
            "norm": sharding.put(rng.standard_normal(rows).astype(dtype), sharding.W_D),
        },
        "rng": {
            "key_data": jax.random.key_data(jax.random.key(seed)),
            "step": jnp.int32(seed),
        },
    }


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(sharding.make_mesh()):
        yield


def saved(folder, steps=(3,), **options):
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, trees(step), None)
    checkpoints.wait()
    return checkpoints


def test_everything_comes_back_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest is None
    assert checkpoints.best is None
    batches = positions()
    for _ in range(41):
        next(batches)
    checkpoints.save(3, trees(3) | {"data": batches}, None)
    checkpoints.close()
    again = Checkpoints(tmp_path)
    assert again.latest == again.best == 3
    batches = positions()
    found = again.restore(3, trees(0) | {"data": batches})
    same({name: found[name] for name in ("params", "rng")}, trees(3))
    assert next(batches) == 41
    again.close()


def test_a_part_can_be_restored_from_shapes_alone(tmp_path):
    checkpoints = saved(tmp_path)
    shapes = jax.eval_shape(lambda: trees_of_zeros())
    found = checkpoints.restore(3, {"params": shapes})
    assert list(found) == ["params"]
    same(found["params"], trees(3)["params"])
    checkpoints.close()


def test_arrays_can_be_read_as_another_type(tmp_path):
    with jax.set_mesh(sharding.make_mesh(1, 4, 2)):
        checkpoints = saved(tmp_path)
        shapes = jax.eval_shape(trees_of_zeros)
        found = checkpoints.restore(3, {"params": shapes}, jnp.bfloat16)["params"]
        for name, written in trees(3)["params"].items():
            assert found[name].dtype == jnp.bfloat16
            assert found[name].sharding == written.sharding
            np.testing.assert_array_equal(found[name], written.astype(jnp.bfloat16))
        checkpoints.close()


def trees_of_zeros():
    return {
        "w_up": jnp.zeros((16, 8), out_sharding=sharding.W_DF),
        "norm": jnp.zeros(16, out_sharding=sharding.W_D),
    }


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_checkpoint_moves_to_another_mesh(tmp_path, sizes):
    with jax.set_mesh(sharding.make_mesh(1, 4, 2)):
        saved(tmp_path).close()
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        checkpoints = Checkpoints(tmp_path)
        found = checkpoints.restore(3, trees(0))
        same(found, trees(3))
        expected = jax.typeof(trees(0)["params"]["w_up"]).sharding.spec
        w_up = found["params"]["w_up"]
        assert w_up.sharding.spec == expected
        assert w_up.sharding.mesh.shape == jax.sharding.get_mesh().shape
        checkpoints.close()


@pytest.mark.parametrize("higher", [False, True])
def test_the_newest_and_the_best_are_kept(tmp_path, higher):
    # Step 4 is as good as step 2: of equals the earlier one stays.
    losses, kept, best = [3.0, 1.0, 2.0, 1.0, None, 5.0], {2, 5, 6}, 2
    if higher:
        losses = [None if loss is None else -loss for loss in losses]
    checkpoints = Checkpoints(tmp_path, 2, "loss", higher)
    for step, loss in enumerate(losses, 1):
        checkpoints.save(step, trees(step), None if loss is None else {"loss": loss})
    checkpoints.wait()
    assert checkpoints.best == best
    assert checkpoints.latest == 6
    checkpoints.close()
    found = {int(f.name) for f in tmp_path.iterdir() if f.name.isdigit()}
    assert found == kept
    again = Checkpoints(tmp_path, 2, "loss", higher)
    assert again.best == best
    same(again.restore(best, trees(0)), trees(best))
    again.close()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (lambda: trees(rows=24), r"params/norm is \(\(16,\), .*model needs \(\(24,\)"),
        (
            lambda: {
                "params": {
                    name: x.astype(jnp.bfloat16)
                    for name, x in trees()["params"].items()
                }
            },
            "params/norm is .*float32.*, the model needs .*bfloat16",
        ),
        (lambda: {"opt_state": {"mu": jnp.zeros(3)}}, "it has no 'opt_state'"),
        (lambda: {"params": {"w_up": jnp.zeros((16, 8))}}, "has /norm, the model does"),
        (
            lambda: {"params": trees()["params"] | {"head": jnp.zeros(3)}},
            "params has no /head; was it another model",
        ),
    ],
    ids=["shape", "dtype", "missing", "fewer", "more"],
)
def test_what_does_not_fit_is_refused_in_words(tmp_path, target, words):
    checkpoints = saved(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        checkpoints.restore(3, target())
    checkpoints.close()


def test_a_step_that_is_not_there_is_named(tmp_path):
    checkpoints = saved(tmp_path)
    with pytest.raises(CheckpointError, match="4: no such checkpoint"):
        checkpoints.restore(4, trees())
    checkpoints.close()


@pytest.mark.parametrize("pattern", ["**/d/*", "_METADATA"])
def test_a_damaged_checkpoint_is_an_error_in_words(tmp_path, pattern):
    saved(tmp_path).close()
    damaged = list((tmp_path / "3" / "params").glob(pattern))
    assert damaged
    for file in damaged:
        file.write_bytes(file.read_bytes()[:-9])
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="3: could not be read"):
        checkpoints.restore(3, trees())
    checkpoints.close()


def test_what_an_interrupted_save_left_is_cleaned_up(tmp_path):
    saved(tmp_path).close()
    half = tmp_path / "4.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "3", half)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest == 3
    checkpoints.save(4, trees(4), None)
    checkpoints.close()
    assert not half.exists()
    assert (tmp_path / "4").exists()


def test_arrays_may_change_while_they_are_written(tmp_path):
    """The loop donates its state to the next step as soon as save returns."""
    checkpoints = Checkpoints(tmp_path)
    state = trees(1)
    expected = jax.tree.map(np.array, state)
    checkpoints.save(1, state, None)
    change = jax.jit(lambda t: jax.tree.map(lambda x: x * 0, t), donate_argnums=0)
    state = {"params": change(state["params"])}
    checkpoints.wait()
    same(checkpoints.restore(1, trees(0)), expected)
    checkpoints.close()


@pytest.fixture
def small_disk(tmp_path):
    """Two megabytes; only root may mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_earlier_checkpoint(small_disk):
    checkpoints = saved(small_disk)
    rng = np.random.default_rng(0)
    big = {"params": {"w": jnp.asarray(rng.standard_normal((1024, 1024)))}}
    checkpoints.save(4, big, None)
    with pytest.raises(
        CheckpointError, match=r"checkpoint 4 could not be written.* step 3; see"
    ):
        checkpoints.wait()
    again = Checkpoints(small_disk)
    assert again.latest == 3
    same(again.restore(3, trees(0)), trees(3))
    # With room again the same run goes on.
    again.save(4, trees(4), None)
    again.close()
    last = Checkpoints(small_disk)
    assert last.latest == 4
    same(last.restore(4, trees(0)), trees(4))
    last.close()


def test_a_write_that_fails_is_told_and_leaves_the_earlier_checkpoint(
    tmp_path, monkeypatch
):
    checkpoints = saved(tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args, **kwargs):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._checkpointer, "save_checkpointables_async", fail)
        with pytest.raises(CheckpointError, match=r"checkpoint 4 could not .*No space"):
            checkpoints.save(4, trees(4), None)
    same(checkpoints.restore(3, trees(0)), trees(3))
    checkpoints.close()


def save_and_fail(folder, step, tree, error=None):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(step, tree, None)
        if error is not None:
            raise error


def too_big():
    rng = np.random.default_rng(0)
    return {"params": {"w": jnp.asarray(rng.standard_normal((1024, 1024)))}}


def test_an_error_elsewhere_lets_a_checkpoint_be_finished(tmp_path):
    with pytest.raises(RuntimeError, match="a bad batch"):
        save_and_fail(tmp_path, 3, trees(3), RuntimeError("a bad batch"))
    again = Checkpoints(tmp_path)
    same(again.restore(3, trees(0)), trees(3))
    again.close()


def test_an_error_is_not_hidden_by_that_of_its_checkpoint(small_disk, caplog):
    with pytest.raises(RuntimeError, match="a bad batch"):
        save_and_fail(small_disk, 4, too_big(), RuntimeError("a bad batch"))
    assert "checkpoint 4 could not be written" in caplog.text


def test_leaving_reports_a_checkpoint_that_could_not_be_written(small_disk):
    with pytest.raises(CheckpointError, match="checkpoint 4 could not be written"):
        save_and_fail(small_disk, 4, too_big())
