"""Prompts as pure functions: RA-DIT Table 10 (training) and Table 12 (evaluation).

A prompt is ``Background: {passage}\\n\\n`` (nothing when there is no passage) followed
by what the example's template lays out. A template is a function from an example and
two markers to pieces of text, each of which carries loss or does not; in training the
markers are drawn per instance, in evaluation they are those of Table 12.

=============  ==========================================  ========================
template       after the background                        carries loss
=============  ==========================================  ========================
qa             Q: {question}\\nA: {answer}                  the answer
dialogue       Q: {turn}\\nA: {turn}\\nQ: ...\\nA: {answer}   the answer; if asked for
                                                           every answering turn
summary        {question}\\nA: {answer}                     the answer
cot            Q: {question} {instruction} {rationale}     rationale, marker and
               A: {answer}                                 answer
choices        Question: {question}\\nA. {choice}\\nB. ...   the letter of the answer
               \\nA: {letter}
long_qa        Question: {question}\\nAnswer: {answer}      the answer
passage_qa     {context}\\nQuestion: {question}             the answer
               \\nAnswer: {answer}
situation_qa   {context} Q: {question} A: {answer}         the answer
statement      Is this statement true? {question}          the answer
               \\nA: {answer}
entity         {question}\\nOutput the Wikipedia page       the answer
               title of ...\\nA: {answer}
relation       {question}\\nA: {answer}                     the answer
continuation   {question} {answer}                         the answer
cloze          {question} with the answer for its ``_``    all after the blank's start
=============  ==========================================  ========================
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from radit_jax.batch import Example

QUESTION_MARKERS = ("Q: ", "Question: ", "")
ANSWER_MARKERS = ("A:", "Answer:")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# RA-DIT's instructions are OPT-IML's, which are not published with it; this is ours.
REASONING = "Let's think step by step."
BLANK = "_"  # of a cloze


@runtime_checkable
class Tokenizer(Protocol):
    """What prompts need of a tokenizer."""

    bos_id: int | None
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ...


class Markers(NamedTuple):
    """What stands in front of a question and of an answer."""

    question: str = QUESTION_MARKERS[0]
    answer: str = ANSWER_MARKERS[0]


class Piece(NamedTuple):
    """A part of a prompt."""

    text: str
    loss: bool = False  # whether the model learns to say it


class Prompt(NamedTuple):
    """A tokenised prompt, and how it was made to fit."""

    tokens: list[int]
    question_start: int  # before it: <bos>, demonstrations and the background
    answer_start: int  # from here on: the answer; = len(tokens) if there is none
    # [start, end) of the tokens that carry loss, in order; the answer is the last.
    spans: tuple[tuple[int, int], ...]
    passage_cut: int  # passage tokens dropped
    question_cut: int  # question tokens dropped, once no passage was left to cut


def _qa(example: Example, markers: Markers) -> list[Piece]:
    return [
        Piece(f"{markers.question}{example.question}\n{markers.answer}"),
        Piece(f" {example.answers[0]}", loss=True),
    ]


def _dialogue(example: Example, markers: Markers) -> list[Piece]:
    # Where markers are drawn, "" for the question would hide who speaks.
    asks = markers.question or QUESTION_MARKERS[0]
    pieces = []
    for turn, text in enumerate(example.turns):
        if turn % 2 == 0:
            pieces.append(Piece(f"{asks}{text}\n{markers.answer}"))
        else:
            pieces += [Piece(f" {text}", loss=True), Piece("\n")]
    pieces.append(Piece(f"{asks}{example.question}\n{markers.answer}"))
    return [*pieces, Piece(f" {example.answers[0]}", loss=True)]


def _summary(example: Example, markers: Markers) -> list[Piece]:
    return _qa(example, markers._replace(question=""))


def _cot(example: Example, markers: Markers) -> list[Piece]:
    said = f" {example.rationale}" if example.rationale else ""
    return [
        Piece(f"{markers.question}{example.question} {REASONING}"),
        Piece(f"{said} {markers.answer} {example.answers[0]}", loss=True),
    ]


def letter(example: Example) -> str:
    """Of the first answer among the choices.

    Raises:
        ValueError: it is not one of them.
    """
    if example.answers[0] not in example.choices:
        raise ValueError(
            f"example {example.id}: the answer {example.answers[0]!r} is not one of "
            f"its choices {list(example.choices)}"
        )
    return LETTERS[example.choices.index(example.answers[0])]


def question_with_choices(question: str, choices: Sequence[str]) -> str:
    """A line for the question and one for every choice, ``A. {choice}``."""
    lines = (f"{a}. {choice}" for a, choice in zip(LETTERS, choices, strict=False))
    return "\n".join([question, *lines])


def _choices(example: Example, markers: Markers) -> list[Piece]:
    shown = question_with_choices(example.question, example.choices)
    return [
        Piece(f"{markers.question}{shown}\n{markers.answer}"),
        Piece(f" {letter(example)}", loss=True),
    ]


def _passage_qa(example: Example, markers: Markers) -> list[Piece]:
    asked, answer = _qa(example, markers)
    return [Piece(f"{example.context}\n{asked.text}"), answer]


def _situation_qa(example: Example, markers: Markers) -> list[Piece]:
    asked = f"{markers.question}{example.question} {markers.answer}"
    return [
        Piece(f"{example.context} {asked}"),
        Piece(f" {example.answers[0]}", loss=True),
    ]


def _statement(example: Example, markers: Markers) -> list[Piece]:
    return _qa(example, markers._replace(question="Is this statement true? "))


def _entity(example: Example, markers: Markers) -> list[Piece]:
    asked = (
        f"{example.question}\nOutput the Wikipedia page title of the entity mentioned "
        "between [START_ENT] and [END_ENT] in the given text"
    )
    return _qa(example._replace(question=asked), markers._replace(question=""))


def _continuation(example: Example, markers: Markers) -> list[Piece]:
    del markers
    return [Piece(example.question), Piece(f" {example.answers[0]}", loss=True)]


def _cloze(example: Example, markers: Markers) -> list[Piece]:
    del markers
    before, blank, after = example.question.partition(BLANK)
    if not blank:
        raise ValueError(f"example {example.id}: no {BLANK} to fill in the question")
    space = " " * before.endswith(" ")
    return [
        Piece(before.rstrip(" ")),
        Piece(f"{space}{example.answers[0]}{after}", loss=True),
    ]


class Template(NamedTuple):
    """How an example is laid out, and with which markers it is evaluated."""

    pieces: Callable[[Example, Markers], list[Piece]]
    markers: Markers = Markers()


_LONG = Markers("Question: ", "Answer:")
TEMPLATES = {
    "qa": Template(_qa),
    "dialogue": Template(_dialogue),
    "summary": Template(_summary),
    "cot": Template(_cot),
    "choices": Template(_choices, Markers("Question: ", "A:")),
    "long_qa": Template(_qa, _LONG),
    "passage_qa": Template(_passage_qa, _LONG),
    "situation_qa": Template(_situation_qa),
    "statement": Template(_statement),
    "entity": Template(_entity),
    "relation": Template(_summary),
    "continuation": Template(_continuation),
    "cloze": Template(_cloze),
}


def pieces(
    example: Example, markers: Markers | None = None, every_turn: bool = False
) -> list[Piece]:
    """What follows the background, its answer last.

    Args:
        example: its ``template`` says how it is laid out.
        markers: drawn for training; None: those of the evaluation.
        every_turn: whether the earlier answers of a dialogue carry loss as well.

    Raises:
        ValueError: an unknown template, or the example lacks what it needs.
    """
    if example.template not in TEMPLATES:
        raise ValueError(
            f"example {example.id}: template {example.template!r} is not one of "
            f"{', '.join(TEMPLATES)}"
        )
    template = TEMPLATES[example.template]
    *earlier, answer = template.pieces(example, markers or template.markers)
    if not every_turn:
        earlier = [piece._replace(loss=False) for piece in earlier]
    return [*earlier, answer]


def render(
    tokenizer: Tokenizer,
    pieces: Sequence[Piece],
    max_tokens: int,
    *,
    before: str = "",
    passage: str = "",
    answered: bool = True,
    bos: bool = True,
    eos: bool = True,
) -> Prompt:
    """Tokenise a prompt of at most ``max_tokens`` tokens.

    What is too long loses the end of its passage first, then the beginning of its
    question; the answer is never cut. The passage and the rest are tokenised apart,
    so that what a question's tokens are does not depend on the passage before it.

    Args:
        tokenizer: of the language model.
        pieces: what follows the background; the answer is the last.
        max_tokens: room for everything, special tokens included.
        before: demonstrations, see ``data.fewshot``; never cut.
        passage: text for ``Background:``; "" leaves the background out.
        answered: False leaves the answer out, for a prompt to generate from.
        bos: begin with <bos> if the tokenizer has one.
        eos: close the answer with <eos>.

    Raises:
        ValueError: demonstrations and answer alone do not fit, or the answer tokenises
            to nothing.
    """
    start = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    start += tokenizer.encode(before) if before else []
    *asked, answer = pieces
    text = "\n\n" if passage else ""
    ends = []  # of the text up to each piece of the question
    for piece in asked:
        text += piece.text
        ends.append(len(text))
    middle = tokenizer.encode(text)
    whole = middle
    target: list[int] = []
    if answered:
        whole = tokenizer.encode(text + answer.text)
        same = _shared(middle, whole)
        middle, target = whole[:same], whole[same:]
        if not target:
            raise ValueError(f"answer {answer.text!r} tokenises to nothing")
        target += [tokenizer.eos_id] * eos
    room = max_tokens - len(start) - len(target)
    if room <= 0:
        raise ValueError(
            f"an answer of {len(target)} tokens does not fit into {max_tokens} tokens"
            f"{f' behind {len(start)} of demonstrations' * bool(before)}: "
            f"{answer.text[:80]!r}"
        )
    question_cut = max(len(middle) - room, 0)
    background = tokenizer.encode(f"Background: {passage}") if passage else []
    passage_cut = max(len(background) - (room - len(middle) + question_cut), 0)
    background = background[: len(background) - passage_cut]
    beginning = start + background
    shift = len(beginning) - question_cut
    spans = []
    for piece, last in zip(asked, [0, *ends], strict=False):
        if piece.loss:
            stop = last + len(piece.text)
            found = [_shared(tokenizer.encode(text[:at]), whole) for at in (last, stop)]
            first, end = (max(at + shift, len(beginning)) for at in found)
            spans += [(first, end)] * (end > first)
    tokens = beginning + middle[question_cut:] + target
    answer_start = len(tokens) - len(target)
    if target:
        spans.append((answer_start, len(tokens)))
    return Prompt(
        tokens, len(beginning), answer_start, tuple(spans), passage_cut, question_cut
    )


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning that two sequences have in common."""
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return same
