"""Datasets by name: where they are found, and what is said when something is wrong."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from configs import base
from radit_jax.batch import Example
from radit_jax.data import prompts
from radit_jax.data.registry import DATASETS, Entry, entries, searched, table
from radit_jax.data.spec import CONTEXT_ROLES
from radit_jax.stages.retrieve import chosen_datasets, limited, read_splits

ROOT = Path(__file__).parents[1]
ROWS = [
    {"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"}
    for i in range(30)
]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def root(tmp_path):
    """A folder of published datasets, as a hub lays them out."""
    for split, rows in (("train", ROWS), ("test", ROWS[:4])):
        name = f"main/{split}-00000-of-00001.parquet"
        write(tmp_path / "root" / "openai" / "gsm8k" / name, rows)
    return tmp_path / "root"


def test_the_paper_s_recipes_name_the_paper_s_datasets():
    used = {
        letter: [n for n, s in DATASETS.items() if letter in s.used] for letter in "LR"
    }
    assert set(base.TRAIN_DATASETS) == {*used["L"], *used["R"]}
    assert len(base.TRAIN_DATASETS) == 22
    assert len(used["L"]) == 20
    assert len(used["R"]) == 10
    for name in base.TEST_DATASETS:
        assert "E" in DATASETS[name].used


@pytest.mark.parametrize("spec", DATASETS.values(), ids=list(DATASETS))
def test_every_dataset_is_described(spec):
    assert spec.template in prompts.TEMPLATES
    assert spec.context in CONTEXT_ROLES
    assert spec.splits.keys() <= {"train", "dev", "test"}
    assert spec.splits
    assert spec.columns
    assert spec.licence
    assert spec.size > 0
    assert searched(spec.name) == spec.search
    # Instead of what is retrieved.
    assert spec.search or spec.context == "only" or "E" in spec.used


def test_the_documented_table_is_that_of_the_code():
    page = (ROOT / "docs" / "data.md").read_text()
    assert page.endswith(f"<!-- table -->\n{table()}"), (
        "make it anew: python -c 'from radit_jax.data.registry import table; "
        'print(table(), end="")\''
    )


def test_a_dataset_is_found_by_its_hub_id_its_name_or_its_own_path(root, tmp_path):
    (by_hub,) = entries("data.train", "gsm8k", str(root))
    assert by_hub == Entry("gsm8k", root / "openai/gsm8k", DATASETS["gsm8k"])
    (root / "openai/gsm8k").rename(root / "gsm8k")
    (by_name,) = entries("data.train", "gsm8k", str(root))
    assert by_name.path == root / "gsm8k"
    (by_path,) = entries("data.train", f"gsm8k = {root / 'gsm8k'}", "")
    assert by_path == by_name
    file = write(tmp_path / "mine.jsonl", [{"question": "a", "answers": ["b"]}])
    found = entries("data.train", f"{file}, gsm8k", str(root))
    assert [(entry.name, entry.spec is None) for entry in found] == [
        ("mine", True),
        ("gsm8k", False),
    ]


def test_splits_are_read_in_order_as_examples(root):
    (entry,) = entries("data.train", "gsm8k", str(root))
    examples = entry.read("train")
    assert [e.answers for e in examples] == [(str(2 * i),) for i in range(30)]
    assert examples[3].rationale == "It is 6."
    assert examples[3].template == "cot"
    assert examples[3].dataset == "gsm8k"
    assert len(entry.read("test")) == 4
    assert entry.has("test")
    assert not entry.has("dev")
    with pytest.raises(
        ValueError, match="dataset gsm8k has no published dev split, on"
    ):
        entry.read("dev")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("gsm8", "data.train: no dataset is called 'gsm8'; did you mean gsm8k?"),
        ("gsm=x", "data.train: no dataset is called 'gsm'"),
        ("squad_v2", "squad_v2: no such file or folder"),
        ("gsm8k=there", "--config.data.train=gsm8k=there: there: no such file"),
        ("a/b.jsonl", "a/b.jsonl: no such file or folder"),
        ("gsm8k,gsm8k", "are both called gsm8k"),
    ],
)
def test_a_dataset_that_is_not_there_is_named(root, setting, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        entries("data.train", setting, str(root))


def test_a_name_without_a_root_says_where_the_dataset_belongs():
    with pytest.raises(ValueError, match=r"data.root=FOLDER with FOLDER/openai/gsm8k"):
        entries("data.train", "gsm8k", "")


def test_a_damaged_record_is_named_or_left_out_as_the_config_says(root, caplog):
    rows = [*ROWS, {"question": "Why?", "answer": "no number"}]
    name = "main/train-00000-of-00001.parquet"
    file = write(root / "openai/gsm8k" / name, rows)
    (entry,) = entries("data.train", "gsm8k", str(root))
    message = rf'dataset gsm8k: {file}, record 31: field "answer".*set data.max_damaged'
    with pytest.raises(ValueError, match=message):
        entry.read("train")
    assert len(entry.read("train", 0.05)) == 30
    assert "left out 1 damaged of 31 records" in caplog.text
    with pytest.raises(ValueError, match=r"1 of 31 records are damaged, more than the"):
        entry.read("train", 0.03)


def test_a_run_with_too_much_damage_stops_early(root):
    rows = [{"question": "Why?", "answer": "no number"}] * 5000
    write(root / "openai/gsm8k/main/train-00000-of-00001.parquet", rows)
    (entry,) = entries("data.train", "gsm8k", str(root))
    with pytest.raises(ValueError, match=r"101 of 101 records are damaged.*record 101"):
        entry.read("train", 0.1)


def test_damaged_lines_count_as_records(tmp_path):
    lines = [json.dumps({"question": f"{i}?", "answers": ["a"]}) for i in range(9)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join([*lines, "{broken"]))
    entry = Entry("mine", file, None)
    assert len(entry.read("train", 0.1)) == 9
    with pytest.raises(ValueError, match=r"1 of 10 records are damaged"):
        entry.read("train", 0.09)
    with pytest.raises(ValueError, match=rf"{file}, line 10: not JSON"):
        entry.read("train")


def test_a_missing_column_and_an_empty_dataset_are_told(root):
    name = "openai/gsm8k/main/train-00000-of-00001.parquet"
    write(root / name, [{"question": "a", "anwser": "b"}])
    (entry,) = entries("data.train", "gsm8k", str(root))
    with pytest.raises(ValueError, match=r'dataset gsm8k: .*"answer".*"anwser"'):
        entry.read("train", 0.5)
    label = [{"question_id": "q", "question": "a", "answer": "b", "label": 0}]
    file = write(root / "wiki.jsonl", label)
    entry = Entry("wiki_qa", file, DATASETS["wiki_qa"])
    with pytest.raises(
        ValueError, match=r"dataset wiki_qa: no example comes out of the"
    ):
        entry.read("train")


def test_an_id_that_occurs_twice_is_damage(root):
    row = {
        "id": "x",
        "question": "a",
        "answer": "b",
        "nbestanswers": [],
        "main_category": "",
    }
    file = write(root / "yahoo.jsonl", [row, {**row, "id": "y"}, row])
    entry = Entry("yahoo_answers_qa", file, DATASETS["yahoo_answers_qa"])
    with pytest.raises(
        ValueError, match=r'line 3: id "x" has occurred before, in .*line 1'
    ):
        entry.read("train")
    assert len(entry.read("train", 0.4)) == 2


def test_a_dataset_without_a_dev_split_lends_a_share_of_its_training_split(
    root, tiny_config, tmp_path
):
    row = {"question_id": "q", "question": "a?", "answer": "b", "label": 1}
    for split in ("train", "validation"):
        rows = [{**row, "question_id": f"{split}{i}"} for i in range(8)]
        write(root / "microsoft/wiki_qa/data" / f"{split}-00000-of-00001.parquet", rows)
    config = tiny_config(tmp_path, **{"data.root": str(root)})
    config.data.train, config.data.dev, config.data.test = "gsm8k,wiki_qa", "", "gsm8k"
    config.data.limit.train = 20
    config.data.shots = "gsm8k"
    config.data.limit.shots = 5
    splits = read_splits(config)
    sizes = {s: {n: len(e) for n, e in parts.items()} for s, parts in splits.items()}
    assert sizes == {
        "train": {"gsm8k": 20, "wiki_qa": 8},
        "dev": {"gsm8k": 3, "wiki_qa": 8},
        "test": {"gsm8k": 4},
        "shots": {"gsm8k": 5},
    }
    dev = {example.id for example in splits["dev"]["gsm8k"]}
    assert not dev & {example.id for example in splits["train"]["gsm8k"]}


def test_a_limit_is_a_random_choice_in_order():
    every = [Example(f"{i:04d}", "a", ("b",)) for i in range(1000)]
    assert limited(every, 0, 0) == limited(every, 1000, 0) == every
    few = limited(every, 20, 0)
    assert few == sorted(few) == limited(every, 20, 0)
    assert few != limited(every, 20, 1)
    assert len(set(few)) == 20


def test_a_stage_reads_the_datasets_it_names():
    splits = {"train": ["a", "b"], "dev": ["a", "b", "mine"]}
    assert chosen_datasets("f", "", splits, "L") == ["a", "b", "mine"]
    assert chosen_datasets("f", "b", splits, "R") == ["b", "mine"]
    with pytest.raises(ValueError, match=r"f = 'bb': there is no dataset .*mean b\?"):
        chosen_datasets("f", "bb", splits, "L")


def test_a_stage_reads_what_the_paper_uses_there_unless_told_otherwise():
    splits = {"train": ["gsm8k", "ms_marco", "oasst1", "nq", "mine"], "dev": ["gsm8k"]}
    assert chosen_datasets("f", "", splits, "L") == ["gsm8k", "oasst1", "nq", "mine"]
    assert chosen_datasets("f", "", splits, "R") == ["ms_marco", "oasst1", "nq", "mine"]
    assert chosen_datasets("f", "gsm8k", splits, "R") == ["gsm8k"]
    with pytest.raises(ValueError, match="f: gsm8k: RA-DIT uses these in the other"):
        chosen_datasets("f", "", {"train": ["gsm8k"]}, "R")
