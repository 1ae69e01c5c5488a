"""Ensembles and choices against references that read one prompt at a time."""

import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from radit_jax.batch import Example, Passage
from radit_jax.data import prompts
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tokenize import load_tokenizer
from radit_jax.evaluation.metrics import normalise
from radit_jax.evaluation.tasks import TASKS
from radit_jax.inference.generate import generate
from radit_jax.models.huggingface import load_llama
from radit_jax.stages.answering import Asked, Reader
from radit_jax.stages.shots import Shots
from radit_jax.stages.stage import mesh

NEW = 5
QUESTIONS = [
    Example("a", "Where is the lake?", ("there",)),
    Example("b", "Who is it?", ("me",)),
    Example("c", "How many are there in all of these places?", ("three",)),
]
TEXTS = ["the lake is in place4", "nothing at all", "place7 has a lake and a hill"]
PASSAGES = [Passage(i, f"d{i}", f"place{i}", "", text) for i, text in enumerate(TEXTS)]
WEIGHTS = [0.5, 0.2, 0.3]
PICK = Example(
    "p", "Which is it?", ("a hill",), choices=("the lake", "a hill", "place7 itself")
)


@pytest.fixture(scope="module")
def lm(retrieved, tmp_path_factory):
    """A random model that says something else after every prompt.

    As it was made it repeats the last token, whatever it reads.
    """
    folder = tmp_path_factory.mktemp("lm") / "lm"
    shutil.copytree(retrieved / "inputs" / "lm", folder)
    file = folder / "model.safetensors"
    weights = {
        name: value * 12 if "layers" in name and value.ndim == 2 else value
        for name, value in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def config(retrieved, lm, tiny_config):
    config = tiny_config(retrieved)
    config.lm = str(lm)
    config.evaluate.max_new_tokens = NEW
    config.evaluate.prompt_tokens = 128
    return config


@pytest.fixture
def reader(config):
    """Makes readers on one device; ``ensemble`` and other settings by name."""

    def make(**settings):
        with jax.set_mesh(mesh(config, "evaluate.mesh")):
            changed = config.copy_and_resolve_references()
            for name, value in settings.items():
                changed.evaluate[name] = value
            none = Shots(changed, PassageStore(f"{config.workdir}/passages"), {})
            model = load_llama(config.lm)
            tokenizer = load_tokenizer(config.lm)
            return Reader(changed, model, tokenizer, True, none)

    with jax.set_mesh(mesh(config, "evaluate.mesh")):
        yield make


def asked(example, passages=PASSAGES, weights=WEIGHTS, dataset="own"):
    return Asked(dataset, example, passages, weights)


def plain(reader, example, passage):
    """What generation alone says after one passage."""
    prompt = prompts.render(
        reader.tokenizer,
        prompts.pieces(example),
        128 - NEW,
        passage=passage.display if passage else "",
        answered=False,
    )
    (found,) = generate(
        reader.model,
        reader.tokenizer,
        [prompt.tokens],
        max_new_tokens=NEW,
        stop=("\n",),
    )
    return found


def test_passages_lead_to_different_answers(reader):
    """Otherwise the tests below could not fail."""
    ours = reader()
    said = [{plain(ours, q, p).text for p in PASSAGES} for q in QUESTIONS]
    assert all(len(texts) == 3 for texts in said)


@pytest.mark.parametrize("ensemble", ["paper", "token", "concatenated"])
def test_one_passage_is_plain_generation(reader, ensemble):
    ours = reader(ensemble=ensemble)
    found = ours.answer("x", [asked(q, PASSAGES[:1], [1.0]) for q in QUESTIONS])
    for answered, question in zip(found, QUESTIONS, strict=True):
        expected = plain(ours, question, PASSAGES[0])
        assert answered.prediction == expected.text
        (said,) = answered.said
        assert "Background: place0 the lake is in place4\n\nQ: " in said.prompt
        assert said.prompt.endswith(f"Q: {question.question}\nA:")
        if ensemble == "paper":
            assert answered.confidence == pytest.approx(1.0)
            assert said.log_probability == pytest.approx(
                expected.log_probability, abs=1e-4
            )


@pytest.mark.parametrize("ensemble", ["paper", "rescored", "token"])
@pytest.mark.parametrize("right", [0, 1, 2])
def test_all_weight_on_one_passage_is_that_passage(reader, ensemble, right):
    weights = [float(i == right) for i in range(3)]
    ours = reader(ensemble=ensemble)
    found = ours.answer("x", [asked(q, weights=weights) for q in QUESTIONS])
    for answered, question in zip(found, QUESTIONS, strict=True):
        expected = plain(ours, question, PASSAGES[right])
        if ensemble != "rescored":
            assert answered.prediction == expected.text
        else:
            # The likeliest of all candidates after that passage.
            candidates = [plain(ours, question, p).text for p in PASSAGES]
            scores = [
                option_log_p(ours, question, text, PASSAGES[right].display)
                for text in candidates
            ]
            assert answered.prediction == candidates[int(np.argmax(scores))]


def option_log_p(reader, example, option, passage, pieces=None):
    """By transformers, one sequence at a time."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(reader.config.lm)
    pieces = pieces or prompts.pieces(example._replace(answers=(option,)))
    prompt = prompts.render(reader.tokenizer, pieces, 128, passage=passage, eos=False)
    with torch.no_grad():
        logits = reference.eval()(torch.tensor([prompt.tokens])).logits[0]
    log_p = logits.log_softmax(-1)
    at = range(prompt.answer_start, len(prompt.tokens))
    return float(sum(log_p[i - 1, prompt.tokens[i]] for i in at))


def test_the_paper_s_ensemble_sums_the_weight_of_each_unique_answer(reader):
    ours = reader()
    for answered, question in zip(
        ours.answer("x", [asked(q) for q in QUESTIONS]), QUESTIONS, strict=True
    ):
        totals: dict[str, float] = {}
        for passage, weight in zip(PASSAGES, WEIGHTS, strict=True):
            found = plain(ours, question, passage)
            name = normalise(found.text)
            totals[name] = totals.get(name, 0.0) + weight * np.exp(
                found.log_probability
            )
        best = max(totals, key=totals.get)
        assert normalise(answered.prediction) == best
        share = totals[best] / sum(totals.values())
        assert answered.confidence == pytest.approx(share, rel=1e-3)


def test_rescoring_is_eq_2(reader):
    ours = reader(ensemble="rescored")
    for answered, question in zip(
        ours.answer("x", [asked(q) for q in QUESTIONS]), QUESTIONS, strict=True
    ):
        texts = list(dict.fromkeys(plain(ours, question, p).text for p in PASSAGES))
        p_O = [
            sum(
                weight * np.exp(option_log_p(ours, question, text, passage.display))
                for passage, weight in zip(PASSAGES, WEIGHTS, strict=True)
            )
            for text in texts
        ]
        best = int(np.argmax(p_O))
        assert answered.prediction == texts[best]
        assert answered.confidence == pytest.approx(p_O[best] / sum(p_O), rel=1e-3)


@pytest.mark.parametrize("ensemble", ["paper", "rescored", "token"])
def test_neither_order_nor_mates_change_an_answer(reader, ensemble):
    ours, other = reader(ensemble=ensemble), reader(ensemble=ensemble, batch_tokens=1)
    together = ours.answer("x", [asked(q) for q in QUESTIONS])
    for answered, question in zip(together, QUESTIONS, strict=True):
        (alone,) = other.answer("x", [asked(question, PASSAGES[::-1], WEIGHTS[::-1])])
        assert alone.prediction == answered.prediction
        assert alone.confidence == pytest.approx(answered.confidence, rel=1e-3)


def test_a_concatenation_reads_all_passages_in_one_prompt(reader):
    (found,) = reader(ensemble="concatenated").answer("x", [asked(QUESTIONS[0])])
    (said,) = found.said
    joined = "\n\n".join(passage.display for passage in PASSAGES)
    assert f"Background: {joined}\n\nQ: {QUESTIONS[0].question}\nA:" in said.prompt


@pytest.mark.parametrize("dataset", ["own", "piqa", "boolq"])
def test_options_are_compared_as_if_each_was_scored_alone(reader, dataset):
    """nll, nll_char and nll_compl; shared beginnings and packing change nothing."""
    ours = reader()
    (found,) = ours.answer("x", [asked(PICK, dataset=dataset)])
    log_p_CO = np.array(
        [
            [option_log_p(ours, PICK, o, p.display) for o in PICK.choices]
            for p in PASSAGES
        ]
    )
    kind = TASKS[dataset].score if dataset in TASKS else "nll"
    if kind == "nll_char":
        log_p_CO /= [len(option) for option in PICK.choices]
    score_O = np.log(np.array(WEIGHTS) @ np.exp(log_p_CO))
    if kind == "nll_compl":
        score_O -= [
            option_log_p(
                ours, PICK, o, "", [prompts.Piece("Answer:"), prompts.Piece(f" {o}")]
            )
            for o in PICK.choices
        ]
    np.testing.assert_allclose(found.choice_scores, score_O, atol=1e-4)
    best = int(score_O.argmax())
    assert found.prediction == PICK.choices[best]
    p_O = np.exp(score_O)
    assert found.confidence == pytest.approx(p_O[best] / p_O.sum(), rel=1e-3)
    for said, log_p_O in zip(found.said, log_p_CO, strict=True):
        assert said.prompt.endswith("Q: Which is it?\nA:")
        if kind == "nll":
            assert said.text == PICK.choices[int(log_p_O.argmax())]
            assert said.log_probability == pytest.approx(log_p_O.max(), abs=1e-4)


def test_the_letter_is_the_option_where_the_template_says_so(reader):
    ours = reader()
    example = PICK._replace(template="choices")
    (found,) = ours.answer("x", [asked(example, (), ())])
    expected = [option_log_p(ours, example, o, "") for o in PICK.choices]
    np.testing.assert_allclose(found.choice_scores, expected, atol=1e-4)
    assert found.said[0].prompt.endswith("C. place7 itself\nA:")


def test_options_share_what_is_cut(reader):
    """A passage too long is cut as much for a short option as for a long one."""
    ours = reader(prompt_tokens=40)
    long = Passage(9, "d", "long", "", "lake " * 60)
    (found,) = ours.answer("x", [asked(PICK, [long], [1.0])])
    options = [
        prompts.pieces(PICK._replace(answers=(choice,))) for choice in PICK.choices
    ]
    rendered = ours.render_options(options, long.display, 40)
    beginnings = {tuple(p.tokens[: p.answer_start]) for p in rendered}
    assert len(beginnings) == 1
    assert max(len(prompt.tokens) for prompt in rendered) == 40
    shown = ours.tokenizer.decode(next(iter(beginnings)), special=True)
    assert found.said[0].prompt == shown
    assert shown.endswith("Q: Which is it?\nA:")


def test_questions_of_several_tasks_come_back_in_order(reader):
    mixed = [QUESTIONS[0], PICK, QUESTIONS[1], PICK]
    datasets = ["own", "piqa", "own", "obqa"]
    given = [asked(q, dataset=d) for q, d in zip(mixed, datasets, strict=True)]
    together = reader().answer("x", given)
    for one, answered in zip(given, together, strict=True):
        (alone,) = reader().answer("x", [one])
        assert alone.prediction == answered.prediction
        assert len(alone.choice_scores) == len(answered.choice_scores)


def test_a_task_to_choose_needs_options(reader):
    with pytest.raises(ValueError, match="dataset 'piqa': the task is to choose among"):
        reader().answer("x", [asked(QUESTIONS[0], dataset="piqa")])
