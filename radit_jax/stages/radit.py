"""The chain: every stage in order, skipping what is complete for the same inputs."""

import logging
from pathlib import Path

import jax
from ml_collections import ConfigDict

from radit_jax import processes
from radit_jax.stages import (
    corpus,
    evaluate,
    export,
    index,
    lm_ft,
    lm_score,
    prepare,
    r_ft,
    retrieve,
    retrieve_r_ft,
)
from radit_jax.stages.stage import Stage, check_required, existing, mesh, run

log = logging.getLogger(__name__)

STAGES: dict[str, Stage] = {
    "prepare": prepare.STAGE,
    "corpus": corpus.STAGE,
    "index": index.STAGE,
    "retrieve": retrieve.STAGE,
    "lm_score": lm_score.STAGE,
    "r_ft": r_ft.STAGE,
    "retrieve_r_ft": retrieve_r_ft.STAGE,
    "lm_ft": lm_ft.STAGE,
    "evaluate": evaluate.STAGE,
    "export": export.STAGE,
}


def run_chain(config: ConfigDict) -> None:
    """Run ``config.stages`` in order and show the table at the end.

    Raises:
        ValueError: an unknown stage, or a field that any of the stages needs is not
            set; nothing runs then.
        ValueError: a mesh does not fit the devices, or the language model the mesh.
        FileNotFoundError: a file or folder that any of them needs is not there.
        ValueError: an encoder that normalises, without a temperature of its scores; or
            processes with different files.
    """
    unknown = [name for name in config.stages if name not in STAGES]
    if unknown:
        raise ValueError(f"stages: {unknown} not among {', '.join(STAGES)}")
    required = dict.fromkeys(f for name in config.stages for f in STAGES[name].required)
    check_required("radit", tuple(required), config)
    # Each raises if there are other devices than it says.
    meshes = {name: mesh(config, STAGES[name].mesh) for name in config.stages}
    if "prepare" not in config.stages:
        # Not after hours of indexing. What ``prepare`` makes is not there yet.
        for field in required:
            # A field of a section is for its stage to check.
            if "." not in field:
                existing(config, field)
        for name in config.stages:
            with jax.set_mesh(meshes[name]):
                STAGES[name].check(config)
        if processes.count() > 1:
            found = {name: STAGES[name].settings(config) for name in config.stages}
            processes.check_same("inputs", found)
    for name in config.stages:
        run(name, STAGES[name], config)
    workdir = Path(config.workdir)
    if "evaluate" in config.stages and processes.first():
        report = workdir / "report"
        print(evaluate.summary(workdir))
        print(f"\nEverything is in {workdir.resolve()}:")
        print(f"  to read, down to every prompt    {report / 'index.html'}")
        print(f"  tables and side-by-side answers  {report / 'results.md'}")
        print(f"  the same as data                 {report / 'results.json'}")
        print(f"  picture                          {report / 'results.png'}")
        print(f"  every answer with its passages   {report / 'generations.jsonl'}")
        curves = [workdir / "lm_ft", workdir / "r_ft" / config.r_ft.target]
        for folder in (folder for folder in curves if folder.is_dir()):
            print(f"  training curves                  {folder / 'curves.png'}")
