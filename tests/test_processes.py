"""Several processes on one machine, over loopback, against one process alone.

Their fake devices add up to the same mesh. What they make must be the same: passages
and ids exactly, floats to rounding.
"""

import functools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from radit_jax import processes, sharding
from radit_jax.data.candidates import CandidateBatches, Questions
from radit_jax.models import huggingface
from radit_jax.models.llama import Llama
from radit_jax.retrieval import embed, index
from radit_jax.stages import lm_ft
from radit_jax.stages.stage import run
from radit_jax.stages.training import load_checkpoint

ROOT = Path(__file__).parents[1]
INTERRUPTED, PEER_FAILED = 75, 76
# What shrinks the tiny chain without leaving out a stage.
SHORT = {
    "r_ft.controls": (),
    "evaluate.limit": 8,
    "evaluate.systems": ("LM", "LM-FT + retrieval", "RA-DIT (LM-FT + R-FT)"),
}


CHAIN = (
    *("prepare", "corpus", "index", "retrieve"),
    *("lm_score", "r_ft", "retrieve_r_ft"),
    *("lm_ft", "evaluate"),
)


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


# A server that has imported the front door, of which each process is a fork.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["radit_jax.main"])


def member(log, devices, environment, folder, function, arguments):
    """A process from its birth: what it writes goes into a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= environment
    # Compiling well takes longer than all that is computed here.
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    os.chdir(folder)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    try:
        function(*arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    else:
        status = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def door(arguments):
    """The command line."""
    from radit_jax import main

    sys.argv = ["main.py", *arguments]
    main.front_door()


class Group:
    """Processes of one run; all of them are gone at the end of the block.

    Args:
        folder: for their logs.
        devices: of each.
        function: that each runs.
        arguments: of the function, for each process.
        cwds: where each runs.
    """

    def __init__(self, folder, devices, function, arguments, cwds=None):
        address, count = free_address(), len(arguments)
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"log-{process}.txt" for process in range(count)]
        self.members = []
        for process, log in enumerate(self.logs):
            environment = {}
            if count > 1:
                environment = {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(process),
                }
            where = cwds[process] if cwds else ROOT
            given = (log, devices, environment, where, function, arguments[process])
            self.members.append(FORKS.Process(target=member, args=given, daemon=True))
            self.members[-1].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one in self.members:
            one.kill()
            one.join()

    def said(self, process):
        log = self.logs[process]
        return log.read_text() if log.exists() else ""

    def wait(self, seconds=200):
        """Exit codes; with all logs where one is missing after so long."""
        end = time.monotonic() + seconds
        for process, one in enumerate(self.members):
            one.join(max(end - time.monotonic(), 0.1))
            assert one.exitcode is not None, (
                f"process {process} goes on after {seconds} s\n{self.everything()}"
            )
        return [one.exitcode for one in self.members]

    def everything(self):
        return "\n".join(
            f"--- process {i}\n{self.said(i)[-6000:]}" for i in range(len(self.logs))
        )

    def succeed(self):
        assert not any(self.wait()), self.everything()


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """Starts processes of the tiny chain; they compile each program once."""
    cache = tmp_path_factory.getbasetemp() / "xla-processes"

    def start(
        folder,
        count,
        devices,
        workdir="",
        recipe="radit",
        function=door,
        cwds=None,
        **fields,
    ):
        # A field that is a list has a value for each process.
        fields = {
            "distributed.heartbeat_seconds": 10,
            "distributed.start_seconds": 60,
            "compilation_cache": cache,
            "workdir": workdir or folder / "work",
        } | fields
        commands = [
            [f"--config={ROOT}/configs/{recipe}.py:tiny"]
            + [
                f"--config.{name}={value[i] if isinstance(value, list) else value}"
                for name, value in fields.items()
            ]
            for i in range(count)
        ]
        arguments = [(command,) for command in commands]
        return Group(folder, devices, function, arguments, cwds)

    return start


@pytest.fixture(scope="module")
def chains(group, tmp_path_factory):
    """Work folders in which one process and two have run the whole chain."""
    folder = tmp_path_factory.mktemp("chains")
    fields = SHORT | {"mesh.data": 2, "mesh.fsdp": 2, "stages": (*CHAIN, "export")}
    # Both processes answer the same questions, each with half of the heads.
    answering = {"data": 1, "fsdp": 1, "tensor": 4}
    others = {f"evaluate.mesh.{axis}": size for axis, size in answering.items()}
    with (
        group(folder / "one", 1, 4, **fields) as one,
        group(folder / "two", 2, 2, **fields, **others) as two,
    ):
        one.succeed()
        two.succeed()
    return folder / "one" / "work", folder / "two" / "work", two


def metrics(folder):
    """Step -> metric -> value, without what depends on the clock."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        timed = ("second", "mfu")
        values = {k: v for k, v in row.items() if not any(t in k for t in timed)}
        found.setdefault(row["step"], {}).update(values)
    return found


