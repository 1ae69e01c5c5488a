"""LM-FT on the tiny chain's data: losses, meshes, packing, and being killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radit_jax import optim, sharding
from radit_jax.batch import Packed
from radit_jax.checkpoint import PARAMS, Checkpoints
from radit_jax.data.tokenize import load_tokenizer
from radit_jax.loop import NonFiniteLoss, TrainState
from radit_jax.models.huggingface import load_llama, read_llama_config
from radit_jax.models.llama import Llama
from radit_jax.stages import hardware, lm_ft
from radit_jax.stages.stage import run

ROOT = Path(__file__).parents[1]
F32 = jnp.dtype(jnp.float32)


@pytest.fixture(scope="module")
def tiny(retrieved, tiny_config):
    """Tokenizer, the first five batches, and the validation batches."""
    config = tiny_config(retrieved)
    tokenizer = load_tokenizer(config.lm)
    with jax.set_mesh(sharding.make_mesh()):
        batches, fixed = lm_ft.prepare_data(config, tokenizer)
        found = [next(batches) for _ in range(5)]
        batches.close()
    return config, tokenizer, found, fixed


def losses_of(folder, batches, sizes=(1, 1, 1), rate=1e-3):
    """Loss curve and final weights of plain steps over given batches."""
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        model = load_llama(folder)
        schedule = optim.schedule(rate, rate / 10, 1, max(len(batches), 2))
        tx = optim.optimizer(schedule, 0.9, 0.95, 1e-8, 0.1, 1.0)
        state = TrainState(
            jnp.int32(0), model, jax.jit(tx.init)(model), jnp.zeros(2, jnp.uint32)
        )
        step = lm_ft.make_step(tx, schedule, F32, "none")
        curve = []
        for batch in batches:
            state, metrics = step(state, lm_ft.place(batch))
            curve.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        return np.asarray(curve), jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def reference(tiny):
    config, _, batches, _ = tiny
    return losses_of(config.lm, batches)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_the_loss_is_the_same_on_every_mesh(tiny, reference, sizes):
    config, _, batches, _ = tiny
    curve, _ = losses_of(config.lm, batches, sizes)
    np.testing.assert_allclose(curve, reference[0], rtol=1e-5)


def test_micro_batches_change_nothing(tiny, reference):
    config, _, batches, _ = tiny
    split = [
        Packed(*(field.reshape(4, 2, *field.shape[2:]) for field in batch))
        for batch in batches
    ]
    curve, params = losses_of(config.lm, split)
    np.testing.assert_allclose(curve, reference[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, reference[1]
    )


def test_one_batch_can_be_learnt_by_heart(tiny):
    config, _, batches, _ = tiny
    curve, _ = losses_of(config.lm, batches[:1] * 60, rate=2e-2)
    assert curve[0, 0] > 5.5
    assert curve[-1, 0] < 1.5


@pytest.fixture(scope="module")
def row(tiny):
    """A packed row of several instances, and the model and its loss."""
    config, _, batches, _ = tiny
    rows = Packed(*(field[0] for field in batches[0]))
    most = int(np.argmax(rows.segment_ids_BL.max(1)))
    chosen = Packed(*(field[most : most + 1] for field in rows))
    assert chosen.segment_ids_BL.max() >= 2
    with jax.set_mesh(sharding.make_mesh()):
        model = load_llama(config.lm)
        sums = jax.jit(lambda m, b: lm_ft.answer_loss(m, b, F32, "none"))

        def nll(batch):
            with jax.set_mesh(sharding.make_mesh()):
                placed = Packed(*map(sharding.put_rows, batch))
                return float(sums(model, placed)["nll"])

        return chosen, nll


def only(batch, segment):
    """Weights of one segment's sites, the others' zero."""
    ids_BT = np.take_along_axis(batch.segment_ids_BL, batch.sites_BT, 1)
    return batch.weights_BT * (ids_BT == segment)


def alone(batch, segment):
    """A row that holds one segment, at its beginning, and nothing else."""
    places = np.flatnonzero(batch.segment_ids_BL[0] == segment)
    weights = only(batch, segment)
    sites = np.flatnonzero(weights[0])
    out = Packed(*map(np.zeros_like, batch))
    n, t = len(places), len(sites)
    out.tokens_BL[0, :n] = batch.tokens_BL[0, places]
    out.segment_ids_BL[0, :n] = 1
    out.positions_BL[0, :n] = np.arange(n)
    out.sites_BT[0, :t] = batch.sites_BT[0, sites] - places[0]
    out.targets_BT[0, :t] = batch.targets_BT[0, sites]
    out.weights_BT[0, :t] = 1
    return out


def test_an_instance_does_not_see_its_row_mates(row):
    batch, nll = row
    singles = []
    rng = np.random.default_rng(0)
    for segment in range(1, batch.segment_ids_BL.max() + 1):
        ours = batch._replace(weights_BT=only(batch, segment))
        noise_BL = rng.integers(0, 300, batch.tokens_BL.shape).astype(np.int32)
        own_BL = batch.segment_ids_BL == segment
        noisy = ours._replace(tokens_BL=np.where(own_BL, batch.tokens_BL, noise_BL))
        singles.append(nll(alone(batch, segment)))
        assert nll(ours) == pytest.approx(singles[-1], rel=1e-5)
        assert nll(noisy) == pytest.approx(singles[-1], rel=1e-5)
    assert sum(singles) == pytest.approx(nll(batch), rel=1e-5)


def test_only_answers_carry_loss(tiny, row):
    """Sites are the answer's predecessors; unused ones weigh nothing."""
    config, tokenizer, _, fixed = tiny
    batch, nll = row
    unused_BT = batch.weights_BT == 0
    assert unused_BT.any()
    changed = batch._replace(
        targets_BT=np.where(unused_BT, 7, batch.targets_BT),
        sites_BT=np.where(unused_BT, 3, batch.sites_BT),
    )
    assert nll(changed) == nll(batch)
    # And a target that does count changes it.
    counted = batch._replace(targets_BT=np.where(unused_BT, batch.targets_BT, 7))
    assert nll(counted) != nll(batch)
    # The targets of validation are the answers, to the letter, and <eos>.
    lines = (Path(config.workdir) / "retrieved/dev/dev/examples.jsonl").read_text()
    answers = {json.loads(line)["answers"][0] for line in lines.splitlines()}
    found = []
    for part in fixed:
        ids_BT = np.take_along_axis(part.segment_ids_BL, part.sites_BT, 1)
        for b in range(len(ids_BT)):
            for segment in range(1, part.segment_ids_BL[b].max() + 1):
                mine = (ids_BT[b] == segment) & (part.weights_BT[b] > 0)
                targets = part.targets_BT[b][mine].tolist()
                assert targets.pop() == tokenizer.eos_id
                found.append(tokenizer.decode(targets).strip())
    assert len(found) == config.lm_ft.validation_examples
    assert set(found) <= answers


