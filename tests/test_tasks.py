import json

import pytest

from radit_jax.batch import Example
from radit_jax.data.corpus import Document, PassageStore, write_passages
from radit_jax.data.tasks import (
    contains_answer,
    gold_passages,
    normalize,
    read_examples,
)


def _write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_examples_are_read_with_and_without_the_optional_fields(tmp_path):
    path = _write(
        tmp_path / "dev.jsonl",
        {"question": "Q?", "answers": ["a"], "source": "ignored", "context": None},
        {
            "id": 9,
            "question": "R?",
            "answers": ["b", "c"],
            "context": "ctx",
            "kind": "k",
            "document": 4,
            "evidence": "e",
        },
    )
    assert read_examples(path, dataset="demo") == [
        Example("dev-1", "Q?", ("a",), dataset="demo"),
        Example("9", "R?", ("b", "c"), "ctx", "demo", "k", "4", "e"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": " ", "answers": ["a"]}, '"question" is blank'),
        ({"answers": ["a"]}, '"question" is missing'),
        ({"question": 3, "answers": ["a"]}, '"question" is a number'),
        ({"question": "Q?"}, '"answers" is missing'),
        ({"question": "Q?", "answers": []}, "at least one string"),
        ({"question": "Q?", "answers": None}, "at least one string"),
        ({"question": "Q?", "answers": "Rome"}, r'"answers": \["Rome"\]'),
        ({"question": "Q?", "answers": ["a", " "]}, "answer 2 in"),
        ({"question": "Q?", "answers": ["a", 5]}, "answer 2 in .* is 5"),
        ({"question": "Q?", "anwsers": ["a"]}, '"anwsers"; did you mean "answers"'),
        ({"question": "Q?", "answers": ["a"], "contex": "c"}, 'mean "context"'),
        ({"question": "Q?", "answers": ["a"], "id": "x"}, "before, on line 1"),
    ],
)
def test_malformed_rows_are_refused_with_the_line(tmp_path, row, message):
    first = {"id": "x", "question": "Q?", "answers": ["a"]}
    path = _write(tmp_path / "train.jsonl", first, row)
    with pytest.raises(ValueError, match=message) as error:
        read_examples(path)
    assert "train.jsonl, line 2: " in str(error.value)


def test_normalize_is_the_one_of_squad():
    assert normalize("The  643,801 sq. km, a lot!") == "643801 sq km lot"


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("the Euro is used", "euro", True),
        ("in Europe", "euro", False),
        ("Area: 643,801 sq km", "643801", True),
        ("code .fr", "fr", True),
        ("a b", "The", False),  # nothing is left of it, so it must occur as it is
        ("The band", "The", True),
    ],
)
def test_answers_are_found_as_whole_words(text, answer, found):
    assert contains_answer(text, (answer,)) is found


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passages")
    lines = [
        "Area, total: 12 sq km",
        "Area, water: 12 sq km",
        "Coast: 99 km of sand",
        "Roads: no number",
    ]
    documents = [
        Document("a", "A", "", "\n".join(lines)),
        Document("b", "B", "", "Area, total: 12 sq km"),
    ]
    write_passages(documents, folder, max_words=5)
    return PassageStore(folder)


def _example(**fields):
    values = {"document": "a", "evidence": "Area, total: 12 sq km"}
    return Example("x", "Q?", ("12 sq km",), **{**values, **fields})


def test_gold_is_the_passage_of_the_evidence(store):
    assert len(store) == 5
    assert gold_passages(_example(), store) == {0}
    assert gold_passages(_example(evidence="Area, water: 12 sq km"), store) == {1}


def test_without_evidence_every_passage_with_an_answer_is_gold(store):
    assert gold_passages(_example(evidence=""), store) == {0, 1}


def test_gold_must_contain_the_answer(store):
    roads = _example(evidence="Roads: no number")
    assert gold_passages(roads._replace(answers=("77",)), store) == set()
    # The words of the evidence are elsewhere than the answer.
    assert gold_passages(roads._replace(answers=("99",)), store) == set()


@pytest.mark.parametrize("document", ["", "unknown"])
def test_no_gold_for_an_unknown_document(store, document):
    assert gold_passages(_example(document=document), store) == set()
