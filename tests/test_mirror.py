"""Artifacts and checkpoints in a mirror: empty disks, damage, two runs at once."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from radit_jax import artifacts, mirror, sharding
from radit_jax.mirror import Mirror, MirrorError
from radit_jax.stages import lm_ft
from radit_jax.stages.stage import Stage, run

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=["memory", "folder", "file"])
def url(request, tmp_path):
    """A mirror on each kind of file system that needs no network."""
    if request.param == "memory":
        yield f"memory://{tmp_path.name}/run"
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)
        return
    where = tmp_path / "the mirror" / "run"
    yield str(where) if request.param == "folder" else f"file://{where}/"


@pytest.fixture(autouse=True)
def forget():
    mirror.reachable.cache_clear()


def remote(url):
    """The files of a mirror: name -> content."""
    fs, root = fsspec.core.url_to_fs(url.rstrip("/"))
    return {os.path.relpath(f, root): fs.cat_file(f) for f in fs.find(root)}


def change(url, name, content):
    """Overwrite a file of a mirror, or remove it."""
    fs, root = fsspec.core.url_to_fs(url.rstrip("/"))
    if content is None:
        fs.rm_file(f"{root}/{name}")
    else:
        fs.pipe_file(f"{root}/{name}", content)


def files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


MADE = []


def stage(inputs=(), output="index"):
    """A stage that writes its setting, and a link to a folder, and counts its runs."""

    def build(config, folder):
        MADE.append(output)
        (folder / "deep" / "er").mkdir(parents=True, exist_ok=True)
        (folder / "deep" / "er" / "a b.bin").write_bytes(config.content.encode() * 1000)
        (folder / "empty").touch()
        elsewhere = Path(config.workdir) / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        (elsewhere / "weights").write_text("weights")
        (folder / "link").unlink(missing_ok=True)
        (folder / "link").symlink_to(elsewhere)
        return {"rows": 3}

    return Stage(output, inputs, (), lambda c: {"content": c.content}, build)


def config(workdir, url, content="x"):
    fields = {"workdir": str(workdir), "mirror": url, "content": content}
    return ConfigDict(fields | {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}})


def make(workdir, url, content="x", **kinds):
    MADE.clear()
    folder = run("index", stage(**kinds), config(workdir, url, content))
    return folder, bool(MADE)


def key(folder):
    return artifacts.read_manifest(folder)["key"]


def test_an_empty_disk_fetches_what_was_made(tmp_path, url):
    first, made = make(tmp_path / "one", url)
    assert made
    second, made = make(tmp_path / "two", url)
    assert not made
    expected = files(first) | {"link/weights": b"weights"}
    found = files(second)
    for content in (expected, found):
        # Whose URL is the same, whichever way it was written.
        content.pop("mirror.json")
    assert found == expected
    assert not (second / "link").is_symlink()
    assert [p.name for p in (tmp_path / "two").iterdir()] == ["index"]
    names = set(remote(url))
    below = f"index/{key(first)}"
    assert f"{below}/deep/er/a b.bin" in names
    assert not any(name.startswith("reachable-") for name in names)


def test_what_is_complete_here_but_not_there_is_copied(tmp_path, url):
    folder, _ = make(tmp_path / "one", "")
    _, made = make(tmp_path / "one", url)
    assert not made
    _, made = make(tmp_path / "two", url)
    assert not made
    assert (tmp_path / "two" / "index" / "empty").exists()
    # And only once.
    before = (folder / "deep" / "er" / "a b.bin").read_bytes()
    (folder / "deep" / "er" / "a b.bin").write_bytes(b"changed since")
    make(tmp_path / "one", url)
    assert before in remote(url).values()
    assert b"changed since" not in remote(url).values()


def test_two_keys_live_side_by_side(tmp_path, url):
    one, _ = make(tmp_path / "one", url, "x")
    two, made = make(tmp_path / "two", url, "y")
    assert made
    assert key(one) != key(two)
    for content, folder in (("x", one), ("y", two)):
        found, made = make(tmp_path / f"again-{content}", url, content)
        assert not made
        assert key(found) == key(folder)
        binary = (found / "deep" / "er" / "a b.bin").read_bytes()
        assert binary == content.encode() * 1000


def test_a_stage_alone_fetches_its_inputs_as_they_were_last_used(tmp_path, url):
    for content in ("y", "x", "y", "x"):
        make(tmp_path / "one", url, content, output="passages")
    inputs = {"inputs": ("passages",)}
    index, _ = make(tmp_path / "one", url, **inputs)
    found, made = make(tmp_path / "two", url, **inputs)
    assert not made
    assert key(found) == key(index)
    assert key(tmp_path / "two" / "passages") == key(tmp_path / "one" / "passages")
    # One that is there is taken as it is.
    make(tmp_path / "three", "", "y", output="passages")
    found, made = make(tmp_path / "three", url, **inputs)
    assert made
    assert key(found) != key(index)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("manifest.json", b'{"format": 1, "ke', "damaged, ignored"),
        ("manifest.json", b"[1]", "damaged, ignored"),
        ("manifest.json", b'{"format": 1, "key": "other"}', "not of key"),
        ("manifest.json", None, None),
        ("mirror_files.json", None, "without its list of files, ignored"),
        ("mirror_files.json", b"\xff{", "damaged, ignored"),
        ("deep/er/a b.bin", b"x" * 999, "a b.bin is missing or damaged, ignored"),
        ("deep/er/a b.bin", b"y" + b"x" * 999, "a b.bin is missing or damaged"),
        ("deep/er/a b.bin", None, "missing or damaged, ignored"),
        ("link/weights", None, "missing or damaged, ignored"),
    ],
)
def test_a_damaged_copy_is_ignored_and_mended(
    tmp_path, url, caplog, name, content, words
):
    caplog.set_level(logging.WARNING)
    first, _ = make(tmp_path / "one", url)
    change(url, f"index/{key(first)}/{name}", content)
    second, made = make(tmp_path / "two", url)
    assert made
    if words:
        assert words in caplog.text
    assert key(second) == key(first)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == [
        "elsewhere",
        "index",
    ]
    _, made = make(tmp_path / "three", url)
    assert not made


def test_a_copy_that_was_cut_short_is_ignored_and_finished(tmp_path, url, monkeypatch):
    put, calls = mirror.Remote.put, []

    def unplugged(self, folder, names, below=""):
        calls.append(names)
        put(self, folder, names[: len(names) // 2], below)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mirror.Remote, "put", unplugged)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "one", url)
    assert len(remote(url)) == len(calls[0]) // 2
    _, made = make(tmp_path / "two", url)
    assert made
    # The first machine is whole, too.
    _, made = make(tmp_path / "one", url)
    assert not made


def test_a_damaged_copy_does_not_look_whole_while_it_is_mended(
    tmp_path, url, monkeypatch
):
    first, _ = make(tmp_path / "one", url)
    place = f"index/{key(first)}"
    change(url, f"{place}/empty", b"damaged")

    def unplugged(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(mirror.Remote, "put", unplugged)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "two", url)
    assert f"{place}/empty" in remote(url)
    assert f"{place}/manifest.json" not in remote(url)


def test_a_fetch_that_was_cut_short_starts_over(tmp_path, url, monkeypatch):
    first, _ = make(tmp_path / "one", url)
    left = tmp_path / "two" / f"index.fetching-{key(first)}"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    second, made = make(tmp_path / "two", url)
    assert not made
    assert not (second / "half").exists()
    assert not left.exists()


def test_an_artifact_of_other_settings_is_moved_aside_for_a_fetched_one(tmp_path, url):
    make(tmp_path / "one", url, "x")
    old, _ = make(tmp_path / "two", "", "y")
    old_key = key(old)
    _, made = make(tmp_path / "two", url, "x")
    assert not made
    aside = tmp_path / "two" / f"index.replaced-{old_key}"
    assert (aside / "deep" / "er" / "a b.bin").read_bytes() == b"y" * 1000


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("{file}/run", "could not be written to (NotADirectoryError"),
        ("file://{file}/run", "could not be written to (NotADirectoryError"),
        ("gs:/bucket/run", "did you mean gs://...?"),
        ("nosuch://bucket/run", "is of no kind that fsspec knows"),
    ],
)
def test_an_unreachable_mirror_is_said_before_any_work(tmp_path, where, words):
    (tmp_path / "file").write_text("")
    where = where.format(file=tmp_path / "file")
    with pytest.raises(MirrorError) as error:
        make(tmp_path / "one", where)
    assert words in str(error.value)
    assert f"mirror {where.removeprefix('file://')}" in str(error.value)
    assert MADE == []
    assert not (tmp_path / "one").exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    # As if it were not installed.
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MirrorError, match=r"gcsfs.*install radit_jax\[gcs\]"):
        make(tmp_path, "gs://bucket/run")


def test_a_mirror_that_fails_later_says_that_the_work_is_done(
    tmp_path, url, monkeypatch
):
    def broken(self, *args, **kwargs):
        raise OSError("connection reset")

    def fail(*args):
        monkeypatch.setattr(type(Mirror(url).remote._fs), "put", broken)
        return {}

    failing = stage()._replace(build=fail)
    with pytest.raises(MirrorError, match=r"reset.*is complete; run the same command"):
        run("index", failing, config(tmp_path / "one", url))
    assert (tmp_path / "one" / "index" / "manifest.json").exists()
    monkeypatch.undo()
    _, made = make(tmp_path / "one", url)
    assert not made
    _, made = make(tmp_path / "two", url)
    assert not made


# Checkpoints --------------------------------------------------------------------------


def begun(workdir, url):
    """An unfinished artifact that is attached to a mirror."""
    plan = artifacts.plan(workdir, "lm_ft", {}, {})
    artifacts.begin(plan)
    if url:
        Mirror(url).attach(plan)
    return plan


def test_checkpoints_go_where_the_artifact_says(tmp_path):
    where = tmp_path / "mirror"
    plan = begun(tmp_path / "work", str(where))
    expected = where / "lm_ft" / plan.key
    assert mirror.checkpoints_of(plan.partial) == expected / "checkpoints"
    target = plan.partial / "shuffled"
    assert mirror.checkpoints_of(target) == expected / "shuffled" / "checkpoints"
    other = begun(tmp_path / "other", "")
    assert mirror.checkpoints_of(other.partial) == other.partial / "checkpoints"
    bucket = begun(tmp_path / "bucket", "")
    (bucket.partial / "mirror.json").write_text('{"url": "gs://bucket/run/lm_ft/k"}')
    found = mirror.checkpoints_of(bucket.partial)
    assert os.fspath(found) == "gs://bucket/run/lm_ft/k/checkpoints"
    assert os.fspath(found / "3") == "gs://bucket/run/lm_ft/k/checkpoints/3"


def test_checkpoints_in_memory_are_refused(tmp_path):
    plan = begun(tmp_path, "memory://a/b")
    with pytest.raises(
        MirrorError, match="can be written to gs:// and to folders only"
    ):
        mirror.checkpoints_of(plan.partial)


def test_a_run_does_not_change_its_mirror(tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    plan = begun(tmp_path / "work", one)
    begun(tmp_path / "work", one)
    with pytest.raises(MirrorError, match=f"Set --config.mirror={one}, or copy"):
        begun(tmp_path / "work", two)
    artifacts.finish(plan, {})
    with pytest.raises(MirrorError, match=f"are in {one}.*not in {two}"):
        Mirror(two).keep(plan)
    Mirror(one).keep(plan)


def test_a_run_begun_without_a_mirror_keeps_its_checkpoints(tmp_path, caplog):
    plan = begun(tmp_path / "work", "")
    (plan.partial / "lm" / "checkpoints" / "3").mkdir(parents=True)
    (plan.partial / "lm" / "checkpoints" / "3" / "array").write_text("array")
    begun(tmp_path / "work", str(tmp_path / "mirror"))
    assert "was begun without a mirror" in caplog.text
    run_folder = plan.partial / "lm"
    assert mirror.checkpoints_of(run_folder) == run_folder / "checkpoints"
    artifacts.finish(plan, {})
    Mirror(str(tmp_path / "mirror")).keep(plan)
    elsewhere = artifacts.plan(tmp_path / "empty", "lm_ft", {}, {})
    assert Mirror(str(tmp_path / "mirror")).fetch(elsewhere)
    fetched = elsewhere.folder / "lm" / "checkpoints" / "3" / "array"
    assert fetched.read_text() == "array"


def test_a_mirror_may_be_moved(tmp_path):
    plan = begun(tmp_path / "work", str(tmp_path / "old"))
    artifacts.finish(plan, {})
    Mirror(str(tmp_path / "old")).keep(plan)
    shutil.move(tmp_path / "old", tmp_path / "new")
    elsewhere = artifacts.plan(tmp_path / "empty", "lm_ft", {}, {})
    assert Mirror(str(tmp_path / "new")).fetch(elsewhere)
    expected = tmp_path / "new" / "lm_ft" / plan.key / "checkpoints"
    assert mirror.checkpoints_of(elsewhere.folder) == expected


def test_curves_follow_the_checkpoints(tmp_path, url):
    plan = begun(tmp_path / "work", url)
    run_folder = plan.partial / "lm"
    (run_folder / "tensorboard").mkdir(parents=True)
    (run_folder / "metrics.jsonl").write_text("1\n")
    (run_folder / "tensorboard" / "events").write_text("events")
    (run_folder / "huge").write_text("huge")
    names = ("metrics.jsonl", "tensorboard")
    mirror.push(run_folder, names)
    assert "huge" not in str(remote(url))
    other = begun(tmp_path / "other", url).partial / "lm"
    mirror.pull(other, names)
    assert files(other) == {"metrics.jsonl": b"1\n", "tensorboard/events": b"events"}
    # What is here is newer.
    (run_folder / "metrics.jsonl").write_text("1\n2\n")
    mirror.pull(run_folder, names)
    assert (run_folder / "metrics.jsonl").read_text() == "1\n2\n"


def weights(config):
    with jax.set_mesh(sharding.make_mesh()):
        found = lm_ft.load_finetuned(config)
    return jax.tree.map(np.asarray, found)


def rows(folder):
    """Of metrics.jsonl, without what the clock says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds/", "tokens_per_second", "mfu")
    return [
        {k: v for k, v in json.loads(line).items() if not any(t in k for t in timed)}
        for line in lines
    ]


