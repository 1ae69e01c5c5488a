"""Prompts of Tables 10 and 12: their text, and what is cut when they are too long."""

import itertools

import pytest

from radit_jax.batch import Example
from radit_jax.data import prompts
from radit_jax.data.prompts import Markers, pieces


def render(tokenizer, question, room, *, answer=None, markers=None, **options):
    """A question and its answer, if there is one, as an example of template qa."""
    example = Example("e", question, (answer or "",))
    return prompts.render(
        tokenizer,
        pieces(example, markers),
        room,
        answered=answer is not None,
        **options,
    )


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
            {"answer": "me", "markers": Markers("", "Answer:")},
            "<s>who?\nAnswer: me</s>",
        ),
        (
            {"passage": "P", "answer": "me", "markers": Markers("Question: ")},
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
        pieces(Example("e", "x", ("y",)), Markers(q, a))[0].text
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

    with pytest.raises(ValueError, match="answer ' ' tokenises to nothing"):
        render(Stripping(), "who?", 100, answer="")


def shown(prompt):
    """The text, with what carries loss between brackets."""
    found, at = "", 0
    for start, end in prompt.spans:
        found += f"{text(prompt.tokens[at:start])}[{text(prompt.tokens[start:end])}]"
        at = end
    return found + text(prompt.tokens[at:])


TALK = Example(
    "t", "and now?", ("rain",), template="dialogue", turns=("hi", "hello", "ok?", "no")
)
SUM = Example("s", "Add 2 and 3.", ("5",), template="cot", rationale="2 + 3 is 5.")
PICK = Example("c", "Which?", ("two",), template="choices", choices=("one", "two"))
GOLDEN = {
    "qa": (Example("e", "who?", ("me",)), "Q: who?\nA:[ me</s>]"),
    "dialogue": (TALK, "Q: hi\nA: hello\nQ: ok?\nA: no\nQ: and now?\nA:[ rain</s>]"),
    "summary": (
        Example("e", "Summarize this article:", ("so",), template="summary"),
        "Summarize this article:\nA:[ so</s>]",
    ),
    "cot": (
        SUM,
        "Q: Add 2 and 3. Let's think step by step.[ 2 + 3 is 5. A: 5</s>]",
    ),
    "choices": (PICK, "Question: Which?\nA. one\nB. two\nA:[ B</s>]"),
    "long_qa": (
        Example("e", "who?", ("me",), template="long_qa"),
        "Question: who?\nAnswer:[ me</s>]",
    ),
    "passage_qa": (
        Example("e", "is it", ("yes",), "It is.", template="passage_qa"),
        "It is.\nQuestion: is it\nAnswer:[ yes</s>]",
    ),
    "situation_qa": (
        Example("e", "why?", ("so",), "Kim ran.", template="situation_qa"),
        "Kim ran. Q: why? A:[ so</s>]",
    ),
    "statement": (
        Example("e", "Ice is hot.", ("REFUTES",), template="statement"),
        "Is this statement true? Ice is hot.\nA:[ REFUTES</s>]",
    ),
    "entity": (
        Example("e", "In [START_ENT] X [END_ENT].", ("X",), template="entity"),
        "In [START_ENT] X [END_ENT].\nOutput the Wikipedia page title of the entity "
        "mentioned between [START_ENT] and [END_ENT] in the given text\nA:[ X</s>]",
    ),
    "relation": (
        Example("e", "Ada [SEP] father", ("Byron",), template="relation"),
        "Ada [SEP] father\nA:[ Byron</s>]",
    ),
    "continuation": (
        Example("e", "He fell", ("down.",), template="continuation"),
        "He fell[ down.</s>]",
    ),
    "cloze": (
        Example("e", "Kim saw _ there.", ("Lee",), template="cloze"),
        "Kim saw[ Lee there.</s>]",
    ),
}


@pytest.mark.parametrize("template", prompts.TEMPLATES)
def test_every_template_reads_as_in_the_paper(template):
    example, golden = GOLDEN[template]
    prompt = prompts.render(Characters(), pieces(example), 200, passage="P")
    assert shown(prompt) == f"<s>Background: P\n\n{golden}"
    asked = prompts.render(Characters(), pieces(example), 200, answered=False)
    assert shown(asked) == f"<s>{golden.split('[ ')[0]}"
    assert asked.spans == ()


def test_the_answers_of_a_dialogue_carry_loss_where_that_is_asked_for():
    """Whatever pieces the tokenizer makes of them."""
    golden = "<s>Q: hi\nA:[ hello]\nQ: ok?\nA:[ no]\nQ: and now?\nA:[ rain</s>]"
    every = pieces(TALK, every_turn=True)
    assert shown(prompts.render(Characters(), every, 200)) == golden
    words = Words()
    prompt = prompts.render(words, every, 200)
    said = [words.words[prompt.tokens[start]] for start, _ in prompt.spans]
    assert said == [" hello", " no", " rain"]


def test_markers_of_a_dialogue_are_the_same_for_every_turn():
    found = "".join(p.text for p in pieces(TALK, Markers("Question: ", "Answer:")))
    assert found == (
        "Question: hi\nAnswer: hello\nQuestion: ok?\nAnswer: no\n"
        "Question: and now?\nAnswer: rain"
    )
    # Without a marker nobody could tell who speaks.
    assert pieces(TALK, Markers("", "A:")) == pieces(TALK)


@pytest.mark.parametrize("room", range(8, 60))
def test_spans_follow_what_is_cut(room):
    """A cut dialogue carries loss on what is left of the same words."""
    every = pieces(TALK, every_turn=True)
    full = prompts.render(Characters(), every, 200, passage="PASSAGE")
    prompt = prompts.render(Characters(), every, room, passage="PASSAGE")
    carries = [text(prompt.tokens[start:end]) for start, end in prompt.spans]
    whole = [text(full.tokens[start:end]) for start, end in full.spans]
    assert carries[-1] == " rain</s>"
    kept = whole[len(whole) - len(carries) :]
    for ours, theirs in zip(carries, kept, strict=True):
        assert ours
        assert theirs.endswith(ours)
    assert carries[1:] == kept[1:]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (PICK._replace(template="chioces"), "example c: template 'chioces' is not one"),
        (PICK._replace(answers=("three",)), "example c: the answer 'three' is not one"),
        (PICK._replace(template="cloze"), "example c: no _ to fill in"),
    ],
)
def test_an_example_that_its_template_cannot_show_is_named(example, message):
    with pytest.raises(ValueError, match=message):
        pieces(example)
