"""Records of RA-DIT Table 1 in their published layouts, and what becomes of them."""

import copy
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from radit_jax.batch import Example
from radit_jax.data import prompts
from radit_jax.data.instruction import SPECS
from radit_jax.data.jsonl import RecordError, Row
from radit_jax.data.spec import CONTEXT_ROLES

BY_NAME = {spec.name: spec for spec in SPECS}

# Name: category, use, training examples. Typed from the table, not from the code.
TABLE_1 = {
    "oasst1": ("Dialogue", "LR", 31598),
    "commonsense_qa": ("Open-domain QA", "LR", 9741),
    "math_qa": ("Open-domain QA", "LR", 29837),
    "web_questions": ("Open-domain QA", "LR", 3778),
    "wiki_qa": ("Open-domain QA", "LR", 20360),
    "yahoo_answers_qa": ("Open-domain QA", "LR", 87362),
    "freebase_qa": ("Open-domain QA", "R", 20358),
    "ms_marco": ("Open-domain QA", "R", 80143),
    "coqa": ("Reading comprehension", "L", 108647),
    "drop": ("Reading comprehension", "L", 77400),
    "narrativeqa": ("Reading comprehension", "L", 32747),
    "newsqa": ("Reading comprehension", "L", 74160),
    "pubmed_qa": ("Reading comprehension", "LR", 1000),
    "quail": ("Reading comprehension", "L", 10246),
    "quarel": ("Reading comprehension", "LR", 1941),
    "squad_v2": ("Reading comprehension", "L", 130319),
    "cnn_dailymail": ("Summarization", "L", 287113),
    "aqua_rat": ("Chain of thought", "L", 97467),
    "ecqa": ("Chain of thought", "L", 7598),
    "gsm8k": ("Chain of thought", "L", 7473),
    "competition_math": ("Chain of thought", "L", 7500),
    "strategyqa": ("Chain of thought", "L", 2290),
}


def _message(id, parent, role, text, **fields):
    message = {
        "message_id": id,
        "parent_id": parent,
        "user_id": "u1",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": text,
        "role": role,
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": None,
        "synthetic": False,
        "model_name": None,
        "detoxify": None,
        "message_tree_id": "m1",
        "tree_state": "ready_for_export",
        "emojis": None,
        "labels": {"name": ["spam"], "value": [0.0], "count": [3]},
    }
    return message | fields


# A tree with three replies, of which the last is ranked best and goes on; a tree in
# another language whose replies have no rank; and what is to be left out.
MESSAGES = [
    _message("m3", "m1", "assistant", "On tea.", rank=1),
    _message("m1", None, "prompter", " How do I brew tea? "),
    _message("m2", "m1", "assistant", "No idea.", rank=None),
    _message("m4", "m1", "assistant", "Steep it.\nThen wait.", rank=0),
    _message("m5", "m4", "prompter", "How long?"),
    _message("m6", "m5", "assistant", "Three minutes.", deleted=True, rank=0),
    _message("m7", "m5", "assistant", "Four minutes.", rank=1),
    _message("m8", "m7", "prompter", "Nobody answers this."),
    _message("m9", "m6", "prompter", "Below a deleted message."),
    _message("m10", "m9", "assistant", "So is this."),
    _message("n1", None, "prompter", "¿Qué es el té?", lang="es"),
    _message("n2", "n1", "assistant", "Una bebida.", lang="es"),
    _message("n3", "n1", "assistant", "Una planta.", lang="es"),
    _message("p1", None, "prompter", "A deleted tree.", deleted=True),
    _message("p2", "p1", "assistant", "All of it."),
    _message("o1", None, "prompter", "Low.", tree_state="aborted_low_grade"),
    _message("o2", "o1", "assistant", "Grade.", tree_state="aborted_low_grade"),
]


