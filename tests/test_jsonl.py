# Text of many languages holds characters that look like others.
# ruff: noqa: RUF001

import gzip
import json
import random
import subprocess
import sys
import tracemalloc
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest

import radit_jax.data
from radit_jax.data.jsonl import RecordError, Row, read_rows


def test_rows_know_their_lines_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": "\xc3\xa9"}')
    assert [(row.line, row.values) for row in read_rows(path)] == [
        (1, {"a": 1}),
        (3, {"a": "é"}),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows in 0 lines"),
        (b"\n\n", "no rows in 2 lines"),
        (b'{"a": 1}\n{"a": ', "line 2: not JSON"),
        (b'{"a": 1}\n[{"a": 1}]', "line 2: a list, expected a JSON object"),
        (b'{"a": 1}\n"a"', "line 2: a string, expected a JSON object"),
        (b'{"a": 1}\n{"a": "\xff"}', "line 2: not UTF-8 at byte 7"),
    ],
)
def test_malformed_files_are_refused_with_the_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_rows(path))
    assert str(path) in str(error.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "documents.jsonl").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"did you mean documents\.jsonl\?"):
        next(read_rows(tmp_path / "document.jsonl"))
    with pytest.raises(FileNotFoundError, match="no folder"):
        next(read_rows(tmp_path / "nowhere" / "x.jsonl"))
    with pytest.raises(FileNotFoundError, match="is a folder"):
        next(read_rows(tmp_path))


def test_fields_are_checked(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 7, "titel": "x", "text": 3, "section": null, "flag": true}')
    row = next(read_rows(path))
    assert row.identifier("id") == "7"
    assert row.text("section", default="") == ""
    with pytest.raises(ValueError, match=r'"title" is missing .* by "titel"'):
        row.text("title")
    with pytest.raises(ValueError, match='"text" is a number, expected a string'):
        row.text("text")
    with pytest.raises(ValueError, match='"section" is null'):
        row.text("section")
    with pytest.raises(ValueError, match='"flag" is true or false'):
        row.identifier("flag")
    with pytest.raises(ValueError, match='"titel"; did you mean "title"'):
        row.check_names(("id", "title", "text"))


def test_an_unknown_field_beside_the_one_it_resembles_is_ignored(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"answers": ["x"], "answer": "x", "source": "web"}')
    next(read_rows(path)).check_names(("answers", "question"))


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nnot json\n')
    assert next(read_rows(path)).values == {"a": 1}


BAD_LINES = [
    b'{"a": "\xff"}',
    b'{"a": ',
    b'[{"a": 1}]',
    b"[" * 100_000,
    b'{"a": ' + b"1" * 5000 + b"}",
]


@pytest.mark.parametrize("bad", BAD_LINES, ids=["utf8", "cut", "list", "deep", "long"])
def test_a_damaged_line_can_be_counted_and_skipped(tmp_path, bad):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + bad + b'\n{"a": 2}\n')
    errors = []
    rows = list(read_rows(path, errors.append))
    assert [(row.line, row.values["a"]) for row in rows] == [(1, 1), (3, 2)]
    (error,) = errors
    assert isinstance(error, RecordError)
    assert str(error).startswith(f"{path}, line 2: ")
    with pytest.raises(RecordError, match="line 2: "):
        list(read_rows(path))


def test_a_file_of_damaged_lines_only_holds_no_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(BAD_LINES))
    errors = []
    with pytest.raises(ValueError, match="no rows in 5 lines") as error:
        list(read_rows(path, errors.append))
    assert len(errors) == 5
    assert not isinstance(error.value, RecordError)


def _row(**values):
    return Row(Path("x.parquet"), 7, values, "record")


def test_a_record_of_another_format_is_not_called_a_line():
    assert str(_row().error("no")) == "x.parquet, record 7: no"


@pytest.mark.parametrize("value", [3, 3.0, "3", " 3", np.int64(3), np.uint8(3)])
def test_integers_in_the_guises_they_come_in(value):
    assert _row(label=value).integer("label") == 3


@pytest.mark.parametrize("value", [True, 3.5, "three", "", None, [3], float("nan")])
def test_what_is_not_an_integer_is_refused(value):
    with pytest.raises(RecordError, match=r'"label" is .*, expected an integer'):
        _row(label=value).integer("label")


