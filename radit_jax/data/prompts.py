"""Prompts as pure functions: RA-DIT Table 10 (training) and Table 12 (evaluation).

A prompt is ``Background: {passage}\\n\\n`` (nothing when there is no passage) followed
by ``{question marker}{question}\\n{answer marker}{answer}``. In training the markers
are drawn per instance; in evaluation they are ``Q:`` and ``A:``. Without markers the
answer is plain text that goes on where the question ends.
"""

from typing import NamedTuple, Protocol, runtime_checkable

QUESTION_MARKERS = ("Q: ", "Question: ", "")
ANSWER_MARKERS = ("A:", "Answer:")


@runtime_checkable
class Tokenizer(Protocol):
    """What prompts need of a tokenizer."""

    bos_id: int | None
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ...


class Prompt(NamedTuple):
    """A tokenised prompt, and how it was made to fit."""

    tokens: list[int]
    question_start: int  # tokens before it are <bos> and the background
    answer_start: int  # from here on: the answer; = len(tokens) if there is none
    passage_cut: int  # passage tokens dropped
    question_cut: int  # question tokens dropped, once no passage was left to cut


def question_text(
    question: str,
    question_marker: str = QUESTION_MARKERS[0],
    answer_marker: str = ANSWER_MARKERS[0],
) -> str:
    """The part of a prompt between the background and the answer."""
    marked = f"{question_marker}{question}"
    return f"{marked}\n{answer_marker}" if answer_marker else marked


def render(
    tokenizer: Tokenizer,
    question: str,
    max_tokens: int,
    *,
    passage: str = "",
    answer: str | None = None,
    question_marker: str = QUESTION_MARKERS[0],
    answer_marker: str = ANSWER_MARKERS[0],
    bos: bool = True,
    eos: bool = True,
) -> Prompt:
    """Tokenise a prompt of at most ``max_tokens`` tokens.

    What is too long loses the end of its passage first, then the beginning of its
    question; the answer is never cut. The passage and the rest are tokenised apart,
    so that what a question's tokens are does not depend on the passage before it.

    Args:
        tokenizer: of the language model.
        question: the question.
        max_tokens: room for everything, special tokens included.
        passage: text for ``Background:``; "" leaves the background out.
        answer: the target; None renders a prompt to generate from.
        question_marker: one of QUESTION_MARKERS.
        answer_marker: one of ANSWER_MARKERS, or "" for an answer on the same line.
        bos: begin with <bos> if the tokenizer has one.
        eos: close the answer with <eos>.

    Raises:
        ValueError: the answer alone does not fit, or tokenises to nothing.
    """
    start = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    text = question_text(question, question_marker, answer_marker)
    if passage:
        text = f"\n\n{text}"
    middle = tokenizer.encode(text)
    target: list[int] = []
    if answer is not None:
        whole = tokenizer.encode(f"{text} {answer}")
        same = 0
        while same < min(len(middle), len(whole)) and middle[same] == whole[same]:
            same += 1
        middle, target = whole[:same], whole[same:]
        if not target:
            raise ValueError(f"answer {answer!r} tokenises to nothing")
        target += [tokenizer.eos_id] * eos
    room = max_tokens - len(start) - len(target)
    if room <= 0:
        raise ValueError(
            f"an answer of {len(target)} tokens does not fit into {max_tokens} tokens: "
            f"{(answer or question)[:80]!r}"
        )
    question_cut = max(len(middle) - room, 0)
    middle = middle[question_cut:]
    background = tokenizer.encode(f"Background: {passage}") if passage else []
    passage_cut = max(len(background) - (room - len(middle)), 0)
    background = background[: len(background) - passage_cut]
    beginning = start + background
    tokens = beginning + middle + target
    return Prompt(
        tokens,
        len(beginning),
        len(tokens) - len(target),
        passage_cut,
        question_cut,
    )
