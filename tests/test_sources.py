import csv
import gzip
import io
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from radit_jax.data import sources
from radit_jax.data.jsonl import RecordError
from radit_jax.data.layouts import SUFFIXES
from radit_jax.data.sources import READERS, check_columns, read_source


def test_every_kind_of_file_that_is_found_has_a_reader():
    assert set(READERS) == set(SUFFIXES)


@pytest.mark.parametrize("name", ["train.pkl", "train.bin", "train.pt", "train.zip"])
def test_files_of_other_kinds_are_never_opened(tmp_path, name):
    # A folder behind a link that leads nowhere could not be opened at all.
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match=f"{name}: a file of a kind that is not read"):
        next(read_source(tmp_path / name, "train"))
    with pytest.raises(ValueError, match="no file of a kind that is read"):
        next(read_source(tmp_path, "train"))


ROWS = [
    {
        "id": f"q{at}",
        "question": f"Où est la ville numéro {at} ?\n「東京」 😀",
        "answers": {"text": ["é", "b"][: at % 3], "start": [1, 2][: at % 3]},
        "paths": [["a", "b"], []],
        "label": at,
        "gap": None if at % 2 else 1.5,
    }
    for at in range(600)
]
TABLE = [{"id": row["id"], "question": row["question"]} for row in ROWS]


def _json(rows, **options):
    return json.dumps(rows, ensure_ascii=False, **options).encode()


def _stream(rows, path):
    table = pa.Table.from_pylist(rows)
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table, max_chunksize=100)


def _file(rows, path):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table, max_chunksize=100)


def _parquet(rows, path):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=250)


def _lines(rows, path):
    path.write_bytes(b"".join(_json(row) + b"\n" for row in rows))


def _csv(rows, path):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())


def _tsv(rows, path):
    lines = [list(rows[0]), *(row.values() for row in rows)]
    path.write_text("".join("\t".join(line) + "\n" for line in lines))


def _gzipped(write):
    def zipped(rows, path):
        write(rows, path)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return zipped


def _array(rows, path):
    path.write_bytes(b" \n" + _json(rows))


def _pretty_array(rows, path):
    path.write_bytes(_json(rows, indent=2) + b"\n")


def _data(rows, path):
    path.write_bytes(b"\xef\xbb\xbf" + _json({"version": "v2.0", "data": rows}))


def _pretty_data(rows, path):
    path.write_bytes(_json({"data": rows, "version": 2.0}, indent=1) + b"\n\n")


WRITERS = {
    "train.parquet": _parquet,
    "train-stream.arrow": _stream,
    "train-file.arrow": _file,
    "train.jsonl": _lines,
    "train.jsonl.gz": _gzipped(_lines),
    "train-lines.json": _lines,
    "train-lines.json.gz": _gzipped(_lines),
    "train-array.json": _array,
    "train-array.json.gz": _gzipped(_array),
    "train-pretty.json": _pretty_array,
    "train-data.json": _data,
    "train-pretty-data.json": _pretty_data,
}


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(sources, "_CHUNK", chunk)
    WRITERS[name](ROWS, tmp_path / name)
    rows = list(read_source(tmp_path, "train"))
    assert [row.values for row in rows] == ROWS
    assert [row.line for row in rows] == list(range(1, 601))
    lines = name.startswith(("train.jsonl", "train-lines"))
    assert {row.unit for row in rows} == {"line" if lines else "record"}
    assert rows[0].path == tmp_path / name
    assert type(rows[0].values["gap"]) is float
    # Both kinds of nested values.
    assert [len(row.rows("answers")) for row in rows[:4]] == [0, 1, 2, 0]
    assert rows[2].rows("answers")[1].text("text") == "b"


@pytest.mark.parametrize("name", ["train.csv", "train.csv.gz"])
def test_csv_files_are_read_with_their_header(tmp_path, name):
    write = _gzipped(_csv) if name.endswith("gz") else _csv
    write(TABLE, tmp_path / name)
    rows = list(read_source(tmp_path, "train"))
    assert [row.values for row in rows] == TABLE
    # Every question holds a line break.
    assert [row.line for row in rows[:3]] == [2, 4, 6]


@pytest.mark.parametrize("name", ["train.tsv", "train.tsv.gz"])
def test_quotes_mean_nothing_in_tsv_files(tmp_path, name):
    table = [{"a": f'"{at}', "b": 'x "y" z'} for at in range(5)]
    write = _gzipped(_tsv) if name.endswith("gz") else _tsv
    write(table, tmp_path / name)
    rows = list(read_source(tmp_path, "train"))
    assert [row.values for row in rows] == table
    assert [row.line for row in rows] == [2, 3, 4, 5, 6]


