"""Which questions to show: drawn at random, not picked."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from radit_jax.evaluation.records import Generation


class Choice(NamedTuple):
    """Questions to show, each with every system's answer, and out of how many."""

    questions: list[list[Generation]]
    of_split: int  # systems differ in the task's own metric
    split: int
    of_agreed: int
    agreed: int


def by_question(
    generations: Sequence[Generation],
) -> dict[tuple[str, str], list[Generation]]:
    """(dataset, question id) -> every system's answer."""
    questions: dict[tuple[str, str], list[Generation]] = {}
    for g in generations:
        questions.setdefault((g.dataset, g.question_id), []).append(g)
    return questions


def choose(generations: Sequence[Generation], examples: int, seed: int) -> Choice:
    """Drawn at random: half of them where systems differ.

    Args:
        generations: of all systems.
        examples: how many questions.
        seed: of the draw.
    """
    questions = by_question(generations)
    split = [k for k, v in questions.items() if len({g.value for g in v}) > 1]
    apart = set(split)
    agreed = [k for k in questions if k not in apart]
    rng = random.Random(seed)
    # Where one side is short the other fills up.
    of_split = min(len(split), max((examples + 1) // 2, examples - len(agreed)))
    of_agreed = min(len(agreed), examples - of_split)
    keys = rng.sample(split, of_split) + rng.sample(agreed, of_agreed)
    return Choice(
        [questions[key] for key in keys], of_split, len(split), of_agreed, len(agreed)
    )


def sample_questions(
    generations: Sequence[Generation], most: int, seed: int
) -> list[list[Generation]]:
    """As many questions of every dataset as there is room for, in their order.

    Small datasets are taken whole, and leave their room to the larger ones.

    Args:
        generations: of all systems.
        most: questions of all datasets together.
        seed: of the draw.
    """
    questions = by_question(generations)
    of_dataset: dict[str, list[tuple[str, str]]] = {}
    for key in questions:
        of_dataset.setdefault(key[0], []).append(key)
    taken: set[tuple[str, str]] = set()
    rng = random.Random(seed)
    smallest_first = sorted(of_dataset.values(), key=len)
    for place, keys in enumerate(smallest_first):
        room = (most - len(taken)) // (len(smallest_first) - place)
        taken.update(rng.sample(keys, min(room, len(keys))))
    return [found for key, found in questions.items() if key in taken]