def killed_at(step, config):
    """Run the chain in a process that loses its power before a step."""
    code = f"""
import os, signal, sys
import jax
# As here: otherwise sums are split otherwise, and differ in their last bit.
jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, {str(ROOT)!r})
from configs import radit
from radit_jax.stages import hardware, lm_ft
from radit_jax.stages.radit import run_chain
hardware.measured_matmul = lambda dtype: 1e9
place, seen = lm_ft.place, []
def unplugged(batch):
    seen.append(batch)
    if len(seen) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return place(batch)
lm_ft.place = unplugged
config = radit.get_config("tiny")
config.update_from_flattened_dict({config!r})
run_chain(config)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == -signal.SIGKILL, found.stderr


def test_a_machine_with_an_empty_disk_goes_on_where_the_killed_one_was(
    tmp_path, retrieved, tiny_config, monkeypatch
):
    """And ends with the same bytes as one that was never stopped."""
    from radit_jax.stages import hardware

    monkeypatch.setattr(hardware, "measured_matmul", lambda dtype: 1e9)
    where = tmp_path / "mirror"
    changes = {"stages": ("lm_ft",), "lm_ft.save_every": 2, "mirror": str(where)}
    whole = tiny_config(shutil.copytree(retrieved, tmp_path / "whole", symlinks=True))
    whole.lm_ft.save_every = 2
    expected = run("lm_ft", lm_ft.STAGE, whole)

    first = tmp_path / "first"
    shutil.copytree(retrieved, first, symlinks=True)
    for name in ("inputs", "passages", "index", "retrieved"):
        plan = artifacts.Plan(first / name, first, key(first / name), {}, {})
        Mirror(str(where)).keep(plan)
    killed_at(6, {"workdir": str(first), **changes})
    shutil.rmtree(first)

    again = tiny_config(tmp_path / "second", **changes)
    place, seen = lm_ft.place, []
    monkeypatch.setattr(lm_ft, "place", lambda b: place((seen.append(b), b)[1]))
    folder = run("lm_ft", lm_ft.STAGE, again)
    steps = again.lm_ft.steps
    assert len(seen) < steps - 2  # it went on from step 4, or at least from 2
    assert not (folder / "checkpoints").exists()
    assert rows(folder) == rows(expected)
    jax.tree.map(np.testing.assert_array_equal, weights(again), weights(whole))
    # A third machine has it from the mirror, weights in place.
    third = tiny_config(tmp_path / "third", **changes)
    seen.clear()
    run("lm_ft", lm_ft.STAGE, third)
    assert seen == []
    jax.tree.map(np.testing.assert_array_equal, weights(third), weights(whole))
