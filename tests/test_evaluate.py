"""The evaluation stage: what it keeps, asks without a corpus, and refuses."""

import json
import shutil

import pytest

from radit_jax.evaluation.files import read_generations
from radit_jax.stages import evaluate
from radit_jax.stages.answering import Reader
from radit_jax.stages.stage import run


@pytest.fixture
def config(retrieved, tiny_config, tmp_path):
    """Of two systems that need no training, on a few questions."""
    workdir = shutil.copytree(retrieved, tmp_path / "work", symlinks=True)
    config = tiny_config(workdir, **{"evaluate.limit": 4})
    config.evaluate.systems = ("LM", "LM + retrieval")
    return config


def test_a_resumed_evaluation_is_that_of_an_uninterrupted_one(
    config, tmp_path, monkeypatch
):
    whole = run("evaluate", evaluate.STAGE, config)
    expected = (whole / "results.json").read_text()
    generations = (whole / "generations.jsonl").read_text()
    shutil.rmtree(whole)
    real = Reader.answer

    def fail(self, name, asked):
        if name == "LM + retrieval":
            raise OSError("the power went out")
        return real(self, name, asked)

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "answer", fail)
        with pytest.raises(OSError, match="power"):
            run("evaluate", evaluate.STAGE, config)

    def only_the_second(self, name, asked):
        assert name == "LM + retrieval", "the first had been asked"
        return real(self, name, asked)

    monkeypatch.setattr(Reader, "answer", only_the_second)
    again = run("evaluate", evaluate.STAGE, config)
    assert (again / "results.json").read_text() == expected
    assert (again / "generations.jsonl").read_text() == generations


def test_every_answer_can_be_followed_to_its_prompts(config):
    report = run("evaluate", evaluate.STAGE, config)
    found = read_generations(report / "generations.jsonl")
    assert len(found) == 8
    for g in found:
        asked = f"Q: {g.question}\nA:"
        if g.system == "LM":
            assert g.prompt.endswith(asked)
            assert not g.passages
            continue
        assert len(g.passages) == config.evaluate.passages
        assert sum(p.weight for p in g.passages) == pytest.approx(1.0)
        for passage in g.passages:
            assert f"Background: {passage.heading} {passage.text}" in passage.prompt
            assert passage.prompt.endswith(asked)
            assert passage.answer is not None
            assert passage.log_probability < 0
        assert g.prediction in [passage.answer for passage in g.passages]
        assert 0 < g.confidence <= 1
    assert (report / "index.html").stat().st_size > 10_000


ROWS = [
    {"question": f"Which is {i}?", "answers": ["b"], "choices": ["a", "b", "c"]}
    for i in range(6)
]


def test_a_closed_book_needs_no_corpus(config, tmp_path):
    """Nor an encoder; questions with choices are answered by choosing."""
    file = tmp_path / "picked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config.workdir = str(tmp_path / "new")
    config.lm = str(tmp_path / "work" / "inputs" / "lm")
    config.encoder = config.data.train = config.data.dev = ""
    config.data.test = str(file)
    config.evaluate.systems = ("LM",)
    report = run("evaluate", evaluate.STAGE, config)
    rows = json.loads((report / "results.json").read_text())
    assert {(row["dataset"], row["metric"], row["n"]) for row in rows} == {
        ("picked", "accuracy", 4)
    }
    for g in read_generations(report / "generations.jsonl"):
        assert g.choices == ("a", "b", "c")
        assert g.choice_scores.index(max(g.choice_scores)) == "abc".index(g.prediction)
        assert g.metrics == {"accuracy": float(g.prediction == "b")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ensemble": "papr"}, "evaluate.ensemble = 'papr' is not one of paper, resc"),
        ({"rows": 0}, "evaluate.rows = 0 must be at least 1"),
        ({"prompt_tokens": 0}, "evaluate.prompt_tokens = 0 must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config, changes, message):
    for name, value in changes.items():
        config.evaluate[name] = value
    with pytest.raises(ValueError, match=message):
        run("evaluate", evaluate.STAGE, config)