def same_metrics(folder, other):
    ours, theirs = metrics(folder), metrics(other)
    assert ours.keys() == theirs.keys()
    for step, values in ours.items():
        assert values == pytest.approx(theirs[step], rel=1e-4, abs=1e-6), step


def same_arrays(folder, other, atol=1e-4):
    files = sorted(folder.rglob("*.npz"))
    assert files
    for file in files:
        ours, theirs = np.load(file), np.load(other / file.relative_to(folder))
        assert ours.files == theirs.files
        for name in ours.files:
            if ours[name].dtype.kind == "f":
                np.testing.assert_allclose(ours[name], theirs[name], atol=atol)
            else:
                np.testing.assert_array_equal(ours[name], theirs[name])


def test_two_processes_make_what_one_makes(chains):
    one, two, _ = chains
    passages = sorted((one / "passages").glob("*.array_record*"))
    assert passages
    for file in passages:
        assert file.read_bytes() == (two / "passages" / file.name).read_bytes()
    for artifact in ("retrieved", "scored", "retrieved_r_ft"):
        same_arrays(one / artifact, two / artifact)
    for run_folder in ("lm_ft", "r_ft/lm"):
        same_metrics(one / run_folder, two / run_folder)
        seen = (one / run_folder / "seen.json").read_text()
        assert seen == (two / run_folder / "seen.json").read_text()
    embeddings = sorted((one / "index").glob("embeddings-*.npy"))
    assert len(embeddings) > 1
    for file in embeddings:
        theirs = np.load(two / "index" / file.name)
        np.testing.assert_allclose(np.load(file), theirs, atol=1e-5)


def test_two_processes_write_the_same_report(chains):
    one, two, _ = chains
    ours, theirs = (
        [
            json.loads(line)
            for line in (work / "report" / "generations.jsonl").read_text().splitlines()
        ]
        for work in (one, two)
    )
    assert [g["prediction"] for g in ours] == [g["prediction"] for g in theirs]
    assert len({g["system"] for g in ours}) == 3
    results = [
        json.loads((work / "report" / "results.json").read_text())
        for work in (one, two)
    ]
    flat = [dict(leaves(result)) for result in results]
    assert flat[0].keys() == flat[1].keys()
    numbers = [{k: v for k, v in part.items() if isinstance(v, float)} for part in flat]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)