def test_weights_count_answer_tokens_and_eos(retrieved, tiny_config):
    config = tiny_config(retrieved, **{"lm_ft.plain_text_share": 0.0})
    tokenizer = load_tokenizer(config.lm)
    with jax.set_mesh(sharding.make_mesh()):
        batches, _ = lm_ft.prepare_data(config, tokenizer)
        batch = next(batches)
        batches.close()
    eos_BL = batch.tokens_BL == tokenizer.eos_id
    segments = batch.segment_ids_BL.max(-1).sum()
    assert (batch.targets_BT == tokenizer.eos_id).sum() == segments == eos_BL.sum()
    for row_L, ids_L, targets_T, weights_T in zip(
        batch.tokens_BL[0],
        batch.segment_ids_BL[0],
        batch.targets_BT[0],
        batch.weights_BT[0],
        strict=True,
    ):
        texts = [
            tokenizer.decode(row_L[ids_L == segment].tolist())
            for segment in range(1, ids_L.max() + 1)
        ]
        answers = [re.split(r"\n(?:A|Answer):", text)[-1] for text in texts]
        expected = sum(len(tokenizer.encode(answer)) + 1 for answer in answers)
        assert weights_T.sum() == expected
        kept = targets_T[weights_T > 0].tolist()
        assert tokenizer.decode(kept) == "".join(answers)


def test_rows_that_do_not_divide_are_refused(retrieved, tiny_config):
    config = tiny_config(retrieved, **{"lm_ft.rows": 12})
    tokenizer = load_tokenizer(config.lm)
    with (
        jax.set_mesh(sharding.make_mesh(2, 4, 1)),
        pytest.raises(ValueError, match=r"= 12 rows do not divide over the 8 devices"),
    ):
        lm_ft.prepare_data(config, tokenizer)


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("Radeon", 0.0),
    ],
)
def test_a_chip_is_known_by_the_beginning_of_its_name(kind, flops):
    assert hardware.data_sheet(kind) == flops


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_the_speed_of_a_cpu_is_measured_on_any_mesh(sizes):
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        assert hardware.measured_matmul(F32, size=64, repeats=1) > 0


# Runs of the whole stage.


def curves(folder):
    """Rows of metrics.jsonl without what the clock says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds/", "tokens_per_second", "mfu")
    return [
        {k: v for k, v in json.loads(line).items() if not any(t in k for t in timed)}
        for line in lines
    ]


def shapes(config):
    """The tree that a checkpoint's weights are restored into."""
    llama = read_llama_config(config.lm)
    return jax.eval_shape(lambda: Llama(llama, jax.random.key(0)))


def final_weights(config):
    """All that the newest checkpoint of a finished run holds of the model."""
    with jax.set_mesh(sharding.make_mesh()):
        checkpoints = Checkpoints(
            Path(config.workdir) / "lm_ft" / "checkpoints", 1, lm_ft.METRIC.name
        )
        found = checkpoints.restore(checkpoints.latest, {PARAMS: shapes(config)})
        checkpoints.close()
    return jax.tree.map(np.asarray, found[PARAMS])


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


class PulledPlugError(Exception):
    """Stands for anything that ends a run without warning."""


