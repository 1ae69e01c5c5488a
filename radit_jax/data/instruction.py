"""RA-DIT's fine-tuning data (Table 1): published records to examples.

One function per dataset, in the order of the table, from a record of its layout on the
Hugging Face hub to examples; ``SPECS`` says where each dataset is and how it is used,
and in ``note`` what was chosen where the paper is silent.
"""

import ast
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from radit_jax.batch import Example
from radit_jax.data import prompts
from radit_jax.data.jsonl import Row
from radit_jax.data.spec import Spec
from radit_jax.data.tasks import distinct

UNANSWERABLE = "I don't know"  # of SQuAD v2, as RA-DIT has it
SUMMARIZE = "Summarize this article:"  # RA-DIT Table 10

# How MS MARCO says that people found no answer.
_NO_ANSWER = "No Answer Present."
_MATH_LETTERS = "abcde"
# "a ) 38 , b ) 27.675": the comma keeps the b of "( a + b )" apart from a label.
_MATH_LABEL = re.compile(rf"(?:^|,)\s*([{_MATH_LETTERS}])\s*\)")
_AQUA_OPTION = re.compile(r"\s*([A-E])\s*\)(.*)", re.DOTALL)
_QUAREL_LABEL = re.compile(r"\(([A-Z])\)")
# What GSM8K's calculator was given and said: 48/2 = <<48/2=24>>24.
_CALCULATOR = re.compile(r"<<.*?>>")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # or whatever is escaped, such as \{


def _text(row: Row, name: str) -> str:
    """A string without white space around it; blank is an error."""
    text = row.text(name).strip()
    if not text:
        raise row.error(f'field "{name}" is blank')
    return text


def _id(row: Row, dataset: str) -> str:
    """Of a record that was published without one; files of a split count anew."""
    return f"{dataset}-{row.path.stem}-{row.line}"


def _distinct(row: Row, name: str, texts: Iterable[str]) -> tuple[str, ...]:
    """Texts once each, in their order and without blank ones; none is an error."""
    found = distinct(texts)
    if not found:
        raise row.error(f'field "{name}" holds no text')
    return found


def _pick(row: Row, name: str, key: object, options: Mapping[Any, str]) -> str:
    """The option that a field names."""
    if key not in options:
        known = ", ".join(repr(option) for option in options) or "but there are none"
        raise row.error(f'field "{name}" is {key!r}, expected one of {known}')
    if not options[key]:
        raise row.error(f'field "{name}" is {key!r}, and that option is blank')
    return options[key]


def _multiple_choice(
    dataset: str, id: str, question: str, choices: Iterable[str], answer: str
) -> Example:
    """A question shown with its options; what is searched for is the bare one."""
    shown = tuple(choices)
    return Example(
        id=id,
        question=prompts.question_with_choices(question, shown),
        answers=(answer,),
        dataset=dataset,
        query=question,
        choices=shown,
    )


def _threads(rows: Iterator[Row]) -> Iterator[Row]:
    """Messages of oasst1 to threads: one for every user message with a reply."""
    known = set()
    replies: dict[str, list[Row]] = defaultdict(list)  # of "": where trees begin
    for row in rows:
        if row.text("tree_state") != "ready_for_export":
            continue
        known.add(row.text("message_id"))
        # What is below a deleted message is not reached.
        if not row.values.get("deleted"):
            replies[row.text("parent_id", default="")].append(row)
    for parent, children in replies.items():
        if parent and parent not in known:
            raise children[0].error(
                f"message {children[0].text('message_id')}: its parent {parent} is not"
                " among the messages of the split"
            )
    for root in replies[""]:
        yield from _threads_below(root, (), replies)


