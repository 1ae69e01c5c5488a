"""A copy of a work folder elsewhere: in a bucket, or on a disk that machines share.

The work folder stays on a local disk, for memory maps need files. ``config.mirror``
names a folder that outlives the machine, and holds by name and key

    NAME/KEY/...               the files of a finished artifact, as they are
    NAME/KEY/mirror_files.json their names and content hashes, written after them
    NAME/KEY/manifest.json     last: with it, the artifact is whole
    NAME/KEY/.../checkpoints/  of a stage that trains, which Orbax writes there itself
    NAME/latest.json           key of the one that the last run used

so runs with other settings live side by side, and a half-made copy is never taken for
a whole one. A stage whose artifact is there under its key fetches rather than makes it.
Checkpoints are never copied: every process writes and reads its own shards of them in
the mirror. Which mirror that is stands in the artifact (``mirror.json``).
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from radit_jax import artifacts, processes
from radit_jax.artifacts import MANIFEST, Plan

LISTING = "mirror_files.json"
LATEST = "latest.json"
POINTER = "mirror.json"  # in an artifact: whose checkpoints are in that mirror
CHECKPOINTS = "checkpoints"

log = logging.getLogger(__name__)


class MirrorError(ValueError):
    """The mirror cannot be reached, or another one holds a run's checkpoints."""


