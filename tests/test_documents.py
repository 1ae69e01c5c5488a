import gzip
import json
import logging

import pyarrow as pa
import pytest
from pyarrow import parquet

from radit_jax.data.documents import (
    CorpusFile,
    Document,
    find_files,
    read_corpus,
    read_documents,
    read_file,
)
from radit_jax.data.jsonl import RecordError


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def _plain(documents):
    """Without what says where a document was read."""
    return [document[:4] for document in documents]


# Files of records.


@pytest.mark.parametrize("name", ["documents.jsonl", "documents.jsonl.gz"])
def test_documents_are_read_with_integer_ids_and_optional_fields(tmp_path, name):
    path = _write(
        tmp_path / name,
        [
            {"id": 1, "title": "A", "text": "x", "url": "ignored"},
            {"id": "b", "title": "B", "section": "S", "text": ""},
            {"id": "c", "title": None, "section": None, "text": "y"},
        ],
    )
    assert list(read_documents(path)) == [
        Document("1", "A", "", "x", place=f"{path}, line 1"),
        Document("b", "B", "S", "", place=f"{path}, line 2"),
        Document("c", "", "", "y", place=f"{path}, line 3"),
    ]


def test_web_pages_have_neither_id_nor_title(tmp_path):
    page = {"url": "https://example.org/", "raw_content": "Words.", "language": "en"}
    path = _write(tmp_path / "head.json.gz", [page, {**page, "id": None}])
    assert _plain(read_documents(path)) == [
        ("head.json.gz:1", "", "", "Words."),
        ("head.json.gz:2", "", "", "Words."),
    ]
    both = _write(tmp_path / "both.jsonl", [{**page, "text": "Cleaned."}])
    assert _plain(read_documents(both))[0][3] == "Cleaned."


def test_the_wikipedia_of_atlas_has_sections_and_a_file_of_infoboxes(tmp_path):
    row = {"id": "0", "title": "Ada", "section": "Life: Youth", "text": "She was."}
    box = {"id": "0", "title": "Ada", "section": "", "text": "name: Ada"}
    _write(tmp_path / "wiki" / "text-list-100-sec.jsonl", [row])
    _write(tmp_path / "wiki" / "infobox.jsonl", [box])
    found = find_files(f"{tmp_path}/wiki/text-list-100-sec.jsonl, {tmp_path}/wiki/inf*")
    assert _plain(read_corpus(found)) == [
        ("text-list-100-sec.jsonl:0", "Ada", "Life: Youth", "She was."),
        ("infobox.jsonl:0", "Ada", "", "name: Ada"),
    ]


@pytest.mark.parametrize("mistyped", ["sectoin", "titel"])
def test_a_mistyped_field_is_refused(tmp_path, mistyped):
    row = {"id": 1, "text": "x", mistyped: "S"}
    path = _write(tmp_path / "documents.jsonl", [{"id": 0, "text": "x"}, row])
    with pytest.raises(ValueError, match=r'line 2: unknown field .* did you mean "'):
        list(read_documents(path))
    table = tmp_path / "documents.parquet"
    parquet.write_table(pa.table({"text": ["x"], mistyped: ["S"]}), table)
    with pytest.raises(ValueError, match=r'unknown field .* did you mean "'):
        list(read_documents(table))


def test_odd_characters_are_kept(tmp_path):
    text = "cafÃ© \ufffd\x00 x"
    path = _write(tmp_path / "documents.jsonl", [{"text": text, "title": text}])
    (document,) = read_documents(path)
    assert document[1:4] == (text, "", text)


def test_a_line_of_ten_megabytes_is_a_document(tmp_path):
    path = _write(tmp_path / "d.jsonl", [{"text": "word " * 2_000_000}, {"text": "x"}])
    assert [len(document.text) for document in read_documents(path)] == [10_000_000, 1]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), "dictionary"])
def test_rows_of_parquet_are_documents(tmp_path, kind):
    def strings(*values):
        if kind == "dictionary":
            return pa.array(values, pa.string()).dictionary_encode()
        return pa.array(values, kind)

    path = tmp_path / "documents.parquet"
    columns = {
        "id": pa.array([7, None], pa.int64()),
        "url": strings("a", "b"),
        "title": strings("A", None),
        "text": strings("x", "é"),
    }
    parquet.write_table(pa.table(columns), path)
    assert list(read_documents(path)) == [
        Document("7", "A", "", "x", place=f"{path}, record 1"),
        Document("documents.parquet:2", "", "", "é", place=f"{path}, record 2"),
    ]


def test_parquet_of_several_row_groups_is_read_in_order(tmp_path):
    path = tmp_path / "documents.parquet"
    texts = [f"t{at}" for at in range(5000)]
    parquet.write_table(pa.table({"raw_content": texts}), path, row_group_size=700)
    documents = list(read_documents(path))
    assert [document.text for document in documents] == texts
    assert documents[4999].id == "documents.parquet:5000"


