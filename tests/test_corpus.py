import json
import math
import pickle
import random
import sys
import time
import tracemalloc
from itertools import chain

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

import radit_jax.data
from radit_jax.data import corpus, duplicates, parts
from radit_jax.data.corpus import (
    Document,
    PassageStore,
    clean,
    read_documents,
    split_passages,
    write_passages,
)
from radit_jax.data.documents import find_files, read_corpus
from radit_jax.data.duplicates import jaccard, shingles
from radit_jax.stages import corpus as stage
from radit_jax.stages.stage import run


def _document(text, id="d", title="Title", section=""):
    return Document(id, title, section, text)


def _words(count):
    return " ".join(f"w{at}" for at in range(count))


def _write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_document_id_occurs_once_and_both_places_are_named(tmp_path):
    row = {"id": 1, "title": "A", "text": "x"}
    path = _write(tmp_path / "a.jsonl", [{**row, "id": id} for id in (1, "2", "1", 2)])
    message = r'a\.jsonl, line 3: id "1" has occurred before, in .*a\.jsonl, line 1;'
    with pytest.raises(ValueError, match=message):
        write_passages(read_documents(path), tmp_path / "out", 10)
    other = _write(tmp_path / "b.jsonl", [{"id": "2", "text": ""}])
    message = r'b\.jsonl, line 1: id "2" has occurred before, in .*a\.jsonl, line 2;'
    ids = [Document("9", "", "", "y")]
    documents = chain(list(read_documents(path))[:2], ids, read_documents(other))
    with pytest.raises(ValueError, match=message):
        write_passages(documents, tmp_path / "out", 10)
    with pytest.raises(ValueError, match=r'document 2: id "d" .* in document 1;'):
        write_passages([_document("a"), _document("b")], tmp_path / "out", 10)
    assert list((tmp_path / "out").iterdir()) == []


def test_clean_keeps_lines_and_drops_the_invisible():
    text = " a\t\u00a0b \r\n\n\x00c\x07\u200b d\ud800\u2028e\ufeff\n f  g "
    assert clean(text) == "a b\nc d\ne\nf g"


def test_clean_keeps_what_a_lost_encoding_left():
    assert clean("cafÃ© \ufffd \u200d") == "cafÃ© \ufffd \u200d"


def test_clean_is_the_same_by_its_short_cuts():
    # Of lines that are already clean nothing is looked at twice.
    rng = random.Random(5)
    for _ in range(500):
        text = "".join(
            rng.choices("ab \n\t\x00\xa0é\x85", [9, 9, 9, 2, *[1] * 5], k=40)
        )
        lines = (line.replace("\x00", "").split() for line in text.splitlines())
        assert clean(text) == "\n".join(" ".join(words) for words in lines if words)


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
        "near_duplicates": 0,
        "damaged_records": 0,
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
    hash_text = parts.hash_text
    monkeypatch.setattr(
        parts, "hash_text", lambda text: 7 if len(text) < 7 else hash_text(text)
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
    assert list(tmp_path.iterdir()) == []


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


@pytest.fixture
def small_blocks(monkeypatch):
    """What is held in memory, small enough for a test to go beyond."""
    monkeypatch.setattr(parts, "_BLOCK", 64)
    monkeypatch.setattr(duplicates, "_HELD", 200)


def _many(count, kinds=10**9, seed=6):
    """Documents of some lines each, which are of so many kinds."""
    rng = random.Random(seed)
    for at in range(count):
        lines = []
        for _ in range(rng.choice([0, 1, 2, 5])):
            line = random.Random(rng.randrange(kinds))
            lines.append(" ".join(line.choices("abcdefghij", k=9)))
        yield _document("\n".join(lines), id=f"d{at}", title="")


@pytest.mark.parametrize("kinds", [3, 500])
def test_of_equal_passages_the_first_is_kept(tmp_path, small_blocks, kinds):
    documents = list(_many(400, kinds))
    counts = write_passages(documents, tmp_path, 9, passages_per_shard=100)
    first: dict[str, str] = {}
    repeated = 0
    for document in documents:
        for text in split_passages(document, 9):
            repeated += text in first
            first.setdefault(text, document.id)
    store = PassageStore(tmp_path)
    passages = list(store)
    assert [(p.text, p.document) for p in passages] == list(first.items())
    assert counts.duplicate_passages == repeated > 100
    assert counts.words == 9 * len(first)
    for document in documents:
        own = [p.id for p in passages if p.document == document.id]
        assert list(store.of_document(document.id)) == own


def test_the_table_of_documents_is_sorted(tmp_path, small_blocks):
    write_passages(_many(1000), tmp_path, 9)
    table = np.load(tmp_path / "documents.npy")
    assert (np.diff(table[0]) > 0).all()
    np.save(tmp_path / "again.npy", table)
    assert (tmp_path / "again.npy").read_bytes() == (
        tmp_path / "documents.npy"
    ).read_bytes()


def test_a_record_is_the_passage_as_json(tmp_path):
    document = Document(
        'a"/\ud800', "Tïtle\n2", 'S"', 'Tëxt \\ with\n"quotes" \u2028 x'
    )
    write_passages([document], tmp_path, 10)
    reader = ArrayRecordReader(str(tmp_path / "passages-00000.array_record"))
    (passage,) = PassageStore(tmp_path)
    assert passage[1:] == (
        *(document.id, "Tïtle 2", 'S"', 'Tëxt \\ with\n"quotes"\nx'),
    )
    values = passage._asdict()
    del values["id"]
    assert reader.read([0]) == [
        json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ]


@pytest.mark.parametrize("near_duplicates", [0.0, 0.8])
def test_memory_does_not_grow_with_the_corpus(
    tmp_path, small_blocks, monkeypatch, near_duplicates
):
    monkeypatch.setattr(corpus, "BAND_BUCKET_BITS", 5)

    def peak(count):
        tracemalloc.start()
        folder = tmp_path / f"{count}"
        write_passages(_many(count), folder, 9, 50, near_duplicates=near_duplicates)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(50)  # what is made once
    few, many = peak(200), peak(1200)
    # 2,000 passages more: the list of shards, some bits of each.
    assert many - few < 20_000


def test_scratch_files_are_removed(tmp_path):
    stale = tmp_path / ".scratch-killed"
    stale.mkdir()
    (stale / "records").write_text("left by a killed run")
    seen = []

    def documents(fail):
        yield _document("a")
        seen.extend(path.name for path in tmp_path.glob(".scratch-*/*"))
        if fail:
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_passages(documents(fail=True), tmp_path, 10)
    assert list(tmp_path.iterdir()) == []
    write_passages(documents(fail=False), tmp_path, 10)
    assert seen == ["part", "part"]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("documents.npy", "passages-00000.array_record", "shards.json"),
    }


