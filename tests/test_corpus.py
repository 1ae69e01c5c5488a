import json
import math
import pickle
import random
import time

import numpy as np
import pytest

from radit_jax.data.corpus import (
    Document,
    PassageStore,
    clean,
    read_documents,
    split_passages,
    write_passages,
)


def _document(text, id="d", title="Title", section=""):
    return Document(id, title, section, text)


def _words(count):
    return " ".join(f"w{at}" for at in range(count))


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_documents_are_read_with_integer_ids_and_optional_sections(tmp_path):
    path = _write(
        tmp_path / "documents.jsonl",
        [
            {"id": 1, "title": "A", "text": "x", "url": "ignored"},
            {"id": "b", "title": "B", "section": "S", "text": ""},
        ],
    )
    assert list(read_documents(path)) == [
        Document("1", "A", "", "x"),
        Document("b", "B", "S", ""),
    ]


def test_a_document_id_occurs_once(tmp_path):
    row = {"id": 1, "title": "A", "text": "x"}
    path = _write(tmp_path / "documents.jsonl", [row, {**row, "id": "1"}])
    with pytest.raises(ValueError, match='line 2: id "1" has occurred before'):
        list(read_documents(path))


def test_a_mistyped_section_is_refused(tmp_path):
    row = {"id": 1, "title": "A", "text": "x", "sectoin": "S"}
    path = _write(tmp_path / "documents.jsonl", [row])
    with pytest.raises(ValueError, match='did you mean "section"'):
        list(read_documents(path))


def test_clean_keeps_lines_and_drops_the_invisible():
    text = " a\t\u00a0b \r\n\n\x00c\x07\u200b d\ud800\u2028e\ufeff"
    assert clean(text) == "a b\nc d\ne"


@pytest.mark.parametrize(("words", "most"), [(1, 5), (5, 5), (6, 5), (23, 5), (400, 7)])
def test_one_line_is_cut_into_the_fewest_equal_chunks(words, most):
    for keep_lines in (True, False):
        chunks = split_passages(_document(_words(words)), most, keep_lines)
        sizes = [len(chunk.split()) for chunk in chunks]
        assert len(sizes) == math.ceil(words / most)
        assert max(sizes) - min(sizes) <= 1
        assert " ".join(chunks) == _words(words)


def test_borders_move_to_the_nearest_line_break():
    # Equal-size border at 6 of 12 words; line breaks at 5 and 9.
    lines = ["a b c d e", "f g h i", "j k l"]
    chunks = split_passages(_document("\n".join(lines)), 8)
    assert chunks == ["a b c d e", "f g h i\nj k l"]
    flat = split_passages(_document("\n".join(lines)), 8, keep_lines=False)
    assert flat == ["a b c d e f", "g h i j k l"]


def test_short_lines_make_equal_chunks():
    chunks = split_passages(_document("a\n" * 12), 8)
    assert [len(chunk.split()) for chunk in chunks] == [6, 6]


def test_only_a_line_that_is_too_long_is_cut():
    rng = random.Random(0)
    for _ in range(200):
        most = rng.randint(3, 12)
        lines = [_words(rng.randint(1, 15)) for _ in range(rng.randint(1, 12))]
        chunks = split_passages(_document("\n".join(lines)), most)
        assert max(len(chunk.split()) for chunk in chunks) <= most
        assert " ".join(chunks).split() == " ".join(lines).split()
        kept = [part for chunk in chunks for part in chunk.split("\n")]
        short = [line for line in lines if len(line.split()) <= most]
        for line in short:
            assert line in kept


def test_an_empty_text_has_no_passages():
    assert split_passages(_document(" \n\x00 "), 5) == []


def test_max_words_must_be_positive():
    with pytest.raises(ValueError, match="max_words is 0"):
        split_passages(_document("a"), 0)