def test_only_the_columns_that_are_needed_are_read(tmp_path):
    path = tmp_path / "documents.parquet"
    columns = {"text": ["x"] * 100, "html": [f"<p>{at}" for at in range(100)]}
    parquet.write_table(pa.table(columns), path, compression="zstd")
    chunk = parquet.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * (
        chunk.total_compressed_size
    )
    path.write_bytes(content)
    with pytest.raises((pa.ArrowException, OSError)):
        parquet.read_table(path)
    assert len(list(read_documents(path))) == 100


def test_parquet_without_a_text_is_refused_with_the_nearest(tmp_path):
    path = tmp_path / "documents.parquet"
    parquet.write_table(pa.table({"id": [1], "contents": ["x"]}), path)
    with pytest.raises(ValueError, match=r'"text" is missing \(fields there: "id", "c'):
        list(read_documents(path))


# Text files.


def test_text_files_are_documents_by_path(tmp_path):
    (tmp_path / "notes" / "b").mkdir(parents=True)
    (tmp_path / "notes" / "b" / "two.txt").write_bytes(b"\xef\xbb\xbfSecond\r\nline")
    (tmp_path / "notes" / "one.txt").write_text("First")
    (tmp_path / "notes" / "README.md").write_text("not a document")
    (file,) = find_files(f"{tmp_path}/notes")
    assert list(read_file(file)) == [
        Document(
            "b/two.txt",
            "two",
            "",
            "Second\r\nline",
            place=str(tmp_path / "notes/b/two.txt"),
        ),
        Document("one.txt", "one", "", "First", place=str(tmp_path / "notes/one.txt")),
    ]
    assert file.files() == [tmp_path / "notes/b/two.txt", tmp_path / "notes/one.txt"]
    assert _plain(read_corpus(find_files(f"{tmp_path}/notes/o*.txt"))) == [
        ("one.txt", "one", "", "First")
    ]
    assert _plain(read_corpus(find_files(f"{tmp_path}/notes/one.txt")))[0][0] == (
        "one.txt"
    )


# Which files.


@pytest.fixture
def tree(tmp_path):
    for name in ("wiki/b.jsonl", "wiki/a.jsonl", "cc/2019/x.jsonl.gz", "cc/y.jsonl"):
        _write(tmp_path / name, [{"id": 5, "text": name}, {"text": name}])
    (tmp_path / "wiki" / "LICENSE.md").write_text("not a document")
    return tmp_path


def test_files_folders_and_globs_are_found_in_order(tree):
    found = find_files(
        f"{tree}/wiki/b.jsonl, {tree}/cc@100, {tree}/wiki/a*@ 50".replace("@ ", "@")
    )
    assert found == [
        CorpusFile(tree / "wiki/b.jsonl", "", "wiki.b.jsonl", 0),
        CorpusFile(tree / "cc/2019/x.jsonl.gz", "", "cc.2019.x.jsonl.gz", 100),
        CorpusFile(tree / "cc/y.jsonl", "", "cc.y.jsonl", 100),
        CorpusFile(tree / "wiki/a.jsonl", "", "wiki.a.jsonl", 50),
    ]
    documents = list(read_corpus(found))
    assert [document.id for document in documents[:4]] == [
        "wiki.b.jsonl:5",
        "wiki.b.jsonl:2",
        "cc.2019.x.jsonl.gz:5",
        "cc.2019.x.jsonl.gz:2",
    ]
    assert {document.max_words for document in documents} == {0, 50, 100}


def test_files_of_a_folder_come_in_the_order_of_their_names(tmp_path):
    names = [f"{letter}/{at}.jsonl" for letter in "bac" for at in (2, 10, 1)]
    for name in names:
        _write(tmp_path / name, [{"text": "x"}])
    for documents in (f"{tmp_path}", f"{tmp_path}/*/*.jsonl"):
        found = [str(f.path.relative_to(tmp_path)) for f in find_files(documents)]
        assert found == sorted(names)
    for name in names:
        (tmp_path / name).rename((tmp_path / name).with_suffix(".txt"))
    (texts,) = find_files(f"{tmp_path}")
    assert texts.texts() == sorted(name.replace("jsonl", "txt") for name in names)


def test_a_single_file_keeps_its_ids(tree):
    (file,) = find_files(f"{tree}/wiki/a.jsonl")
    assert [document.id for document in read_file(file)] == ["5", "a.jsonl:2"]


def test_prefixes_do_not_depend_on_where_the_corpus_lies(tree, tmp_path, monkeypatch):
    absolute = [file.prefix for file in find_files(f"{tree}/wiki,{tree}/cc")]
    monkeypatch.chdir(tree)
    assert [file.prefix for file in find_files("wiki/,./cc")] == absolute
    assert [file.prefix for file in find_files("wiki")] == ["a.jsonl", "b.jsonl"]


