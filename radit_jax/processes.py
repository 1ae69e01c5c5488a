"""Several processes, each with its own devices, that run one program together.

``start`` joins them before any device is touched, and compares what they were told to
do. From then on they speak through the key-value store of JAX's own coordinator, which
process 0 serves: short messages on the host, never arrays. A process that dies or fails
ends all the others, with its name and what it said.

Alone, everything here is immediate: there is nobody to wait for.
"""

import difflib
import hashlib
import itertools
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax

# The coordinator's key-value store and barriers have no public names yet; Orbax uses
# the same ones.
from jax._src import clusters, distributed
from jax.errors import JaxRuntimeError

log = logging.getLogger(__name__)

# Fields of a config that may differ: each process' own number, and what has no effect.
OWN = ("distributed.process", "compilation_cache", "debug")
# Exit status where another process was the cause.
PEER_FAILED = 76
# The longest that the coordinator's clock can hold, 24 days. Whoever waits is told at
# once when a process dies, so that no wait needs a bound of its own.
_FOREVER_MS = 2**31 - 1
_FAILED = "radit/failed/"
_LOOK_SECONDS = 1.0  # between two looks for a process that failed


class Settings(NamedTuple):
    """How processes find each other; the section ``distributed`` of a config."""

    coordinator: str = ""  # HOST:PORT of process 0
    processes: int = 0
    process: int = -1
    start_seconds: int = 300  # until all must have come
    heartbeat_seconds: int = 60  # of silence, after which a process is taken for dead


class ProcessError(ValueError):
    """Processes that do not belong together, or that do not find each other."""


class _World:
    """What this process knows of the others."""

    settings = Settings()
    address = ""
    hosts: tuple[str, ...] = ()  # host and pid of each
    calls = itertools.count()  # of messages, in the same order on all processes
    leaving = threading.Event()  # no longer interested in what becomes of the others


def count() -> int:
    """Number of processes."""
    return distributed.global_state.num_processes


def index() -> int:
    """Number of this process, from 0."""
    return distributed.global_state.process_id


def first() -> bool:
    """Whether this is the process that writes what all of them share."""
    return index() == 0


def named(process: int) -> str:
    """A process in words."""
    where = f" ({_World.hosts[process]})" if _World.hosts else ""
    return f"process {process}{where}"


def start(settings: Settings) -> None:
    """Join the other processes, if there are any; before any device is touched.

    Where the settings and the environment (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
    JAX_PROCESS_ID) say nothing, a TPU pod, SLURM, Open MPI or Kubernetes is asked, by
    JAX's own detection.

    Raises:
        ProcessError: settings that make no sense, or a coordinator that does not answer
            within ``start_seconds``.
    """
    address, processes, process = _found(settings)
    if processes <= 1:
        return
    _World.settings, _World.address = settings, address
    if process > 0:
        _await_coordinator(address, settings.start_seconds)
    # SIGTERM stays ours: training saves together, everything else ends at once.
    jax.config.update("jax_enable_preemption_service", False)
    with _bounded(settings.start_seconds, _not_everyone(address, processes)):
        try:
            jax.distributed.initialize(
                address,
                processes,
                process,
                # JAX would abort at its own bound; ours comes first, with words.
                initialization_timeout=settings.start_seconds + 30,
                heartbeat_timeout_seconds=settings.heartbeat_seconds,
                shutdown_timeout_seconds=settings.heartbeat_seconds,
            )
        except JaxRuntimeError as error:
            raise ProcessError(
                f"process 0 cannot be the coordinator at {address} ({error}); is the "
                "port taken by another run? Set another one in "
                "--config.distributed.coordinator of all processes"
            ) from error
    me = f"{socket.gethostname()}, pid {os.getpid()}"
    _World.hosts = tuple(gather(me))
    for watch in (_watch_deaths, _watch_failures):
        threading.Thread(target=watch, daemon=True).start()
    log.info("%s of %d, coordinator %s", named(process), processes, address)


def _found(settings: Settings) -> tuple[str, int, int]:
    """Address of the coordinator, number of processes, and which this is."""
    address = settings.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    processes = settings.processes or _number("JAX_NUM_PROCESSES", 0)
    process = settings.process
    if process < 0:
        process = _number("JAX_PROCESS_ID", -1)
    given = {
        "coordinator (JAX_COORDINATOR_ADDRESS)": bool(address),
        "processes (JAX_NUM_PROCESSES)": processes > 0,
        "process (JAX_PROCESS_ID)": process >= 0,
    }
    if not any(given.values()):
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, settings.start_seconds
        )
        return found[0] or "", found[1] or 1, found[2] or 0
    if processes == 1:
        return "", 1, 0
    missing = [field for field, there in given.items() if not there]
    if missing:
        raise ProcessError(
            f"distributed: not set: {', '.join(missing)}. Give coordinator=HOST:PORT "
            "of process 0, the number of processes and which this is, or none of them"
        )
    if not re.fullmatch(r"\S+:\d+", address):
        raise ProcessError(
            f"distributed.coordinator = {address!r}: expected HOST:PORT of process 0, "
            "such as 10.0.0.1:8476"
        )
    if process >= processes:
        raise ProcessError(
            f"distributed.process = {process}: processes are numbered from 0, and "
            f"there are {processes}; the last one is {processes - 1}"
        )
    return address, processes, process


