"""What a user sees of ``python -m radit_jax.main``: runs, skips, and one-line errors.

A process that has imported the front door answers many commands, each in a fork of its
own, for the import takes longer than most of them.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from radit_jax.data.tiny import write_tiny

ROOT = Path(__file__).parents[1]
STAGES = (
    *("prepare", "corpus", "index", "retrieve"),
    *("lm_score", "r_ft", "retrieve_r_ft"),
    *("lm_ft", "evaluate"),
)

SERVER = """
import json, os, sys, traceback
from radit_jax import main

def answer(argv, file):
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["main.py", *argv]
    code = 1
    try:
        main.front_door()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    argv, file = json.loads(line)
    child = os.fork()
    if child == 0:
        answer(argv, file)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    """Runs the front door: arguments -> (exit code, what it printed)."""
    file = tmp_path_factory.mktemp("door") / "output"
    cache = tmp_path_factory.getbasetemp() / "xla-door"
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout.readline() == "ready\n"

    def run(recipe, **fields):
        fields = {"compilation_cache": cache} | fields
        argv = [f"--config={recipe}"]
        argv += [f"--config.{name}={value}" for name, value in fields.items()]
        server.stdin.write(json.dumps([argv, str(file)]) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return code, file.read_text()

    yield run
    server.stdin.close()
    assert server.wait(60) == 0


def refused(answer):
    """The one line of an error; the exit code is 1 and there is no traceback."""
    code, output = answer
    assert code == 1, output
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    return errors[0]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A work folder in which ``radit:tiny`` has run, in a process of its own."""
    workdir = tmp_path_factory.mktemp("chain") / "work"
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "radit_jax.main",
            "--config=configs/radit.py:tiny",
            f"--config.workdir={workdir}",
            f"--config.compilation_cache={tmp_path_factory.getbasetemp() / 'xla-door'}",
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return workdir, found


def test_the_chain_runs_and_shows_its_table(chain):
    workdir, found = chain
    assert "LM-FT + retrieval" in found.stdout
    assert f"Everything is in {workdir}" in found.stdout
    for line in found.stdout.split("Everything is in")[1].splitlines()[1:]:
        assert Path(line.split("  ")[-1].strip()).is_file()
    made = {path.name for path in workdir.iterdir()}
    assert made == {
        *("inputs", "passages", "index", "retrieved"),
        *("scored", "r_ft", "retrieved_r_ft", "lm_ft", "report"),
    }
    assert "Traceback" not in found.stderr
    assert "Warning" not in found.stderr


def test_every_run_writes_its_config(chain):
    workdir, _ = chain
    for folder in workdir.iterdir():
        config = json.loads((folder / "config.json").read_text())
        assert config["workdir"] == str(workdir)
        assert config["lm"] == f"{workdir}/inputs/lm"
        assert config["lm_ft"]["steps"] == 6


def test_a_second_run_makes_nothing(chain, door):
    workdir, _ = chain
    before = {file: file.stat().st_mtime_ns for file in workdir.rglob("*")}
    code, output = door("configs/radit.py:tiny", workdir=workdir)
    assert code == 0, output
    assert len(re.findall(r"is complete, skipped", output)) == len(STAGES)
    assert "LM-FT + retrieval" in output
    assert before == {file: file.stat().st_mtime_ns for file in workdir.rglob("*")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_alone_finds_what_the_chain_made(chain, door, stage):
    workdir, _ = chain
    code, output = door(f"configs/{stage}.py:tiny", workdir=workdir)
    assert code == 0, output
    assert f"{stage}: {workdir}/" in output
    assert "is complete, skipped" in output


def test_other_settings_make_it_anew_and_keep_the_old(chain, door, tmp_path):
    workdir = shutil.copytree(chain[0], tmp_path / "work", symlinks=True)
    code, output = door(
        "configs/corpus.py:tiny", workdir=workdir, **{"corpus.max_words": 6}
    )
    assert code == 0, output
    assert len(list(workdir.glob("passages.replaced-*"))) == 1


# Mistyped commands.


def test_a_mistyped_field_is_met_with_the_nearest(door, tmp_path):
    error = refused(
        door("configs/radit.py:tiny", workdir=tmp_path, **{"lm_ft.stepps": 3})
    )
    assert error.startswith("error: 'stepps'")
    assert 'Did you mean "steps" instead of "stepps"?' in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["many", "1.5"])
def test_a_value_of_the_wrong_kind_is_refused(door, tmp_path, value):
    error = refused(
        door("configs/radit.py:tiny", workdir=tmp_path, **{"lm_ft.steps": value})
    )
    assert "lm_ft.steps" in error
    assert value in error


def test_an_unknown_variant_is_met_with_the_nearest(door):
    error = refused(door("configs/radit.py:dmeo"))
    assert "unknown variant :dmeo" in error
    assert "Did you mean :demo?" in error


@pytest.mark.parametrize(
    ("recipe", "nearest"),
    [
        ("configs/radt.py:tiny", "configs/radit.py"),
        ("configs/lmft.py", "configs/lm_ft.py"),
        ("config/index.py", "configs/index.py"),
    ],
)
def test_an_unknown_recipe_is_met_with_the_nearest(door, recipe, nearest):
    error = refused(door(recipe))
    assert f"no recipe {recipe.split(':')[0]}; did you mean {nearest}? " in error
    assert "configs/evaluate.py" in error
    assert "base.py" not in error


def test_the_papers_recipe_says_what_it_needs_and_what_would_run(door, tmp_path, mine):
    code, output = door("configs/radit.py", workdir=tmp_path)
    assert code == 1
    assert refused((code, output)).startswith("error: stage radit: not set: ")
    fields = ("corpus.documents", "encoder", "lm")
    for field in fields:
        assert f"--config.{field}=..." in output
    assert "configs/radit.py:demo" in output
    assert "configs/radit.py:tiny" in output
    assert list(tmp_path.iterdir()) == []
    # The data is the paper's; where it lies is the user's to say.
    given = {field: own(mine)[field] for field in fields}
    error = refused(door("configs/radit.py", workdir=tmp_path, **given))
    assert "dataset oasst1 is looked for below data.root, which is not set" in error
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_stage_of_the_chain_is_refused(door, tmp_path):
    error = refused(
        door("configs/radit.py:tiny", workdir=tmp_path, stages="('prepare', 'indx')")
    )
    assert "['indx'] not among prepare, corpus" in error
    assert list(tmp_path.iterdir()) == []


# A user's own files.


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Files such as a user would bring."""
    folder = tmp_path_factory.mktemp("mine")
    write_tiny(folder, seed=5)
    return folder


def own(folder):
    return {
        "r_ft.score_temperature": 0.05,
        "evaluate.score_temperature": 0.05,
        "corpus.documents": folder / "documents.jsonl",
        "data.train": folder / "train.jsonl",
        "data.test": folder / "test.jsonl",
        "lm": folder / "lm",
        "encoder": folder / "encoder",
    }


def test_the_chain_runs_on_a_users_own_files(door, mine, tmp_path):
    code, output = door(
        "configs/radit.py:own",
        workdir=tmp_path / "new" / "work",
        **own(mine),
        **{
            "lm_ft.steps": 2,
            "lm_ft.warmup_steps": 1,
            "lm_ft.row_tokens": 128,
            "lm_ft.row_targets": 64,
            "lm_ft.micro_batches": 1,
            "lm_score.row_tokens": 128,
            "lm_score.row_targets": 32,
            "lm_score.limit.train": 40,
            "r_ft.steps": 2,
            "r_ft.warmup_steps": 1,
            "evaluate.max_new_tokens": 4,
            "evaluate.limit": 4,
            "index.max_tokens": 64,
            "retrieve.max_tokens": 32,
        },
    )
    assert code == 0, output
    assert "questions set aside as dev" in output
    report = json.loads((tmp_path / "new/work/report/results.json").read_text())
    assert {row["dataset"] for row in report} == {"test"}
    assert {row["n"] for row in report} == {4}


def test_the_chain_looks_for_every_file_before_it_starts(door, mine, tmp_path):
    workdir = tmp_path / "work"
    fields = own(mine) | {"lm": mine / "lmm"}
    error = refused(door("configs/radit.py:own", workdir=workdir, **fields))
    assert (
        f"--config.lm={mine / 'lmm'}: {mine / 'lmm'}: no such file or folder" in error
    )
    assert f"did you mean {mine / 'lm'}?" in error
    two = f"{mine / 'train.jsonl'}, {mine / 'trian2.jsonl'}"
    fields = own(mine) | {"data.train": two}
    error = refused(door("configs/radit.py:own", workdir=workdir, **fields))
    assert f"{mine / 'trian2.jsonl'}: no such file" in error
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mesh.fsdp": 2}, r"--config\.mesh: .*\(1, 2, 1\) needs 2 devices"),
        ({"evaluate.mesh.tensor": 2}, r"--config\.evaluate\.mesh: .*\(1, 1, 2\) needs"),
        ({"attention": "splash"}, r"splash cannot run"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_chain_tries_every_mesh_before_it_starts(
    door, mine, tmp_path, fields, words
):
    workdir = tmp_path / "work"
    error = refused(
        door("configs/radit.py:own", workdir=workdir, **own(mine), **fields)
    )
    assert re.search(words, error), error
    assert not workdir.exists()


@pytest.mark.parametrize("stage", ["r_ft", "evaluate"])
def test_the_chain_asks_for_temperatures_before_it_starts(door, mine, tmp_path, stage):
    fields = own(mine)
    del fields[f"{stage}.score_temperature"]
    error = refused(door("configs/radit.py:own", workdir=tmp_path / "work", **fields))
    assert f"Try --config.{stage}.score_temperature=0.05" in error
    assert not (tmp_path / "work").exists()


def test_the_chain_compares_the_retriever_before_and_after(chain):
    workdir, found = chain
    rows = json.loads((workdir / "report" / "results.json").read_text())
    gold = {row["system"] for row in rows if row["metric"] == "gold@1"}
    assert gold == {"retriever", "R-FT", "gold targets (supervised)"}
    answered = {row["system"] for row in rows if row["metric"] == "em"}
    table_6 = {"LM + retrieval", "LM + R-FT", "LM-FT + retrieval"}
    assert answered > table_6 | {"RA-DIT (LM-FT + R-FT)"}
    compared = json.loads((workdir / "report" / "differences.json").read_text())
    assert {(d["first"], d["second"]) for d in compared} >= {
        ("retriever", "R-FT"),
        ("LM-FT + retrieval", "RA-DIT (LM-FT + R-FT)"),
        ("LM + R-FT", "RA-DIT (LM-FT + R-FT)"),
    }
    assert "R-FT over retriever" in found.stdout


def test_systems_read_what_their_retriever_found(chain, door, tmp_path):
    workdir = shutil.copytree(chain[0], tmp_path / "work", symlinks=True)
    shutil.rmtree(workdir / "report")
    read: dict[str, list] = {"LM + retrieval": [], "LM + R-FT": []}
    (start,) = (workdir / "retrieved" / "test").glob("*/shard-*.npz")
    (tuned,) = (workdir / "retrieved_r_ft" / "lm" / "test").glob("*/shard-*.npz")
    # Toys learn little: were the same passages found, nothing would be shown.
    arrays = dict(np.load(tuned))
    np.savez(tuned, ids=arrays["ids"][:, ::-1], scores=arrays["scores"])
    code, output = door(
        "configs/evaluate.py:tiny",
        workdir=workdir,
        **{"evaluate.systems": str(tuple(read))},
    )
    assert code == 0, output
    for line in (workdir / "report" / "generations.jsonl").open():
        answer = json.loads(line)
        ids = [passage["id"] for passage in answer["passages"]]
        read[answer["system"]].append(ids)
    for file, found in zip((start, tuned), read.values(), strict=True):
        assert found == np.load(file)["ids"][:20, :2].tolist()
    assert read["LM + retrieval"] != read["LM + R-FT"]


def test_the_chain_without_r_ft_needs_nothing_of_it(chain, door, tmp_path):
    workdir = tmp_path / "work"
    for name in ("inputs", "passages", "index", "retrieved", "lm_ft"):
        shutil.copytree(chain[0] / name, workdir / name, symlinks=True)
    systems = "('LM + retrieval', 'LM-FT + retrieval')"
    code, output = door(
        "configs/evaluate.py:tiny", workdir=workdir, **{"evaluate.systems": systems}
    )
    assert code == 0, output
    rows = json.loads((workdir / "report" / "results.json").read_text())
    assert {row["system"] for row in rows if row["metric"] == "mrr"} == {"retriever"}
    error = refused(
        door(
            "configs/evaluate.py:tiny",
            workdir=workdir,
            **{"evaluate.systems": "('RA-DIT',)"},
        )
    )
    assert "['RA-DIT'] not among LM, LM + retrieval" in error


def test_a_stage_without_its_input_says_what_to_run(door, mine, tmp_path):
    error = refused(
        door("configs/index.py:own", workdir=tmp_path, encoder=mine / "encoder")
    )
    assert f"{tmp_path}/passages: artifact is missing. Run the stage" in error


DOCUMENT = '{"id": "1", "title": "T", "text": "Some words."}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"documents.jsonl: no such file"),
        (DOCUMENT + "{'id': 2}\n", r"documents.jsonl.*2.*JSON"),
        (DOCUMENT + '{"id": "2", "title": "T"}\n', r'documents.jsonl.*2.*"text"'),
        (DOCUMENT + '{"id": 2, "title": "T", "txet": "x"}\n', r"documents.*2.*text"),
        ("", r"documents.jsonl.*(empty|no )"),
        (DOCUMENT.replace("Some words.", " "), r"no passage|empty|blank"),
        (b"\x80\x81", r"documents.jsonl.*UTF-8"),
    ],
    ids=["none", "no-json", "no-text", "mistyped", "empty", "blank", "bytes"],
)
def test_bad_documents_are_an_error_in_a_line(door, tmp_path, content, words):
    file = tmp_path / "documents.jsonl"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.write_text(content)
    error = refused(
        door(
            "configs/corpus.py:own",
            workdir=tmp_path / "work",
            **{"corpus.documents": file},
        )
    )
    assert re.search(words, error), error


