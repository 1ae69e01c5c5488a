import subprocess
import sys
from pathlib import Path

import pytest

import radit_jax.data
from radit_jax.data.jsonl import read_rows


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


def test_importing_the_data_room_brings_no_framework():
    names = sorted(
        path.stem
        for path in Path(radit_jax.data.__file__).parent.glob("*.py")
        if path.stem
        in {"jsonl", "corpus", "tasks", "packages", "factbook", "factbook_questions"}
    )
    imports = "; ".join(f"import radit_jax.data.{name}" for name in names)
    check = "print([m for m in ('jax', 'torch', 'tensorflow') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {imports}; {check}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(names) == 6
    assert done.stdout.strip() == "[]"
