"""Stage ``retrieve_r_ft``: r_ft/ and index/ -> retrieved_r_ft/, for evaluation.

The test questions with the query encoder as R-FT left it, one folder per target that
was trained towards.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from radit_jax import sharding
from radit_jax.data.tokenize import load_tokenizer
from radit_jax.retrieval.index import open_index
from radit_jax.stages.index import encoding, tokenizing
from radit_jax.stages.r_ft import load_finetuned_towers
from radit_jax.stages.retrieve import Searcher, read_retrieved, search_splits
from radit_jax.stages.stage import Stage, section

SPLIT = "test"


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The retrieve section and what was trained towards."""
    return section(config.retrieve) | {
        "targets": [config.r_ft.target, *config.r_ft.controls],
        "dtype": config.dtype,
    }


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Search with the query encoder of every target."""
    workdir = Path(config.workdir)
    datasets = {
        name: examples for name, (examples, _) in read_retrieved(workdir, SPLIT).items()
    }
    apply = encoding(config)
    counts: dict[str, Any] = {}
    for target in (config.r_ft.target, *config.r_ft.controls):
        tuned = workdir / "r_ft" / target
        towers = load_finetuned_towers(config, tuned)
        # Where both towers were trained, with passages as they are now.
        own = tuned / "index"
        index = open_index(
            own if own.is_dir() else workdir / "index", jax.sharding.get_mesh()
        )
        length = min(config.retrieve.max_tokens, towers.query.config.max_length)
        searcher = Searcher(
            config,
            index,
            functools.partial(apply, sharding.on_own_mesh(towers.query)),
            tokenizing(load_tokenizer(config.encoder), length),
            length,
        )
        found = search_splits(config, searcher, {SPLIT: datasets}, folder / target)
        counts |= {f"{target}/{name}": count for name, count in found.items()}
    return counts


STAGE = Stage(
    "retrieved_r_ft",
    ("index", "retrieved", "r_ft"),
    ("encoder",),
    settings,
    build,
)