def test_two_processes_export_what_one_exports(chains, tiny_config):
    one, two, _ = chains
    for name in ("lm", "encoder"):
        ours, theirs = (
            load_file(work / "exported" / name / "model.safetensors")
            for work in (one, two)
        )
        came = load_file(one / "inputs" / name / "model.safetensors")
        assert ours.keys() == theirs.keys() == came.keys()
        for key, array in ours.items():
            np.testing.assert_allclose(array, theirs[key], atol=1e-5)
        # What came was trained; the best retriever may be the one that came.
        if name == "lm":
            assert max(np.abs(ours[key] - came[key]).max() for key in came) > 1e-4
    # It is the best checkpoint, and this package reads it as its own.
    with jax.set_mesh(sharding.make_mesh(1, 8, 1)):
        best = lm_ft.load_finetuned(tiny_config(one))
        again = huggingface.load_llama(one / "exported" / "lm")
    for ours, theirs in zip(*map(jax.tree.leaves, (best, again)), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def leaves(value, name=""):
    if isinstance(value, dict):
        value = list(value.items())
    elif isinstance(value, list):
        value = list(enumerate(value))
    else:
        yield name, value
        return
    for key, part in value:
        yield from leaves(part, f"{name}.{key}")


def test_one_process_writes_and_speaks(chains):
    _, two, group = chains
    assert "Everything is in" in group.said(0)
    assert "Everything is in" not in group.said(1)
    assert not list(two.glob("*.partial-*"))
    rows = (two / "lm_ft" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == len(set(rows))


def copied(work, to, *names):
    """A work folder with the first artifacts of another."""
    to.mkdir(parents=True)
    for name in names:
        shutil.copytree(work / name, to / name, symlinks=True)
    return to


START = ("inputs", "passages", "index", "retrieved")


def test_four_processes_two_of_which_share_rows(chains, group, tmp_path):
    """Two split the heads of the same rows: they read the same data."""
    one, *_ = chains
    work = copied(one, tmp_path / "work", *START)
    fields = {"mesh.data": 2, "mesh.tensor": 2, "stages": ("lm_score", "lm_ft")}
    with group(tmp_path, 4, 1, **SHORT, **fields) as four:
        four.succeed()
    same_arrays(one / "scored", work / "scored")
    same_metrics(one / "lm_ft", work / "lm_ft")
    seen = (one / "lm_ft" / "seen.json").read_text()
    assert seen == (work / "lm_ft" / "seen.json").read_text()


LONG = {"lm_ft.steps": 30, "lm_ft.save_every": 4, "lm_ft.validate_every": 15}


@pytest.fixture(scope="module")
def uninterrupted(chains, tiny_config, tmp_path_factory):
    """LM-FT of many steps, in one go and one process."""
    work = copied(chains[0], tmp_path_factory.mktemp("long") / "work", *START)
    config = tiny_config(work, **LONG, **{"mesh.fsdp": 4, "mesh.data": 2})
    return run("lm_ft", lm_ft.STAGE, config)


def steps_done(work):
    files = list(work.glob("lm_ft.partial-*/metrics.jsonl"))
    return len(files[0].read_text().splitlines()) - 1 if files else 0


def wait_for_step(group, work, step):
    end = time.monotonic() + 120
    while steps_done(work) < step:
        assert time.monotonic() < end, group.everything()
        assert all(m.exitcode is None for m in group.members), group.everything()
        time.sleep(0.02)


def checkpoints(work):
    folders = work.glob("lm_ft.partial-*/checkpoints/*")
    return sorted(int(f.name) for f in folders if f.name.isdigit())


def same_weights(folder, other, lm):
    """Of the newest checkpoints, whoever wrote them."""
    shape = huggingface.read_llama_config(lm)
    with jax.set_mesh(sharding.make_mesh(1, 8, 1)):
        found = [
            load_checkpoint(one, lm_ft.METRIC, lambda key: Llama(shape, key), last=True)
            for one in (folder, other)
        ]
    for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-5)


def test_a_killed_process_ends_the_others_and_one_alone_goes_on(
    chains, group, uninterrupted, tiny_config, tmp_path
):
    work = copied(chains[0], tmp_path / "work", *START)
    fields = LONG | {"mesh.fsdp": 4, "stages": ("lm_ft",)}
    with group(tmp_path, 2, 2, **fields) as two:
        wait_for_step(two, work, 10)
        two.members[1].kill()
        start = time.monotonic()
        codes = two.wait(60)
        # Within the 10 s of silence, and what it takes to tell.
        assert time.monotonic() - start < 30
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None), two.everything()
    assert "process 1" in two.said(0), two.everything()
    assert "is gone" in two.said(0), two.everything()
    newest = checkpoints(work)[-1]
    assert 4 <= newest < 30
    config = tiny_config(work, **LONG, **{"mesh.fsdp": 8})
    resumed = run("lm_ft", lm_ft.STAGE, config)
    same_metrics(uninterrupted, resumed)
    seen = (uninterrupted / "seen.json").read_text()
    assert seen == (resumed / "seen.json").read_text()
    same_weights(uninterrupted, resumed, config.lm)


