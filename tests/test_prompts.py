"""Prompts of Tables 10 and 12: their text, and what is cut when they are too long."""

import itertools

import pytest

from radit_jax.data import prompts
from radit_jax.data.prompts import render


class Characters:
    """One token per character; ids are code points."""

    bos_id = 1
    eos_id = 2

    def encode(self, text):
        return [ord(c) for c in text]


class Words:
    """Tokens are words with the space before them, as byte-level BPE cuts them."""

    bos_id = None
    eos_id = 2

    def __init__(self):
        self.words = ["", "", ""]

    def encode(self, text):
        found, word = [], ""
        for c in text:
            if c in " \n" and word:
                found.append(word)
                word = ""
            word += c
        found += [word] if word else []
        for word in found:
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in found]


def text(tokens):
    names = {1: "<s>", 2: "</s>"}
    return "".join(names.get(token) or chr(token) for token in tokens)


@pytest.mark.parametrize(
    ("options", "golden"),
    [
        ({}, "<s>Q: who?\nA:"),
        ({"bos": False}, "Q: who?\nA:"),
        ({"answer": "me"}, "<s>Q: who?\nA: me</s>"),
        ({"passage": "P: s"}, "<s>Background: P: s\n\nQ: who?\nA:"),
        (
            {"passage": "P: s", "answer": "me"},
            "<s>Background: P: s\n\nQ: who?\nA: me</s>",
        ),
        (
            {"answer": "me", "question_marker": "", "answer_marker": "Answer:"},
            "<s>who?\nAnswer: me</s>",
        ),
        (
            {"passage": "P", "answer": "me", "question_marker": "Question: "},
            "<s>Background: P\n\nQuestion: who?\nA: me</s>",
        ),
    ],
)
def test_prompts_read_as_in_the_paper(options, golden):
    prompt = render(Characters(), "who?", 100, **options)
    assert text(prompt.tokens) == golden
    assert prompt.passage_cut == prompt.question_cut == 0


def test_training_markers_are_those_of_table_10():
    shown = [
        prompts.question_text("x", q, a)
        for q, a in itertools.product(prompts.QUESTION_MARKERS, prompts.ANSWER_MARKERS)
    ]
    assert shown == [
        "Q: x\nA:",
        "Q: x\nAnswer:",
        "Question: x\nA:",
        "Question: x\nAnswer:",
        "x\nA:",
        "x\nAnswer:",
    ]


def test_the_answer_begins_where_it_says():
    prompt = render(Characters(), "who?", 100, passage="P", answer="me")
    assert text(prompt.tokens[prompt.answer_start :]) == " me</s>"
    prompt = render(Characters(), "who?", 100, passage="P")
    assert prompt.answer_start == len(prompt.tokens)


def test_what_is_generated_from_is_what_was_trained_on():
    """The training prompt begins with the very tokens of the evaluation prompt."""
    for tokenizer in (Characters(), Words()):
        trained = render(tokenizer, "who is it?", 100, passage="a b", answer="it is me")
        asked = render(tokenizer, "who is it?", 100, passage="a b")
        assert trained.tokens[: trained.answer_start] == asked.tokens


def test_a_question_is_the_same_tokens_after_any_passage():
    tokenizer = Words()
    one = render(tokenizer, "who is it?", 100, passage="a b").tokens
    two = render(tokenizer, "who is it?", 100, passage="c").tokens
    asked = tokenizer.encode("\n\nQ: who is it?\nA:")
    assert one[-len(asked) :] == two[-len(asked) :] == asked


FULL = "<s>Background: PASSAGE\n\nQ: who?\nA: me</s>"


@pytest.mark.parametrize("room", range(6, 41))
def test_the_passage_is_cut_first_then_the_question_never_the_answer(room):
    """From its end the passage, from its beginning the question."""
    full = render(Characters(), "who?", 100, passage="PASSAGE", answer="me")
    prompt = render(Characters(), "who?", room, passage="PASSAGE", answer="me")
    assert text(full.tokens) == FULL
    assert len(prompt.tokens) == min(room, len(full.tokens))
    assert text(prompt.tokens).startswith("<s>")
    assert text(prompt.tokens[prompt.answer_start :]) == " me</s>"
    assert prompt.passage_cut + prompt.question_cut == len(full.tokens) - len(
        prompt.tokens
    )
    background, question = "Background: PASSAGE", "\n\nQ: who?\nA:"
    kept = background[: len(background) - prompt.passage_cut]
    asked = question[prompt.question_cut :]
    assert text(prompt.tokens) == f"<s>{kept}{asked} me</s>"
    if prompt.question_cut:
        assert kept == ""


def test_a_prompt_to_generate_from_is_cut_in_the_same_order():
    prompt = render(Characters(), "who?", 25, passage="PASSAGE")
    assert text(prompt.tokens) == "<s>Background: \n\nQ: who?\nA:"
    assert (prompt.passage_cut, prompt.question_cut) == (7, 0)


def test_an_answer_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"of 14 tokens does not fit into 14"):
        render(Characters(), "who?", 14, passage="P", answer="a long answer"[:12])
    assert render(Characters(), "who?", 15, answer="a long answer"[:11]).tokens


def test_an_answer_of_nothing_is_an_error():
    class Stripping(Characters):
        def encode(self, text):
            return super().encode(text.rstrip())

    with pytest.raises(ValueError, match="answer '' tokenises to nothing"):
        render(Stripping(), "who?", 100, answer="")
