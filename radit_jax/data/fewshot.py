"""Demonstrations: answered questions that stand in a prompt before the one asked.

RA-DIT's 5-shot and 64-shot evaluation: a demonstration is shown with the best passage
that was retrieved for it, the question asked with each of its own in turn.
"""

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from radit_jax.batch import Example
from radit_jax.data.prompts import pieces
from radit_jax.data.tasks import normalize


class Demonstration(NamedTuple):
    """An answered question, and what it is shown with."""

    example: Example
    passage: str = ""  # text of its best passage; "" for none


def choose(
    pool: Sequence[Example], count: int, seed: int, asked: Iterable[Example] = ()
) -> list[Example]:
    """Draw examples to demonstrate a task with, the same for all questions asked.

    A smaller count gives the beginning of what a larger one gives. No question that is
    asked is drawn, and none twice; the words are compared, not ids.

    Args:
        pool: Examples of the training split.
        count: How many to draw.
        seed: Of the order in which they are drawn.
        asked: The questions that the demonstrations are for.

    Raises:
        ValueError: The pool is too small, or the count negative.
    """
    if count < 0:
        raise ValueError(f"{count} demonstrations are asked for, expected 0 or more")
    order = list(range(len(pool)))
    random.Random(seed).shuffle(order)
    taken = {_words(example) for example in asked}
    chosen: list[Example] = []
    for place in order:
        if len(chosen) == count:
            break
        words = _words(pool[place])
        if words not in taken:
            taken.add(words)
            chosen.append(pool[place])
    if len(chosen) < count:
        raise ValueError(
            f"{count} demonstrations are asked for, and only {len(chosen)} of the "
            f"{len(pool)} examples to draw from are different questions that are not "
            "asked"
        )
    return chosen


def _words(example: Example) -> str:
    """Of a question and what it cannot be understood without."""
    return normalize(" ".join((example.context, *example.turns, example.question)))


def prefix(demonstrations: Iterable[Demonstration]) -> str:
    """What stands in a prompt before the background of the question asked.

    Every demonstration is laid out as the question asked is: its background if it has
    any, its question as its template has it (see ``data.prompts``) and its answer. An
    empty line ends it.
    """
    shown = []
    for example, passage in demonstrations:
        background = f"Background: {passage}\n\n" if passage else ""
        answered = "".join(piece.text for piece in pieces(example))
        shown.append(f"{background}{answered}\n\n")
    return "".join(shown)