QUESTION = '{"question": "Who?", "answers": ["me"]}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"mine.jsonl: no such file"),
        (QUESTION + '{"question": "Who?", "answers": []}\n', r"mine.jsonl.*2.*answers"),
        (QUESTION + '{"question": "Who?", "answers": ["  "]}\n', r"2.*answers"),
        (QUESTION + '{"answers": ["me"]}\n', r"mine.jsonl.*2.*question"),
        (QUESTION + '{"question": "Who?", "answer": ["me"]}\n', r"2.*answers"),
        ("", r"mine.jsonl.*(empty|no )"),
    ],
    ids=["none", "no-answers", "blank-answer", "no-question", "mistyped", "empty"],
)
def test_bad_questions_are_an_error_in_a_line(door, workdir, content, words):
    file = workdir / "mine.jsonl"
    if content is not None:
        file.write_text(content)
    error = refused(
        door("configs/retrieve.py:tiny", workdir=workdir, **{"data.train": file})
    )
    assert re.search(words, error), error


@pytest.fixture
def lm(retrieved, tmp_path):
    """A language model to spoil."""
    return shutil.copytree(retrieved / "inputs" / "lm", tmp_path / "lm")


def edit_json(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def no_folder(lm):
    shutil.rmtree(lm)


def a_pickle(lm):
    (lm / "model.safetensors").unlink()
    (lm / "pytorch_model.bin").write_bytes(pickle.dumps({"w": 1}))


def a_pickle_by_another_name(lm):
    (lm / "model.safetensors").write_bytes(pickle.dumps({"w": [1.0] * 100}))


def a_small_vocabulary(lm):
    weights = load_file(lm / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = np.ascontiguousarray(weights[name][:64])
    save_file(weights, lm / "model.safetensors")
    edit_json(lm / "config.json", vocab_size=64)


def another_architecture(lm):
    edit_json(lm / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])


def another_width(lm):
    edit_json(lm / "config.json", intermediate_size=128)


def no_tokenizer(lm):
    (lm / "tokenizer.json").unlink()


def a_short_context(lm):
    edit_json(lm / "config.json", max_position_embeddings=64)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_folder, r"lm: no such file or folder"),
        (a_pickle, r"only pickled weights \(pytorch_model.bin\)"),
        (a_pickle_by_another_name, r"model.safetensors"),
        (a_small_vocabulary, r"tokenizer.*\d+.*64|64.*tokenizer"),
        (another_architecture, r"gpt2"),
        (another_width, r"mlp|gate_proj|down_proj|up_proj"),
        (no_tokenizer, r"tokenizer.json"),
        (a_short_context, r"row_tokens = 128 is more than the model's context of 64"),
    ],
)
def test_bad_models_are_an_error_in_a_line(door, workdir, lm, spoil, words):
    spoil(lm)
    error = refused(door("configs/lm_ft.py:tiny", workdir=workdir, lm=lm))
    assert re.search(words, error), error


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": "float61"}, r"dtype = 'float61' is not one of auto, float32"),
        ({"attention": "splash"}, r"splash cannot run: it runs on tpu only, .* is cpu"),
        ({"attention": "flash"}, r"'flash' is not one of auto, xla, splash, cudnn"),
        ({"mesh.tensor": 3}, r"\(1, 1, 3\) needs 3 devices, there are 1"),
        ({"lm_ft.warmup_steps": 6}, r"warmup_steps = 6 must be .* less than steps = 6"),
        ({"lm_ft.schedule": "flat"}, r"'flat' is not one of"),
        ({"lm_ft.micro_batches": 3}, r"rows = 8 does not divide .*nearest multiple is"),
        ({"lm_ft.context": "add"}, r"has no `context`"),
        ({"lm_ft.remat": "some"}, r"remat = 'some' is not one of"),
        ({"lm_ft.row_targets": 2}, r"example .*set lm_ft.row_targets to at least \d"),
        ({"lm_ft.steps": 0, "lm_ft.warmup_steps": 0}, r"steps = 0"),
        ({"lm_ft.learning_rate": -1.0}, r"learning_rate = -1.0 must be positive"),
        ({"lm_ft.save_every": 0}, r"save_every = 0 must be at least 1"),
        ({"lm_ft.validation_examples": 0}, r"validation_examples = 0 must be at least"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_settings_are_an_error_in_a_line(door, workdir, fields, words):
    error = refused(door("configs/lm_ft.py:tiny", workdir=workdir, **fields))
    assert re.search(words, error), error


def test_debug_shows_where_an_error_was_raised(door, tmp_path):
    code, output = door("configs/radit.py", workdir=tmp_path, debug=True)
    assert code == 1
    assert "Traceback" in output
    assert "not set: corpus.documents" in output