class Remote:
    """A folder on any file system that fsspec knows; errors name it, in words.

    Args:
        url: ``gs://`` needs the extra ``gcs``.

    Raises:
        MirrorError: no such kind of file system, or its package is missing.
    """

    def __init__(self, url: str):
        scheme, colon, _ = url.partition(":")
        if colon and "://" not in url and "/" not in scheme:
            raise MirrorError(f"mirror {url}: did you mean {scheme}://...?")
        self.url = url.rstrip("/")
        local = "://" not in url or scheme in ("file", "local")
        if local:
            path = Path(self.url.partition("://")[2] or self.url).expanduser()
            self.url = str(path.absolute())
        try:
            self._fs, self._root = fsspec.core.url_to_fs(
                self.url,
                # What other machines write must be seen.
                use_listings_cache=False,
                **({"auto_mkdir": True} if local else {}),
            )
        except ImportError as error:
            raise MirrorError(
                f"mirror {url}: {error}; for gs:// install radit_jax[gcs]"
            ) from error
        except Exception as error:
            raise self._failed("is of no kind that fsspec knows", error) from error

    def read(self, name: str) -> bytes | None:
        """Content of a file; None where there is none."""
        with self._explained("could not be read from"):
            try:
                return self._fs.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file, in one piece."""
        with self._explained("could not be written to"):
            self._fs.pipe_file(f"{self._root}/{name}", content)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with (
            self._explained("could not be written to"),
            contextlib.suppress(FileNotFoundError),
        ):
            self._fs.rm_file(f"{self._root}/{name}")

    def put(self, folder: Path, names: Sequence[str], below: str = "") -> None:
        """Copy files of a folder there, under the same names."""
        with self._explained("could not be written to"):
            self._fs.put(
                [str(folder / name) for name in names],
                [f"{self._root}/{below}{name}" for name in names],
            )

    def get(self, folder: Path, names: Sequence[str], below: str = "") -> str | None:
        """Copy files from there to a folder; names one that is missing."""
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with self._explained("could not be read from"):
            try:
                self._fs.get(
                    [f"{self._root}/{below}{name}" for name in names],
                    [str(folder / name) for name in names],
                )
            except FileNotFoundError as error:
                return str(error)
        return None

    def find(self, name: str) -> list[str]:
        """Names of the files in a folder there, or of the file itself."""
        with self._explained("could not be read from"):
            found = self._fs.find(f"{self._root}/{name}")
        return [os.path.relpath(path, self._root) for path in found]

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        # File systems raise whatever their clients do: HTTP, credentials, sockets.
        try:
            yield
        except Exception as error:
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: Exception) -> MirrorError:
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        return MirrorError(f"mirror {self.url} {what} ({reason})")


class Mirror:
    """Finished artifacts by name and key, below a URL or a folder.

    All methods raise MirrorError if the mirror does not answer.
    """

    def __init__(self, url: str):
        self.remote = Remote(url)

    def check(self) -> None:
        """See that files can be written and read there."""
        probe = f"reachable-{uuid.uuid4().hex}"
        self.remote.write(probe, b"radit_jax")
        if self.remote.read(probe) is None:
            raise MirrorError(
                f"mirror {self.remote.url}: forgets what is written to it"
            )
        self.remote.remove(probe)

    def place(self, plan: Plan) -> str:
        """URL of an artifact's copy."""
        return f"{self.remote.url}/{_below(plan)}".rstrip("/")

    def is_complete(self, plan: Plan) -> bool:
        """Whether a copy of this key is there with its manifest."""
        manifest = self._read_json(_below(plan) + MANIFEST)
        if manifest is None:
            return False
        if manifest.get("key") != plan.key:
            log.warning("%s: not of key %s, ignored", self.place(plan), plan.key)
            return False
        return True

    def fetch(self, plan: Plan) -> bool:
        """Copy an artifact to the work folder, if it is there and whole.

        Returns:
            Whether it was. A damaged copy is left alone, with a warning in the log.
        """
        if not self.is_complete(plan):
            return False
        place = self.place(plan)
        listing = self._read_json(_below(plan) + LISTING)
        if listing is None:
            log.warning("%s: without its list of files, ignored", place)
            return False
        log.info("%s: fetching %d files of %s", plan.folder.name, len(listing), place)
        folder = plan.folder.with_name(f"{plan.folder.name}.fetching-{plan.key}")
        # Of a fetch that was cut short.
        shutil.rmtree(folder, ignore_errors=True)
        damaged = self.remote.get(folder, [*listing, MANIFEST], _below(plan))
        if damaged is None:
            damaged = next(
                (n for n in listing if artifacts.fingerprint(folder / n) != listing[n]),
                None,
            )
        if damaged is not None:
            log.warning("%s: %s is missing or damaged, ignored", place, damaged)
            shutil.rmtree(folder)
            return False
        if (folder / POINTER).exists():
            # It may have been moved since.
            _write_pointer(folder, place)
        artifacts.install(plan, folder)
        return True

    def bring(self, workdir: Path, names: Iterable[str]) -> None:
        """Fetch artifacts that the work folder lacks, as the last run here had them.

        A stage that runs alone knows its inputs by name only.
        """
        for name in names:
            folder = workdir / name
            latest = None if folder.exists() else self._read_json(f"{name}/{LATEST}")
            if latest is not None and isinstance(latest.get("key"), str):
                self.fetch(Plan(folder, folder, latest["key"], {}, {}))

    def keep(self, plan: Plan) -> None:
        """Have a copy of a finished artifact, and remember that it was the last used.

        Raises:
            MirrorError: also if its checkpoints are in another mirror. The artifact in
                the work folder is whole all the same.
        """
        if not self.is_complete(plan):
            self.send(plan)
        if self._read_json(f"{plan.folder.name}/{LATEST}") != {"key": plan.key}:
            content = json.dumps({"key": plan.key}).encode()
            self.remote.write(f"{plan.folder.name}/{LATEST}", content)

    def send(self, plan: Plan) -> None:
        """Copy a finished artifact to the mirror, manifest last.

        Raises:
            MirrorError: as ``keep``.
        """
        folder, below, place = plan.folder, _below(plan), self.place(plan)
        _check_pointer(folder, place)
        names = [n for n in _files(folder) if n not in (MANIFEST, LISTING)]
        log.info("%s: copying %d files to %s", folder.name, len(names), place)
        try:
            # What is there may be damaged, and must not look whole in the meantime.
            self.remote.remove(below + MANIFEST)
            self.remote.put(folder, names, below)
            listing = {name: artifacts.fingerprint(folder / name) for name in names}
            self.remote.write(below + LISTING, json.dumps(listing).encode())
            self.remote.write(below + MANIFEST, (folder / MANIFEST).read_bytes())
        except MirrorError as error:
            raise MirrorError(
                f"{error}. {folder} is complete; run the same command again to copy it"
            ) from error

    def attach(self, plan: Plan) -> None:
        """Have the checkpoints of a stage that begins, or goes on, in the mirror.

        Raises:
            MirrorError: the stage was begun with another mirror.
        """
        folder = plan.partial
        _check_pointer(folder, self.place(plan))
        if (folder / POINTER).exists():
            return
        if any(folder.rglob(CHECKPOINTS)):
            log.warning(
                "%s was begun without a mirror: its checkpoints stay there, and reach "
                "%s when the stage is done",
                folder,
                self.remote.url,
            )
            return
        _write_pointer(folder, self.place(plan))

    def _read_json(self, name: str) -> dict[str, Any] | None:
        """None where there is no such file, or not one of ours."""
        content = self.remote.read(name)
        if content is None:
            return None
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            log.warning("%s/%s: damaged, ignored", self.remote.url, name)
            return None
        return found