RECORDS = {
    "oasst1": (
        MESSAGES,
        [
            Example(
                id="m1",
                question="How do I brew tea?",
                answers=("Steep it.\nThen wait.",),
                dataset="oasst1",
                template="dialogue",
                query="How do I brew tea?",
            ),
            Example(
                id="m5",
                question="How long?",
                answers=("Four minutes.",),
                dataset="oasst1",
                template="dialogue",
                query="How do I brew tea? Steep it.\nThen wait. How long?",
                turns=("How do I brew tea?", "Steep it.\nThen wait."),
            ),
            Example(
                id="n1",
                question="¿Qué es el té?",
                answers=("Una bebida.",),
                dataset="oasst1",
                template="dialogue",
                query="¿Qué es el té?",
            ),
        ],
    ),
    "commonsense_qa": (
        [
            {
                "id": "c1",
                "question": "Where would you keep milk?",
                "question_concept": "milk",
                "choices": {
                    "label": ["A", "B", "C", "D", "E"],
                    "text": ["attic", "fridge ", "car", "shoe", "sky"],
                },
                "answerKey": "B",
            },
        ],
        [
            Example(
                id="c1",
                question=(
                    "Where would you keep milk?\n"
                    "A. attic\nB. fridge\nC. car\nD. shoe\nE. sky"
                ),
                answers=("fridge",),
                dataset="commonsense_qa",
                query="Where would you keep milk?",
                choices=("attic", "fridge", "car", "shoe", "sky"),
            ),
        ],
    ),
    "math_qa": (
        [
            {
                "Problem": "what is 600 + 600 ? ",
                "Rationale": '"add . answer : b"',
                "options": (
                    "a ) ( 1 + b ) , b ) 1 , 200 , c ) ( a , b ) , d ) rs . 3 , "
                    "e ) none of these"
                ),
                "correct": "b",
                "annotated_formula": "add(600, 600)",
                "linear_formula": "add(n0,n0)|",
                "category": "general",
            },
            {
                "Problem": "what is 1 / 2 ?",
                "Rationale": '"half . answer : e"',
                "options": "['a ) 3 : 1', 'b ) 2', 'c ) 4', 'd ) 5', 'e ) 0.5']",
                "correct": "e",
                "annotated_formula": "divide(1, 2)",
                "linear_formula": "divide(n0,n1)|",
                "category": "general",
            },
        ],
        [
            Example(
                id="math_qa-train-1",
                question=(
                    "what is 600 + 600 ?\nA. ( 1 + b )\nB. 1 , 200\nC. ( a , b )\n"
                    "D. rs . 3\nE. none of these"
                ),
                answers=("1 , 200",),
                dataset="math_qa",
                query="what is 600 + 600 ?",
                choices=(
                    "( 1 + b )",
                    "1 , 200",
                    "( a , b )",
                    "rs . 3",
                    "none of these",
                ),
            ),
            Example(
                id="math_qa-train-2",
                question="what is 1 / 2 ?\nA. 3 : 1\nB. 2\nC. 4\nD. 5\nE. 0.5",
                answers=("0.5",),
                dataset="math_qa",
                query="what is 1 / 2 ?",
                choices=("3 : 1", "2", "4", "5", "0.5"),
            ),
        ],
    ),
    "web_questions": (
        [
            {
                "url": "http://www.freebase.com/view/en/utopia",
                "question": "what do people in utopia speak?",
                "answers": ["Utopian", "Latin ", "Utopian"],
            },
        ],
        [
            Example(
                id="web_questions-train-1",
                question="what do people in utopia speak?",
                answers=("Utopian", "Latin"),
                dataset="web_questions",
            ),
        ],
    ),
    "wiki_qa": (
        [
            {
                "question_id": "Q1",
                "question": "how are kites flown?",
                "document_title": "Kite",
                "answer": "Kites are often red .",
                "label": 0,
            },
            {
                "question_id": "Q1",
                "question": "how are kites flown?",
                "document_title": "Kite",
                "answer": "A kite is flown on a line .",
                "label": 1,
            },
            {
                "question_id": "Q1",
                "question": "how are kites flown?",
                "document_title": "Kite",
                "answer": "Wind carries it .",
                "label": 1,
            },
        ],
        [
            Example(
                id="Q1-2",
                question="how are kites flown?",
                answers=("A kite is flown on a line .",),
                dataset="wiki_qa",
            ),
            Example(
                id="Q1-3",
                question="how are kites flown?",
                answers=("Wind carries it .",),
                dataset="wiki_qa",
            ),
        ],
    ),
    "yahoo_answers_qa": (
        [
            {
                "id": "2020338",
                "question": "Why does bread rise?",
                "answer": "Yeast makes gas.",
                "nbestanswers": ["Because it is warm.", "Yeast makes gas."],
                "main_category": "Food & Drink",
            },
        ],
        [
            Example(
                id="2020338",
                question="Why does bread rise?",
                answers=("Yeast makes gas.",),
                dataset="yahoo_answers_qa",
            ),
        ],
    ),
    "freebase_qa": (
        [
            {
                "Question-ID": "FreebaseQA-train-0",
                "RawQuestion": "Which film has the lion?",
                "ProcessedQuestion": "which film has the lion",
                "Parses": {
                    "Parse-Id": ["FreebaseQA-train-0.P0", "FreebaseQA-train-0.P1"],
                    "PotentialTopicEntityMention": ["lion", "film"],
                    "TopicEntityName": ["lion", "film"],
                    "TopicEntityMid": ["m.01", "m.02"],
                    "InferentialChain": ["film.a", "film.b"],
                    "Answers": [
                        {"AnswersMid": ["m.03"], "AnswersName": [["the lion"]]},
                        {
                            "AnswersMid": ["m.03", "m.04"],
                            "AnswersName": [["the lion"], ["lions", "two lions"]],
                        },
                    ],
                },
            },
        ],
        [
            Example(
                id="FreebaseQA-train-0",
                question="Which film has the lion?",
                answers=("the lion", "lions", "two lions"),
                dataset="freebase_qa",
            ),
        ],
    ),
    "ms_marco": (
        [
            {
                "answers": ["in june"],
                "passages": {
                    "is_selected": [0, 1],
                    "passage_text": ["Roses.", "They bloom in june."],
                    "url": ["http://a.test", "http://b.test"],
                },
                "query": "when do roses bloom",
                "query_id": 19699,
                "query_type": "entity",
                "wellFormedAnswers": ["Roses bloom in June."],
            },
            {
                "answers": ["No Answer Present."],
                "passages": {
                    "is_selected": [0],
                    "passage_text": ["Roses."],
                    "url": ["http://a.test"],
                },
                "query": "why do roses bloom",
                "query_id": 19700,
                "query_type": "description",
                "wellFormedAnswers": [],
            },
            {
                "answers": [],
                "passages": {
                    "is_selected": [0],
                    "passage_text": ["Roses."],
                    "url": ["http://a.test"],
                },
                "query": "where do roses bloom",
                "query_id": 19701,
                "query_type": "location",
                "wellFormedAnswers": [],
            },
        ],
        [
            Example(
                id="19699",
                question="when do roses bloom",
                answers=("Roses bloom in June.", "in june"),
                dataset="ms_marco",
            ),
        ],
    ),
    "coqa": (
        [
            {
                "source": "mctest",
                "story": "Ann saw a cloud.",
                "questions": ["Who saw it?", "What?", "Was it big?"],
                "answers": {
                    "input_text": ["Ann", "a cloud", "unknown"],
                    "answer_start": [0, 8, -1],
                    "answer_end": [3, 15, -1],
                },
            },
            {
                "source": "wikipedia",
                "story": "Bees fly.",
                "questions": ["What flies?"],
                "answers": {
                    "input_text": ["Bees"],
                    "answer_start": [0],
                    "answer_end": [4],
                },
            },
        ],
        [
            Example(
                id="coqa-train-1-0",
                question="Who saw it?",
                answers=("Ann",),
                context="Ann saw a cloud.",
                dataset="coqa",
                template="dialogue",
                query="Who saw it?",
            ),
            Example(
                id="coqa-train-1-1",
                question="What?",
                answers=("a cloud",),
                context="Ann saw a cloud.",
                dataset="coqa",
                template="dialogue",
                query="Who saw it? Ann What?",
                turns=("Who saw it?", "Ann"),
            ),
            Example(
                id="coqa-train-1-2",
                question="Was it big?",
                answers=("unknown",),
                context="Ann saw a cloud.",
                dataset="coqa",
                template="dialogue",
                query="Who saw it? Ann What? a cloud Was it big?",
                turns=("Who saw it?", "Ann", "What?", "a cloud"),
            ),
            Example(
                id="coqa-train-2-0",
                question="What flies?",
                answers=("Bees",),
                context="Bees fly.",
                dataset="coqa",
                template="dialogue",
                query="What flies?",
            ),
        ],
    ),
    "drop": (
        [
            {
                "section_id": "nfl_1",
                "query_id": "q1",
                "passage": " The Reds beat the Blues 7-3. ",
                "question": "By how many points?",
                "answers_spans": {"spans": ["4", "4"], "types": ["number", "number"]},
            },
            {
                "section_id": "nfl_1",
                "query_id": "q2",
                "passage": "The Reds beat the Blues 7-3.",
                "question": "Which teams played?",
                "answers_spans": {
                    "spans": ["Reds", "Blues"],
                    "types": ["span", "span"],
                },
            },
        ],
        [
            Example(
                id="q1",
                question="By how many points?",
                answers=("4",),
                context="The Reds beat the Blues 7-3.",
                dataset="drop",
            ),
            Example(
                id="q2",
                question="Which teams played?",
                answers=("Reds, Blues", "Reds", "Blues"),
                context="The Reds beat the Blues 7-3.",
                dataset="drop",
            ),
        ],
    ),
    "narrativeqa": (
        [
            {
                "document": {
                    "id": "0f",
                    "kind": "gutenberg",
                    "url": "http://a.test/tale",
                    "file_size": 80473,
                    "word_count": 41000,
                    "start": "A TALE BY",
                    "end": "THE END",
                    "summary": {
                        "text": " Jo finds a map. ",
                        "tokens": ["Jo", "finds", "a", "map", "."],
                        "url": "http://a.test/wiki",
                        "title": "A Tale",
                    },
                    "text": "A TALE BY NOBODY ...",
                },
                "question": {
                    "text": "What does Jo find?",
                    "tokens": ["What", "does", "Jo", "find", "?"],
                },
                "answers": [
                    {"text": "A map.", "tokens": ["A", "map", "."]},
                    {"text": "a map", "tokens": ["a", "map"]},
                ],
            },
        ],
        [
            Example(
                id="narrativeqa-train-1",
                question="What does Jo find?",
                answers=("A map.", "a map"),
                context="Jo finds a map.",
                dataset="narrativeqa",
            ),
        ],
    ),
    "newsqa": (
        [
            {
                "context": "NOWHERE (CNN) -- A bridge opened Friday.",
                "question": "What opened?",
                "answers": ["A bridge", "bridge"],
                "key": "da0e6b66e04d439fa1ba23c32de07e50",
                "labels": [{"end": [22], "start": [15]}, {"end": [22], "start": [17]}],
            },
        ],
        [
            Example(
                id="da0e6b66e04d439fa1ba23c32de07e50",
                question="What opened?",
                answers=("A bridge", "bridge"),
                context="NOWHERE (CNN) -- A bridge opened Friday.",
                dataset="newsqa",
            ),
        ],
    ),
    "pubmed_qa": (
        [
            {
                "pubid": 21645374,
                "question": "Does tea help?",
                "context": {
                    "contexts": ["Tea was drunk. ", "Nobody slept."],
                    "labels": ["BACKGROUND", "RESULTS"],
                    "meshes": ["Tea", "Sleep", "Humans"],
                    "reasoning_required_pred": ["m", "a", "y", "b", "e"],
                    "reasoning_free_pred": ["n", "o"],
                },
                "long_answer": "Tea may help.",
                "final_decision": "maybe",
            },
        ],
        [
            Example(
                id="21645374",
                question="Does tea help?",
                answers=("maybe",),
                context="Tea was drunk. Nobody slept.",
                dataset="pubmed_qa",
            ),
        ],
    ),
    "quail": (
        [
            {
                "id": "f001_19",
                "context_id": "f001",
                "question_id": "19",
                "domain": "fiction",
                "metadata": {"author": "A", "title": "T", "url": "http://a.test"},
                "context": "Kim ran home.",
                "question": "Where is Kim?",
                "question_type": "Subsequent_state",
                "answers": ["out", "not enough information", "home", "lost"],
                "correct_answer_id": 2,
            },
        ],
        [
            Example(
                id="f001_19",
                question=(
                    "Where is Kim?\nA. out\nB. not enough information\nC. home\nD. lost"
                ),
                answers=("home",),
                context="Kim ran home.",
                dataset="quail",
                query="Where is Kim?",
                choices=("out", "not enough information", "home", "lost"),
            ),
        ],
    ),
    "quarel": (
        [
            {
                "id": "QuaRel_V1_B5_1403",
                "answer_index": 1,
                "logical_forms": ["(infer (time lower world1))"],
                "logical_form_pretty": "qrel(time, lower, world1)",
                "world_literals": {"world1": ["Jo"], "world2": ["Kim"]},
                "question": "Jo rests and Kim runs.  Who gets farther? (A) Jo (B) Kim",
            },
        ],
        [
            Example(
                id="QuaRel_V1_B5_1403",
                question="Jo rests and Kim runs.  Who gets farther?\nA. Jo\nB. Kim",
                answers=("Kim",),
                dataset="quarel",
                query="Jo rests and Kim runs.  Who gets farther?",
                choices=("Jo", "Kim"),
            ),
        ],
    ),
    "squad_v2": (
        [
            {
                "id": "56ddde6b",
                "title": "Tea",
                "context": "Tea came to Utopia in 1700.",
                "question": "When did tea come?",
                "answers": {
                    "text": ["1700", "in 1700", "1700"],
                    "answer_start": [22, 19, 22],
                },
            },
            {
                "id": "5ad39d53",
                "title": "Tea",
                "context": "Tea came to Utopia in 1700.",
                "question": "When did coffee come?",
                "answers": {"text": [], "answer_start": []},
            },
        ],
        [
            Example(
                id="56ddde6b",
                question="When did tea come?",
                answers=("1700", "in 1700"),
                context="Tea came to Utopia in 1700.",
                dataset="squad_v2",
            ),
            Example(
                id="5ad39d53",
                question="When did coffee come?",
                answers=("I don't know",),
                context="Tea came to Utopia in 1700.",
                dataset="squad_v2",
            ),
        ],
    ),
    "cnn_dailymail": (
        [
            {
                "article": "(CNN) -- A bridge opened. It is long.",
                "highlights": "A bridge opens .\nIt is long . ",
                "id": "0054d6d3",
            },
        ],
        [
            Example(
                id="0054d6d3",
                question="Summarize this article:",
                answers=("A bridge opens .\nIt is long .",),
                context="(CNN) -- A bridge opened. It is long.",
                dataset="cnn_dailymail",
                template="summary",
            ),
        ],
    ),
    "aqua_rat": (
        [
            {
                "question": "A bag costs $2. What do 5 bags cost?",
                "options": ["A)$5", "B)$10", "C)2 (or 3)", "D)", "E)None of these"],
                "rationale": "5 * 2 = 10\nAnswer is B.",
                "correct": "B",
            },
        ],
        [
            Example(
                id="aqua_rat-train-1",
                question=(
                    "A bag costs $2. What do 5 bags cost?\n"
                    "A. $5\nB. $10\nC. 2 (or 3)\nD. \nE. None of these"
                ),
                answers=("$10",),
                dataset="aqua_rat",
                template="cot",
                query="A bag costs $2. What do 5 bags cost?",
                rationale="5 * 2 = 10\nAnswer is B.",
                choices=("$5", "$10", "2 (or 3)", "", "None of these"),
            ),
        ],
    ),
    "ecqa": (
        [
            {
                "q_no": "075e",
                "q_concept": "milk",
                "q_text": "Where is milk cold?",
                "q_op1": "attic",
                "q_op2": "fridge",
                "q_op3": "car",
                "q_op4": "shoe",
                "q_op5": "sky",
                "q_ans": "fridge",
                "taskA_pos": "A fridge is cold.",
                "taskA_neg": "An attic is warm.",
                "taskB": "A fridge cools milk. An attic does not.",
            },
        ],
        [
            Example(
                id="075e",
                question=(
                    "Where is milk cold?\nA. attic\nB. fridge\nC. car\nD. shoe\nE. sky"
                ),
                answers=("fridge",),
                dataset="ecqa",
                template="cot",
                query="Where is milk cold?",
                rationale="A fridge cools milk. An attic does not.",
                choices=("attic", "fridge", "car", "shoe", "sky"),
            ),
        ],
    ),
    "gsm8k": (
        [
            {
                "question": "Jo has 2 boxes of 600 pins. How many pins?",
                "answer": (
                    "There are 2*600=<<2*600=1200>>1200 pins.\n"
                    "So 1200+0=<<1200+0=1200>>1200.\n#### 1,200"
                ),
            },
        ],
        [
            Example(
                id="gsm8k-train-1",
                question="Jo has 2 boxes of 600 pins. How many pins?",
                answers=("1,200",),
                dataset="gsm8k",
                template="cot",
                rationale="There are 2*600=1200 pins.\nSo 1200+0=1200.",
            ),
        ],
    ),
    "competition_math": (
        [
            {
                "problem": "What is $x$?",
                "level": "Level 1",
                "type": "Algebra",
                "solution": r"Not $\boxed{1}$ but $x=\boxed{\frac{1}{\sqrt{2}}}$.",
            },
            {
                "problem": "Which set?",
                "level": "Level 2",
                "type": "Algebra",
                "solution": r"It is $\boxed{\left\{ 1, 2 \right.}$.",
            },
            {
                "problem": "How many?",
                "level": "Level 3",
                "type": "Algebra",
                "solution": r"There are $\fbox 5$ of them.",
            },
        ],
        [
            Example(
                id="competition_math-train-1",
                question="What is $x$?",
                answers=(r"\frac{1}{\sqrt{2}}",),
                dataset="competition_math",
                template="cot",
                rationale=r"Not $\boxed{1}$ but $x=\boxed{\frac{1}{\sqrt{2}}}$.",
            ),
            Example(
                id="competition_math-train-2",
                question="Which set?",
                answers=(r"\left\{ 1, 2 \right.",),
                dataset="competition_math",
                template="cot",
                rationale=r"It is $\boxed{\left\{ 1, 2 \right.}$.",
            ),
            Example(
                id="competition_math-train-3",
                question="How many?",
                answers=("5",),
                dataset="competition_math",
                template="cot",
                rationale=r"There are $\fbox 5$ of them.",
            ),
        ],
    ),
    "strategyqa": (
        [
            {
                "qid": "4fd6",
                "term": "Kite",
                "description": "flying toy",
                "question": "Can a kite fly on the Moon?",
                "answer": False,
                "facts": ["A kite needs wind.", "The Moon has no wind."],
                "decomposition": ["What does a kite need?", "Has the Moon #1?"],
                "evidence": [[[["Kite-1"]], ["no_evidence", "operation"]]],
            },
            {
                "qid": "4fd7",
                "term": "Kite",
                "description": "flying toy",
                "question": "Can a kite fly?",
                "answer": True,
                "facts": ["A kite flies."],
                "decomposition": ["Does it?"],
                "evidence": [["operation"]],
            },
        ],
        [
            Example(
                id="4fd6",
                question="Can a kite fly on the Moon?",
                answers=("no",),
                dataset="strategyqa",
                template="cot",
                rationale="A kite needs wind. The Moon has no wind.",
            ),
            Example(
                id="4fd7",
                question="Can a kite fly?",
                answers=("yes",),
                dataset="strategyqa",
                template="cot",
                rationale="A kite flies.",
            ),
        ],
    ),
}