def _number(variable: str, default: int) -> int:
    """Of an environment variable."""
    text = os.environ.get(variable, "")
    if text and not text.isdigit():
        raise ProcessError(f"{variable} = {text!r} in the environment: not a number")
    return int(text) if text else default


def _await_coordinator(address: str, seconds: float) -> None:
    """Wait until process 0 listens.

    Raises:
        ProcessError: it does not within so many seconds; with what to look at.
    """
    host, port = address.rsplit(":", 1)
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), 5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ProcessError(
                    f"the coordinator, process 0 at {address}, did not answer within "
                    f"{seconds} s ({error}). See that process 0 was started and has "
                    "not ended with an error, that this host can reach that name and "
                    "port (a firewall?), and that all processes were given the same "
                    "address; --config.distributed.start_seconds sets the bound"
                ) from error
        time.sleep(0.2)


def _not_everyone(address: str, processes: int) -> str:
    return (
        f"not all of {processes} processes came to the coordinator at {address} in "
        "time. See which were not started or have ended with an error, and that none "
        "was started twice; --config.distributed.start_seconds sets the bound"
    )


@contextmanager
def _bounded(seconds: float, words: str) -> Iterator[None]:
    """Ends the process with an error if what is inside takes longer: JAX cannot be
    interrupted where it waits, and at its own bound it aborts without words."""
    timer = threading.Timer(seconds, _end, (f"error: {words}", 1))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(words: str, status: int) -> NoReturn:
    """End this process, whatever its other threads wait for."""
    # One write, so that the lines of processes that share a terminal stay whole.
    os.write(2, f"{words}\n".encode())
    _linger()
    os._exit(status)


def _client() -> Any:
    return distributed.global_state.client


def barrier(what: str) -> None:
    """Wait until all processes are here; Ctrl-C is obeyed while waiting.

    Args:
        what: the place, for errors of the coordinator.
    """
    if count() == 1:
        return
    key = f"radit/{next(_World.calls)}/{what}"
    _interruptible(lambda: _client().wait_at_barrier(key, _FOREVER_MS))


def _interruptible(wait: Callable[[], None]) -> None:
    """Wait in another thread: signals reach Python code, and none runs in there."""
    failed: list[BaseException] = []
    over = threading.Event()

    def run() -> None:
        try:
            wait()
        except JaxRuntimeError as error:
            failed.append(error)
        finally:
            over.set()

    threading.Thread(target=run, daemon=True).start()
    over.wait()
    if failed:
        raise failed[0]


def gather(value: Any) -> list[Any]:
    """A JSON value of every process, by its number, on all of them."""
    if count() == 1:
        return [value]
    folder = f"radit/{next(_World.calls)}/gather/"
    own = f"{folder}{index()}"
    _client().key_value_set(own, json.dumps(value))
    barrier("gather")
    found = {
        int(key.rsplit("/", 1)[1]): json.loads(text)
        for key, text in _client().key_value_dir_get(folder)
    }
    barrier("gathered")
    _client().key_value_delete(own)
    return [found[process] for process in range(count())]


def from_first(value: Any) -> Any:
    """The JSON value that process 0 has, on all of them.

    For what is looked up on the disk: what one process sees another may not yet see.
    """
    return gather(value if first() else None)[0]