def test_an_absent_integer_is_missed_or_has_a_default():
    row = _row(labels=1, gap=None)
    assert row.integer("label", default=-1) == -1
    assert row.integer("gap", default=0) == 0
    with pytest.raises(RecordError, match=r'"label" is missing .* by "labels"'):
        row.integer("label")


@pytest.mark.parametrize(
    "value", [["a", "b"], ("a", "b"), np.array(["a", "b"], dtype=object)]
)
def test_lists_of_strings_in_the_guises_they_come_in(value):
    assert _row(answers=value).texts("answers") == ("a", "b")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a", '"answers" is a string, expected a list of strings'),
        (None, '"answers" is null'),
        ({"text": []}, '"answers" is an object'),
        (["a", None], 'item 2 of "answers" is null, expected a string'),
        (["a", ["b"]], 'item 2 of "answers" is a list'),
        (["a", b"b"], 'item 2 of "answers" is of type bytes'),
        (["a", "b\x00"], 'item 2 of "answers" holds a NUL character'),
    ],
)
def test_what_is_not_a_list_of_strings_is_refused(value, message):
    with pytest.raises(RecordError, match=f"record 7: .*{message}"):
        _row(answers=value).texts("answers")


def test_absent_texts_are_missed_or_have_a_default():
    assert _row().texts("turns", default=()) == ()
    with pytest.raises(RecordError, match=r'"turns" is missing .* by "turn"'):
        _row(turn=[]).texts("turns")


@pytest.mark.parametrize(
    "value",
    [
        [{"text": "a", "at": 1}, {"text": "b", "at": 2}],
        {"text": ["a", "b"], "at": [1, 2]},
        {"text": np.array(["a", "b"], dtype=object), "at": np.array([1, 2])},
    ],
)
def test_lists_of_objects_may_come_as_objects_of_lists(value):
    rows = _row(spans=value).rows("spans")
    assert [(row.text("text"), row.integer("at")) for row in rows] == [
        ("a", 1),
        ("b", 2),
    ]
    assert _row(spans=value).rows("spans")[1].line == 7


@pytest.mark.parametrize("value", [[], {"text": [], "at": []}])
def test_no_objects(value):
    assert _row(spans=value).rows("spans") == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a", '"spans" is a string, expected a list of objects'),
        (["a"], 'item 1 of "spans" is a string, expected an object'),
        ({"text": "a"}, 'an object whose "text" is a string'),
        ({"text": ["a"], "at": []}, "lengths differ: {'text': 1, 'at': 0}"),
    ],
)
def test_what_is_not_a_list_of_objects_is_refused(value, message):
    with pytest.raises(RecordError, match=message):
        _row(spans=value).rows("spans")


def test_an_error_in_a_nested_object_names_the_way_to_it():
    row = _row(qas=[{"answer": {"texts": "x"}}, {"answer": {"text": "x"}}])
    (_, second) = row.rows("qas")
    place = r'x\.parquet, record 7, item 2 of "qas", in "answer": field "texts" is miss'
    with pytest.raises(RecordError, match=place + r'.* by "text"'):
        second.row("answer").text("texts")
    with pytest.raises(RecordError, match='"qas" is a list, expected an object'):
        row.row("qas")


GOOD_TEXTS = [
    "tab\tand\nline\r\n",
    "Où est né l’écrivain français «\u00a0Molière\u00a0»\u00a0?",
    "Ποια είναι η πρωτεύουσα της Ελλάδας;",
    "中国的首都是哪里？",
    "Столица России — Москва",
    "کتاب\u200cها و हिन्दी",
    "👍🏽 👩\u200d👩\u200d👧 ok",
    "São Paulo, Łódź, Århus, naïve, 5 €, 20 °C, ½, “quoted” – and…",
    "AMANHÃ DE MANHÃ, IRMÃ",
    "BEYONCÉ’S CAFÉ’S",
    "NESCAFÉ® AND PELÉ™",
    "FIERTÉ\u00a0! LIBERTÉ\u00a0! CAFÉ… OLÉ”",
    "le café\u00a0«\u00a0Procope\u00a0»",
    "GOBERNÓ… MURIÓ”",
    "Â, Ã and é are letters",
]


@pytest.mark.parametrize("text", GOOD_TEXTS)
def test_good_text_of_any_language_is_read(text):
    assert _row(text=text).text("text") == text
    decomposed = unicodedata.normalize("NFD", text)
    assert _row(text=[decomposed]).texts("text") == (decomposed,)