def _published(name, records):
    """Records as they come out of the file they are published in."""
    if name == "strategyqa":
        return json.loads(json.dumps(records))
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    return pyarrow.parquet.read_table(file).to_pylist()


def _read(name, records):
    spec = BY_NAME[name]
    rows = (
        Row(Path("train.parquet"), line, values)
        for line, values in enumerate(records, start=1)
    )
    return [
        example
        for row in (spec.gather(rows) if spec.gather else rows)
        for example in spec.read(row)
    ]


def test_every_dataset_of_table_1_is_there():
    assert {
        spec.name: (spec.category, spec.used, spec.size) for spec in SPECS
    } == TABLE_1
    assert [spec.name for spec in SPECS] == list(TABLE_1)
    assert list(RECORDS) == list(TABLE_1)


def test_the_mixtures_are_as_large_as_the_paper_says():
    assert len([spec for spec in SPECS if "L" in spec.used]) == 20
    retriever = [spec.size for spec in SPECS if "R" in spec.used]
    assert (len(retriever), sum(retriever)) == (10, 286_118)


@pytest.mark.parametrize("name", TABLE_1)
def test_published_records_become_examples(name):
    records, golden = RECORDS[name]
    assert _read(name, _published(name, records)) == golden


@pytest.mark.parametrize("name", TABLE_1)
def test_a_spec_says_what_its_examples_are(name):
    spec, (records, golden) = BY_NAME[name], RECORDS[name]
    assert set(spec.columns) <= set(records[0])
    assert {example.template for example in golden} == {spec.template}
    assert {example.dataset for example in golden} == {name}
    assert spec.context in CONTEXT_ROLES
    assert {bool(example.context) for example in golden} == {spec.context != "none"}
    # What is searched for is learnt from; R-FT learns from retrieved passages.
    assert spec.search == (spec.context != "only")
    assert spec.search or "R" not in spec.used


