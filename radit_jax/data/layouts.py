"""Where the records of a split lie on disk, in the layouts datasets are published in.

===================  ===============================================================
layout               what a split is
===================  ===============================================================
one file             the file
``save_to_disk``     ``SPLIT/`` with ``state.json`` and ``data-*.arrow``
hub repository       ``SPLIT-*.parquet`` in the folder, in ``data/`` or in
                     ``CONFIG/``; or ``CONFIG/SPLIT/*.parquet``, as the hub converts
other files          the same with another suffix of SUFFIXES; the name may go on
                     (``dev_rand_split.jsonl``) or have the dataset's in front of it
                     (``nq-dev-kilt.jsonl``), as long as only one fits
TensorFlow Datasets  ArrayRecord shards beside ``features.json``, also in
                     ``VERSION/`` or ``CONFIG/VERSION/``
===================  ===============================================================
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from radit_jax.data.jsonl import why_missing

# Of the files that are read; of a split in two kinds, the first one is taken.
SUFFIXES = (
    ".parquet",
    ".arrow",
    ".jsonl",
    ".json",
    ".jsonl.gz",
    ".json.gz",
    ".csv",
    ".csv.gz",
    ".tsv",
    ".tsv.gz",
)

# Names that publishers give to one split.
SYNONYMS = (("train", "training"), ("validation", "dev", "valid", "val"))

# Files about a dataset; none of its records is in them.
_METADATA = {
    "config.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "features.json",
    "state.json",
}
# The hash is that of early uploads to the hub.
_SHARD = re.compile(r"-(?P<at>\d{5,})-of-(?P<count>\d{5,})(-[0-9a-f]{16})?")
_CONVERTED = re.compile(r"(?P<at>\d{4})\.parquet")  # a shard that the hub converted
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class _Part(NamedTuple):
    """Files of a folder that are one split, or a part of one."""

    label: str  # what the files, or the folder they are in, are called
    kind: int  # the smaller, the rather it is taken
    exact: bool  # whether the label is the name of a split, with nothing behind it
    files: list[Path]


def find_files(path: str | Path, split: str, config: str = "") -> list[Path]:
    """The files of a split, in the order of their records.

    Args:
        path: A file, which then is the split, or the folder of a dataset.
        split: Name of the split; a synonym of it counts where it is not there itself.
        config: Name of the configuration, of a dataset with several. A folder in which
            there is none is itself one.

    Returns:
        The files; of a dataset of TensorFlow Datasets the folder that holds them.

    Raises:
        FileNotFoundError: There is nothing at the path.
        ValueError: There is no such split or configuration, several files fit, a shard
            is missing, or the file is of an unknown kind.
    """
    path = Path(path)
    if path.is_file():
        if not suffix_of(path):
            raise ValueError(
                f"{path}: a file of a kind that is not read, expected one of"
                f" {', '.join(SUFFIXES)}"
            )
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: {why_missing(path)}")
    if builder := _builder_folder(path, config):
        builder_split(builder, split)
        return [builder]
    if (path / "state.json").is_file():
        return _saved_files(path)
    folder, front = _config_folder(path, split, config)
    fitting = _fitting(folder, split, front)
    if not fitting:
        raise _missing_split(folder, split, _shown(folder))
    if len(fitting) > 1:
        names = (os.path.relpath(files[0], folder) for files in fitting)
        raise ValueError(
            f'{folder}: split "{split}" may be any of {", ".join(names)}; give the path'
            " of the right one"
        )
    (files,) = fitting
    if files[0].name == "state.json":
        return _saved_files(files[0].parent)
    return _complete(files)


def suffix_of(path: Path) -> str:
    """The one of ``SUFFIXES`` that a file's name ends in; "" if none.

    Args:
        path: The file, which need not be there.
    """
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def builder_split(folder: Path, split: str) -> str:
    """What a split is called in a folder of TensorFlow Datasets.

    Args:
        folder: With ``features.json`` in it, as ``find_files`` returns it.
        split: As in ``find_files``.

    Raises:
        ValueError: There is no such split, a shard is missing, or the files are not
            ArrayRecord.
    """
    info = _load(folder / "dataset_info.json")
    formats = {info.get("fileFormat"), *info.get("alternativeFileFormats", ())}
    if "array_record" not in formats:
        raise ValueError(
            f"{folder}: {info.get('fileFormat', 'tfrecord')} files, which only"
            " TensorFlow reads; where it is installed, convert them:"
            f" tfds convert_format --dataset_version_dir={folder}"
            " --out_file_format=array_record"
        )
    shards = {
        entry["name"]: len(entry.get("shardLengths", ()))
        for entry in info.get("splits", ())
    }
    name = next((name for name in _names(split) if name in shards), None)
    if name is None:
        raise _missing_split(folder, split, shards)
    files = list(folder.glob(f"*-{name}.array_record-*"))
    if not files:
        raise ValueError(f'{folder}: none of the files of split "{name}" is there')
    _complete(files, shards[name])
    return name


def _config_folder(path: Path, split: str, config: str) -> tuple[Path, str]:
    """The folder of a configuration, and what may stand before a split's name in it.

    The second is for ``_fitting``.
    """
    homes = (path, path / "data")
    if config:
        for home in homes:
            if (home / config).is_dir():
                return home / config, ""
        if path.name == config:
            return path, ""
    elif _fitting(path, split, ""):
        return path, ""
    configs = {
        folder.name: folder
        for home in homes
        for folder in _visible(home)
        if folder.is_dir()
        and folder.name not in ("data", *_names(split))
        and _fitting(folder, split, "")
    }
    if not configs:
        return path, config
    if not config and len(configs) == 1:
        return next(iter(configs.values())), ""
    if not config and "default" in configs:
        return configs["default"], ""
    raise _missing_config(path, config, configs)


def _missing_config(path: Path, config: str, there: Iterable[str]) -> ValueError:
    names = sorted(there)
    near = difflib.get_close_matches(config, names, n=1)
    what = f'no configuration "{config}"' if config else "several configurations"
    hint = f"; did you mean {near[0]}?" if near else ""
    return ValueError(f"{path}: {what}, there are {', '.join(names)}{hint}")


def _missing_split(path: Path, split: str, there: Iterable[str]) -> ValueError:
    names = sorted(set(there))
    if not names:
        return ValueError(
            f'{path}: no split "{split}", and no file of a kind that is read:'
            f" {', '.join(SUFFIXES)}"
        )
    near = difflib.get_close_matches(split, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ValueError(f'{path}: no split "{split}", there are {", ".join(names)}{hint}')


def _names(split: str) -> list[str]:
    """The name of a split, then its synonyms."""
    same = next((names for names in SYNONYMS if split.lower() in names), ())
    return [split, *(name for name in same if name != split.lower())]


def _fitting(folder: Path, split: str, front: str) -> list[list[Path]]:
    """The files whose names fit a split best; several lists if they differ in them.

    Args:
        folder: Where to look, besides its ``data``.
        split: Name of the split.
        front: What may stand before it, such as a configuration; "": anything.
    """
    ranked: dict[tuple[int, int, int], dict[Path, list[Path]]] = {}
    parts = _parts(folder)
    for synonym, name in enumerate(_names(split)):
        # train_0, train_1, ... are parts of one split.
        number = re.compile(rf"(?<={re.escape(name)})[-_.]?\d+$", re.IGNORECASE)
        for part in parts:
            label = number.sub("", part.label)
            rank = _rank(label, name, front, part.exact)
            if rank is not None:
                same = ranked.setdefault((synonym, rank, part.kind), {})
                whole = part.files[0].parent / label
                same.setdefault(whole, []).extend(part.files)
    return list(ranked[min(ranked)].values()) if ranked else []


def _rank(label: str, split: str, front: str, exact: bool) -> int | None:
    """How well a label fits a split, 0 being best; None if it does not."""
    name = re.escape(split)
    # The hub calls the beginning of a large dataset partial-SPLIT.
    front = re.escape(front) or "(?!partial-).+"
    # A split's name has no hyphen on the hub, so what is before one is the dataset's;
    # before an underscore it may be another split's, such as auxiliary_train.
    patterns = [name, f"{front}-{name}"]
    if not exact:
        patterns.append(f"{front}[_.]{name}")
        patterns += [f"{name}[-_.].+", f"{front}[-_.]{name}[-_.].+"]
    for rank, pattern in enumerate(patterns):
        if re.fullmatch(pattern, label, re.IGNORECASE):
            return rank
    return None


def _parts(folder: Path) -> list[_Part]:
    """What lies in a folder and in its ``data``: files, and folders of files."""
    parts = []
    for home in (folder / "data", folder):
        found: dict[tuple[str, int, bool], list[Path]] = {}
        for entry in _visible(home):
            if entry.is_dir():
                if entry != folder / "data":
                    parts += _folder_part(entry)
            elif suffix := suffix_of(entry):
                stem = entry.name[: -len(suffix)]
                label = _SHARD.sub("", stem)
                key = (label, SUFFIXES.index(suffix), label != stem)
                found.setdefault(key, []).append(entry)
        parts += [_Part(*key, files) for key, files in found.items()]
    return parts


def _folder_part(folder: Path) -> list[_Part]:
    """The files in a folder that bears a split's name; none if it holds none."""
    state = folder / "state.json"
    if state.is_file():
        return [_Part(folder.name, -1, True, [state])]
    kinds: dict[str, list[Path]] = {suffix: [] for suffix in SUFFIXES}
    for entry in _visible(folder):
        if not entry.is_dir() and (suffix := suffix_of(entry)):
            kinds[suffix].append(entry)
    return [
        _Part(folder.name, kind, True, files)
        for kind, files in enumerate(kinds.values())
        if files
    ]


