from report_samples import all_generations, cells, generation, passage

from radit_jax.evaluation.markdown import draw, escape, markdown_page
from radit_jax.evaluation.records import Picture
from radit_jax.evaluation.tables import Table


def examples_of(generations, examples, seed=0):
    page = markdown_page([], [], generations, examples, seed)
    return page.partition("## Generations\n\n")[2]


def test_tables_of_one_title_share_a_heading():
    first = Table("Kinds", "nq: EM.", [["a", "b"], ["x", "1.0 [0.5, 2.0]"]])
    page = markdown_page([first, first._replace(note="wow: F1.")], [], [], 3, 0)
    assert page.count("## Kinds") == 1
    assert "nq: EM.\n\n| a | b |\n| --- | ---: |\n| x | 1.0 [0.5, 2.0] |\n\nwow" in page
    assert "## Generations" not in page
    assert "## Plots" not in page


def test_pictures_are_linked():
    page = markdown_page([], [Picture("R-FT [x](y)", "figures/1_r_ft.png")], [], 3, 0)
    assert "## Plots\n\n![R-FT [x\\](y)](figures/1_r_ft.png)\n" in page


def test_missing_numbers_leave_a_column_on_the_right():
    drawn = draw([["a", "b", "c"], ["x", "-", "word"], ["y", "< 0.1", "5"]])
    assert cells(drawn)[1] == ["---", "---:", "---"]


def test_examples_show_both_sides():
    text = examples_of(all_generations(), 4)
    assert text.startswith(
        "Drawn at random (seed 0): 2 of the 10 questions on which systems differ in "
        "the task's metric, 2 of the 10 others."
    )
    assert text.count("**What is the capital") == 4
    assert text.count("- ✗ closed book: Lyon\n- ✓ RA-DIT: Paris") == 2
    assert text.count("- Gold: Paris; City of Light") == 4
    assert "- Top passage: *France: Cities* — Paris is the capital." in text


def test_graded_answers_show_their_value_and_choices_their_options():
    graded = generation("a", 0, 1.0, metrics={"rouge_l": 0.216})
    assert "- 0.22 a: Paris" in examples_of([graded], 1)
    chosen = generation("a", 0, 1.0, "mmlu", choices=("Paris", "Lyon"))
    text = examples_of([chosen], 1)
    assert "(MMLU, capital)" in text
    assert "- Options: Paris; Lyon" in text


def test_passages_are_told_apart_and_shortened():
    text = examples_of(
        [
            generation("a", 0, 1.0, passages=(passage(1, "word " * 400),)),
            generation("b", 0, 0.0, passages=(passage(2, "other"),)),
        ],
        1,
    )
    assert "- Top passage of a: *France: Cities* — word word" in text
    assert "- Top passage of b: *France: Cities* — other" in text
    assert max(map(len, text.splitlines())) < 320


def test_texts_cannot_break_the_page():
    wild = "a | b\n# *head* <b>x</b> &amp; [x](y) `c` _d_ snake_case 5 < 6"
    assert escape(wild) == (
        r"a \| b # \*head\* \<b>x\</b> \&amp; [x\](y) \`c\` \_d\_ snake_case 5 < 6"
    )