def test_long_fields_of_csv_files_are_read(tmp_path):
    table = [{"id": "a", "text": "word " * 100_000}]
    _csv(table, tmp_path / "train.csv")
    assert [row.values for row in read_source(tmp_path, "train")] == table


def test_shards_follow_each_other_and_count_for_themselves(tmp_path):
    for at in range(3):
        name = f"train-{at:05d}-of-00003.parquet"
        _parquet(ROWS[200 * at : 200 * (at + 1)], tmp_path / name)
    rows = list(read_source(tmp_path, "train"))
    assert [row.values for row in rows] == ROWS
    assert [row.line for row in rows] == 3 * list(range(1, 201))
    assert rows[250].place.endswith("train-00001-of-00003.parquet, record 51")


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ({"problem": "p", "data": 1}, [{"problem": "p", "data": 1}]),
        ({}, [{}]),
        ({"a": {"b": [1], "data": [2]}, "data": [{"c": 1}]}, [{"c": 1}]),
        ({"data": {"item": {"a": 1}}}, [{"data": {"item": {"a": 1}}}]),
        ({"a": {"data": [{"b": 1}]}}, [{"a": {"data": [{"b": 1}]}}]),
        ({"a": -1.5e3, "item": [{"b": 1}]}, [{"a": -1.5e3, "item": [{"b": 1}]}]),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_without_data_is_one_record(tmp_path, content, values, indent):
    (tmp_path / "train.json").write_text(json.dumps(content, indent=indent))
    assert [row.values for row in read_source(tmp_path, "train")] == values


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.json", b"[]"),
        ("train.json", b'{"data": [], "version": 1}'),
        ("train.csv", b"a,b\n"),
        ("train.tsv", b""),
    ],
)
def test_an_empty_split_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match='no record that can be read in split "train"'):
        list(read_source(tmp_path, "train"))


@pytest.mark.parametrize("name", ["train.parquet", "train.arrow"])
def test_tables_without_rows_are_an_empty_split(tmp_path, name):
    WRITERS[{"train.arrow": "train-stream.arrow"}.get(name, name)]([], tmp_path / name)
    with pytest.raises(ValueError, match='no record that can be read in split "train"'):
        list(read_source(tmp_path, "train"))


def _bad_text(path):
    """Three records, the second of which holds text that is not UTF-8."""
    text = pa.array([b"a", b"b\xff", "é".encode()], pa.binary()).view(pa.string())
    table = pa.table({"id": [1, 2, 3], "text": text})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table)


@pytest.mark.parametrize("name", ["train.parquet", "train.arrow"])
def test_a_record_that_is_not_utf8_can_be_skipped(tmp_path, name):
    _bad_text(tmp_path / name)
    errors = []
    rows = list(read_source(tmp_path, "train", damaged=errors.append))
    assert [(row.line, row.text("text")) for row in rows] == [(1, "a"), (3, "é")]
    assert [str(error) for error in errors] == [
        f"{tmp_path / name}, record 2: text that is not UTF-8 (invalid start byte)"
    ]
    with pytest.raises(RecordError, match="record 2"):
        list(read_source(tmp_path, "train"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1,2,3", "3 fields, but 2 columns have names"),
        (b"1", "1 fields, but 2 columns have names"),
        (b"1,\xff", "not UTF-8"),
        (b'1,"2"3', "malformed: .* expected after"),
        (b"1,2\r3", "malformed: new-line character"),
    ],
)
def test_a_damaged_line_of_a_table_can_be_skipped(tmp_path, content, message):
    (tmp_path / "train.csv").write_bytes(b"a,b\n\n0,0\n" + content + b"\n9,9\n")
    errors = []
    rows = list(read_source(tmp_path, "train", damaged=errors.append))
    assert [row.integer("a") for row in rows] == [0, 9]
    with pytest.raises(RecordError, match=rf"train\.csv, line 4: {message}") as error:
        list(read_source(tmp_path, "train"))
    assert [str(error) for error in errors] == [str(error.value)]


def test_a_quote_that_is_never_closed_does_not_swallow_the_rest(tmp_path):
    (tmp_path / "train.csv").write_bytes(b'a,b\n0,0\n1,"x\n2,y\n')
    with pytest.raises(RecordError, match="line 3: malformed: unexpected end"):
        list(read_source(tmp_path, "train"))


def test_the_header_of_a_table_must_make_sense(tmp_path):
    for content, message in ((b"a,b,a\n1,2,3\n", "twice"), (b'a,"b"c\n', "no names")):
        (tmp_path / "train.csv").write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            list(read_source(tmp_path, "train"))
        assert not isinstance(error.value, RecordError)


