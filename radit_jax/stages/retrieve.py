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
from radit_jax.data.tokenize import Tokenizer, load_tokenizer
from radit_jax.evaluation.metrics import contains_answer
from radit_jax.retrieval.embed import embed_queries
from radit_jax.retrieval.index import Index, open_index
from radit_jax.stages.index import Encode, Tokenize, tower
from radit_jax.stages.stage import (
    Stage,
    check_counts,
    existing,
    field_fingerprint,
    section,
)
from radit_jax.tracker import progress

log = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")
# Not questions but text that continues, from the passages themselves.
CORPUS = "corpus"


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


def corpus_examples(
    config: ConfigDict, store: PassageStore, tokenizer: Tokenizer
) -> list[Example]:
    """Self-supervised examples: a passage's first tokens, and its last as the answer.

    RA-DIT section 3.3: the first 50 and the last 50 tokens of random passages. The
    paper does not say of which tokenizer; they are the query encoder's, and end with a
    whole word. Passages with fewer tokens than both ends together are passed over.

    Raises:
        ValueError: too few passages are long enough.
    """
    wanted, size = config.retrieve.corpus_examples, config.retrieve.corpus_tokens
    order = np.random.default_rng(config.seed).permutation(len(store))
    examples: list[Example] = []
    for id in order.tolist():
        if len(examples) == wanted:
            break
        passage = store[id]
        ends = tokenizer.ends(passage.display, size)
        if ends is not None:
            examples.append(
                Example(
                    id=f"passage-{id}",
                    question=ends[0],
                    answers=(ends[1],),
                    dataset=CORPUS,
                    document=passage.document,
                    source=id,
                )
            )
    if len(examples) < wanted:
        raise ValueError(
            f"retrieve.corpus_examples = {wanted}, but only {len(examples)} of "
            f"{len(store)} passages have {2 * size} tokens; ask for fewer, or for "
            f"fewer retrieve.corpus_tokens (now {size})"
        )
    return examples


class Searcher:
    """Finds the passages of examples with one query encoder.

    Args:
        config: its retrieve section is used.
        index: that is searched.
        encode: token ids and mask to embeddings.
        tokenize: questions to token ids.
        length: tokens of the longest question.
    """

    def __init__(
        self,
        config: ConfigDict,
        index: Index,
        encode: Encode,
        tokenize: Tokenize,
        length: int,
    ):
        self.config = config.retrieve
        self.index = index
        self.encode = encode
        self.tokenize = tokenize
        self.length = length

    def __call__(self, examples: Sequence[Example], k: int) -> Retrieved:
        """The best k passages of each example, never the one it was cut from."""
        queries_BE = embed_queries(
            [example.question for example in examples],
            self.tokenize,
            self.encode,
            batch_tokens=self.config.batch_tokens,
            max_length=self.length,
            row_multiple=sharding.row_shards(),
        )
        sources_B = np.array([example.source for example in examples])
        if (sources_B < 0).all():
            return self.index.search(queries_BE, k)
        ids_BC, scores_BC = self.index.search(queries_BE, k + 1)
        own_BC = (ids_BC == sources_B[:, None]) & (ids_BC >= 0)
        # The source goes to the end and falls off, else the worst passage does.
        order_BC = np.argsort(own_BC, axis=1, kind="stable")[:, :k]
        return Retrieved(
            *(np.take_along_axis(x, order_BC, axis=1) for x in (ids_BC, scores_BC))
        )


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Search for every question; a dataset already searched is kept."""
    check_counts(
        "retrieve",
        config.retrieve,
        ("k", "max_tokens", "batch_tokens", "shard_size", "corpus_tokens"),
    )
    splits = read_splits(config)
    workdir = Path(config.workdir)
    if config.retrieve.corpus_examples:
        store = PassageStore(workdir / "passages")
        tokenizer = load_tokenizer(config.encoder)
        splits[CORPUS] = {CORPUS: corpus_examples(config, store, tokenizer)}
    searcher = Searcher(
        config,
        open_index(workdir / "index", jax.sharding.get_mesh()),
        *tower(config, config.encoder, config.retrieve.max_tokens),
    )
    return search_splits(config, searcher, splits, folder)


def search_splits(
    config: ConfigDict,
    searcher: Searcher,
    splits: Mapping[str, Mapping[str, list[Example]]],
    folder: Path,
) -> dict[str, int]:
    """Fill ``folder/SPLIT/DATASET``, a shard that is there is kept; sizes of each."""
    size = config.retrieve.shard_size
    counts = {}
    total = sum(len(e) for datasets in splits.values() for e in datasets.values())
    with progress(total, "retrieve", "questions") as bar:
        for split, datasets in splits.items():
            for name, examples in datasets.items():
                target = folder / split / name
                counts[f"{split}/{name}"] = len(examples)
                for start in range(0, len(examples), size):
                    part = examples[start : start + size]
                    file = target / f"shard-{start:09d}.npz"
                    if file.exists():
                        bar.skip(len(part))
                    else:
                        found = searcher(part, config.retrieve.k)
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
    workdir: Path, split: str, artifact: str = "retrieved"
) -> dict[str, tuple[list[Example], Retrieved]]:
    """Dataset -> its examples and what was retrieved for them.

    Args:
        workdir: of the run.
        split: one of SPLITS, or CORPUS; empty where that was not asked for.
        artifact: folder of a retriever, ``retrieved`` or below ``retrieved_r_ft``.
    """
    found: dict[str, tuple[list[Example], Retrieved]] = {}
    folder = workdir / artifact / split
    if split == CORPUS and not folder.is_dir():
        return found
    for part in sorted(folder.iterdir()):
        lines = (part / "examples.jsonl").read_text().splitlines()
        examples = [_example(json.loads(line)) for line in lines]
        shards = [np.load(file) for file in sorted(part.glob("shard-*.npz"))]
        ids = np.concatenate([shard["ids"] for shard in shards])
        scores = np.concatenate([shard["scores"] for shard in shards])
        found[part.name] = (examples, Retrieved(ids, scores))
    return found


def _example(row: dict[str, Any]) -> Example:
    return Example(**{**row, "answers": tuple(row["answers"])})


STAGE = Stage(
    "retrieved",
    ("passages", "index"),
    ("encoder", "data.train", "data.test"),
    settings,
    build,
)