DAMAGED_TEXTS = [
    ("a\x00b", "a NUL character"),
    ("bell\x07", r"a control character \(U\+0007\)"),
    ("it\x92s", r"a control character \(U\+0092\)"),
    ("it’s".encode().decode("latin-1"), r"a control character \(U\+0080\)"),
    ("half \ud83d a pair", r"a lone surrogate \(U\+D83D\)"),
    ("caf\ufffd", r"a replacement character \(U\+FFFD\)"),
    *(
        (text.encode().decode("cp1252"), "UTF-8 that was read as Windows-1252")
        for text in (
            *("café", "it’s", "a – b", "20 °C", "½", "\u00a0", "5 €", "😀"),
            *("żółć", "中国的首", "Ελλάδα"),
        )
    ),
]


@pytest.mark.parametrize(("text", "kind"), DAMAGED_TEXTS)
def test_damaged_text_is_refused_with_an_excerpt(text, kind):
    padded = "x" * 100 + text + "y" * 100
    with pytest.raises(RecordError, match=f'"text" holds {kind}') as error:
        _row(text=padded).text("text")
    shown = str(error.value).rpartition(": ")[2]
    assert 20 < len(shown) < 70
    assert "xxx" in shown
    assert _row(text=padded).text("text", checked=False) == padded
    assert _row(text=[padded]).texts("text", checked=False) == (padded,)


def test_a_very_long_line_is_read_and_one_beyond_the_limit_is_not(tmp_path):
    path = tmp_path / "rows.jsonl"
    text = "word " * 2_000_000
    path.write_text(json.dumps({"text": text}) + '\n{"text": "b"}\n')
    assert [row.text("text") for row in read_rows(path)] == [text, "b"]
    for limit, lines in ((1000, 0), (10_000_010, 0), (10_000_014, 2)):
        rows = read_rows(path, max_line_bytes=limit)
        if lines:
            assert len(list(rows)) == lines
            continue
        with pytest.raises(ValueError, match=rf"line 1: longer than {limit:,} b"):
            next(rows)


def test_the_limit_stops_reading_before_the_memory_is_full(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(b" " * 2**20)
    tracemalloc.start()
    with pytest.raises(ValueError, match="longer than 1,048,576 bytes"):
        next(read_rows(path, max_line_bytes=2**20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6  # of a line of 64 MB


def _noise(count):
    rng = random.Random(0)
    return [{"id": at, "text": str(rng.random())} for at in range(count)]


def test_gzip_files_are_unpacked_on_the_way(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    lines = [json.dumps(row) for row in _noise(100)]
    # Two members, as of files that were concatenated.
    halves = ["\n".join(part) + "\n" for part in (lines[:50], lines[50:])]
    path.write_bytes(b"".join(gzip.compress(half.encode()) for half in halves))
    assert [row.values for row in read_rows(path)] == _noise(100)


def test_a_damaged_gzip_file_says_how_much_was_whole(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    text = "".join(json.dumps(row) + "\n" for row in _noise(6_000))
    whole = gzip.compress(text.encode())
    packer = zlib.compressobj(wbits=31)
    begun = packer.compress(text.encode()) + packer.flush(zlib.Z_FULL_FLUSH)
    for content, kind in (
        (whole[:-1000], "truncated"),
        (whole[:-8] + bytes(8), "damaged"),  # the check sum and the size
        (begun + 100 * b"\xff", "damaged"),  # no kind of block begins like this
    ):
        path.write_bytes(content)
        rows = []
        with pytest.raises(ValueError, match=f"a {kind} gzip file") as error:
            rows.extend(read_rows(path))
        assert f"{path}: " in str(error.value)
        assert f"{len(rows)} rows were read whole" in str(error.value)
        assert len(rows) > 1000
        assert not isinstance(error.value, RecordError)


def test_a_file_that_is_not_gzip_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="not a gzip file") as error:
        list(read_rows(path))
    assert "0 rows were read whole" in str(error.value)
    assert not isinstance(error.value, RecordError)


def test_importing_the_data_room_brings_no_framework():
    names = sorted(
        path.stem
        for path in Path(radit_jax.data.__file__).parent.glob("*.py")
        if path.stem
        in {
            *("jsonl", "sources", "corpus", "tasks"),
            *("packages", "factbook", "factbook_questions"),
        }
    )
    imports = "; ".join(f"import radit_jax.data.{name}" for name in names)
    check = "print([m for m in ('jax', 'torch', 'tensorflow') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {imports}; {check}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(names) == 7
    assert done.stdout.strip() == "[]"