def test_an_item_that_is_no_object_can_be_skipped(tmp_path):
    (tmp_path / "train.json").write_bytes(b'[{"a": 1}, "x", null, {"a": 2}]')
    errors = []
    rows = list(read_source(tmp_path, "train", damaged=errors.append))
    assert [(row.line, row.values["a"]) for row in rows] == [(1, 1), (4, 2)]
    assert [str(error).split(", ")[1] for error in errors] == [
        "record 2: not a JSON object",
        "record 3: not a JSON object",
    ]
    with pytest.raises(RecordError, match="record 2"):
        list(read_source(tmp_path, "train"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}, {"a": 2}', r"premature EOF\); 2 records"),
        (b'[{"a": 1}, {"a": 2', r"premature EOF\); 1 records"),
        (b'[{"a": 1}, {"a": "x', r"premature EOF\); 1 records"),
        (b'[{"a": 1} {"a": 2}]', "I expect ',' or .* at '.*'.; 1 records"),
        (b'[{"a": 1}, {a: 2}]', r"invalid char .* at '\[{\"a.*; 1 records"),
        (b'[{"a": 1}] [', "trailing garbage .*; 1 records"),
        (b'{"a": 1}, {"b": 2}', "trailing garbage .*; 0 records"),
        (b'{"data": [{"a": 1}], "b"}', "separated by a colon .*; 1 records"),
        (b'{"data": [{"a": 1}], 3: 4}', "invalid object key .*; 1 records"),
        (b'[{"a": 1}, {"a": "x\xff"}]', r"invalid bytes in UTF8 .* at '.*; 1 records"),
        # What is quoted of it ends within a character.
        ('[{"a": 1} "' + "é" * 99 + '"]', "I expect ',' or .*é.*; 1 records"),
        (b'{"a": [1, {]}', "invalid object key .*; 0 records"),
        (b"text", r"invalid string in json text at 'text'\); 0 records"),
        (b"", r"premature EOF\); 0 records"),
    ],
)
def test_damaged_json_says_how_much_was_whole(tmp_path, content, message):
    if isinstance(content, str):
        content = content.encode()
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"train\.json: a damaged .*{message}"
    ) as error:
        list(read_source(tmp_path, "train"))
    assert not isinstance(error.value, RecordError)


@pytest.mark.parametrize(
    "name", ["train.parquet", "train-stream.arrow", "train-file.arrow"]
)
@pytest.mark.parametrize("kept", [0, 10, 0.5, -8])
def test_truncated_tables_are_errors(tmp_path, name, kept):
    path = tmp_path / name
    WRITERS[name](ROWS, path)
    whole = path.read_bytes()
    size = int(len(whole) * kept) if isinstance(kept, float) else kept
    path.write_bytes(whole[:size])
    rows = []
    with pytest.raises(ValueError, match="a damaged file") as error:
        rows.extend(read_source(tmp_path, "train"))
    assert f"{len(rows)} records were read whole" in str(error.value)
    assert str(path) in str(error.value)
    assert not isinstance(error.value, RecordError)
    if name == "train-stream.arrow" and kept == 0.5:
        assert 0 < len(rows) < 600


