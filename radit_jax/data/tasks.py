"""Question files to examples, and which passages hold an example's answer."""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from radit_jax.batch import Example
from radit_jax.data.corpus import PassageStore
from radit_jax.data.damage import Damage
from radit_jax.data.jsonl import RecordError, Row, read_rows
from radit_jax.data.prompts import pieces

FIELDS = (
    *("question", "answers", "id", "context", "kind", "document", "evidence"),
    *("template", "query", "turns", "rationale", "choices"),
)
MAX_DAMAGED = "data.max_damaged"  # the field that says how many rows may be damaged

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def read_examples(
    path: str | Path, dataset: str = "", max_damaged: float = 0.0
) -> list[Example]:
    """Read the questions of a JSONL file.

    Every row has ``question`` and ``answers`` (a list; the first is trained on, all are
    accepted), and may have the other fields of ``Example`` that FIELDS lists. A row
    without an id gets the file's stem and the line: ``dev-7``.

    Args:
        path: A UTF-8 file with one JSON object per line.
        dataset: Name that the examples bear in mixtures and reports.
        max_damaged: share of rows that may be damaged; these are left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A row is malformed, an id occurs twice, or a field looks mistyped.
    """
    damage = Damage(MAX_DAMAGED, max_damaged)
    rows = read_rows(path, damage.lost)
    examples = list(
        collect(
            rows,
            lambda row: [_example(row, dataset)],
            damage,
            # There is one file only.
            where=lambda row: f"on line {row.line}",
        )
    )
    damage.finish()
    return examples


def collect(
    rows: Iterable[Row],
    read: Callable[[Row], Sequence[Example]],
    damage: Damage,
    where: Callable[[Row], str] = lambda row: f"in {row.place}",
) -> Iterator[Example]:
    """The examples of records; what is damaged is counted and left out.

    Args:
        rows: the records.
        read: a record to its examples.
        damage: counts; an id that occurs twice is damage too.
        where: says of a record where it is, in the error about such an id.

    Raises:
        ValueError: as ``Damage.note``.
    """
    places: dict[str, str] = {}
    for row in rows:
        damage.records += 1
        try:
            found = read(row)
            for example in found:
                if example.id in places:
                    raise row.error(
                        f'id "{example.id}" has occurred before, '
                        f"{places[example.id]}; every example needs its own"
                    )
        except RecordError as error:
            damage.note(error)
            continue
        places |= dict.fromkeys((example.id for example in found), where(row))
        yield from found


def distinct(texts: Iterable[str]) -> tuple[str, ...]:
    """Each text once, in order, without white space around it; no blank ones."""
    return tuple(dict.fromkeys(filter(None, (text.strip() for text in texts))))


def _example(row: Row, dataset: str) -> Example:
    row.check_names(FIELDS)
    example = Example(
        id=row.identifier("id", default=f"{row.path.stem}-{row.line}"),
        question=row.text("question"),
        answers=_answers(row),
        context=row.text("context", default=""),
        dataset=dataset,
        kind=row.text("kind", default=""),
        document=row.identifier("document", default=""),
        evidence=row.text("evidence", default=""),
        template=row.text("template", default="qa"),
        query=row.text("query", default=""),
        turns=row.texts("turns", default=()),
        rationale=row.text("rationale", default=""),
        choices=row.texts("choices", default=()),
    )
    if not example.question.strip():
        raise row.error('field "question" is blank')
    if len(example.turns) % 2:
        raise row.error(
            f'field "turns" has {len(example.turns)} strings, expected the turns before'
            " the question: the user's and the answer to it, an even number"
        )
    try:
        # Whether the example has what its template needs.
        pieces(example)
    except ValueError as error:
        raise row.error(str(error)) from error
    return example


def _answers(row: Row) -> tuple[str, ...]:
    if "answers" not in row.values:
        row.text("answers")  # raises, and names what is there instead
    answers = row.values["answers"]
    if isinstance(answers, str):
        raise row.error(
            'field "answers" is a string, expected a list of strings:'
            f' "answers": ["{answers}"]'
        )
    if not isinstance(answers, list) or not answers:
        raise row.error(
            'field "answers" must be a list with at least one string, such as'
            ' "answers": ["Paris"]'
        )
    for place, answer in enumerate(answers, start=1):
        if not isinstance(answer, str) or not answer.strip():
            raise row.error(
                f'answer {place} in "answers" is {answer!r}, expected a non-blank'
                " string"
            )
    return tuple(answers)


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space.

    The normalisation of the SQuAD evaluation script (Rajpurkar et al., 2016).
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def contains_answer(text: str, answers: tuple[str, ...]) -> bool:
    """Whether a text contains one of the answers, as whole words, normalised.

    An answer of which the normalisation leaves nothing ("The") must occur as it is.
    """
    padded = f" {normalize(text)} "
    for answer in answers:
        normalized = normalize(answer)
        if f" {normalized} " in padded if normalized else answer in text:
            return True
    return False


def subject(example: Example) -> str:
    """What a question is about: the head of the document id, ``fr`` of
    ``fr/geography``; "" when the file does not say.

    Questions about one thing are not independent, and find the same passages.
    """
    return example.document.split("/")[0]


def gold_passages(example: Example, store: PassageStore) -> set[int]:
    """Ids of the passages that hold an example's evidence and answer.

    These are the passages of ``example.document`` that contain an accepted answer (see
    ``contains_answer``), and of those the ones that share the most words with the
    evidence. Several may tie; without evidence all of them do.

    Args:
        example: A question that names its document.
        store: The corpus.

    Returns:
        Passage ids; none when the document is unknown, or is not in the corpus, or
        holds no answer, or nothing of the evidence.
    """
    if not example.document:
        return set()
    passages = store.get(store.of_document(example.document))
    evidence = Counter(normalize(example.evidence).split())
    overlap = {
        passage.id: (evidence & Counter(normalize(passage.text).split())).total()
        for passage in passages
        if contains_answer(passage.text, example.answers)
    }
    most = max(overlap.values(), default=0)
    if evidence and most == 0:
        return set()
    return {id for id, shared in overlap.items() if shared == most}