def _threads_below(
    message: Row, turns: tuple[str, ...], replies: Mapping[str, Sequence[Row]]
) -> Iterator[Row]:
    """The threads that end in a message, or further down its tree."""
    id, role = message.text("message_id"), message.text("role")
    expected = ("prompter", "assistant")[len(turns) % 2]
    if role != expected:
        raise message.error(f'message {id}: role "{role}", expected "{expected}" here')
    # What is wrong with a text is for ``_oasst1`` to say, which loses one thread by it.
    said = message.text("text", default="", checked=False).strip()
    children = replies.get(id, ())
    if role == "prompter" and children:
        reply = min(children, key=_rank).values.get("text")
        thread = {"message_id": id, "turns": list(turns), "text": said, "reply": reply}
        yield replace(message, values=thread)
    for child in children:
        yield from _threads_below(child, (*turns, said), replies)


def _rank(reply: Row) -> float:
    """Place among the replies to a message: 0 is the best, unranked ones are last."""
    ranked = reply.values.get("rank") is not None
    return float(reply.integer("rank")) if ranked else math.inf


def _oasst1(row: Row) -> list[Example]:
    turns, question = row.texts("turns"), _text(row, "text")
    if not all(turns):
        raise row.error(f"a message above {row.text('message_id')} is blank")
    return [
        Example(
            id=row.text("message_id"),
            question=question,
            answers=(_text(row, "reply"),),
            dataset="oasst1",
            template="dialogue",
            query=" ".join([*turns, question]),
            turns=tuple(turns),
        )
    ]


def _commonsense_qa(row: Row) -> list[Example]:
    options = {
        option.text("label"): option.text("text").strip()
        for option in row.rows("choices")
    }
    answer = _pick(row, "answerKey", row.text("answerKey"), options)
    id, question = row.identifier("id"), _text(row, "question")
    return [_multiple_choice("commonsense_qa", id, question, options.values(), answer)]


def _math_qa(row: Row) -> list[Example]:
    options = _math_options(row)
    answer = _pick(row, "correct", row.text("correct").strip(), options)
    id, question = _id(row, "math_qa"), _text(row, "Problem")
    return [_multiple_choice("math_qa", id, question, options.values(), answer)]


def _math_options(row: Row) -> dict[str, str]:
    """``a ) 38 , b ) 27.675 , ...``, or a list of such in Python's notation."""
    text = row.text("options").strip()
    if text.startswith("["):
        try:
            text = ", ".join(ast.literal_eval(text)).strip()
        except (SyntaxError, TypeError, ValueError) as error:
            raise row.error(f'field "options" is not a list: {text!r}') from error
    labels: list[re.Match[str]] = []
    for found in _MATH_LABEL.finditer(text):
        # Within an option a letter may stand after a comma, too.
        if _MATH_LETTERS.startswith(found[1], len(labels)):
            labels.append(found)
    ends = [*(label.start() for label in labels[1:]), len(text)]
    options = {
        label[1]: text[label.end() : end].strip()
        for label, end in zip(labels, ends, strict=False)
    }
    if len(options) < len(_MATH_LETTERS) or labels[0].start() > 0:
        raise row.error(
            f'field "options" is {text!r}, expected options from "a ) " to "e ) "'
        )
    return options


def _web_questions(row: Row) -> list[Example]:
    return [
        Example(
            id=_id(row, "web_questions"),
            question=_text(row, "question"),
            answers=_distinct(row, "answers", row.texts("answers")),
            dataset="web_questions",
        )
    ]


def _wiki_qa(row: Row) -> list[Example]:
    label = row.integer("label")
    if label not in (0, 1):
        raise row.error(f'field "label" is {label}, expected 0 or 1')
    if label == 0:
        return []
    return [
        Example(
            # A question may have several correct sentences.
            id=f"{row.identifier('question_id')}-{row.line}",
            question=_text(row, "question"),
            answers=(_text(row, "answer"),),
            dataset="wiki_qa",
        )
    ]


def _yahoo_answers_qa(row: Row) -> list[Example]:
    return [
        Example(
            id=row.identifier("id"),
            question=_text(row, "question"),
            answers=(_text(row, "answer"),),
            dataset="yahoo_answers_qa",
        )
    ]


