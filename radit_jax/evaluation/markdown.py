"""The report as Markdown: tables, and questions with every system's answer."""

import re
import textwrap
from collections.abc import Sequence

from radit_jax.evaluation.examples import choose
from radit_jax.evaluation.records import Generation, Picture, mark
from radit_jax.evaluation.tables import Table, dataset_name, numeric_columns

# What CommonMark and GitHub would take for markup in the middle of a line; like them,
# it leaves an underscore inside a word alone.
_MARKUP = re.compile(r"[\\`*~|$]|(?<!\w)_|_(?!\w)|<(?=[\w/!?])|&(?=#?\w+;)|\](?=\()")

INTRODUCTION = (
    "All numbers are percentages; in brackets the 95 % bootstrap interval over "
    "questions (over groups of questions where they have groups)."
)


def markdown_page(
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    generations: Sequence[Generation],
    examples: int,
    seed: int,
) -> str:
    """The whole page.

    Args:
        tables: in order; those that follow one of the same title share its heading.
        pictures: of the report's folder, where the page will be.
        generations: of all systems, to show some.
        examples: how many questions to show.
        seed: of their choice.
    """
    sections = ["# Results", INTRODUCTION]
    title = ""
    for table in tables:
        if table.title != title:
            title = table.title
            sections.append(f"## {escape(title)}")
        sections += [part for part in (table.note, draw(table.cells)) if part]
    if pictures:
        sections.append("## Plots")
        sections += [f"![{escape(title)}]({file})" for title, file in pictures]
    shown = _examples_section(generations, examples, seed)
    if shown:
        sections += ["## Generations", shown]
    return "\n\n".join(sections) + "\n"


def draw(cells: Sequence[Sequence[str]]) -> str:
    """A table, the header first; numbers stand right."""
    rule = ["---:" if right else "---" for right in numeric_columns(cells)]
    lines = [[escape(cell) for cell in line] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def escape(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def _examples_section(
    generations: Sequence[Generation], examples: int, seed: int
) -> str:
    if not generations or examples < 1:
        return ""
    chosen = choose(generations, examples, seed)
    note = (
        f"Drawn at random (seed {seed}): {chosen.of_split} of the {chosen.split} "
        "questions on which systems differ in the task's metric, "
        f"{chosen.of_agreed} of the {chosen.agreed} others."
    )
    return "\n\n".join([note, *map(_example, chosen.questions)])


def _example(answered: Sequence[Generation]) -> str:
    first = answered[0]
    kind = f", {escape(first.kind)}" if first.kind else ""
    lines = [
        f"**{escape(first.question)}** ({escape(dataset_name(first.dataset))}{kind})",
        "",
        f"- Gold: {'; '.join(map(escape, first.answers))}",
    ]
    if first.choices:
        lines.append(f"- Options: {'; '.join(map(escape, first.choices))}")
    tops: dict[int, list[Generation]] = {}
    for g in answered:
        if g.passages:
            tops.setdefault(g.passages[0].id, []).append(g)
    for same in tops.values():
        # Systems with different retrievers were given different passages.
        who = f" of {', '.join(escape(g.system) for g in same)}"
        top = same[0].passages[0]
        text = textwrap.shorten(top.text, 240, placeholder=" …")
        label = f"Top passage{who if len(tops) > 1 else ''}"
        lines.append(f"- {label}: *{escape(top.heading)}* — {escape(text)}")
    for g in answered:
        said = escape(textwrap.shorten(g.prediction, 240, placeholder=" …"))
        sign = mark(g.metric, g.value)
        lines.append(f"- {sign} {escape(g.system)}: {said or '(nothing)'}")
    return "\n".join(lines)
