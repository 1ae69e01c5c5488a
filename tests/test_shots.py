"""Few-shot prompts: whose demonstrations stand before a question, and what fits."""

import json
import shutil
from pathlib import Path

import jax
import pytest

from radit_jax.batch import Example
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tokenize import load_tokenizer
from radit_jax.models.huggingface import load_llama
from radit_jax.stages import evaluate, retrieve
from radit_jax.stages.retrieve import read_retrieved
from radit_jax.stages.shots import Shots
from radit_jax.stages.stage import mesh, run


@pytest.fixture(scope="module")
def pool(retrieved, tiny_config, tmp_path_factory):
    """A work folder whose training questions can be demonstrations."""
    workdir = tmp_path_factory.mktemp("shots") / "work"
    shutil.copytree(retrieved, workdir, symlinks=True)
    config = tiny_config(workdir, **{"data.limit.shots": 12})
    config.data.shots = config.data.train
    run("retrieve", retrieve.STAGE, config)
    return config


def shots_of(config, count, questions):
    config = config.copy_and_resolve_references()
    config.evaluate.shots = count
    store = PassageStore(f"{config.workdir}/passages")
    return Shots(config, store, {"test": questions})


QUESTION = Example("q", "Where is it?", ("here",))


def test_a_pool_is_as_large_as_asked_for_and_has_passages(pool):
    examples, found = read_retrieved(Path(pool.workdir), "shots")["train"]
    assert len(examples) == 12
    assert (found.ids[:, 0] >= 0).all()


def test_demonstrations_are_shown_with_their_own_top_passage(pool):
    shots = shots_of(pool, 3, [QUESTION])
    examples, found = read_retrieved(Path(pool.workdir), "shots")["train"]
    store = PassageStore(Path(pool.workdir) / "passages")
    every = {
        f"Background: {store[int(ids[0])].display}\n\n"
        f"Q: {example.question}\nA: {example.answers[0]}\n\n"
        for example, ids in zip(examples, found.ids, strict=True)
    }
    shown = shots(QUESTION, "test", True)
    assert len(set(shown)) == 3
    assert set(shown) <= every
    # Without passages where the question has none, and the same questions.
    bare = shots(QUESTION, "test", False)
    assert [text.split("\n\n", 1)[1] for text in shown] == bare
    # A smaller number is the beginning of a larger one.
    assert shots_of(pool, 2, [QUESTION])(QUESTION, "test", True) == shown[:2]


def test_a_question_is_not_its_own_demonstration(pool):
    examples, _ = read_retrieved(Path(pool.workdir), "shots")["train"]
    shots = shots_of(pool, 11, examples[:1])
    asked = f"Q: {examples[0].question}\n"
    assert not any(asked in text for text in shots(examples[0], "test", False))
    with pytest.raises(
        ValueError, match="12 demonstrations are asked for, and only 11"
    ):
        shots_of(pool, 12, examples[:1])


def test_a_dataset_without_a_pool_is_named(retrieved, tiny_config):
    with pytest.raises(ValueError, match=r"evaluate.shots = 2: data.shots has no data"):
        shots_of(tiny_config(retrieved), 2, [QUESTION])
    assert shots_of(tiny_config(retrieved), 0, [QUESTION])(QUESTION, "test", True) == []


def test_the_nearest_demonstrations_that_fit_are_kept(pool):
    """The question and its passage are never cut for their sake."""
    shots = shots_of(pool, 5, [QUESTION])
    with jax.set_mesh(mesh(pool)):
        model = load_llama(pool.lm)
        tokenizer = load_tokenizer(pool.lm)
        reader = evaluate.Reader(pool, model, tokenizer, True, shots)
        alone = reader.render(QUESTION, "a passage", 128).tokens
        texts = shots(QUESTION, "test", True)
        last = len(tokenizer.encode(texts[-1]))
        kept = []
        rooms = (len(alone), len(alone) + last - 1, len(alone) + last, 250)
        for room in rooms:
            tokens = reader.render(QUESTION, "a passage", room, texts).tokens
            assert len(tokens) <= room
            text = tokenizer.decode(tokens)
            assert text.endswith("Background: a passage\n\nQ: Where is it?\nA:")
            count = text.count("Background: ") - 1
            assert text.startswith("".join(texts[len(texts) - count :]))
            kept.append(count)
    assert kept[:3] == [0, 0, 1]
    assert 1 <= kept[3] < 5


def test_the_report_is_made_with_demonstrations(pool, tmp_path):
    workdir = shutil.copytree(pool.workdir, tmp_path / "work", symlinks=True)
    config = pool.copy_and_resolve_references()
    config.workdir = str(workdir)
    config.evaluate.systems = ("LM", "LM + retrieval")
    config.evaluate.shots, config.evaluate.limit = 2, 3
    config.evaluate.prompt_tokens = 128
    run("evaluate", evaluate.STAGE, config)
    rows = json.loads((workdir / "report" / "results.json").read_text())
    assert {row["system"] for row in rows} >= {"LM", "LM + retrieval"}
