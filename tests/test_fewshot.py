"""Demonstrations: which are drawn, and how they read."""

import pytest

from radit_jax.batch import Example
from radit_jax.data.fewshot import Demonstration, choose, prefix
from radit_jax.data.prompts import TEMPLATES


def _pool(count):
    return [Example(f"t{at}", f"Who is number {at}?", ("me",)) for at in range(count)]


def test_fewer_demonstrations_begin_more_of_them():
    pool = _pool(100)
    many = choose(pool, 64, seed=3)
    assert choose(pool, 5, seed=3) == many[:5]
    assert choose(pool, 0, seed=3) == []
    assert len({example.id for example in many}) == 64
    assert set(many) <= set(pool)


def test_the_seed_says_which():
    pool = _pool(100)
    assert choose(pool, 10, seed=3) == choose(pool, 10, seed=3)
    assert choose(pool, 10, seed=3) != choose(pool, 10, seed=4)
    assert choose(pool, 10, seed=3) != pool[:10]


def test_a_question_asked_is_not_demonstrated():
    asked = [
        Example("dev-1", "who is  Number 2", ("x",)),
        Example("dev-2", "?", ("x",)),
    ]
    for seed in range(20):
        chosen = choose(_pool(4), 3, seed, asked)
        assert {example.id for example in chosen} == {"t0", "t1", "t3"}


def test_leaving_a_question_out_keeps_the_order_of_the_others():
    pool = _pool(20)
    free = choose(pool, 20, seed=0)
    bound = choose(pool, 19, seed=0, asked=[free[4]])
    assert bound == free[:4] + free[5:]


def test_a_question_is_drawn_once():
    pool = [*_pool(2), Example("again", "who is number 1", ("you",))]
    for seed in range(20):
        chosen = choose(pool, 2, seed)
        assert len({example.question.strip("?")[-1] for example in chosen}) == 2


@pytest.mark.parametrize(
    "one",
    [
        Example("a", "Why?", ("x",), context="It rains."),
        Example("a", "Why?", ("x",), turns=("Hello.", "It rains.")),
    ],
)
def test_the_same_words_about_something_else_are_another_question(one):
    assert len(choose([one, Example("b", "Why?", ("x",))], 2, seed=0)) == 2
    assert choose([one], 1, seed=0, asked=[Example("b", "Why?", ("x",))]) == [one]


def test_a_pool_that_is_too_small_is_told_in_numbers():
    pool = _pool(4)
    with pytest.raises(ValueError, match=r"64 demonstrations .* only 3 of the 4"):
        choose(pool, 64, seed=0, asked=pool[:1])
    with pytest.raises(ValueError, match="-1 demonstrations"):
        choose(pool, -1, seed=0)


def test_demonstrations_read_as_in_the_paper():
    shown = [
        Demonstration(Example("a", "Who?", ("Ann", "Anna")), "Town: Ann lives here."),
        Demonstration(Example("b", "Where?", ("There",))),
    ]
    assert prefix(shown) == (
        "Background: Town: Ann lives here.\n\nQ: Who?\nA: Ann\n\n"
        "Q: Where?\nA: There\n\n"
    )
    assert prefix([]) == ""


EXAMPLES = {
    "qa": "Q: A _ b.\nA: two\n\n",
    "dialogue": "Q: hi\nA: yes?\nQ: A _ b.\nA: two\n\n",
    "summary": "A _ b.\nA: two\n\n",
    "cot": "Q: A _ b. Let's think step by step. 1 + 1 A: two\n\n",
    "choices": "Question: A _ b.\nA. one\nB. two\nA: B\n\n",
    "long_qa": "Question: A _ b.\nAnswer: two\n\n",
    "passage_qa": "Text.\nQuestion: A _ b.\nAnswer: two\n\n",
    "situation_qa": "Text. Q: A _ b. A: two\n\n",
    "statement": "Is this statement true? A _ b.\nA: two\n\n",
    "entity": "A _ b.\nOutput the Wikipedia page title of the entity mentioned between "
    "[START_ENT] and [END_ENT] in the given text\nA: two\n\n",
    "relation": "A _ b.\nA: two\n\n",
    "continuation": "A _ b. two\n\n",
    "cloze": "A two b.\n\n",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_can_be_demonstrated(template):
    example = Example(
        "a",
        "A _ b.",
        ("two",),
        context="Text.",
        template=template,
        turns=("hi", "yes?"),
        rationale="1 + 1",
        choices=("one", "two"),
    )
    assert prefix([Demonstration(example)]) == EXAMPLES[template]
    background = prefix([Demonstration(example, "P.")])
    assert background == "Background: P.\n\n" + EXAMPLES[template]