def test_a_signal_to_one_process_stops_all_and_four_go_on(
    chains, group, uninterrupted, tmp_path
):
    work = copied(chains[0], tmp_path / "work", *START)
    fields = LONG | {"mesh.fsdp": 4, "stages": ("lm_ft",)}
    with group(tmp_path / "two", 2, 2, workdir=work, **fields) as two:
        wait_for_step(two, work, 9)
        os.kill(two.members[1].pid, signal.SIGTERM)
        assert two.wait(60) == [INTERRUPTED] * 2, two.everything()
    for process in range(2):
        assert "stopped by a signal at step" in two.said(process)
    newest = checkpoints(work)[-1]
    assert f"at step {newest} of 30" in two.said(0)
    assert newest < 30
    with group(tmp_path / "four", 4, 1, workdir=work, **fields) as four:
        four.succeed()
    assert f"going on from step {newest}" in four.said(0)
    same_metrics(uninterrupted, work / "lm_ft")
    same_weights(uninterrupted, work / "lm_ft", work / "inputs" / "lm")


def refused(group, words):
    """All end by themselves with an error in words, and no traceback."""
    codes = group.wait(60)
    assert set(codes) == {1}, group.everything()
    for process in range(len(codes)):
        said = group.said(process)
        assert "Traceback" not in said, group.everything()
        for word in words:
            assert word in said, group.everything()


def test_other_settings_on_one_process_are_told_to_all(group, tmp_path):
    with group(tmp_path, 2, 1, **{"lm_ft.steps": [6, 7]}) as two:
        refused(two, ["config: processes differ. lm_ft.steps is 7 on process 1"])


def test_other_data_on_one_process_is_told_to_all(chains, group, tmp_path):
    """Before the first stage, though a later one reads it."""
    work = copied(chains[0], tmp_path / "work", *START[:2])
    hosts = [tmp_path / "host0", tmp_path / "host1"]
    for host in hosts:
        host.mkdir()
        shutil.copy(work / "inputs" / "train.jsonl", host / "train.jsonl")
    with (hosts[1] / "train.jsonl").open("a") as file:
        file.write('{"id": "x", "question": "Who?", "answers": ["me"]}\n')
    fields = {
        "data.train": "train.jsonl",
        "mesh.data": 2,
        "stages": ("corpus", "index", "retrieve"),
        "corpus.documents": work / "inputs" / "documents.jsonl",
    }
    with group(tmp_path, 2, 1, cwds=hosts, **fields) as two:
        refused(two, ["inputs: processes differ. retrieve.files.train.train is "])
        assert "on process 1 (" in two.said(0)
    assert not (work / "index").exists()


def test_a_mesh_without_room_for_all_devices_is_told(group, tmp_path):
    with group(tmp_path, 2, 1) as two:
        refused(two, ["(1, 1, 1) needs 1 devices, there are 2"])
    assert not (tmp_path / "work").exists()


def test_a_coordinator_that_does_not_answer_is_an_error_in_time(group, tmp_path):
    fields = {
        "distributed.coordinator": free_address(),
        "distributed.processes": 2,
        "distributed.process": 1,
        "distributed.start_seconds": 2,
    }
    start = time.monotonic()
    with group(tmp_path, 1, 1, **fields) as one:
        assert one.wait(60) == [1], one.everything()
        said = one.said(0)
    assert time.monotonic() - start < 40
    assert f"process 0 at {fields['distributed.coordinator']}, did not answer" in said
    assert "firewall" in said
    assert "Traceback" not in said


def test_a_process_that_never_comes_is_an_error_in_time(group, tmp_path):
    address = free_address()
    fields = {
        "distributed.coordinator": address,
        "distributed.processes": 2,
        "distributed.process": 0,
        "distributed.start_seconds": 2,
    }
    with group(tmp_path, 1, 1, **fields) as one:
        assert one.wait(60) == [1], one.everything()
        assert f"not all of 2 processes came to the coordinator at {address}" in (
            one.said(0)
        )