def _freebase_qa(row: Row) -> list[Example]:
    names = [
        name
        for parse in row.rows("Parses")
        for answer in parse.rows("Answers")
        for name in answer.texts("AnswersName")
    ]
    return [
        Example(
            id=row.identifier("Question-ID"),
            question=_text(row, "RawQuestion"),
            answers=_distinct(row, "Parses", names),
            dataset="freebase_qa",
        )
    ]


def _ms_marco(row: Row) -> list[Example]:
    written = [*row.texts("wellFormedAnswers"), *row.texts("answers")]
    answers = [text for text in written if text.strip() not in ("", _NO_ANSWER)]
    if not answers:
        return []
    return [
        Example(
            id=row.identifier("query_id"),
            question=_text(row, "query"),
            answers=_distinct(row, "answers", answers),
            dataset="ms_marco",
        )
    ]


def _coqa(row: Row) -> list[Example]:
    story = _text(row, "story")
    questions = [text.strip() for text in row.texts("questions")]
    answers = [text.strip() for text in row.row("answers").texts("input_text")]
    if len(questions) != len(answers) or not all(questions + answers):
        raise row.error(
            f"{len(questions)} questions and {len(answers)} answers, expected as many"
            " of both and none of them blank"
        )
    examples = []
    turns: tuple[str, ...] = ()
    for turn, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        examples.append(
            Example(
                id=f"{_id(row, 'coqa')}-{turn}",
                question=question,
                answers=(answer,),
                context=story,
                dataset="coqa",
                template="dialogue",
                query=" ".join([*turns, question]),
                turns=turns,
            )
        )
        turns = (*turns, question, answer)
    return examples


def _drop(row: Row) -> list[Example]:
    spans = _distinct(row, "answers_spans", row.row("answers_spans").texts("spans"))
    return [
        Example(
            id=row.identifier("query_id"),
            question=_text(row, "question"),
            answers=spans if len(spans) == 1 else (", ".join(spans), *spans),
            context=_text(row, "passage"),
            dataset="drop",
        )
    ]


def _narrativeqa(row: Row) -> list[Example]:
    answers = [answer.text("text") for answer in row.rows("answers")]
    return [
        Example(
            id=_id(row, "narrativeqa"),
            question=_text(row.row("question"), "text"),
            answers=_distinct(row, "answers", answers),
            context=_text(row.row("document").row("summary"), "text"),
            dataset="narrativeqa",
        )
    ]


def _newsqa(row: Row) -> list[Example]:
    return [
        Example(
            id=row.identifier("key"),
            question=_text(row, "question"),
            answers=_distinct(row, "answers", row.texts("answers")),
            context=_text(row, "context"),
            dataset="newsqa",
        )
    ]


def _pubmed_qa(row: Row) -> list[Example]:
    decisions = {decision: decision for decision in ("yes", "no", "maybe")}
    decision = row.text("final_decision").strip()
    return [
        Example(
            id=row.identifier("pubid"),
            question=_text(row, "question"),
            answers=(_pick(row, "final_decision", decision, decisions),),
            context=" ".join(
                _distinct(row, "context", row.row("context").texts("contexts"))
            ),
            dataset="pubmed_qa",
        )
    ]


def _quail(row: Row) -> list[Example]:
    choices = [text.strip() for text in row.texts("answers")]
    right = row.integer("correct_answer_id")
    answer = _pick(row, "correct_answer_id", right, dict(enumerate(choices)))
    id, question = row.identifier("id"), _text(row, "question")
    example = _multiple_choice("quail", id, question, choices, answer)
    return [example._replace(context=_text(row, "context"))]


def _quarel(row: Row) -> list[Example]:
    """The options stand behind the question: ``Who ran farther? (A) Jo (B) Kim``."""
    asked, *parts = _QUAREL_LABEL.split(_text(row, "question"))
    labels, choices = parts[::2], [text.strip() for text in parts[1::2]]
    question = asked.strip()
    if labels != ["A", "B"] or not question:
        raise row.error('field "question": expected a question, "(A)" and "(B)"')
    right = row.integer("answer_index")
    answer = _pick(row, "answer_index", right, dict(enumerate(choices)))
    id = row.identifier("id")
    return [_multiple_choice("quarel", id, question, choices, answer)]