def _saved_files(folder: Path) -> list[Path]:
    """The files of a split that ``datasets`` has saved to disk."""
    state = _load(folder / "state.json")
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{folder}: saved by an old version of datasets together with an index of"
            " its rows; load it and save it again with version 2 or later"
        )
    files = [folder / file["filename"] for file in state.get("_data_files", ())]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: this shard is missing, state.json lists it")
    if not files:
        raise ValueError(f"{folder}: state.json lists no files")
    return files


def _complete(files: Sequence[Path], count: int = 0) -> list[Path]:
    """The files of a split in the order of their numbers.

    Args:
        files: In one folder.
        count: How many shards there must be; 0: as many as their names say.

    Raises:
        ValueError: A shard is missing, or is there twice.
    """
    shards: dict[int, Path] = {}
    counts = {count} if count else set()
    for file in files:
        if not file.exists():
            raise ValueError(f"{file}: a link to what is not there; download it again")
        found = _SHARD.search(file.name)
        if found:
            counts.add(int(found["count"]))
        else:
            # These do not say how many there are, but a gap is seen.
            found = _CONVERTED.fullmatch(file.name)
        if found:
            other = shards.setdefault(int(found["at"]), file)
            if other != file:
                raise ValueError(
                    f"{file}: the same shard as {other.name}; remove one of them"
                )
    if len(counts) > 1:
        names = ", ".join(file.name for file in shards.values())
        raise ValueError(f"{files[0].parent}: shards of two datasets: {names}")
    total = max(counts, default=max(shards, default=-1) + 1)
    missing = sorted(set(range(total)) - shards.keys())
    if missing:
        name = f"-{missing[0]:05d}-of-{total:05d}" if counts else f"{missing[0]:04d}"
        raise ValueError(
            f"{files[0].parent}: {len(missing)} of {total} shards are missing, the"
            f" first one is {name}; there are"
            f" {', '.join(file.name for file in files[:3])}"
        )
    return sorted(files, key=_number_aware)