@pytest.mark.parametrize("name", TABLE_1)
def test_columns_are_all_that_is_read(name):
    records, golden = RECORDS[name]
    needed = BY_NAME[name].columns
    bare = [{key: record[key] for key in needed} for record in records]
    assert _read(name, bare) == golden
    for column in needed:
        if column in ("parent_id", "rank", "deleted"):  # null means absent
            continue
        lacking = [{k: v for k, v in record.items() if k != column} for record in bare]
        with pytest.raises(ValueError, match=column):
            _read(name, lacking)


@pytest.mark.parametrize("name", TABLE_1)
def test_published_splits_are_told_apart(name):
    published = {"train": "train", "dev": "validation", "test": "test"}
    splits = BY_NAME[name].splits
    assert "train" in splits
    assert splits.items() <= published.items()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("commonsense_qa", {"answerKey": "F"}, "'F', expected one of 'A', 'B'"),
        ("commonsense_qa", {"answerKey": ""}, "'', expected one of 'A', 'B'"),
        ("commonsense_qa", {"question": " "}, '"question" is blank'),
        (
            "commonsense_qa",
            {"choices": {"label": [], "text": []}},
            "expected one of but there are none",
        ),
        ("math_qa", {"correct": "f"}, "'f', expected one of 'a', 'b'"),
        ("math_qa", {"options": "a ) 1 , b ) 2"}, 'from "a \\) " to "e \\) "'),
        ("math_qa", {"options": "1 , 2 , 3"}, 'from "a \\) " to "e \\) "'),
        (
            "math_qa",
            {"options": "x , a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5"},
            'from "a \\) " to "e \\) "',
        ),
        ("math_qa", {"options": "['a ) 1',"}, "is not a list"),
        (
            "math_qa",
            {"options": "a ) 1 , b ) , c ) 3 , d ) 4 , e ) 5"},
            "that option is blank",
        ),
        ("web_questions", {"answers": []}, '"answers" holds no text'),
        ("web_questions", {"answers": [" "]}, '"answers" holds no text'),
        ("web_questions", {"answers": None}, "answers"),
        ("yahoo_answers_qa", {"answer": None}, '"answer" is null'),
        ("yahoo_answers_qa", {"answer": "\n"}, '"answer" is blank'),
        ("ms_marco", {"query": ""}, '"query" is blank'),
        (
            "coqa",
            {"questions": ["Who?"]},
            "1 questions and 3 answers, expected as many",
        ),
        ("coqa", {"questions": ["Who?", " ", "Why?"]}, "none of them blank"),
        ("drop", {"answers_spans": {"spans": [], "types": []}}, "holds no text"),
        ("narrativeqa", {"answers": []}, '"answers" holds no text'),
        ("newsqa", {"answers": []}, '"answers" holds no text'),
        ("pubmed_qa", {"final_decision": "perhaps"}, "expected one of 'yes', 'no'"),
        ("quail", {"correct_answer_id": 4}, "4, expected one of 0, 1, 2, 3"),
        ("quail", {"correct_answer_id": None}, "correct_answer_id"),
        ("quarel", {"answer_index": 2}, "2, expected one of 0, 1"),
        ("quarel", {"question": "Who? Jo or Kim"}, 'expected a question, "\\(A\\)"'),
        ("quarel", {"question": "(A) Jo (B) Kim"}, "expected a question"),
        ("squad_v2", {"answers": {"text": [" "]}}, '"answers" holds no text'),
        ("cnn_dailymail", {"article": ""}, '"article" is blank'),
        ("aqua_rat", {"correct": "F"}, "'F', expected one of 'A', 'B'"),
        ("aqua_rat", {"correct": "D"}, "that option is blank"),
        ("aqua_rat", {"options": ["5", "6"]}, "option '5', expected one such as"),
        ("ecqa", {"q_ans": "cellar"}, "'cellar', expected one of 'attic', 'fridge'"),
        ("gsm8k", {"answer": "It is 4."}, "expected a chain of thought"),
        ("gsm8k", {"answer": "It is 4.\n####"}, "expected a chain of thought"),
        ("gsm8k", {"answer": "#### 4"}, "expected a chain of thought"),
        ("competition_math", {"solution": "It is 4."}, "no answer in"),
        ("competition_math", {"solution": r"$\boxed{\frac{1}{2}$"}, "no answer in"),
        ("competition_math", {"solution": r"$\boxed{ }$"}, "no answer in"),
        ("strategyqa", {"answer": "no"}, "'no', expected true or false"),
        ("strategyqa", {"facts": []}, '"facts" holds no text'),
    ],
)
def test_a_record_that_is_not_as_published_is_refused(name, changes, message):
    record = copy.deepcopy(RECORDS[name][0][0]) | changes
    with pytest.raises(ValueError, match=message) as error:
        _read(name, [record])
    assert "train.parquet" in str(error.value)


