"""The Beam engine writes what the single process writes, to the byte."""

import json
import random

import pyarrow as pa
import pytest
from pyarrow import parquet

from radit_jax.data import corpus, duplicates, parts
from radit_jax.data.documents import CorpusFile, find_files, read_corpus
from radit_jax.stages import corpus as stage
from radit_jax.stages.stage import run

pytest.importorskip("apache_beam", reason="the extra radit-jax[beam] is not installed")

from radit_jax.data import beam

THREADS = "--direct_num_workers=3 --direct_running_mode=multi_threading"
PROCESSES = "--direct_num_workers=2 --direct_running_mode=multi_processing"


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Files of several kinds: duplicates in and across them, empty texts, damage."""
    folder = tmp_path_factory.mktemp("documents")
    rng = random.Random(0)

    def line():
        words = random.Random(rng.randrange(150)).choices("abcdefghijkl", k=14)
        if rng.random() < 0.3:
            words[-1] = rng.choice("xyz")  # nearly the same
        return " ".join(words)

    def rows(count):
        for at in range(count):
            text = "\n".join(line() for _ in range(rng.choice([0, 1, 1, 2, 5])))
            yield {"id": at, "title": rng.choice(["T", "U"]), "text": text}

    for name, count in (("a", 150), ("b", 1), ("c", 300)):
        lines = [json.dumps(row) for row in rows(count)]
        if name == "c":
            lines[7] = "{"
            lines[8] = '{"text": null}'
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "d.jsonl").write_text('{"text": " "}')  # a file without a passage
    texts = [row["text"] for row in rows(120)]
    parquet.write_table(pa.table({"raw_content": texts}), folder / "e.parquet")
    return f"{folder}/*.jsonl, {folder}/e.parquet@9"


def _content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("options", "per_shard", "near_duplicates"),
    [("", 1000, 0.0), ("", 7, 0.0), (THREADS, 97, 0.0), (THREADS, 200, 0.6)],
)
def test_any_workers_and_shards_write_the_same_bytes(
    tmp_path, documents, monkeypatch, options, per_shard, near_duplicates
):
    monkeypatch.setattr(parts, "_BLOCK", 32)
    monkeypatch.setattr(parts, "_OPEN", 2)
    monkeypatch.setattr(duplicates, "_HELD", 100)
    files = find_files(documents)
    settings = {
        "max_words": 30,
        "passages_per_shard": per_shard,
        "near_duplicates": near_duplicates,
    }
    found = beam.write_passages(files, tmp_path / "beam", 0.1, options, **settings)
    expected = corpus.write_passages(
        read_corpus(files, 0.1), tmp_path / "single", **settings
    )
    assert found == expected
    assert expected.duplicate_passages > 100
    assert expected.damaged_records == 2
    assert expected.empty_documents > 50
    assert expected.shards == -(-expected.passages // per_shard)
    assert (expected.near_duplicates > 20) == (near_duplicates > 0)
    assert _content(tmp_path / "beam") == _content(tmp_path / "single")


def test_workers_may_be_processes(tmp_path, documents):
    files = find_files(documents)
    settings = {"max_words": 3, "passages_per_shard": 50}
    beam.write_passages(files, tmp_path / "beam", 0.1, PROCESSES, **settings)
    corpus.write_passages(read_corpus(files, 0.1), tmp_path / "single", **settings)
    assert _content(tmp_path / "beam") == _content(tmp_path / "single")


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        ("", '{"text": "x"}\n{', r"a\.jsonl, line 2: not JSON"),
        (PROCESSES, '{"text": "x"}\n{', r"a\.jsonl, line 2: not JSON"),
        ("", '{"id": 1, "text": "x"}\n{"id": 1, "text": "y"}', r"line 2: id .* before"),
        ("", '{"text": " "}', r"the corpus is empty: no word in the text of 1 docu"),
        ("", None, r"a\.jsonl: no such file"),
    ],
)
def test_errors_are_those_of_the_single_process(tmp_path, options, content, message):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    files = [CorpusFile(path)]
    with pytest.raises(ValueError, match=message) as error:
        beam.write_passages(files, tmp_path / "beam", 0.0, options, 10)
    with pytest.raises((ValueError, OSError)) as single:
        corpus.write_passages(read_corpus(files), tmp_path / "single", 10)
    assert str(error.value) == str(single.value)
    assert _content(tmp_path / "beam") == {}


def test_documents_of_two_files_may_not_share_an_id(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"id": 1, "text": "x"}')
    files = [CorpusFile(tmp_path / f"{name}.jsonl") for name in "ab"]
    message = r'b\.jsonl, line 1: id "1" has occurred before, in .*a\.jsonl, line 1;'
    with pytest.raises(ValueError, match=message):
        beam.write_passages(files, tmp_path / "beam", 0.0, "", 10)


def test_the_stage_runs_on_beam(tmp_path, documents, tiny_config):
    fields = {"documents": documents, "max_damaged": 0.1, "beam_options": THREADS}
    fields = {f"corpus.{name}": value for name, value in fields.items()}
    single, other = (
        run(
            "corpus",
            stage.STAGE,
            tiny_config(tmp_path / engine, **fields, **{"corpus.engine": engine}),
        )
        for engine in ("single", "beam")
    )
    made = _content(single)
    assert made.keys() == _content(other).keys()
    for name in made.keys() - {"config.json", "manifest.json"}:
        assert made[name] == _content(other)[name]
    keys = {json.loads(f["manifest.json"])["key"] for f in (made, _content(other))}
    assert len(keys) == 1


def test_a_mistyped_option_is_not_passed_over(tmp_path, documents):
    with pytest.raises(ValueError, match=r"--direct_num_wrokers.*did you mean"):
        beam.write_passages(
            find_files(documents), tmp_path, 0.1, "--direct_num_wrokers=2", 10
        )
