"""Artifact folders: what a stage made, from what, and whether it is whole.

A stage works in ``<artifact>.partial-<key>`` and renames it when it is done, so a
folder that bears the artifact's name is complete. The key is a hash of everything
the content depends on; the same key means the same content.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 1
MANIFEST = "manifest.json"
# Files up to this many bytes are hashed whole; of larger ones (weights, corpora of
# many GB) the size and evenly spread blocks are, which any edit in practice changes.
WHOLE = 256 * 2**20
BLOCK = 2**20
BLOCKS = 64

log = logging.getLogger(__name__)


class ArtifactError(ValueError):
    """An artifact is missing, incomplete or made by another version."""


class Plan(NamedTuple):
    """Where an artifact goes and what it depends on."""

    folder: Path  # the complete artifact
    partial: Path  # where the stage works
    key: str  # hash of ``settings`` and ``inputs``
    settings: dict[str, Any]
    inputs: dict[str, str]  # artifact name -> key


def fingerprint(path: str | Path) -> str:
    """Content hash of a file, or of all files of a folder with their names.

    Raises:
        FileNotFoundError: there is no such file or folder.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*"))
    for file in files:
        if file.is_file():
            name = file.name if file == path else str(file.relative_to(path))
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            _hash_file(file, digest)
    return digest.hexdigest()


def _hash_file(file: Path, digest: Any) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE:
            while block := stream.read(BLOCK):
                digest.update(block)
            return
        for i in range(BLOCKS):
            stream.seek(i * (size - BLOCK) // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))


def plan(
    workdir: Path,
    name: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
) -> Plan:
    """The key and the folders of an artifact.

    Args:
        workdir: parent of all artifacts.
        name: the artifact's name, such as ``passages``.
        settings: JSON-serialisable settings and file fingerprints.
        inputs: name -> complete input artifact.
    """
    keys = {input: read_manifest(path)["key"] for input, path in inputs.items()}
    content = json.dumps(
        {"format": FORMAT, "settings": dict(settings), "inputs": keys}, sort_keys=True
    )
    key = hashlib.sha256(content.encode()).hexdigest()[:12]
    folder = workdir / name
    return Plan(folder, workdir / f"{name}.partial-{key}", key, dict(settings), keys)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete artifact.

    Raises:
        ArtifactError: there is none, or it was written by another format version.
    """
    file = folder / MANIFEST
    if not file.is_file():
        partial = sorted(folder.parent.glob(f"{folder.name}.partial-*"))
        hint = f"; {partial[-1].name} is unfinished" if partial else ""
        raise ArtifactError(
            f"{folder}: artifact is missing{hint}. Run the stage that makes it first "
            "(`--config configs/radit.py` runs the whole chain)"
        )
    try:
        manifest = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ArtifactError(
            f"{file}: not valid JSON ({error}); move the folder away to have it made "
            "again"
        ) from error
    if not isinstance(manifest, dict) or not {"format", "key"} <= manifest.keys():
        raise ArtifactError(
            f"{file}: not a manifest; move the folder away to have it made again"
        )
    if manifest["format"] != FORMAT:
        raise ArtifactError(
            f"{file}: format {manifest['format']}, this version reads {FORMAT}; "
            "move the folder away to have it made again"
        )
    return manifest


def check_inputs(folder: Path) -> None:
    """Whether the artifacts beside a complete one are still those it was made from.

    Raises:
        ArtifactError: one of them was made anew since.
    """
    for name, key in read_manifest(folder)["inputs"].items():
        now = read_manifest(folder.parent / name)["key"]
        if now != key:
            raise ArtifactError(
                f"{folder} was made from {name} {key}, and {folder.parent / name} is "
                f"now {now}; run the stage that makes {folder.name} again"
            )


def is_complete(plan: Plan) -> bool:
    """Whether the artifact is there and was made from the same settings and inputs."""
    manifest = plan.folder / MANIFEST
    return manifest.is_file() and read_manifest(plan.folder)["key"] == plan.key


def begin(plan: Plan) -> Path:
    """The folder to work in; what an interrupted run left there is kept."""
    if plan.partial.exists():
        log.info("%s: going on where an earlier run stopped", plan.partial)
    plan.partial.mkdir(parents=True, exist_ok=True)
    return plan.partial


def finish(plan: Plan, counts: Mapping[str, Any]) -> Path:
    """Write the manifest and give the partial folder the artifact's name.

    An artifact of that name made with other settings is moved aside, not deleted.
    """
    manifest = {
        "format": FORMAT,
        "key": plan.key,
        "settings": plan.settings,
        "inputs": plan.inputs,
        "counts": dict(counts),
    }
    temporary = plan.partial / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, plan.partial / MANIFEST)
    return install(plan, plan.partial)


def install(plan: Plan, folder: Path) -> Path:
    """Give a whole folder the artifact's name; one that bears it is moved aside."""
    if plan.folder.exists():
        aside = _aside(plan.folder)
        log.info("%s was made with other settings: moved to %s", plan.folder, aside)
        plan.folder.rename(aside)
    folder.rename(plan.folder)
    return plan.folder


def _aside(folder: Path) -> Path:
    """A free name for an artifact that is replaced."""
    try:
        key = read_manifest(folder)["key"]
    except ArtifactError:
        key = "unknown"
    names = [folder.with_name(f"{folder.name}.replaced-{key}")]
    names += [names[0].with_name(f"{names[0].name}-{i}") for i in range(2, 100)]
    return next(name for name in names if not name.exists())