def test_a_wiki_qa_label_is_0_or_1():
    record = RECORDS["wiki_qa"][0][0] | {"label": -1}
    with pytest.raises(ValueError, match="-1, expected 0 or 1"):
        _read("wiki_qa", [record])


def test_a_message_whose_parent_is_missing_is_named():
    messages = [m for m in MESSAGES if m["message_id"] != "m4"]
    with pytest.raises(ValueError, match="message m5: its parent m4 is not among"):
        _read("oasst1", messages)


def test_two_users_in_a_row_are_refused():
    messages = [*MESSAGES, _message("m11", "m1", "prompter", "And coffee?")]
    with pytest.raises(ValueError, match='m11: role "prompter", expected "assistant"'):
        _read("oasst1", messages)


def test_a_blank_message_is_refused():
    messages = copy.deepcopy(MESSAGES)
    messages[3]["text"] = " "
    with pytest.raises(ValueError, match='"reply" is blank'):
        _read("oasst1", messages)
    messages[0]["rank"] = -1  # so that the blank reply is only a turn
    with pytest.raises(ValueError, match="a message above m5 is blank"):
        _read("oasst1", messages)


@pytest.mark.parametrize("text", ["a \x00 byte", None, " "])
@pytest.mark.parametrize("id", ["m5", "m7"])
def test_a_damaged_message_costs_the_threads_through_it_only(id, text):
    """m5 is a question below m1, and m7 is the reply to it."""
    messages = copy.deepcopy(MESSAGES)
    (message,) = (message for message in messages if message["message_id"] == id)
    message["text"] = text
    spec = BY_NAME["oasst1"]
    rows = [Row(Path("train.parquet"), 1, message) for message in messages]
    first, damaged, other = spec.gather(iter(rows))
    assert [example.id for row in (first, other) for example in spec.read(row)] == [
        "m1",
        "n1",
    ]
    with pytest.raises(RecordError, match='"text"' if id == "m5" else '"reply"'):
        spec.read(damaged)