def _number_aware(file: Path) -> list[str | int]:
    return [
        int(piece) if piece.isdigit() else piece
        for piece in re.split("([0-9]+)", file.name)
    ]


def _visible(folder: Path) -> list[Path]:
    """Files and folders that may hold records; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(
        entry
        for entry in folder.iterdir()
        if not entry.name.startswith((".", "__")) and entry.name not in _METADATA
    )


def _shown(folder: Path) -> list[str]:
    """What there is in a folder, or in those in it, for an error."""
    names = [
        f"{part.label}/" if part.label == part.files[0].parent.name else part.label
        for part in _parts(folder)
    ]
    return names or [
        f"{entry.name}/{name}"
        for entry in _visible(folder)
        if entry.is_dir()
        for name in _shown(entry)
    ]


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: unreadable ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def _builder_folder(path: Path, config: str) -> Path | None:
    """The folder of a dataset of TensorFlow Datasets; None if it is not one."""
    found = _newest(path / config) or _newest(path)
    if found:
        return found
    configs = {entry.name: _newest(entry) for entry in _visible(path)}
    configs = {name: folder for name, folder in configs.items() if folder}
    if not configs:
        return None
    if config or len(configs) > 1:
        raise _missing_config(path, config, configs)
    return next(iter(configs.values()))


def _newest(folder: Path) -> Path | None:
    """A folder itself, or that of its newest version."""
    if (folder / "features.json").is_file():
        return folder
    versions = [
        entry
        for entry in _visible(folder)
        if _VERSION.fullmatch(entry.name) and (entry / "features.json").is_file()
    ]
    return max(
        versions, key=lambda entry: [*map(int, entry.name.split("."))], default=None
    )
