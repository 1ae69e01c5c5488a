import json
import re

import pytest

from radit_jax.data.layouts import builder_split, find_files


def _touch(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "state.json":
            path.write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
        else:
            path.touch()


def _found(path, split, config=""):
    return [str(file.relative_to(path)) for file in find_files(path, split, config)]


CONVERTED = [
    *("main/train/0000.parquet", "main/train/0001.parquet", "main/train/index.duckdb"),
    *("main/test/0000.parquet", "main/partial-validation/0000.parquet"),
    "other/train/0000.parquet",
]
SAVED = [
    *("train/data.arrow", "train/state.json", "train/dataset_info.json"),
    *("validation/data.arrow", "validation/state.json", "dataset_dict.json"),
]
KILT = [
    f"{task}-{split}-kilt.jsonl" for task in ("nq", "wow") for split in ("dev", "test")
]
MMLU = [
    f"all/{split}-00000-of-00001.parquet"
    for split in ("auxiliary_train", "dev", "test", "validation")
]
SHARDED = [f"eli5/kilt_tasks-train-0000{at}-of-00002.parquet" for at in (0, 1)]
EARLY = [
    f"data/{name}.parquet"
    for name in (
        "train-00000-of-00002-b42a775f407cee45",
        "train-00001-of-00002-134b8fd0c89408b6",
        "validation-00000-of-00001-134b8fd0c89408b6",
    )
]


@pytest.mark.parametrize(
    ("tree", "split", "config", "wanted"),
    [
        # What datasets has saved.
        (SAVED, "train", "", ["train/data.arrow"]),
        (SAVED, "dev", "", ["validation/data.arrow"]),
        (["data.arrow", "state.json"], "test", "", ["data.arrow"]),
        ([f"main/{name}" for name in SAVED], "train", "", ["main/train/data.arrow"]),
        (["a/x.arrow", *SAVED], "train", "", ["train/data.arrow"]),
        # The hub.
        (EARLY, "train", "", EARLY[:2]),
        (EARLY, "dev", "any", EARLY[2:]),
        (MMLU, "dev", "all", [MMLU[1]]),
        (MMLU, "validation", "", [MMLU[3]]),
        (
            ["a/train-00000-of-00001.parquet", *MMLU],
            "train",
            "",
            ["a/train-00000-of-00001.parquet"],
        ),
        (
            ["main/train.parquet", "default/train.parquet"],
            "train",
            "",
            ["default/train.parquet"],
        ),
        (CONVERTED, "train", "main", CONVERTED[:2]),
        (
            [*SHARDED, "eli5/kilt_tasks-test.parquet", "eli5/train/index.duckdb"],
            "train",
            "eli5",
            SHARDED,
        ),
        (
            ["train.parquet", "train.jsonl", "test.parquet"],
            "train",
            "",
            ["train.parquet"],
        ),
        (
            ["data/main/train.csv", "data/b/train.csv"],
            "train",
            "main",
            ["data/main/train.csv"],
        ),
        # Files as they were first released.
        (KILT, "validation", "nq", ["nq-dev-kilt.jsonl"]),
        (["strategyQA_train.json"], "train", "", ["strategyQA_train.json"]),
        (
            ["train_rand_split.jsonl", "dev_rand_split.jsonl"],
            "validation",
            "",
            ["dev_rand_split.jsonl"],
        ),
        (["x_train.json", "._train.json"], "train", "", ["x_train.json"]),
        (["val_x.json", "dev.json"], "val", "", ["val_x.json"]),
        (["x_train.json", "x_train_filtered.json"], "train", "", ["x_train.json"]),
        (["train.jsonl", "train_extra.jsonl"], "train", "", ["train.jsonl"]),
        (
            ["train/b.tsv", "train/a.tsv", "train/notes.txt"],
            "train",
            "",
            ["train/a.tsv", "train/b.tsv"],
        ),
        (
            [f"train_{at}.json.gz" for at in range(11)],
            "train",
            "",
            [f"train_{at}.json.gz" for at in range(11)],
        ),
        (["Training.CSV.gz", "test.csv"], "train", "", ["Training.CSV.gz"]),
        (["valid.jsonl", "val.jsonl"], "dev", "", ["valid.jsonl"]),
        (
            ["train.jsonl", ".train.parquet", "train.parquet.lock"],
            "train",
            "",
            ["train.jsonl"],
        ),
    ],
)
def test_splits_are_found_in_every_layout(tmp_path, tree, split, config, wanted):
    _touch(tmp_path, tree)
    assert _found(tmp_path, split, config) == wanted


def test_the_folder_of_a_configuration_can_be_given_itself(tmp_path):
    _touch(tmp_path, CONVERTED)
    for config in ("", "main"):
        assert _found(tmp_path / "main", "test", config) == ["test/0000.parquet"]
    _touch(tmp_path, SHARDED)
    assert len(_found(tmp_path / "eli5", "train", "eli5")) == 2


@pytest.mark.parametrize("name", ["questions.jsonl", "x.parquet", "dev.TSV"])
def test_a_file_is_whatever_split_is_asked_for(tmp_path, name):
    _touch(tmp_path, [name, "other.jsonl"])
    assert find_files(tmp_path / name, "train", "main") == [tmp_path / name]


@pytest.mark.parametrize(
    ("tree", "split", "config", "message"),
    [
        (EARLY, "test", "", 'no split "test", there are train, validation'),
        (EARLY, "trains", "", "did you mean train?"),
        (SAVED, "test", "", 'no split "test", there are train/, validation/'),
        (MMLU, "train", "all", "there are auxiliary_train, dev, test, validation"),
        (
            CONVERTED,
            "validation",
            "main",
            "there are partial-validation/, test/, train/",
        ),
        (
            CONVERTED,
            "train",
            "mian",
            'no configuration "mian", there are main, other; did you mean main?',
        ),
        (
            ["main/train.csv"],
            "train",
            "mian",
            'no configuration "mian", there are main',
        ),
        (CONVERTED, "train", "", "several configurations, there are main, other"),
        (
            KILT,
            "dev",
            "",
            'split "dev" may be any of nq-dev-kilt.jsonl, wow-dev-kilt.jsonl',
        ),
        (
            ["data/train.jsonl", "train.jsonl"],
            "train",
            "",
            "may be any of data/train.jsonl, train.jsonl",
        ),
        (["train/a.jsonl", "train.jsonl"], "train", "", "may be any of train/a.jsonl"),
        (CONVERTED, "validation", "", "there are main/partial-validation/, main/test/"),
        (KILT, "dev", "fever", 'no split "dev", there are nq-dev-kilt'),
        (
            ["train_a.jsonl", "train_b.jsonl"],
            "train",
            "",
            "may be any of train_a.jsonl, train_b.jsonl",
        ),
        (
            ["train.pkl", "train.bin", "model.pt"],
            "train",
            "",
            "no file of a kind that is read: .par",
        ),
        ([], "train", "", "no file of a kind that is read"),
        (
            EARLY[1:],
            "train",
            "",
            "1 of 2 shards are missing, the first one is -00000-of-00002",
        ),
        (
            ["train-00000-of-00003.json"],
            "train",
            "",
            "2 of 3 shards are missing, the first one is -00001-of-00003",
        ),
        (
            ["m/train/0000.parquet", "m/train/0002.parquet"],
            "train",
            "m",
            "the first one is 0001; there are 0000.parquet",
        ),
        (
            [
                "train-00000-of-00001-b42a775f407cee45.parquet",
                "train-00000-of-00001.parquet",
            ],
            "train",
            "",
            "the same shard as",
        ),
        (
            ["train-00000-of-00001.parquet", "train-00001-of-00002.parquet"],
            "train",
            "",
            "shards of two datasets",
        ),
        (["train/state.json"], "train", "", "data.arrow: this shard is missing"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, tree, split, config, message):
    _touch(tmp_path, tree)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        find_files(tmp_path, split, config)
    assert str(error.value).startswith(str(tmp_path))


def test_a_path_that_is_not_there_names_the_nearest(tmp_path):
    (tmp_path / "squad_v2").mkdir()
    with pytest.raises(FileNotFoundError, match="did you mean squad_v2"):
        find_files(tmp_path / "squad-v2", "train")


def test_a_link_to_a_download_that_is_gone_is_named(tmp_path):
    link = tmp_path / "train-00000-of-00001.parquet"
    link.symlink_to(tmp_path / "blobs" / "ab12")
    with pytest.raises(ValueError, match=f"{link}: a link to what is not there"):
        find_files(tmp_path, "train")


def test_a_split_does_not_need_the_others(tmp_path):
    _touch(tmp_path, SAVED)
    (tmp_path / "validation" / "data.arrow").unlink()
    assert _found(tmp_path, "train") == ["train/data.arrow"]
    with pytest.raises(ValueError, match=r"validation/data\.arrow: this shard is miss"):
        find_files(tmp_path, "validation")


def test_an_index_of_rows_of_old_versions_is_refused(tmp_path):
    _touch(tmp_path, ["dataset.arrow"])
    state = {"_data_files": [{"filename": "dataset.arrow"}]}
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="save it again"):
        find_files(tmp_path, "train")
    for content, message in (("{", "unreadable"), ("[]", "object"), ("{}", "no files")):
        (tmp_path / "state.json").write_text(content)
        with pytest.raises(ValueError, match=rf"state\.json.* {message}"):
            find_files(tmp_path, "train")


def _tfds(folder, shards=1, **info):
    """Folder of one version that TensorFlow Datasets has written, with empty shards."""
    folder.mkdir(parents=True)
    (folder / "features.json").write_text("{}")
    splits = {"train": shards, "validation": 1}
    info = {"fileFormat": "array_record", **info}
    info["splits"] = [
        {"name": name, "shardLengths": ["3"] * count} for name, count in splits.items()
    ]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for name, count in splits.items():
        for at in range(count):
            (folder / f"toy-{name}.array_record-{at:05d}-of-{count:05d}").touch()
    return folder


def test_folders_of_tensorflow_datasets_may_be_given_at_any_level(tmp_path):
    toy = tmp_path / "toy"
    easy, hard = (_tfds(toy / config / "1.2.0") for config in ("easy", "hard"))
    assert find_files(toy, "train", "easy") == [easy]
    for path, config in ((hard.parent, ""), (hard, ""), (hard.parent, "main")):
        assert find_files(path, "train", config) == [hard]
    assert builder_split(hard, "dev") == "validation"
    for split, config, message in (
        ("train", "", "several configurations, there are easy, hard"),
        ("train", "hart", 'no configuration "hart".* did you mean hard'),
        ("test", "hard", 'no split "test", there are train, validation'),
    ):
        with pytest.raises(ValueError, match=message):
            find_files(toy, split, config)


def test_the_only_configuration_of_tensorflow_datasets_needs_no_name(tmp_path):
    folder = _tfds(tmp_path / "toy" / "easy" / "1.2.0")
    assert find_files(tmp_path / "toy", "train") == [folder]


def test_the_newest_version_is_read(tmp_path):
    _tfds(tmp_path / "1.2.0")
    newer = _tfds(tmp_path / "1.10.0")
    assert find_files(tmp_path, "train") == [newer]


def test_tfrecord_files_must_be_converted(tmp_path):
    folder = _tfds(tmp_path / "tfrecord", fileFormat="tfrecord")
    with pytest.raises(
        ValueError, match=r"tfrecord files.*tfds convert_format"
    ) as error:
        find_files(folder, "train")
    assert f"--dataset_version_dir={folder} --out_file_format=array_record" in str(
        error.value
    )
    # What the command leaves behind.
    converted = {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    folder = _tfds(tmp_path / "both", **converted)
    assert find_files(folder, "train") == [folder]


def test_missing_shards_of_tensorflow_datasets_are_named(tmp_path):
    folder = _tfds(tmp_path / "1.2.0", shards=2)
    shards = [folder / f"toy-train.array_record-0000{at}-of-00002" for at in (0, 1)]
    shards[1].unlink()
    with pytest.raises(ValueError, match="the first one is -00001-of-00002"):
        find_files(folder, "train")
    shards[0].rename(folder / "toy-train.array_record-00000-of-00001")
    with pytest.raises(ValueError, match="shards of two datasets"):
        find_files(folder, "train")
    (folder / "toy-train.array_record-00000-of-00001").unlink()
    with pytest.raises(ValueError, match='none of the files of split "train"'):
        find_files(folder, "train")