def failing_door(arguments, number):
    """A command that fails on one process, while the others wait for it."""
    from radit_jax import main

    def command(config):
        if processes.index() == number:
            raise OSError(28, "No space left on device", "index")
        processes.barrier("never")

    main.COMMANDS["radit"] = command
    door(arguments)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_ends_all_with_its_words(group, tmp_path, failing):
    start = time.monotonic()
    function = functools.partial(failing_door, number=failing)
    with group(tmp_path, 3, 1, function=function) as three:
        codes = three.wait(60)
        assert codes[failing] == 1, three.everything()
        for other in {0, 1, 2} - {failing}:
            assert codes[other] == PEER_FAILED, three.everything()
            said = three.said(other)
            assert f"process {failing} (" in said, three.everything()
            assert "No space left on device" in said, three.everything()
    assert time.monotonic() - start < 45


def read_and_write(lm, out):
    """Load a model onto a mesh of two processes, count, and write it."""
    processes.start(processes.Settings(start_seconds=60))
    read = []

    def counting(real, size):
        def counted(*args):
            found = real(*args)
            read.append(size(found))
            return found

        return counted

    # The two ways in which bytes of arrays come from a file.
    os.preadv = counting(os.preadv, int)
    np.fromfile = counting(np.fromfile, lambda array: array.nbytes)
    with jax.set_mesh(sharding.make_mesh(fsdp=2, tensor=2)):
        model = huggingface.load_llama(lm)
        arrays = jax.tree.leaves(model)
        held = sum(
            sum(
                {str(s.index): s.data.nbytes for s in array.addressable_shards}.values()
            )
            for array in arrays
        )
        huggingface.save(model, out, lm, np.dtype(np.float32), 100_000)
    whole = sum(array.nbytes for array in arrays)
    found = {"read": sum(read), "held": held, "whole": whole}
    Path(f"{out}-{processes.index()}.json").write_text(json.dumps(found))
    processes.finish()


def test_each_process_reads_the_bytes_of_its_shards_and_writes_them_back(
    chains, tmp_path
):
    lm = chains[0] / "inputs" / "lm"
    given = (lm, tmp_path / "out")
    with Group(tmp_path, 2, read_and_write, [given] * 2) as two:
        two.succeed()
    found = [json.loads((tmp_path / f"out-{i}.json").read_text()) for i in range(2)]
    for one in found:
        assert one["read"] == one["held"]
        # Norms are everywhere; of the rest each process needs its half.
        assert one["read"] < 0.52 * one["whole"]
    original = load_file(lm / "model.safetensors")
    written = {}
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        written |= load_file(file)
    assert written.keys() == original.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(written[name], array)


def search_together(folder):
    """Build ScaNN over the processes' shares, and search it and the exact index."""
    processes.start(processes.Settings(start_seconds=60))
    queries_BE = np.load(folder / "queries.npy")
    store = embed.EmbeddingStore(folder)
    index.BRUTE_FORCE_BELOW = index.PARTITION_FROM = 100
    settings = index.ScannSettings(leaves=9, leaves_to_search=9, reorder=len(store))
    with jax.set_mesh(sharding.make_mesh(fsdp=2, tensor=2)):
        mesh = jax.sharding.get_mesh()
        built = index.build_index("scann", store, folder / "own", settings=settings)
        found = {
            "own": index.open_index(folder / "own", mesh),
            "given": index.open_index(folder / "given", mesh),
            "exact": index.ExactIndex(store, mesh),
        }
        arrays = {"recall": built.recall_at_10, "shards": built.shards}
        for name, opened in found.items():
            assert opened.together
            arrays |= zip(
                (f"{name}_ids", f"{name}_scores"),
                opened.search(queries_BE, 30),
                strict=True,
            )
    assert [len(found[name]._searchers) for name in ("own", "given")] == [
        1,
        [2, 1][processes.index()],
    ]
    np.savez(folder / f"found-{processes.index()}.npz", **arrays)
    processes.finish()


