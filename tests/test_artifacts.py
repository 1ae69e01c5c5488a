"""Keys, partial folders, and what becomes of artifacts that are replaced."""

import pytest

from radit_jax import artifacts
from radit_jax.artifacts import ArtifactError


def make(workdir, name, settings, inputs=(), content="x"):
    plan = artifacts.plan(workdir, name, settings, {i: workdir / i for i in inputs})
    folder = artifacts.begin(plan)
    (folder / "content").write_text(content)
    return artifacts.finish(plan, {"rows": 1})


def key(workdir, name, settings, inputs=()):
    return artifacts.plan(workdir, name, settings, {i: workdir / i for i in inputs}).key


def test_the_key_follows_settings_and_inputs(tmp_path):
    make(tmp_path, "passages", {"words": 10})
    before = key(tmp_path, "index", {"a": 1, "b": 2}, ["passages"])
    assert key(tmp_path, "index", {"b": 2, "a": 1}, ["passages"]) == before
    assert key(tmp_path, "index", {"a": 1, "b": 3}, ["passages"]) != before
    assert key(tmp_path, "index", {"a": 1, "b": 2}) != before
    make(tmp_path, "passages", {"words": 11})
    assert key(tmp_path, "index", {"a": 1, "b": 2}, ["passages"]) != before
    make(tmp_path, "passages", {"words": 10})
    assert key(tmp_path, "index", {"a": 1, "b": 2}, ["passages"]) == before


def test_a_fingerprint_is_of_content_and_names(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a").write_text("one")
    (folder / "deep" / "b").write_text("two")
    before = artifacts.fingerprint(folder)
    assert artifacts.fingerprint(folder) == before
    (folder / "deep" / "b").write_text("twO")
    assert artifacts.fingerprint(folder) != before
    (folder / "deep" / "b").write_text("two")
    assert artifacts.fingerprint(folder) == before
    (folder / "a").rename(folder / "c")
    assert artifacts.fingerprint(folder) != before
    # Where bytes end and the next file begins matters.
    (folder / "c").write_text("onet")
    (folder / "deep" / "b").write_text("wo")
    assert artifacts.fingerprint(folder) != before


def test_a_fingerprint_does_not_depend_on_where_a_folder_is(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("same")
    one, two = (artifacts.fingerprint(tmp_path / name) for name in ("one", "two"))
    assert one == two


def test_large_files_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "WHOLE", 1000)
    monkeypatch.setattr(artifacts, "BLOCK", 10)
    file = tmp_path / "weights"
    content = bytearray(5000)
    file.write_bytes(content)
    before = artifacts.fingerprint(file)
    content[-1] = 1  # the last block is among those that are read
    file.write_bytes(content)
    assert artifacts.fingerprint(file) != before
    file.write_bytes(bytes(5001))
    assert artifacts.fingerprint(file) != before


def test_a_file_that_is_not_there_cannot_be_fingerprinted(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        artifacts.fingerprint(tmp_path / "nowhere")


def test_complete_is_said_of_the_same_key_only(tmp_path):
    plan = artifacts.plan(tmp_path, "index", {"a": 1}, {})
    assert not artifacts.is_complete(plan)
    artifacts.begin(plan)
    assert not artifacts.is_complete(plan)
    assert artifacts.finish(plan, {"rows": 3}) == tmp_path / "index"
    assert artifacts.is_complete(plan)
    assert not plan.partial.exists()
    assert not artifacts.is_complete(artifacts.plan(tmp_path, "index", {"a": 2}, {}))
    manifest = artifacts.read_manifest(tmp_path / "index")
    assert manifest["key"] == plan.key
    assert manifest["settings"] == {"a": 1}
    assert manifest["counts"] == {"rows": 3}


def test_a_replaced_artifact_is_moved_aside_never_deleted(tmp_path):
    for setting, content in ((1, "first"), (2, "second"), (1, "third"), (2, "fourth")):
        make(tmp_path, "index", {"a": setting}, content=content)
    found = {
        (folder / "content").read_text()
        for folder in tmp_path.iterdir()
        if folder.name != "index"
    }
    assert found == {"first", "second", "third"}
    assert (tmp_path / "index" / "content").read_text() == "fourth"
    first = key(tmp_path, "index", {"a": 1})
    kept = tmp_path / f"index.replaced-{first}"
    assert (kept / "content").read_text() == "first"
    assert (tmp_path / f"{kept.name}-2" / "content").read_text() == "third"


def test_a_folder_without_a_manifest_is_moved_aside_too(tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "mine").write_text("precious")
    make(tmp_path, "index", {})
    assert (tmp_path / "index.replaced-unknown" / "mine").read_text() == "precious"


def test_a_folder_with_a_damaged_manifest_is_moved_aside_too(tmp_path):
    plan = artifacts.plan(tmp_path, "index", {}, {})
    artifacts.begin(plan)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "manifest.json").write_text("{")
    artifacts.finish(plan, {})
    assert (tmp_path / "index.replaced-unknown" / "manifest.json").read_text() == "{"


def test_an_interrupted_stage_finds_its_own_folder_again(tmp_path):
    plan = artifacts.plan(tmp_path, "index", {"a": 1}, {})
    (artifacts.begin(plan) / "shard-0").write_text("done")
    other = artifacts.begin(artifacts.plan(tmp_path, "index", {"a": 2}, {}))
    assert list(other.iterdir()) == []
    again = artifacts.begin(artifacts.plan(tmp_path, "index", {"a": 1}, {}))
    assert (again / "shard-0").read_text() == "done"


def test_a_missing_input_is_named_with_what_is_unfinished(tmp_path):
    inputs = {"passages": tmp_path / "passages"}
    with pytest.raises(ArtifactError, match=r"passages: artifact is missing\. Run the"):
        artifacts.plan(tmp_path, "index", {}, inputs)
    unfinished = artifacts.begin(artifacts.plan(tmp_path, "passages", {}, {}))
    with pytest.raises(ArtifactError, match=f"{unfinished.name} is unfinished"):
        artifacts.plan(tmp_path, "index", {}, inputs)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ("{", "manifest.json: not valid JSON"),
        ('{"format": 99, "key": "k"}', "format 99, this version reads"),
        ("[1]", "manifest.json: not a manifest"),
        ('{"format": 1}', "manifest.json: not a manifest"),
    ],
)
def test_a_damaged_manifest_is_an_error_in_words(tmp_path, manifest, words):
    folder = make(tmp_path, "passages", {})
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(ArtifactError, match=words):
        artifacts.read_manifest(folder)
    with pytest.raises(ArtifactError, match=words):
        artifacts.is_complete(artifacts.plan(tmp_path, "passages", {}, {}))
