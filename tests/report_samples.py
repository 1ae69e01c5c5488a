"""Invented answers of two systems, for the tests of the report."""

from radit_jax.evaluation.records import (
    Generation,
    SourcePassage,
    answer_values,
    measure,
)

SYSTEMS = ("closed book", "RA-DIT")


def passage(id=3, text="Paris is the capital.", **fields):
    base = SourcePassage(id, "France", "Cities", text, 0.75, "Paris", -0.5)
    return base._replace(**fields)


def generation(system, i, em, dataset="factbook", kind="capital", **fields):
    base = Generation(
        system=system,
        dataset=dataset,
        question_id=f"q{i}",
        kind=kind,
        question=f"What is the capital of country {i}?",
        answers=("Paris", "City of Light"),
        prediction="Paris" if em else "Lyon",
        passages=() if system == "closed book" else (passage(),),
        metrics={"em": em, "f1": max(em, 0.25)},
    )
    return base._replace(**fields)


def answer_rows(generations):
    return [measure(values, seed=0) for values in answer_values(generations)]


def all_generations():
    # Of 20 questions the closed book gets 5 right and RA-DIT 15, 5 of them shared.
    return [
        generation(system, i, float(i < right), kind="capital" if i % 2 else "area")
        for system, right in zip(SYSTEMS, (5, 15), strict=True)
        for i in range(20)
    ]


def cells(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