@pytest.fixture
def known_speed(monkeypatch):
    """Spares the tests the measuring of a big matrix product."""
    monkeypatch.setattr(hardware, "measured_matmul", lambda dtype: 1e9)


@pytest.mark.usefixtures("known_speed")
def test_a_run_goes_on_on_another_mesh(workdir, tmp_path, tiny_config, monkeypatch):
    config = tiny_config(workdir)
    other = tiny_config(shutil.copytree(workdir, tmp_path / "other"))
    expected = curves(run("lm_ft", lm_ft.STAGE, config))
    place, seen, streams = lm_ft.place, [], []

    def spied(*arguments, make=lm_ft.make_step, **how):
        streams.append(how["stream"])
        return make(*arguments, **how)

    monkeypatch.setattr(lm_ft, "make_step", spied)

    def unplugged(batch):
        seen.append(batch)
        if len(seen) == 5:
            raise PulledPlugError
        return place(batch)

    with monkeypatch.context() as patch:
        patch.setattr(lm_ft, "place", unplugged)
        with pytest.raises(PulledPlugError):
            run("lm_ft", lm_ft.STAGE, other)
    other.mesh.update(data=2, fsdp=2, tensor=2, sequence=True)
    found = curves(run("lm_ft", lm_ft.STAGE, other))
    assert streams == [sharding.ACT_BLD, sharding.SEQUENCE_BLD]
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.usefixtures("known_speed")
def test_a_poisoned_batch_stops_the_run(workdir, tiny_config, monkeypatch):
    config = tiny_config(workdir, **{"lm_ft.save_every": 1})
    place, seen = lm_ft.place, []

    def poisoned(batch):
        seen.append(batch)
        bad = np.nan if len(seen) == 4 else 1.0
        return place(batch._replace(weights_BT=batch.weights_BT * np.float32(bad)))

    with monkeypatch.context() as patch:
        patch.setattr(lm_ft, "place", poisoned)
        with pytest.raises(NonFiniteLoss, match=r"loss is nan at step 4\..*of step 3"):
            run("lm_ft", lm_ft.STAGE, config)
    assert not (workdir / "lm_ft").exists()
    folder = run("lm_ft", lm_ft.STAGE, config)
    assert [r["step"] for r in curves(folder) if "train/loss" in r] == [*range(1, 7)]


@pytest.mark.usefixtures("known_speed")
def test_a_learning_rate_that_explodes_stops_the_run(workdir, tiny_config):
    config = tiny_config(workdir, **{"lm_ft.learning_rate": 1e38})
    with pytest.raises(NonFiniteLoss, match=r" at step \d"):
        run("lm_ft", lm_ft.STAGE, config)
    for step in workdir.glob("lm_ft.partial-*/checkpoints/[0-9]*"):
        checkpoints = Checkpoints(step.parent, 1, lm_ft.METRIC.name)
        with jax.set_mesh(sharding.make_mesh()):
            target = {PARAMS: shapes(config)}
            found = checkpoints.restore(int(step.name), target)[PARAMS]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        checkpoints.close()


STEPS = 40


def command(workdir):
    return [
        sys.executable,
        "-m",
        "radit_jax.main",
        "--config=configs/lm_ft.py:tiny",
        f"--config.workdir={workdir}",
        f"--config.lm_ft.steps={STEPS}",
        "--config.lm_ft.validate_every=20",
        f"--config.compilation_cache={workdir.parent.parent / 'xla'}",
    ]


def start(workdir, **options):
    """The front door in a process of its own."""
    return subprocess.Popen(
        command(workdir),
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(process):
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def wait_for_step(workdir, process, step):
    """Until metrics.jsonl shows a training step."""
    for _ in range(6000):
        for file in workdir.glob("lm_ft.partial-*/metrics.jsonl"):
            lines = file.read_text().split("\n")[:-1]
            steps = [r["step"] for r in map(json.loads, lines) if "train/loss" in r]
            if steps and steps[-1] >= step:
                return steps[-1]
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    raise AssertionError("no step was logged")


@pytest.fixture(scope="module")
def uninterrupted(retrieved, tmp_path_factory, tiny_config):
    workdir = tmp_path_factory.mktemp("whole") / "work"
    shutil.copytree(retrieved, workdir)
    code, output = finish(start(workdir))
    assert code == 0, output
    return final_weights(tiny_config(workdir)), curves(workdir / "lm_ft")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_ends_as_if_it_had_not_been(
    workdir, tiny_config, uninterrupted, number
):
    process = start(workdir)
    step = wait_for_step(workdir, process, 5)
    os.kill(process.pid, number)
    code, output = finish(process)
    assert step < STEPS
    assert not (workdir / "lm_ft").exists()
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 75, output
        assert "Run the same command to go on" in output
        assert "Traceback" not in output
    code, output = finish(start(workdir))
    assert code == 0, output
    assert "going on from step" in output
    weights, expected = uninterrupted
    assert_same(final_weights(tiny_config(workdir)), weights)
    found = curves(workdir / "lm_ft")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert found == expected
