"""Stage ``retrieve``: questions and index/ -> retrieved/, with the query encoder."""

import difflib
import itertools
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from radit_jax import processes
from radit_jax.artifacts import fingerprint
from radit_jax.batch import Example, Retrieved
from radit_jax.data.corpus import PassageStore
from radit_jax.data.registry import DATASETS, Entry, entries, searched
from radit_jax.data.tokenize import Tokenizer, load_tokenizer
from radit_jax.evaluation.metrics import contains_answer
from radit_jax.retrieval.embed import embed_queries
from radit_jax.retrieval.index import Index, open_index
from radit_jax.stages.index import Encode, Tokenize, row_multiple, tower
from radit_jax.stages.stage import (
    Stage,
    check_counts,
    field_fingerprint,
    section,
)
from radit_jax.tracker import progress

log = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")
# Pools of demonstrations for few-shot prompts.
SHOTS = "shots"
# Not questions but text that continues, from the passages themselves.
CORPUS = "corpus"


def datasets(config: ConfigDict, split: str) -> list[Entry]:
    """Those that the config names for a split.

    Raises:
        FileNotFoundError, ValueError: as ``registry.entries``.
    """
    return entries(f"data.{split}", config.data[split], config.data.root)


def sources(config: ConfigDict) -> dict[str, list[tuple[Entry, str]]]:
    """Split -> datasets, and which of their published splits is read for it.

    Without ``data.dev`` it is the dev split of every training dataset that has one; of
    the others a share of train is set aside. Demonstrations come from train.
    """
    usual = {"train": "train", "dev": "dev", "test": "test", SHOTS: "train"}
    found = {
        split: [(entry, entry.split or read) for entry in datasets(config, split)]
        for split, read in usual.items()
    }
    if not found["dev"]:
        published = [entry for entry, _ in found["train"] if entry.spec is not None]
        found["dev"] = [(entry, "dev") for entry in published if entry.has("dev")]
    return {split: parts for split, parts in found.items() if parts}