def _squad_v2(row: Row) -> list[Example]:
    answers = row.row("answers").texts("text") or [UNANSWERABLE]
    return [
        Example(
            id=row.identifier("id"),
            question=_text(row, "question"),
            answers=_distinct(row, "answers", answers),
            context=_text(row, "context"),
            dataset="squad_v2",
        )
    ]


def _cnn_dailymail(row: Row) -> list[Example]:
    return [
        Example(
            id=row.identifier("id"),
            question=SUMMARIZE,
            answers=(_text(row, "highlights"),),
            context=_text(row, "article"),
            dataset="cnn_dailymail",
            template="summary",
        )
    ]


def _aqua_rat(row: Row) -> list[Example]:
    options = {}
    for option in row.texts("options"):
        found = _AQUA_OPTION.fullmatch(option)
        if not found:
            raise row.error(f'option {option!r}, expected one such as "A)125"')
        options[found[1]] = found[2].strip()
    answer = _pick(row, "correct", row.text("correct").strip(), options)
    id, question = _id(row, "aqua_rat"), _text(row, "question")
    example = _multiple_choice("aqua_rat", id, question, options.values(), answer)
    return [example._replace(rationale=_text(row, "rationale"), template="cot")]


def _ecqa(row: Row) -> list[Example]:
    choices = [row.text(f"q_op{number}").strip() for number in range(1, 6)]
    options = {choice: choice for choice in choices}
    answer = _pick(row, "q_ans", row.text("q_ans").strip(), options)
    id, question = row.identifier("q_no"), _text(row, "q_text")
    example = _multiple_choice("ecqa", id, question, choices, answer)
    return [example._replace(rationale=_text(row, "taskB"), template="cot")]


def _gsm8k(row: Row) -> list[Example]:
    chain, _, answer = row.text("answer").rpartition("####")
    rationale = _CALCULATOR.sub("", chain).strip()
    if not rationale or not answer.strip():
        raise row.error('field "answer": expected a chain of thought, "####", a number')
    return [
        Example(
            id=_id(row, "gsm8k"),
            question=_text(row, "question"),
            answers=(answer.strip(),),
            dataset="gsm8k",
            template="cot",
            rationale=rationale,
        )
    ]


def _competition_math(row: Row) -> list[Example]:
    solution = _text(row, "solution")
    answer = _boxed(solution)
    if not answer:
        raise row.error(r'field "solution": no answer in \boxed{...}')
    return [
        Example(
            id=_id(row, "competition_math"),
            question=_text(row, "problem"),
            answers=(answer,),
            dataset="competition_math",
            template="cot",
            rationale=solution,
        )
    ]


def _boxed(solution: str) -> str:
    r"""What the last ``\boxed{...}`` holds, or ``\boxed 5`` up to the formula's end.

    "" if there is none, or its braces do not match.
    """
    boxes = list(_BOX.finditer(solution))
    if not boxes:
        return ""
    rest = solution[boxes[-1].end() :]
    if not rest.startswith("{"):
        return rest.split("$")[0].strip()
    depth = 0
    for found in _BRACE.finditer(rest):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return rest[1 : found.start()].strip()
    return ""


def _strategyqa(row: Row) -> list[Example]:
    answer = row.values.get("answer")
    if not isinstance(answer, bool):
        raise row.error(f'field "answer" is {answer!r}, expected true or false')
    return [
        Example(
            id=row.identifier("qid"),
            question=_text(row, "question"),
            answers=("yes" if answer else "no",),
            dataset="strategyqa",
            template="cot",
            rationale=" ".join(_distinct(row, "facts", row.texts("facts"))),
        )
    ]