def test_a_file_named_with_an_at_sign_is_not_a_number_of_words(tmp_path):
    _write(tmp_path / "dump@2019", [{"text": "x"}])
    assert find_files(f"{tmp_path}/dump@2019") == [CorpusFile(tmp_path / "dump@2019")]
    assert find_files(f"{tmp_path}/dump@2019@7")[0].max_words == 7


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        ("", ValueError, "names no file"),
        ("wiki/aa.jsonl", FileNotFoundError, r"no such file; did you mean a\.jsonl"),
        ("wiki/*.csv", FileNotFoundError, r"wiki/\*\.csv: no file in it ends in"),
        ("empty", FileNotFoundError, "empty: no file in it ends in"),
        ("wiki/a.jsonl,wiki/*", ValueError, r"names wiki/a\.jsonl twice"),
        ("wiki@0", ValueError, "at least 1 word"),
        ("mixed", ValueError, r"text files \(b\.txt\) beside files of records \(a\."),
    ],
)
def test_what_cannot_be_found_is_said(tree, monkeypatch, documents, error, message):
    monkeypatch.chdir(tree)
    (tree / "empty").mkdir()
    _write(tree / "mixed" / "a.jsonl", [{"text": "x"}])
    (tree / "mixed" / "b.txt").write_text("x")
    with pytest.raises(error, match=message):
        find_files(documents)


# Damage.

GOOD = b'{"text": "good"}\n'


def _jsonl(tmp_path, *, bad):
    path = tmp_path / "documents.jsonl"
    path.write_bytes(GOOD + bad + b"\n" + GOOD + GOOD)
    return CorpusFile(path)


def _parquet(tmp_path, **columns):
    path = tmp_path / "documents.parquet"
    parquet.write_table(pa.table(columns), path)
    return CorpusFile(path)


def _damaged_files(tmp_path):
    not_utf8 = pa.array([b"good", b"\xff", b"good", b"good"], pa.binary())
    for bad, message in (
        (b"{", "line 2: not JSON"),
        (b'{"text": "\xff"}', "line 2: not UTF-8"),
        (b'{"text": null}', 'line 2: field "text" is null'),
        (b'{"title": "no text"}', 'line 2: field "text" is missing'),
        (b'{"text": "x", "id": " "}', 'line 2: field "id" is a blank string'),
        (b"[1]", "line 2: a list"),
    ):
        yield (lambda bad=bad: _jsonl(tmp_path, bad=bad)), message
    yield (
        (lambda: _parquet(tmp_path, text=["good", None, "good", "good"])),
        'record 2: field "text" is null',
    )
    strings = not_utf8.view(pa.string())
    for text in (strings, strings.cast(pa.large_string()), strings.dictionary_encode()):
        yield (
            (lambda text=text: _parquet(tmp_path, text=text)),
            'record 2: field "text" is not UTF-8',
        )

    def texts():
        for at, content in enumerate((b"good", b"\xff", b"good", b"good")):
            (tmp_path / f"{at}.txt").write_bytes(content)
        return CorpusFile(tmp_path, "*.txt")

    yield texts, "1.txt: not UTF-8"


@pytest.mark.parametrize("at", range(11))
def test_damaged_records_are_left_out_where_that_is_allowed(tmp_path, caplog, at):
    make, message = list(_damaged_files(tmp_path))[at]
    file = make()
    with pytest.raises(ValueError, match=message) as error:
        list(read_file(file))
    assert str(tmp_path) in str(error.value)
    with caplog.at_level(logging.WARNING):
        found = list(read_file(file, max_damaged=0.25))
    assert [type(item) for item in found] == [
        *(Document, RecordError, Document, Document)
    ]
    assert [item.text for item in found if isinstance(item, Document)] == ["good"] * 3
    assert message in str(found[1])
    assert "left out 1 damaged of 4 records" in caplog.text
    with pytest.raises(ValueError, match="1 of 4 records are damaged, more than the"):
        list(read_file(file, max_damaged=0.24))


def test_a_large_file_of_damaged_records_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_bytes(b"{\n" * 100_000)
    read = []
    with pytest.raises(ValueError, match="are damaged"):
        read.extend(read_file(CorpusFile(path), max_damaged=0.5))
    assert len(read) < 2000


def test_a_damaged_file_is_an_error_whatever_is_allowed(tmp_path):
    whole = _write(tmp_path / "documents.jsonl.gz", [{"text": "x" * 9}] * 999)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: a truncated gzip file"):
        list(read_file(CorpusFile(cut), max_damaged=1.0))
    table = _parquet(tmp_path, text=[f"{at}" for at in range(1000)]).path
    table.write_bytes(table.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"documents\.parquet: damaged Parquet file"):
        list(read_file(CorpusFile(table), max_damaged=1.0))
    with pytest.raises(FileNotFoundError, match=r"did you mean documents\.parquet"):
        list(read_file(CorpusFile(tmp_path / "document.parquet")))