@pytest.mark.parametrize("lines", [1, 50_000])
def test_a_million_words_are_split_in_linear_time(lines):
    text = ("word " * (1_000_000 // lines) + "\n") * lines
    started = time.perf_counter()
    chunks = split_passages(_document(text), 100)
    assert len(chunks) == 10_000
    assert time.perf_counter() - started < 5


def _corpus():
    yield _document(_words(25), id="long", section="Part\none")
    yield _document("  ", id="empty")
    yield _document("same text", id="first")
    yield _document("same  text", id="second")  # the same display after cleaning
    yield _document("same text", id="third", title="Another")


@pytest.mark.parametrize("per_shard", [1, 2, 100])
def test_ids_do_not_depend_on_the_shards(tmp_path, per_shard):
    counts = write_passages(_corpus(), tmp_path, 10, passages_per_shard=per_shard)
    store = PassageStore(tmp_path)
    assert counts._asdict() == {
        "documents": 5,
        "empty_documents": 1,
        "duplicate_passages": 1,
        "passages": 5,
        "words": 29,
        "shards": math.ceil(5 / per_shard),
    }
    assert store.counts == counts
    assert len(store) == 5
    assert [passage.id for passage in store] == [0, 1, 2, 3, 4]
    assert [passage.document for passage in store] == ["long"] * 3 + ["first", "third"]
    assert store[0].display.startswith("Title: Part one w0 w1")
    assert store[np.int64(4)].title == "Another"


def test_get_keeps_the_order_and_repeats(tmp_path):
    write_passages(_corpus(), tmp_path, 10, passages_per_shard=2)
    store = PassageStore(tmp_path)
    ids = np.array([4, 0, 3, 0, 1])
    assert [passage.id for passage in store.get(ids)] == ids.tolist()
    assert store.get([]) == []


@pytest.mark.parametrize("id", [-1, 5])
def test_an_id_out_of_range_is_an_error(tmp_path, id):
    write_passages(_corpus(), tmp_path, 10)
    with pytest.raises(IndexError, match=f"passage {id} is out of range"):
        PassageStore(tmp_path)[id]


def test_passages_of_a_document(tmp_path, monkeypatch):
    write_passages(_corpus(), tmp_path / "a", 10)
    store = PassageStore(tmp_path / "a")
    assert store.of_document("long") == range(0, 3)
    assert store.of_document("third") == range(4, 5)
    for absent in ("empty", "second", "unheard of"):
        assert list(store.of_document(absent)) == []
    # Even if the hashes of all ids coincide, the passage tells them apart.
    monkeypatch.setattr(
        "radit_jax.data.corpus._hash", lambda text: 7 if len(text) < 7 else hash(text)
    )
    write_passages(_corpus(), tmp_path / "b", 10)
    store = PassageStore(tmp_path / "b")
    assert store.of_document("long") == range(0, 3)
    assert store.of_document("third") == range(4, 5)


def test_a_store_travels_by_path(tmp_path):
    write_passages(_corpus(), tmp_path, 10)
    store = PassageStore(tmp_path)
    store.get([0])  # an open reader must not be in the pickle's way
    assert pickle.loads(pickle.dumps(store))[3] == store[3]


def test_an_empty_corpus_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"the corpus is empty: .* 1 documents"):
        write_passages([_document(" ")], tmp_path, 10)
    with pytest.raises(FileNotFoundError, match="no finished passages"):
        PassageStore(tmp_path)


def test_missing_and_truncated_shards_are_found_on_opening(tmp_path):
    write_passages(_corpus(), tmp_path, 10, passages_per_shard=2)
    shard = tmp_path / "passages-00001.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"passages-00001.* expected .* truncated"):
        PassageStore(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"passages-00001.*missing"):
        PassageStore(tmp_path)
    (tmp_path / "shards.json").write_text("{")
    with pytest.raises(ValueError, match="unreadable"):
        PassageStore(tmp_path)


def test_writing_again_replaces_the_shards(tmp_path):
    write_passages(_corpus(), tmp_path, 10, passages_per_shard=1)
    write_passages(_corpus(), tmp_path, 10, passages_per_shard=100)
    assert len(list(tmp_path.glob("*.array_record"))) == 1