def test_two_processes_search_as_one(tmp_path):
    pytest.importorskip("scann", reason="scann has Linux wheels for Python < 3.14 only")
    rng = np.random.default_rng(0)
    # Small integers: dot products are the same in any order of summation, and many are
    # equal.
    passages_NE = rng.integers(-3, 4, (701, 24)).astype(np.float32)
    queries_BE = rng.integers(-3, 4, (21, 24)).astype(np.float32)
    np.save(tmp_path / "queries.npy", queries_BE)
    store = embed.write_embeddings(passages_NE, tmp_path, shard_size=200)
    every = index.ScannSettings(reorder=701)
    index.build_index("scann", store, tmp_path / "given", settings=every, shards=3)
    with Group(tmp_path, 2, search_together, [(tmp_path,)] * 2) as two:
        two.succeed()
    mesh = sharding.make_mesh()
    single = index.ExactIndex(store, mesh).search(queries_BE, 30)
    for process in range(2):
        found = np.load(tmp_path / f"found-{process}.npz")
        assert (found["recall"], found["shards"]) == (1, 2)
        for name in ("own", "given", "exact"):
            np.testing.assert_array_equal(found[f"{name}_ids"], single.ids)
            np.testing.assert_array_equal(found[f"{name}_scores"], single.scores)
    # What two have built, one reads.
    alone = index.open_index(tmp_path / "own", mesh)
    assert len(alone._searchers) == 2
    np.testing.assert_array_equal(alone.search(queries_BE, 30).ids, single.ids)


# --- without other processes ------------------------------------------------------


def test_alone_there_is_nobody_to_wait_for():
    assert (processes.count(), processes.index(), processes.first()) == (1, 0, True)
    processes.barrier("here")
    assert processes.gather({"a": 1}) == [{"a": 1}]
    assert processes.from_first(3) == 3
    processes.check_same("config", {"a": 1})
    processes.finish()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"coordinator": "host:1"}, r"not set: processes .*, process "),
        ({"processes": 2, "process": 0}, "not set: coordinator"),
        (
            {"coordinator": "host", "processes": 2, "process": 0},
            "'host': expected HOST:PORT",
        ),
        (
            {"coordinator": "host:1", "processes": 2, "process": 2},
            "process = 2: .*the last one is 1",
        ),
    ],
)
def test_settings_that_do_not_fit_are_told(settings, words):
    with pytest.raises(processes.ProcessError, match=words):
        processes.start(processes.Settings(**settings))


def test_a_number_in_the_environment_must_be_one(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(processes.ProcessError, match="JAX_NUM_PROCESSES = 'two'"):
        processes.start(processes.Settings())


def test_slurm_is_asked_where_nothing_is_set(monkeypatch):
    for name, value in {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "node[003-004]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    address, count, index = processes._found(processes.Settings())
    assert address.startswith("node003:")
    assert (count, index) == (2, 1)
    # What is said comes first.
    told = processes.Settings("10.0.0.1:99", 4, 3)
    assert processes._found(told) == ("10.0.0.1:99", 4, 3)


def test_a_folder_that_is_not_shared_is_told(tmp_path):
    with pytest.raises(processes.ProcessError, match=r"manifest.json: .*all processes"):
        processes.wait_for(tmp_path / "manifest.json", 0.2)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_batches_of_questions_do_not_depend_on_the_number_of_processes(parts):
    rng = np.random.default_rng(0)
    questions = Questions(
        tokens=[rng.integers(1, 9, rng.integers(2, 30)).tolist() for _ in range(23)],
        ids=rng.integers(0, 50, (23, 3)),
        log_targets=rng.standard_normal((23, 3)).astype(np.float32),
    )

    def batches(process, count):
        gather = {"passages_BCE": None}
        return CandidateBatches(
            [(questions, 1.0)], lambda ids: gather, 8, 32, 0, process, count
        )

    alone = batches(0, 1)
    together = [batches(i, parts) for i in range(parts)]
    for _ in range(7):
        whole = next(alone)
        pieces = [next(part) for part in together]
        for name in ("tokens_BL", "ids_BC", "log_targets_BC"):
            ours = np.concatenate([getattr(piece, name) for piece in pieces])
            np.testing.assert_array_equal(ours, getattr(whole, name))
        states = [part.get_state() for part in (alone, *together)]
        assert all(state == states[0] for state in states)
    # Any number of them goes on where any other stopped.
    again = batches(0, 1)
    again.set_state(together[-1].get_state())
    np.testing.assert_array_equal(next(again).ids_BC, next(alone).ids_BC)
    for one in (alone, again, *together):
        one.close()


def test_rows_of_one_process_are_the_whole_batch():
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        assert sharding.process_rows() == (0, 1)
        assert sharding.own_mesh().shape == jax.sharding.get_mesh().shape