@pytest.mark.parametrize(
    "name", ["train.csv.gz", "train-array.json.gz", "train.jsonl.gz"]
)
def test_truncated_gzip_files_are_errors(tmp_path, name):
    path = tmp_path / name
    _gzipped({**WRITERS, "train.csv.gz": _csv}.get(name))(
        TABLE, path
    ) if "csv" in name else WRITERS[name](ROWS, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"a truncated gzip file .* [0-9]+ rows were read"
    ):
        list(read_source(tmp_path, "train"))
    path.write_bytes(b"plain")
    with pytest.raises(ValueError, match=f"{name}: not a gzip file"):
        list(read_source(tmp_path, "train"))


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl", "train.csv"])
def test_pointers_of_git_lfs_are_recognised(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(ValueError, match="git lfs pull"):
        next(read_source(tmp_path, "train"))


def test_a_json_array_is_read_in_constant_memory(tmp_path):
    with (tmp_path / "train.json").open("w") as file:
        file.write('{"data": [')
        for at in range(400):
            file.write(("," if at else "") + json.dumps({"text": "x" * 100_000}))
        file.write("]}")
    tracemalloc.start()
    assert sum(len(row.values["text"]) for row in read_source(tmp_path, "train")) == 4e7
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_parquet_is_read_in_constant_memory(tmp_path):
    table = pa.table({"text": [f"{at:05d} " * 170 for at in range(40_000)]})
    # In one row group, as many are written.
    pq.write_table(table, tmp_path / "train.parquet", compression="none")
    size = (tmp_path / "train.parquet").stat().st_size
    del table
    code = (
        "import sys, pyarrow as pa; from radit_jax.data.sources import read_source\n"
        "print(sum(1 for _ in read_source(sys.argv[1], 'train')))\n"
        "print(pa.default_memory_pool().max_memory())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    rows, peak = map(int, done.stdout.split())
    assert rows == 40_000
    assert size > 40e6
    assert peak < 12e6


def test_reading_is_lazy(tmp_path):
    (tmp_path / "train.json").write_text('[{"a": 1}, {"a": 2}, oops')
    assert next(read_source(tmp_path, "train")).values == {"a": 1}
    with pytest.raises(ValueError, match="damaged"):
        list(read_source(tmp_path, "train"))


def test_columns_are_checked_with_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "a"}')
    (row,) = read_source(tmp_path, "train")
    check_columns(row, ("question", "answer"), "nq")
    with pytest.raises(
        ValueError, match='lacks the column "answers" of dataset nq'
    ) as error:
        check_columns(row, ("question", "answers"), "nq")
    assert 'columns there: "question", "answer"); did you mean it by "answer"?' in str(
        error.value
    )
    assert not isinstance(error.value, RecordError)


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A dataset of TensorFlow Datasets with a configuration, in ArrayRecord."""
    import tensorflow_datasets as tfds

    class Toy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="easy"),)

        def _info(self):
            text = tfds.features.Text()
            answer = {"text": text, "start": np.int32}
            features = {
                "question": text,
                "words": tfds.features.Sequence(text),
                "answers": tfds.features.Sequence(answer),
                "nested": {"title": text},
                "label": tfds.features.ClassLabel(names=["no", "yes"]),
                "flag": np.bool_,
                "score": np.float32,
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._examples(5), "validation": self._examples(1)}

        def _examples(self, count):
            for at in range(count):
                yield at, _tfds_record(at)

        _generate_examples = _examples

    folder = tmp_path_factory.mktemp("tfds")
    builder = Toy(data_dir=folder, config="easy", file_format="array_record")
    builder.download_and_prepare()
    return folder / "toy"


def _tfds_record(at):
    return {
        "question": f"Où est {at} ?",
        "words": ["é", "b"][: at % 3],
        "answers": [{"text": "x", "start": at}, {"text": "é", "start": 1}][: at % 3],
        "nested": {"title": f"T{at}"},
        "label": at % 2,
        "flag": bool(at % 2),
        "score": at / 2,
    }


def test_tensorflow_datasets_are_read_as_plain_python(tfds_folder):
    folder = tfds_folder / "easy" / "1.2.0"
    rows = list(read_source(tfds_folder, "train", "easy"))
    assert [row.place for row in rows] == [
        f"{folder}, record {at}" for at in range(1, 6)
    ]
    # It shuffles them.
    rows.sort(key=lambda row: row.values["score"])
    for at, row in enumerate(rows):
        wanted = _tfds_record(at)
        answers = [answer.values for answer in row.rows("answers")]
        assert {**row.values, "answers": answers} == wanted
        assert row.texts("words") == tuple(wanted["words"])
        assert row.integer("label") == at % 2
        assert type(row.values["flag"]) is bool
        assert all(type(answer["start"]) is int for answer in answers)
    (row,) = read_source(folder, "dev")
    assert row.text("question") == "Où est 0 ?"


@pytest.fixture
def builder(tfds_folder, tmp_path):
    """A copy of one configuration, of the test's own."""
    return Path(shutil.copytree(tfds_folder / "easy", tmp_path / "toy")) / "1.2.0"


def test_converted_files_of_tensorflow_datasets_are_read(builder):
    info = json.loads((builder / "dataset_info.json").read_text())
    # What tfds convert_format leaves behind.
    info["alternativeFileFormats"] = ["array_record"]
    for original in ("tfrecord", "parquet"):
        info["fileFormat"] = original
        (builder / "dataset_info.json").write_text(json.dumps(info))
        assert len(list(read_source(builder, "train"))) == 5


def test_damaged_shards_of_tensorflow_datasets(builder):
    shard = builder / "toy-train.array_record-00000-of-00001"
    whole = shard.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-100], b""):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=f"{builder}: a damaged .*; 0 records"):
            list(read_source(builder, "train"))


def test_reading_them_loads_no_tensorflow(tfds_folder):
    code = (
        "import sys; from radit_jax.data.sources import read_source\n"
        "print(len(list(read_source(sys.argv[1], 'train'))))\n"
        "print(*sys.modules)"
    )
    path = tfds_folder / "easy"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True
    )
    count, modules = done.stdout.splitlines()
    assert count == "5"
    banned = {"tensorflow", "pandas", "torch", "jax"}
    assert not banned & set(modules.split())