@pytest.mark.parametrize(
    ("name", "place", "golden"),
    [
        (
            "oasst1",
            1,
            "Q: How do I brew tea?\nA: Steep it.\nThen wait.\nQ: How long?\n"
            "A:[ Four minutes.]",
        ),
        (
            "commonsense_qa",
            0,
            "Q: Where would you keep milk?\nA. attic\nB. fridge\nC. car\nD. shoe\n"
            "E. sky\nA:[ fridge]",
        ),
        ("wiki_qa", 1, "Q: how are kites flown?\nA:[ Wind carries it .]"),
        ("squad_v2", 1, "Q: When did coffee come?\nA:[ I don't know]"),
        (
            "cnn_dailymail",
            0,
            "Summarize this article:\nA:[ A bridge opens .\nIt is long .]",
        ),
        (
            "gsm8k",
            0,
            "Q: Jo has 2 boxes of 600 pins. How many pins? Let's think step by step."
            "[ There are 2*600=1200 pins.\nSo 1200+0=1200. A: 1,200]",
        ),
    ],
)
def test_training_prompts_read_as_in_table_10(name, place, golden):
    """What carries loss is in brackets."""
    example = _read(name, RECORDS[name][0])[place]
    pieces = prompts.pieces(example, prompts.Markers("Q: ", "A:"))
    shown = (f"[{piece.text}]" if piece.loss else piece.text for piece in pieces)
    assert "".join(shown) == golden
