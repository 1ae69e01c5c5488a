from report_samples import SYSTEMS, all_generations, answer_rows, generation

from radit_jax.evaluation.records import Row, answer_values, compare
from radit_jax.evaluation.terminal import text_report


def test_text_table_is_aligned():
    rows = [
        Row("LM", "factbook", "em", 0.05, 20, 0.0, 0.1),
        Row("LM", "factbook", "f1", 0.125, 20, 0.1, 0.2),
        Row("LM-FT", "factbook", "em", 1.0, 20, 1.0, 1.0),
        Row("LM", "nq", "em", 0.5, 3610, 0.484, 0.516),
        Row("LM", "nq", "f1", 0.5, 3610, 0.484, 0.516),
        Row("LM", "nq", "mrr", 0.5, 3610, 0.4, 0.6),
        Row("LM", "mmlu", "accuracy", 0.25, 14042, 0.24, 0.26),
    ]
    assert text_report(rows).splitlines() == [
        "dataset      n  system                    EM                 F1",
        "--------  ----  ------  --------------------  -----------------",
        "factbook    20  LM           5.0 [0.0, 10.0]  12.5 [10.0, 20.0]",
        "            20  LM-FT   100.0 [100.0, 100.0]                  -",
        "NQ        3610  LM         50.0 [48.4, 51.6]  50.0 [48.4, 51.6]",
        "",
        "dataset      n  system           accuracy",
        "-------  -----  ------  -----------------",
        "MMLU     14042  LM      25.0 [24.0, 26.0]",
        "",
        "retrieval      NQ (n = 3610)",
        "---------  -----------------",
        "LM MRR     50.0 [40.0, 60.0]",
    ]
    assert text_report([]) == ""


def test_differences_have_a_line_each():
    differences = compare(answer_values(all_generations()), [SYSTEMS], seed=0)
    line = text_report([], (), differences).splitlines()[2]
    assert line.startswith("factbook  RA-DIT over closed book  EM      +50.0 [+")


def test_answers_stand_side_by_side():
    rows = answer_rows(all_generations())
    shown = text_report(rows, all_generations(), examples=3).split("\n\n")
    assert len(shown) == 1 + 3
    question, closed, open_ = shown[1].splitlines()
    assert question.startswith("What is the capital of country ")
    assert question.endswith("?  (factbook; Paris / City of Light)")
    # The first two are among those on which the systems differ.
    assert closed == "  - closed book  Lyon"
    assert open_ == "  + RA-DIT       Paris   [France: Cities]"
    assert text_report(rows, all_generations(), examples=0).count("\n\n") == 0


def test_graded_answers_show_their_value():
    given = generation("closed book", 0, 1.0, "wow", metrics={"f1": 0.4})
    assert "\n  0.40 closed book  Paris" in text_report([], [given])