def united(own: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values by name of all processes together; those who have the same name have
    the same value."""
    return {name: value for part in gather(own) for name, value in part.items()}


def check_same(what: str, values: Mapping[str, Any]) -> None:
    """Stop all processes if one has other values than process 0.

    Args:
        what: is compared, for the error.
        values: nested, JSON-serialisable.

    Raises:
        ProcessError: on all of them, with the first process and field that differ.
    """
    if count() == 1:
        return
    flat = _flat(values)
    text = json.dumps(flat, sort_keys=True)
    digests = gather(hashlib.sha256(text.encode()).hexdigest())
    other = next((i for i, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    # Only now are whole values sent.
    ours, theirs = (gather(flat if index() == i else None)[i] for i in (0, other))
    field = next(
        field
        for field in sorted(ours.keys() | theirs.keys())
        if ours.get(field) != theirs.get(field)
    )
    raise ProcessError(
        f"{what}: processes differ. {field} is {_shown(theirs, field)} on "
        f"{named(other)} and {_shown(ours, field)} on {named(0)}; start all of them "
        "with the same command and the same files"
    )


def _shown(values: Mapping[str, Any], field: str) -> str:
    if field in values:
        return repr(values[field])
    near = difflib.get_close_matches(field, values, 1)
    return "not there" + (f" (but {near[0]} is)" if near else "")


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value."""
    if not isinstance(values, Mapping) or not values:
        return {prefix.removesuffix("."): values}
    parts = (_flat(value, f"{prefix}{key}.") for key, value in values.items())
    return {field: value for part in parts for field, value in part.items()}


def check_same_start(config: Mapping[str, Any]) -> None:
    """Whether all processes have the same config and the same software; then they make
    their devices known to each other.

    Raises:
        ProcessError: as ``check_same``.
    """
    packages = ("radit-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "grain")
    check_same("versions", {package: version(package) for package in packages})
    fields = {k: v for k, v in _flat(config).items() if k not in OWN}
    check_same("config", fields)
    if count() > 1:
        # Later, one of them may be at work alone while it is asked for its devices.
        jax.devices()


def wait_for(file: Path, seconds: float = 60.0) -> None:
    """Wait until a file that process 0 has written is seen here: shared disks lag.

    Raises:
        ProcessError: it is not; the work folder is not shared.
    """
    end = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > end:
            raise ProcessError(
                f"{file}: {named(0)} has written it, and {named(index())} does not see "
                "it. config.workdir must be one folder that all processes share (a "
                "network disk, or a bucket that is mounted)"
            )
        time.sleep(0.1)


def fail(error: str) -> None:
    """Tell the others why this process ends.

    Afterwards the process must end by ``os._exit``: there is no orderly end without the
    others.
    """
    if count() == 1 or _World.leaving.is_set():
        return
    _World.leaving.set()
    try:
        _client().key_value_set(f"{_FAILED}{index()}", error, allow_overwrite=True)
    except JaxRuntimeError as second:
        # Process 0 is gone already, and with it the store; the others know.
        log.debug("nobody to tell: %s", second)
        return
    _linger()


def _linger() -> None:
    """The coordinator lives until the others have looked: where it goes, they go."""
    if first():
        time.sleep(3 * _LOOK_SECONDS)


def finish() -> None:
    """Leave together, after work that went well."""
    if count() == 1:
        return
    # Process 0 ends the wait of the others' watchers, and they that of its own.
    key = "radit/end/0" if first() else "radit/end/1"
    _interruptible(lambda: _client().wait_at_barrier(key, _FOREVER_MS))
    _World.leaving.set()
    barrier("leave")
    jax.distributed.shutdown()


def await_verdict() -> None:
    """After an operation between processes failed: if that was because one of them is
    gone, this one ends here once the coordinator knows which."""
    if count() > 1:
        time.sleep(_World.settings.heartbeat_seconds + 5)


def _watch_deaths() -> None:
    """Waits for an end that only all processes together reach; where one dies, the
    coordinator ends the wait at once and says which."""
    key = "radit/end/1" if first() else "radit/end/0"
    try:
        _client().wait_at_barrier(key, _FOREVER_MS)
    except JaxRuntimeError as error:
        if not _World.leaving.is_set():
            _end(_obituary(str(error)), PEER_FAILED)


def _obituary(error: str) -> str:
    """What the coordinator says of a death, in words."""
    task = re.search(r"Task (\d+) heartbeat timeout", error)
    dead = int(task[1]) if task else 0
    gone = "ended its connection"
    if task:
        gone = f"was not heard of for {_World.settings.heartbeat_seconds} s"
    return (
        f"error: {named(dead)} is gone: it {gone}. Its own log may say why (killed, "
        "out of memory, a machine taken away?). This process cannot go on without it; "
        "run the same command again, on any number of processes, to go on from the "
        "newest checkpoint"
    )


def _watch_failures() -> None:
    """Looks for processes that ended with an error of their own."""
    while not _World.leaving.wait(_LOOK_SECONDS):
        try:
            found = _client().key_value_dir_get(_FAILED)
        except JaxRuntimeError as error:
            if _World.leaving.is_set():
                return
            _end(_obituary(f"coordinator: {error}"), PEER_FAILED)
        for key, text in found:
            process = int(key.rsplit("/", 1)[1])
            if process != index() and not _World.leaving.is_set():
                _end(f"error: {named(process)} has failed: {text}", PEER_FAILED)
