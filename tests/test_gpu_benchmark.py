"""benchmarks/gpu.py on a machine without a GPU: what it says, and that it measures."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from radit_jax import sharding
from radit_jax.models.attention import XLA
from radit_jax.stages import hardware

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_and_ends_with_status_1():
    found = subprocess.run(
        [sys.executable, FILE],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    assert found.stderr.startswith("no GPU: JAX computes on cpu here. On a machine")
    assert not found.stdout


def test_its_rows_are_full_and_carry_loss_on_the_end_of_each_segment(gpu):
    batch = gpu.batch_of(gpu.LLAMA_1B, 2, 64)
    np.testing.assert_array_equal(np.unique(batch.segment_ids_BL), [1, 2, 3, 4])
    np.testing.assert_array_equal(batch.positions_BL[1], np.tile(np.arange(16), 4))
    np.testing.assert_array_equal(batch.sites_BT[0, :5], [11, 12, 13, 14, 27])
    after_BT = np.take_along_axis(batch.tokens_BL, batch.sites_BT + 1, 1)
    np.testing.assert_array_equal(after_BT, batch.targets_BT)
    assert batch.weights_BT.mean() == 1
    assert batch.weights_BT.size * gpu.TARGETS == batch.tokens_BL.size


def test_the_shape_has_as_many_weights_as_the_published_model(gpu):
    config = gpu.LLAMA_1B
    with jax.set_mesh(sharding.make_mesh()):
        model = jax.eval_shape(lambda: gpu.Llama(config, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(model)) == 1_235_814_400


def test_kernels_take_turns_and_are_compared(gpu):
    calls = []
    programs = {
        name: lambda name=name: calls.append(name) or float(len(calls))
        for name in ("cudnn", "xla")
    }
    found = gpu.measure(programs, 2)
    assert calls == ["cudnn", "xla"] * 3
    assert [values for _, values in found.values()] == [[3, 5], [4, 6]]
    found = {"cudnn": (0.5, [1.0, 2.0]), "xla": (2.0, [1.5])}
    assert [*gpu.lines("LM-FT", found, tokens=8, cost=3.0, peak=96.0)] == [
        "LM-FT     cudnn            16 tokens/s  MFU  50.0 %  (1.0000, 2.0000)",
        "LM-FT     xla               4 tokens/s  MFU  12.5 %  (1.5000)",
        "LM-FT     cudnn is 4.00x as fast as xla",
    ]
    assert "MFU" not in next(gpu.lines("LM-FT", found, 8, 3.0, peak=0.0))


def test_both_programs_run(gpu, monkeypatch, capsys):
    """In bfloat16, which a CPU takes its time for."""
    config = dataclasses.replace(
        gpu.LLAMA_1B, vocab_size=64, width=32, layers=1, heads=2, kv_heads=1
    )
    config = dataclasses.replace(config, head_size=16, mlp_width=32)
    monkeypatch.setattr(hardware, "measured_matmul", lambda dtype: 1e9)
    with jax.set_mesh(sharding.make_mesh()):
        gpu.report(config, [XLA], 2, 64, "none", 3)
    training, scoring = capsys.readouterr().out.splitlines()
    losses, means = (
        [float(x) for x in line.split("(")[1].rstrip(")").split(", ")]
        for line in (training, scoring)
    )
    # Training goes on from step to step; scoring gives the same each time, which is
    # what an untrained model knows of 64 words.
    assert losses[0] > losses[1] > losses[2] > 0
    assert means[0] == means[1] == means[2]
    assert abs(means[0] + np.log(64)) < 1