_TRAIN_DEV = {"train": "train", "dev": "validation"}
_TRAIN_TEST = {"train": "train", "test": "test"}
_TRAIN_DEV_TEST = {"train": "train", "dev": "validation", "test": "test"}

SPECS: tuple[Spec, ...] = (
    Spec(
        name="oasst1",
        category="Dialogue",
        read=_oasst1,
        gather=_threads,
        hub="OpenAssistant/oasst1",
        splits=_TRAIN_DEV,
        columns=(
            *("message_id", "parent_id", "text", "role"),
            *("rank", "deleted", "tree_state"),
        ),
        licence="apache-2.0",
        template="dialogue",
        used="LR",
        size=31_598,
        note=(
            "Every user message that has a reply is an example, with the messages "
            "above it as turns and its best-ranked reply as answer (unranked ones "
            "last, then the order of the file). Left out: trees that are not "
            "ready_for_export, deleted messages and what is below them. All languages "
            "are kept, although the corpus is English: the paper names no filter, and "
            "its 31,598 examples are over a third of all 84,437 messages of the split."
        ),
    ),
    Spec(
        name="commonsense_qa",
        category="Open-domain QA",
        read=_commonsense_qa,
        hub="tau/commonsense_qa",
        splits=_TRAIN_DEV,
        columns=("id", "question", "choices", "answerKey"),
        licence="mit",
        used="LR",
        size=9_741,
        note=(
            "The options are shown below the question, and the answer is the text of "
            "the right one. The published test split has no answers."
        ),
    ),
    Spec(
        name="math_qa",
        category="Open-domain QA",
        read=_math_qa,
        hub="allenai/math_qa",
        splits=_TRAIN_DEV_TEST,
        columns=("Problem", "options", "correct"),
        licence="apache-2.0",
        tfds="math_qa",
        used="LR",
        size=29_837,
        note=(
            "Options as in commonsense_qa. The published rationale is not used: RA-DIT "
            "counts the dataset as QA, not as chain of thought."
        ),
    ),
    Spec(
        name="web_questions",
        category="Open-domain QA",
        read=_web_questions,
        hub="stanfordnlp/web_questions",
        splits=_TRAIN_TEST,
        columns=("question", "answers"),
        licence="unknown",
        tfds="web_questions",
        used="LR",
        size=3_778,
    ),
    Spec(
        name="wiki_qa",
        category="Open-domain QA",
        read=_wiki_qa,
        hub="microsoft/wiki_qa",
        splits=_TRAIN_DEV_TEST,
        columns=("question_id", "question", "answer", "label"),
        licence="other (Microsoft Research Data License Agreement)",
        used="LR",
        size=20_360,
        note=(
            "The size is that of all pairs of a question and a sentence. Only those "
            "whose sentence answers the question (label 1) become examples, because "
            "the others have no answer to learn."
        ),
    ),
    Spec(
        name="yahoo_answers_qa",
        category="Open-domain QA",
        read=_yahoo_answers_qa,
        hub="community-datasets/yahoo_answers_qa",
        splits={"train": "train"},
        columns=("id", "question", "answer"),
        licence="unknown",
        used="LR",
        size=87_362,
        note="The answer is the one that was chosen as best; no other is accepted.",
    ),
    Spec(
        name="freebase_qa",
        category="Open-domain QA",
        read=_freebase_qa,
        hub="KelvinJiang/freebase_qa",
        splits=_TRAIN_DEV_TEST,
        columns=("Question-ID", "RawQuestion", "Parses"),
        licence="unknown",
        used="R",
        size=20_358,
        note=(
            "The question is the one before processing, and the answers are those of "
            "all parses. One record is one question, as on the hub; the authors' file "
            "holds all of them in one object."
        ),
    ),
    Spec(
        name="ms_marco",
        category="Open-domain QA",
        read=_ms_marco,
        hub="microsoft/ms_marco",
        config="v1.1",
        splits=_TRAIN_DEV,
        columns=("query_id", "query", "answers", "wellFormedAnswers"),
        licence="not stated",
        used="R",
        size=80_143,
        note=(
            "The paper does not name the version: v1.1 has 82,326 training questions, "
            "v2.1 808,731, and both read alike. Well-formed answers come first where "
            "there are some; questions without an answer are left out, and so are all "
            "passages. The published test split has no answers."
        ),
    ),
    Spec(
        name="coqa",
        category="Reading comprehension",
        read=_coqa,
        hub="stanfordnlp/coqa",
        splits=_TRAIN_DEV,
        columns=("story", "questions", "answers"),
        licence="other (by source: CC BY-SA 4.0, MSR-LA, RACE's own, Apache-2.0)",
        template="dialogue",
        context="only",
        search=False,
        used="L",
        size=108_647,
        note=(
            "Every question is an example, with the earlier questions and answers "
            "about its story as turns. Context only: the questions refer to the story "
            "and to each other. TensorFlow Datasets calls the dev split test."
        ),
    ),
    Spec(
        name="drop",
        category="Reading comprehension",
        read=_drop,
        hub="ucinlp/drop",
        splits=_TRAIN_DEV,
        columns=("query_id", "passage", "question", "answers_spans"),
        licence="cc-by-sa-4.0",
        context="only",
        search=False,
        used="L",
        size=77_400,
        note=(
            "An answer of several spans is learnt as all of them, separated by "
            "commas. In the dev split several spans may also be what several people "
            "said, so each of them is accepted. Context only: the questions are about "
            "the game or the year that the passage tells of, without naming it."
        ),
    ),
    Spec(
        name="narrativeqa",
        category="Reading comprehension",
        read=_narrativeqa,
        hub="deepmind/narrativeqa",
        splits=_TRAIN_DEV_TEST,
        columns=("document", "question", "answers"),
        licence="apache-2.0",
        context="only",
        search=False,
        used="L",
        size=32_747,
        note=(
            "The context is the summary, which the questions were written from; a "
            "whole story does not fit. Context only: a story is not named in its "
            "questions."
        ),
    ),
    Spec(
        name="newsqa",
        category="Reading comprehension",
        read=_newsqa,
        hub="lucadiliello/newsqa",
        splits=_TRAIN_DEV,
        columns=("key", "context", "question", "answers"),
        licence="not stated",
        context="only",
        search=False,
        used="L",
        size=74_160,
        note=(
            "The copy of the MRQA 2019 shared task, whose training split has the "
            "size of the paper; the original has to be put together from CNN stories. "
            "Context only: the questions are about the events of one article."
        ),
    ),
    Spec(
        name="pubmed_qa",
        category="Reading comprehension",
        read=_pubmed_qa,
        hub="qiaojin/PubMedQA",
        config="pqa_labeled",
        splits={"train": "train"},
        columns=("pubid", "question", "context", "final_decision"),
        licence="mit",
        context="add",
        used="LR",
        size=1_000,
        note=(
            "The answer is the decision (yes, no or maybe), which is what the 1,000 "
            "questions were labelled with; the long answer needs no label. The "
            "context is the abstract. Retrieved passages besides it: a research "
            "question stands for itself, and R-FT uses it."
        ),
    ),
    Spec(
        name="quail",
        category="Reading comprehension",
        read=_quail,
        hub="textmachinelab/quail",
        splits=_TRAIN_DEV,
        columns=("id", "context", "question", "answers", "correct_answer_id"),
        licence="cc-by-nc-sa-4.0",
        context="only",
        search=False,
        used="L",
        size=10_246,
        note=(
            "Options as in commonsense_qa. Context only: the questions are about the "
            "people of one text. The challenge split is not read."
        ),
    ),
    Spec(
        name="quarel",
        category="Reading comprehension",
        read=_quarel,
        hub="community-datasets/quarel",
        splits=_TRAIN_DEV_TEST,
        columns=("id", "question", "answer_index"),
        licence="not stated",
        used="LR",
        size=1_941,
        note=(
            "Options as in commonsense_qa, cut off the end of the question. The story "
            "is part of the question, so there is no context but what is retrieved."
        ),
    ),
    Spec(
        name="squad_v2",
        category="Reading comprehension",
        read=_squad_v2,
        hub="rajpurkar/squad_v2",
        splits=_TRAIN_DEV,
        columns=("id", "question", "context", "answers"),
        licence="cc-by-sa-4.0",
        tfds="squad/v2.0",
        context="only",
        search=False,
        used="L",
        size=130_319,
        note=(
            'The answer is "I don\'t know" where there is none (RA-DIT). Context only: '
            "whether a question has an answer depends on its paragraph, and another "
            "passage might hold one."
        ),
    ),
    Spec(
        name="cnn_dailymail",
        category="Summarization",
        read=_cnn_dailymail,
        hub="abisee/cnn_dailymail",
        config="3.0.0",
        splits=_TRAIN_DEV_TEST,
        columns=("id", "article", "highlights"),
        licence="apache-2.0",
        template="summary",
        tfds="cnn_dailymail",
        context="only",
        search=False,
        used="L",
        size=287_113,
        note="Context only: the article is what is summarised.",
    ),
    Spec(
        name="aqua_rat",
        category="Chain of thought",
        read=_aqua_rat,
        hub="deepmind/aqua_rat",
        config="raw",
        splits=_TRAIN_DEV_TEST,
        columns=("question", "options", "rationale", "correct"),
        licence="apache-2.0",
        template="cot",
        used="L",
        size=97_467,
        note=(
            "RA-DIT has the set from OPT-IML; this is the original. Options as in "
            "commonsense_qa; the rationale is the dataset's."
        ),
    ),
    Spec(
        name="ecqa",
        category="Chain of thought",
        read=_ecqa,
        hub="tasksource/ecqa",
        splits=_TRAIN_DEV_TEST,
        columns=(
            *("q_no", "q_text", "q_op1", "q_op2", "q_op3", "q_op4", "q_op5"),
            *("q_ans", "taskB"),
        ),
        licence="cdla-sharing-1.0",
        template="cot",
        used="L",
        size=7_598,
        note=(
            "RA-DIT has the set from OPT-IML; this is the original. Options as in "
            "commonsense_qa; the rationale is the free-flow explanation (taskB), not "
            "the lists for and against options (taskA)."
        ),
    ),
    Spec(
        name="gsm8k",
        category="Chain of thought",
        read=_gsm8k,
        hub="openai/gsm8k",
        config="main",
        splits=_TRAIN_TEST,
        columns=("question", "answer"),
        licence="mit",
        template="cot",
        tfds="gsm8k",
        used="L",
        size=7_473,
        note=(
            "RA-DIT has the set from OPT-IML; this is the original. The rationale is "
            "what is before ####, without the calculator's <<...>>."
        ),
    ),
    Spec(
        name="competition_math",
        category="Chain of thought",
        read=_competition_math,
        hub="",
        splits=_TRAIN_TEST,
        columns=("problem", "solution"),
        licence="mit",
        template="cot",
        used="L",
        size=7_500,
        note=(
            "RA-DIT has the set from OPT-IML. The original was hendrycks/"
            "competition_math on the hub, where access ended in January 2025 after a "
            "copyright claim; own copies are read in that layout. The answer is what "
            "the last box of the solution holds, the rationale is all of it."
        ),
    ),
    Spec(
        name="strategyqa",
        category="Chain of thought",
        read=_strategyqa,
        hub="tasksource/strategy-qa",
        splits={"train": "train"},
        columns=("qid", "question", "answer", "facts"),
        licence="not stated (of the original: mit)",
        template="cot",
        used="L",
        size=2_290,
        note=(
            "RA-DIT has the set from OPT-IML; this is the original. The rationale is "
            "the facts; the decomposition consists of questions, which lead to no "
            "answer."
        ),
    ),
)