@functools.cache
def reachable(url: str) -> Mirror:
    """The mirror, looked at once per process before any work.

    Raises:
        MirrorError: it cannot be reached.
    """
    mirror = Mirror(url)
    mirror.check()
    return mirror


def checkpoints_of(folder: Path) -> Any:
    """Where the checkpoints of a run are: in its folder, or in the mirror.

    Args:
        folder: of the run, an artifact's or one in it; it may be unfinished.

    Returns:
        A path that Orbax takes.

    Raises:
        MirrorError: the mirror is of a kind that Orbax cannot write to.
    """
    found = _place_of(folder)
    if found is None:
        return folder / CHECKPOINTS
    place = f"{found}/{CHECKPOINTS}"
    if place.startswith("gs://"):
        return epath.Path(place)
    if "://" in place:
        raise MirrorError(
            f"mirror {found}: checkpoints can be written to gs:// and to folders only"
        )
    return Path(place)


def push(folder: Path, names: Sequence[str]) -> None:
    """Copy files, or folders of files, of a run to where its checkpoints are.

    Does nothing if these are in the run's own folder. Of several processes the first
    one does it.

    Raises:
        MirrorError: they could not be written.
    """
    place = _place_of(folder)
    if place is not None and processes.first():
        present = [n for n in _files(folder) if n in names or n.split("/")[0] in names]
        Remote(place).put(folder, present)


def pull(folder: Path, names: Sequence[str]) -> None:
    """Bring back what ``push`` copied, unless any of it is here; as ``push``.

    Raises:
        MirrorError: it could not be read.
    """
    place = _place_of(folder)
    here = any((folder / name).exists() for name in names)
    if place is not None and processes.first() and not here:
        remote = Remote(place)
        found = [file for name in names for file in remote.find(name)]
        if found:
            remote.get(folder, found)


def _below(plan: Plan) -> str:
    """An artifact's folder in the mirror."""
    return f"{plan.folder.name}/{plan.key}/"


def _place_of(folder: Path) -> str | None:
    """URL of a run's folder in the mirror, if its artifact has one."""
    for artifact in (folder, folder.parent):
        if (artifact / POINTER).is_file():
            url = _read_pointer(artifact)
            return url if artifact == folder else f"{url}/{folder.name}"
    return None


def _read_pointer(folder: Path) -> str:
    return json.loads((folder / POINTER).read_text())["url"]


def _write_pointer(folder: Path, place: str) -> None:
    (folder / POINTER).write_text(json.dumps({"url": place}) + "\n")


def _check_pointer(folder: Path, place: str) -> None:
    """Whether the checkpoints of an artifact, if elsewhere, are in its copy here.

    Raises:
        MirrorError: they are in another mirror.
    """
    if (folder / POINTER).exists() and (other := _read_pointer(folder)) != place:
        raise MirrorError(
            f"{folder}: its checkpoints are in {other}, not in {place}. Set "
            f"--config.mirror={other.rsplit('/', 2)[0]}, or copy that folder to "
            f"{place} and put the new address into {folder / POINTER}"
        )


def _files(folder: Path) -> list[str]:
    """Names of all files, those behind links too."""
    found = [
        Path(where, name).relative_to(folder).as_posix()
        for where, _, names in os.walk(folder, followlinks=True)
        for name in names
    ]
    return sorted(found)
