"""Stage ``retrieve``: questions and index/ -> retrieved/, with the query encoder."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from radit_jax import sharding
from radit_jax.artifacts import fingerprint
from radit_jax.batch import Example, Retrieved
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tasks import read_examples
from radit_jax.evaluation.metrics import contains_answer
from radit_jax.retrieval.embed import embed_queries
from radit_jax.retrieval.index import open_index
from radit_jax.stages.index import tower
from radit_jax.stages.stage import Stage, existing, field_fingerprint, section
from radit_jax.tracker import progress

log = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")


def paths(config: ConfigDict, split: str) -> list[Path]:
    """The files of a split; the config separates several by commas.

    Raises:
        FileNotFoundError: as ``existing``.
        ValueError: two files of a split have the same name; it names the dataset.
    """
    files = existing(config, f"data.{split}")
    names = [file.stem for file in files]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"data.{split}: two files are called {name}; the name of a file is "
                "the name of its dataset, rename one"
            )
    return files


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The retrieve section, the query encoder and the content of every data file."""
    files = {
        split: {file.stem: fingerprint(file) for file in paths(config, split)}
        for split in SPLITS
    }
    return section(config.retrieve) | {
        "encoder": field_fingerprint(config, "encoder"),
        "pooling": section(config.pooling),
        "files": files,
        "dev_share": config.data.dev_share,
        "seed": config.seed,
        "dtype": config.dtype,
    }


def read_splits(config: ConfigDict) -> dict[str, dict[str, list[Example]]]:
    """Split -> dataset -> examples; dev is set aside from train if no file is given.

    Questions about the same document stay on one side.
    """
    splits = {
        split: {
            file.stem: read_examples(file, file.stem) for file in paths(config, split)
        }
        for split in SPLITS
    }
    if not splits["dev"]:
        for name, examples in splits["train"].items():
            groups = [example.document or example.id for example in examples]
            unique = sorted(set(groups))
            rng = np.random.default_rng(config.seed)
            size = round(config.data.dev_share * len(unique))
            chosen = set(rng.permutation(unique)[:size].tolist())
            dev = [e for e, g in zip(examples, groups, strict=True) if g in chosen]
            train = [
                e for e, g in zip(examples, groups, strict=True) if g not in chosen
            ]
            if dev and train:
                splits["train"][name], splits["dev"][name] = train, dev
                log.info("%s: %d questions set aside as dev", name, len(dev))
        if not splits["dev"]:
            raise ValueError(
                "data.dev is not set and the training questions are too few to set "
                f"some aside (data.dev_share = {config.data.dev_share}); give a file"
            )
    return splits


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Search for every question; a dataset already searched is kept."""
    splits = read_splits(config)
    index = open_index(Path(config.workdir) / "index", jax.sharding.get_mesh())
    encode, tokenize, length = tower(config, config.encoder, config.retrieve.max_tokens)
    counts = {}
    total = sum(len(e) for datasets in splits.values() for e in datasets.values())
    with progress(total, "retrieve", "questions") as bar:
        for split, datasets in splits.items():
            for name, examples in datasets.items():
                target = folder / split / name
                counts[f"{split}/{name}"] = len(examples)
                for start in range(0, len(examples), config.retrieve.shard_size):
                    part = examples[start : start + config.retrieve.shard_size]
                    file = target / f"shard-{start:09d}.npz"
                    if file.exists():
                        bar.skip(len(part))
                    else:
                        queries_BE = embed_queries(
                            [example.question for example in part],
                            tokenize,
                            encode,
                            batch_tokens=config.retrieve.batch_tokens,
                            max_length=length,
                            row_multiple=sharding.row_shards(),
                        )
                        found = index.search(queries_BE, config.retrieve.k)
                        write_arrays(file, ids=found.ids, scores=found.scores)
                        bar.update(len(part))
                rows = (json.dumps(example._asdict()) for example in examples)
                (target / "examples.jsonl").write_text("\n".join(rows) + "\n")
    return counts


def answer_hits(
    ids_NC: np.ndarray, examples: Sequence[Example], store: PassageStore
) -> np.ndarray:
    """Whether each retrieved passage contains an answer of its example, bool [N, C]."""
    return np.array(
        [
            [
                contains_answer(passage.display, example.answers)
                for passage in store.get(ids)
            ]
            for ids, example in zip(ids_NC, examples, strict=True)
        ]
    )


def write_arrays(file: Path, **arrays: np.ndarray) -> None:
    """An ``.npz`` file that is whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    temporary.rename(file)


def read_retrieved(
    workdir: Path, split: str
) -> dict[str, tuple[list[Example], Retrieved]]:
    """Dataset -> its examples and what was retrieved for them."""
    found = {}
    for folder in sorted((workdir / "retrieved" / split).iterdir()):
        lines = (folder / "examples.jsonl").read_text().splitlines()
        examples = [_example(json.loads(line)) for line in lines]
        shards = [np.load(file) for file in sorted(folder.glob("shard-*.npz"))]
        ids = np.concatenate([shard["ids"] for shard in shards])
        scores = np.concatenate([shard["scores"] for shard in shards])
        found[folder.name] = (examples, Retrieved(ids, scores))
    return found


def _example(row: dict[str, Any]) -> Example:
    return Example(**{**row, "answers": tuple(row["answers"])})


STAGE = Stage(
    "retrieved",
    ("index",),
    ("encoder", "data.train", "data.test"),
    settings,
    build,
)