def data_settings(config: ConfigDict) -> dict[str, Any]:
    """What the examples depend on: the content of every file, and the choice."""
    files = {
        split: {
            entry.name: [fingerprint(file) for file in entry.files(published)]
            for entry, published in parts
        }
        for split, parts in sources(config).items()
    }
    names = ("dev_share", "limit", "max_damaged")
    data = {name: section(config.data)[name] for name in names}
    return {"files": files, "data": data, "seed": config.seed}


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The retrieve section, the query encoder and the examples."""
    return {
        **section(config.retrieve),
        **data_settings(config),
        "encoder": field_fingerprint(config, "encoder"),
        "pooling": section(config.pooling),
        "dtype": config.dtype,
    }


def read_splits(config: ConfigDict) -> dict[str, dict[str, list[Example]]]:
    """Split -> dataset -> examples; where no dev split is given or published, a share
    of train is set aside. Questions about the same document stay on one side.

    Raises:
        FileNotFoundError, ValueError: as ``Entry.read``; or there is nothing to
            validate on.
    """
    data = config.data
    splits: dict[str, dict[str, list[Example]]] = {split: {} for split in SPLITS}
    for split, parts in sources(config).items():
        splits[split] = {
            entry.name: entry.read(published, data.max_damaged)
            for entry, published in parts
        }
    if not data.dev:
        for name in [name for name in splits["train"] if name not in splits["dev"]]:
            examples = splits["train"][name]
            groups = [example.document or example.id for example in examples]
            unique = sorted(set(groups))
            rng = np.random.default_rng(config.seed)
            size = round(data.dev_share * len(unique))
            chosen = set(rng.permutation(unique)[:size].tolist())
            dev = [e for e, g in zip(examples, groups, strict=True) if g in chosen]
            train = [
                e for e, g in zip(examples, groups, strict=True) if g not in chosen
            ]
            if dev and train:
                splits["train"][name], splits["dev"][name] = train, dev
                log.info("%s: %d questions set aside as dev", name, len(dev))
        if splits["train"] and not splits["dev"]:
            raise ValueError(
                "data.dev is not set and the training questions are too few to set "
                f"some aside (data.dev_share = {data.dev_share}); give a file"
            )
    return {
        split: {
            name: limited(examples, data.limit[split], config.seed)
            for name, examples in parts.items()
        }
        for split, parts in splits.items()
    }


def chosen_datasets(
    field: str, setting: str, splits: Mapping[str, Collection[str]], use: str
) -> list[str]:
    """Those of the datasets that a stage reads.

    Args:
        field: of the config, for errors.
        setting: its value: names separated by commas; "" for all but those that RA-DIT
            uses in the other fine-tuning alone.
        splits: split -> names of its datasets. Those that have no training split, such
            as a file of dev questions, are always read.
        use: "L" or "R", see ``Spec.used``.

    Raises:
        ValueError: there is no such training dataset, or none is left.
    """
    wanted = [name.strip() for name in setting.split(",") if name.strip()]
    train = splits["train"]
    if not wanted:
        other = {"L": "R", "R": "L"}[use]
        wanted = [n for n in train if n not in DATASETS or DATASETS[n].used != other]
        if not wanted:
            raise ValueError(
                f"{field}: {', '.join(train)}: RA-DIT uses these in the other "
                f"fine-tuning alone; name those to read all the same"
            )
    for name in wanted:
        if name not in train:
            near = difflib.get_close_matches(name, train, 1, 0.0)
            raise ValueError(
                f"{field} = {setting!r}: there is no dataset {name!r} among those "
                f"retrieved for; did you mean {near[0] if near else 'none'}? There are "
                f"{', '.join(train)}"
            )
    names = dict.fromkeys(name for split in splits.values() for name in split)
    return [n for n in names if n in wanted or n not in train]


def limited(examples: list[Example], limit: int, seed: int) -> list[Example]:
    """A random choice of so many, in their order; all of them if ``limit`` is 0."""
    if not limit or len(examples) <= limit:
        return examples
    chosen = np.random.default_rng(seed).permutation(len(examples))[:limit]
    return [examples[i] for i in np.sort(chosen)]


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
                    template="continuation",
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
            [example.search_text for example in examples],
            self.tokenize,
            self.encode,
            batch_tokens=self.config.batch_tokens,
            max_length=self.length,
            row_multiple=row_multiple(),
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
    """Fill ``folder/SPLIT/DATASET``, a shard that is there is kept; sizes of each.

    Datasets that are never read with retrieved passages get none. Several processes
    deal the shards out among each other, unless the index wants them all together.
    """
    size = config.retrieve.shard_size
    counts = {}
    files = [
        folder / split / name / f"shard-{start:09d}.npz"
        for split, datasets in splits.items()
        for name, examples in datasets.items()
        for start in range(0, len(examples), size)
    ]
    there = processes.from_first([file.exists() for file in files])
    done = dict(zip(files, there, strict=True))
    deal = itertools.cycle(range(processes.count()))
    total = sum(len(e) for datasets in splits.values() for e in datasets.values())
    with progress(total, "retrieve", "questions") as bar:
        for split, datasets in splits.items():
            for name, examples in datasets.items():
                target = folder / split / name
                counts[f"{split}/{name}"] = len(examples)
                for start in range(0, len(examples), size):
                    part = examples[start : start + size]
                    file = target / f"shard-{start:09d}.npz"
                    if done[file]:
                        bar.skip(len(part))
                        continue
                    mine = next(deal) == processes.index()
                    found = nothing(len(part), config.retrieve.k)
                    if searched(name) and (mine or searcher.index.together):
                        found = searcher(part, config.retrieve.k)
                    if mine:
                        write_arrays(file, ids=found.ids, scores=found.scores)
                    bar.update(len(part))
                if processes.first():
                    rows = (json.dumps(example._asdict()) for example in examples)
                    target.mkdir(parents=True, exist_ok=True)
                    (target / "examples.jsonl").write_text("\n".join(rows) + "\n")
    return counts


def nothing(examples: int, k: int) -> Retrieved:
    """No passage at all."""
    return Retrieved(
        np.full((examples, k), -1, np.int64),
        np.full((examples, k), -np.inf, np.float32),
    )


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
        split: one of SPLITS, or CORPUS or SHOTS; empty where that was not asked for.
        artifact: folder of a retriever, ``retrieved`` or below ``retrieved_r_ft``.
    """
    found: dict[str, tuple[list[Example], Retrieved]] = {}
    folder = workdir / artifact / split
    if split not in SPLITS and not folder.is_dir():
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
    """JSON knows no tuples."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in row.items()
    }
    return Example(**values)


def check(config: ConfigDict) -> None:
    """Whether every dataset is there, with the split that is read.

    Raises:
        FileNotFoundError, ValueError: as ``sources`` and ``Entry.files``.
    """
    for parts in sources(config).values():
        for entry, published in parts:
            entry.files(published)


STAGE = Stage(
    "retrieved",
    ("passages", "index"),
    ("encoder", "data.train", "data.test"),
    settings,
    build,
    check,
)
