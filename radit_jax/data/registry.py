"""Datasets by name: which there are, where one lies on disk, and its examples."""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from radit_jax.batch import Example
from radit_jax.data import evaluation_sets, instruction, layouts, sources
from radit_jax.data.damage import Damage
from radit_jax.data.jsonl import Row, nearest
from radit_jax.data.spec import Spec
from radit_jax.data.tasks import MAX_DAMAGED, collect, read_examples

DATASETS: Mapping[str, Spec] = {
    spec.name: spec for spec in (*instruction.SPECS, *evaluation_sets.SPECS)
}


def searched(name: str) -> bool:
    """Whether passages are retrieved for a dataset: not where its own context is all
    that is read (RA-DIT footnote 4), nor for the commonsense tasks (section 5)."""
    return name not in DATASETS or DATASETS[name].search


class Entry(NamedTuple):
    """One dataset of a split, as the config names it."""

    name: str
    path: Path  # a question file, or a folder or file in the published layout
    spec: Spec | None  # None: a question file, see ``read_examples``
    split: str = ""  # which is read, "train", "dev" or "test"; "": as the field says

    def files(self, split: str) -> list[Path]:
        """What is read of a split: "train", "dev" or "test".

        Raises:
            ValueError: the dataset has no such split.
            FileNotFoundError: it is not there.
        """
        if self.spec is None:
            return [self.path]
        return layouts.find_files(self.path, self._published(split), self.spec.config)

    def has(self, split: str) -> bool:
        """Whether a split was published; a question file is any split."""
        return self.spec is None or split in self.spec.splits

    def _published(self, split: str) -> str:
        assert self.spec is not None
        if split not in self.spec.splits:
            raise ValueError(
                f"dataset {self.name} has no published {split} split, only "
                f"{', '.join(self.spec.splits)}"
            )
        return self.spec.splits[split]

    def read(self, split: str, max_damaged: float = 0.0) -> list[Example]:
        """The examples of a split, in the order of the files.

        Args:
            split: "train", "dev" or "test".
            max_damaged: share of records that may be damaged; these are counted and
                left out.

        Raises:
            FileNotFoundError: the dataset is not there.
            ValueError: a record is damaged or more than may be are, an id occurs
                twice, or no example comes out; with dataset, file and record.
        """
        if self.spec is None:
            return read_examples(self.path, self.name, max_damaged)
        published = self._published(split)
        damage = Damage(MAX_DAMAGED, max_damaged)
        try:
            rows = sources.read_source(
                self.path, published, self.spec.config, damage.lost
            )
            rows = _checked(rows, self.spec)
            if self.spec.gather:
                rows = self.spec.gather(rows)
            examples = list(collect(rows, self.spec.read, damage))
            damage.finish()
        except ValueError as error:
            raise ValueError(f"dataset {self.name}: {error}") from error
        if not examples:
            raise ValueError(
                f"dataset {self.name}: no example comes out of the {split} split in "
                f"{self.path}"
            )
        return examples


def _checked(rows: Iterator[Row], spec: Spec) -> Iterator[Row]:
    """Records whose first one has the columns that are read."""
    for number, row in enumerate(rows):
        if number == 0:
            sources.check_columns(row, spec.columns, spec.name)
        yield row


def entries(field: str, setting: str, root: str) -> list[Entry]:
    """The datasets that a field of the config names.

    Args:
        field: its name, for errors.
        setting: separated by commas: ``PATH`` of a question file (the file's name is
            the dataset's), ``NAME`` of a published dataset, which lies in the folder of
            its hub id or its own name below ``root``, or ``NAME=PATH``. ``NAME:SPLIT``
            is for another split than the field's, such as ``nq:train``.
        root: folder of published datasets; "" if there is none.

    Raises:
        FileNotFoundError: a file or folder is not there.
        ValueError: an unknown name, ``root`` is needed and not set, or a name stands
            for two.
    """
    found: dict[str, Entry] = {}
    for part in filter(None, (part.strip() for part in setting.split(","))):
        entry = _entry(field, part, root)
        if entry.name in found:
            raise ValueError(
                f"{field}: {found[entry.name].path} and {entry.path} are both called "
                f"{entry.name}, and a name stands for one dataset; rename one"
            )
        if not entry.path.exists():
            raise FileNotFoundError(f"--config.{field}={part}: {missing(entry.path)}")
        found[entry.name] = entry
    return list(found.values())


def _entry(field: str, part: str, root: str) -> Entry:
    named, equals, path = (piece.strip() for piece in part.partition("="))
    name, _, split = (piece.strip() for piece in named.partition(":"))
    if not equals and name not in DATASETS and ("/" in part or "." in part):
        file = Path(part).expanduser()
        return Entry(file.stem.removesuffix(".jsonl"), file, None)
    if name not in DATASETS:
        raise ValueError(f"{field}: {_unknown(name)}")
    spec = DATASETS[name]
    if split and split not in spec.splits:
        raise ValueError(
            f"{field} = {part}: dataset {name} has no {split} split, only "
            f"{', '.join(spec.splits)}"
        )
    if equals:
        return Entry(name, Path(path).expanduser(), spec, split)
    if not root:
        raise ValueError(
            f"{field}: dataset {name} is looked for below data.root, which is not "
            f"set: --config.data.root=FOLDER with FOLDER/{spec.hub or name}, or "
            f"name its own place: {name}=PATH"
        )
    places = [Path(root).expanduser() / place for place in (spec.hub, name) if place]
    found = next((place for place in places if place.exists()), places[0])
    return Entry(name, found, spec, split)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, DATASETS, 1, 0.0)
    return (
        f"no dataset is called {name!r}; did you mean {near[0]}? docs/data.md lists "
        "them; a question file of your own is given by its path, such as train.jsonl"
    )


def missing(path: Path) -> str:
    """What to say of a file or folder that is not there: the nearest name that is."""
    near = nearest(path)
    hint = f"; did you mean {near}?" if near else ""
    return f"{path}: no such file or folder{hint}"


def table() -> str:
    """All datasets as a Markdown table, for docs/data.md."""
    uses = {"L": "LM-FT", "R": "R-FT", "LR": "LM-FT, R-FT", "E": "evaluation"}
    lines = [
        "| name | category | used in | size | template | context | read from (hub id, "
        "config; splits) | TFDS | licence as published |",
        "|---|---|---|---:|---|---|---|---|---|",
    ]
    for spec in DATASETS.values():
        place = ", ".join(filter(None, (spec.hub or "not on the hub", spec.config)))
        splits = ", ".join(
            ours if ours == theirs else f"{ours} = {theirs}"
            for ours, theirs in spec.splits.items()
        )
        context = spec.context if spec.search else f"{spec.context}, not searched"
        cells = (
            f"`{spec.name}`",
            spec.category,
            uses[spec.used],
            f"{spec.size:,}",
            spec.template,
            context,
            f"{place}; {splits}",
            spec.tfds or "",
            spec.licence,
        )
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- `{spec.name}`: {spec.note}" for spec in DATASETS.values() if spec.note]
    return "\n".join([*lines, "", *notes]) + "\n"
