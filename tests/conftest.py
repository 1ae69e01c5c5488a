"""Eight fake CPU devices, and no silent broadcasting, for every test."""

import os
import shutil
import sys
from pathlib import Path

# Tests run on CPUs; libtpu is there to compile only, and would look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

ROOT = Path(__file__).parents[1]

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Tests that trace the same program anew need not compile it anew."""
    folder = tmp_path_factory.getbasetemp() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder


@pytest.fixture(scope="session")
def tiny_config():
    """Makes the config of a ``:tiny`` recipe, with dotted changes."""
    sys.path.insert(0, str(ROOT))
    from configs import radit

    def make(workdir, variant="tiny", **changes):
        config = radit.get_config(variant)
        config.workdir = str(workdir)
        config.update_from_flattened_dict(changes)
        return config

    return make


@pytest.fixture(scope="session")
def retrieved(tmp_path_factory, tiny_config):
    """A work folder of the tiny chain, complete up to lm_ft; copy it to go on."""
    from radit_jax.stages.radit import run_chain

    workdir = tmp_path_factory.mktemp("tiny")
    config = tiny_config(workdir)
    config.stages = ("prepare", "corpus", "index", "retrieve")
    run_chain(config)
    return workdir


@pytest.fixture(scope="session")
def scored(retrieved, tiny_config, tmp_path_factory):
    """A work folder of the tiny chain with ``lm_score`` besides; copy it to go on."""
    from radit_jax.stages import lm_score
    from radit_jax.stages.stage import run

    workdir = tmp_path_factory.mktemp("scored") / "work"
    shutil.copytree(retrieved, workdir, symlinks=True)
    run("lm_score", lm_score.STAGE, tiny_config(workdir))
    return workdir


@pytest.fixture
def workdir(retrieved, tmp_path):
    """A copy of ``retrieved`` of the test's own."""
    return shutil.copytree(retrieved, tmp_path / "work", symlinks=True)