def test_damaged_records_are_counted(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "a"}\n{\n{"text": "b"}\n{"text": null}\n{')
    documents = read_corpus(find_files(str(path)), max_damaged=0.6)
    counts = write_passages(documents, tmp_path / "out", 10)
    assert (counts.documents, counts.damaged_records, counts.passages) == (2, 3, 2)
    assert PassageStore(tmp_path / "out").counts == counts


def test_a_source_may_have_passages_of_its_own_size(tmp_path):
    for name in ("wiki", "cc"):
        _write(tmp_path / f"{name}.jsonl", [{"title": name, "text": _words(12)}])
    files = find_files(f"{tmp_path}/wiki.jsonl, {tmp_path}/cc.jsonl@4")
    write_passages(read_corpus(files), tmp_path / "out", 6)
    sizes = [(p.title, len(p.text.split())) for p in PassageStore(tmp_path / "out")]
    assert sizes == [("wiki", 6)] * 2 + [("cc", 4)] * 3


def test_equal_chunks_of_a_web_page_are_shorter_than_a_hundred_words(tmp_path):
    page = "\n".join(_words(count) for count in (3, 180, 40, 7))
    write_passages([_document(page, title="")], tmp_path, 100, keep_lines=False)
    assert [len(p.text.split()) for p in PassageStore(tmp_path)] == [76, 77, 77]


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates_of_an_earlier_passage_are_dropped(tmp_path, threshold):
    rng = random.Random(7)
    pages = []
    for _ in range(40):
        words = [f"w{rng.randrange(5000)}" for _ in range(100)]
        for changes in (0, 0, 1, 2, 4, 30):
            altered = list(words)
            for at in rng.sample(range(100), changes):
                altered[at] = "altered"
            pages.append(" ".join(altered))
    rng.shuffle(pages)
    documents = [_document(page, id=f"{at}") for at, page in enumerate(pages)]
    plain = write_passages(documents, tmp_path / "plain", 100)
    counts = write_passages(
        documents, tmp_path / "near", 100, near_duplicates=threshold
    )
    assert counts.duplicate_passages == plain.duplicate_passages == 40
    assert counts.passages == plain.passages - counts.near_duplicates
    kept = {passage.document for passage in PassageStore(tmp_path / "near")}
    earlier: list[frozenset] = []
    expected = set()
    for passage in PassageStore(tmp_path / "plain"):
        own = shingles(passage.display)
        if all(jaccard(own, other) < threshold for other in earlier):
            expected.add(passage.document)
        earlier.append(own)
    assert counts.near_duplicates > 40
    assert kept == expected
    again = write_passages(
        documents, tmp_path / "again", 100, 13, near_duplicates=threshold
    )
    assert again == counts._replace(shards=again.shards)
    assert list(PassageStore(tmp_path / "again")) == list(
        PassageStore(tmp_path / "near")
    )


def test_whole_blocks_may_be_dropped_before_near_duplicates(tmp_path, small_blocks):
    documents = [_document("a b c", id=f"{at}") for at in range(300)]
    counts = write_passages(documents, tmp_path, 100, near_duplicates=0.8)
    assert (counts.passages, counts.duplicate_passages) == (1, 299)
    assert counts.near_duplicates == 0


@pytest.mark.parametrize("similarity", [-0.1, 1.5])
def test_a_similarity_is_a_share(tmp_path, similarity):
    with pytest.raises(ValueError, match=r"from 0 .* to 1, such as 0\.8"):
        write_passages(_corpus(), tmp_path, 10, near_duplicates=similarity)


# The stage.


def test_the_key_depends_on_the_content_of_all_files(tmp_path, tiny_config):
    for name in ("a", "b"):
        _write(tmp_path / f"{name}.jsonl", [{"id": 1, "text": name}])

    def settings(documents=f"{tmp_path}/*.jsonl", **fields):
        fields = {f"corpus.{name}": value for name, value in fields.items()}
        config = tiny_config(tmp_path, **{"corpus.documents": documents}, **fields)
        return stage.settings(config)

    start = settings()
    assert settings() == start
    assert settings(engine="beam", beam_options="--direct_num_workers=2") == start
    assert settings(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl") == start
    others = [
        settings(f"{tmp_path}/b.jsonl,{tmp_path}/a.jsonl"),
        settings(f"{tmp_path}/a.jsonl"),
        settings(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl@7"),
        settings(near_duplicates=0.8),
        settings(max_words=7),
    ]
    _write(tmp_path / "sub" / "a.jsonl", [{"id": 1, "text": "a"}])
    others.append(settings(f"{tmp_path}/sub/a.jsonl,{tmp_path}/b.jsonl"))
    _write(tmp_path / "b.jsonl", [{"id": 1, "text": "c"}])
    others.append(settings())
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    others.append(settings())
    assert all(other != start for other in others)
    assert len({json.dumps(other) for other in others}) == len(others)


def test_the_key_depends_on_where_a_text_file_lies(tmp_path, tiny_config):
    (tmp_path / "notes" / "x").mkdir(parents=True)
    (tmp_path / "notes" / "a.txt").write_text("a")
    config = tiny_config(tmp_path, **{"corpus.documents": f"{tmp_path}/notes"})
    start = stage.settings(config)
    (tmp_path / "notes" / "a.txt").rename(tmp_path / "notes" / "x" / "a.txt")
    assert stage.settings(config) != start


def test_the_stage_makes_passages_of_several_files(tmp_path, tiny_config):
    _write(tmp_path / "in" / "a.jsonl", [{"id": 1, "text": _words(20)}])
    (tmp_path / "in" / "b.jsonl").write_text('{"id": 1, "text": "b"}\n{\n')
    fields = {"documents": f"{tmp_path}/in@5", "max_damaged": 0.5}
    fields = {f"corpus.{name}": value for name, value in fields.items()}
    made = run("corpus", stage.STAGE, tiny_config(tmp_path / "work", **fields))
    store = PassageStore(made)
    assert [p.document for p in store] == ["a.jsonl:1"] * 4 + ["b.jsonl:1"]
    assert (
        json.loads((made / "manifest.json").read_text())["counts"].items()
        >= {
            "documents": 2,
            "damaged_records": 1,
            "passages": 5,
        }.items()
    )


def test_without_beam_its_engine_says_what_to_install(
    tmp_path, tiny_config, monkeypatch
):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "radit_jax.data.beam", raising=False)
    monkeypatch.delattr(radit_jax.data, "beam", raising=False)
    path = _write(tmp_path / "documents.jsonl", [{"text": "x"}])
    fields = {"corpus.engine": "beam", "corpus.documents": str(path)}
    with pytest.raises(ValueError, match=r"pip install 'radit-jax\[beam\]'"):
        stage.build(tiny_config(tmp_path, **fields), tmp_path / "out")


def test_an_unknown_engine_is_refused(tmp_path, tiny_config):
    with pytest.raises(ValueError, match=r"corpus\.engine = 'spark' is not one of"):
        stage.settings(tiny_config(tmp_path, **{"corpus.engine": "spark"}))
