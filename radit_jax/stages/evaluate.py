"""Stage ``evaluate``: questions, passages and both language models -> report/."""

import functools
import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from radit_jax import processes
from radit_jax.batch import Example
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tasks import gold_passages, subject
from radit_jax.data.tokenize import load_tokenizer
from radit_jax.evaluation import metrics
from radit_jax.evaluation.files import (
    read_differences,
    read_generations,
    read_rows,
    write_generations,
)
from radit_jax.evaluation.records import (
    Generation,
    SourcePassage,
    Values,
    answer_values,
    compare,
    measure,
)
from radit_jax.evaluation.report import write_report
from radit_jax.evaluation.tasks import task_of
from radit_jax.evaluation.terminal import text_report
from radit_jax.inference.ensemble import passage_weights, vote
from radit_jax.models.huggingface import load_llama
from radit_jax.models.llama import Llama
from radit_jax.stages import prepare
from radit_jax.stages.answering import ENSEMBLES, Answered, Asked, Reader
from radit_jax.stages.index import score_temperature
from radit_jax.stages.lm_ft import load_finetuned
from radit_jax.stages.retrieve import (
    answer_hits,
    data_settings,
    read_retrieved,
    read_splits,
)
from radit_jax.stages.scoring import check_rows
from radit_jax.stages.shots import Shots
from radit_jax.stages.stage import (
    Stage,
    check_counts,
    check_language_model,
    compute_dtype,
    field_fingerprint,
    lm_folder,
    run,
    section,
)

log = logging.getLogger(__name__)


class System(NamedTuple):
    """A row of the table: which model, and what it is given to read."""

    finetuned: bool
    background: str  # "none", "retrieved", "r_ft" (by the tuned retriever) or "gold"


# RA-DIT Table 6 is the four systems that retrieve.
SYSTEMS = {
    "LM": System(False, "none"),
    "LM + retrieval": System(False, "retrieved"),
    "LM + R-FT": System(False, "r_ft"),
    "LM-FT": System(True, "none"),
    "LM-FT + retrieval": System(True, "retrieved"),
    "RA-DIT (LM-FT + R-FT)": System(True, "r_ft"),
    "LM + gold passage": System(False, "gold"),
    "LM-FT + gold passage": System(True, "gold"),
}
# Differences worth a paired test, when both systems ran: (without, with).
PAIRS = (
    ("LM", "LM + retrieval"),
    ("LM + retrieval", "LM + R-FT"),
    ("LM + retrieval", "LM-FT + retrieval"),
    ("LM-FT", "LM-FT + retrieval"),
    ("LM-FT + retrieval", "RA-DIT (LM-FT + R-FT)"),
    ("LM + R-FT", "RA-DIT (LM-FT + R-FT)"),
    ("RA-DIT (LM-FT + R-FT)", "LM-FT + gold passage"),
)
# Rows of the retrieval table: the retriever as it came, as R-FT left it, and controls.
START = "retriever"
RETRIEVERS = {
    "lm": "R-FT",
    "gold": "gold targets (supervised)",
    "shuffled": "shuffled targets (last step)",
    "uniform": "uniform targets (last step)",
}


class Question(NamedTuple):
    """A test question with everything the systems may read."""

    dataset: str
    example: Example
    # Retriever, as in the retrieval table -> passage ids, best first, and scores.
    retrieved: Mapping[str, tuple[tuple[int, ...], tuple[float, ...]]]
    gold: tuple[int, ...]  # ids of the passages that hold the answer, when known


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The evaluate section, the untuned model and how prompts begin; and the questions,
    where these do not come from an artifact. Not the mesh."""
    questions = {} if "retrieved" in inputs(config) else data_settings(config)
    own = section(config.evaluate)
    del own["mesh"]
    return own | {
        **questions,
        "lm": field_fingerprint(config, "lm"),
        "target": config.r_ft.target,
        "bos": config.lm_ft.bos,
        "seed": config.seed,
        "dtype": config.dtype,
    }


def inputs(config: ConfigDict) -> tuple[str, ...]:
    """Artifacts that the systems of the table need."""
    systems = _systems(config).values()
    needed = []
    if any(system.background != "none" for system in systems):
        needed += ["passages", "retrieved"]
    if any(system.finetuned for system in systems):
        needed.append("lm_ft")
    if any(system.background == "r_ft" for system in systems):
        needed.append("retrieved_r_ft")
    return tuple(needed)


def _systems(config: ConfigDict) -> dict[str, System]:
    """Those of the table.

    Raises:
        ValueError: a name that is none.
    """
    unknown = [name for name in config.evaluate.systems if name not in SYSTEMS]
    if unknown:
        raise ValueError(f"evaluate.systems: {unknown} not among {', '.join(SYSTEMS)}")
    return {name: SYSTEMS[name] for name in config.evaluate.systems}


def retrievers(config: ConfigDict) -> dict[str, str]:
    """Row of the retrieval table -> where its passages are."""
    needed = inputs(config)
    found = {START: "retrieved"} if "retrieved" in needed else {}
    if "retrieved_r_ft" in needed:
        # The tuned one first, its controls after it.
        targets = sorted(
            path.name
            for path in (Path(config.workdir) / "retrieved_r_ft").iterdir()
            if path.name in RETRIEVERS
        )
        targets.sort(key=lambda target: target != config.r_ft.target)
        found |= {RETRIEVERS[name]: f"retrieved_r_ft/{name}" for name in targets}
    return found


def questions(config: ConfigDict, store: PassageStore | None) -> list[Question]:
    """The first ``evaluate.limit`` questions of every test file (0: all).

    Without a corpus they come from the files themselves.
    """
    found = []
    if store is None:
        return [
            Question(dataset, example, {}, ())
            for dataset, examples in read_splits(config)["test"].items()
            for example in examples[: config.evaluate.limit or None]
        ]
    by_retriever = {
        name: read_retrieved(Path(config.workdir), "test", folder)
        for name, folder in retrievers(config).items()
    }
    for dataset, (examples, _) in by_retriever[START].items():
        for i, example in enumerate(examples[: config.evaluate.limit or None]):
            retrieved = {}
            for name, datasets in by_retriever.items():
                ids, scores = (array[i] for array in datasets[dataset][1])
                real = ids >= 0
                retrieved[name] = (
                    tuple(ids[real].tolist()),
                    tuple(scores[real].tolist()),
                )
            gold = gold_passages(example, store) if example.document else set()
            found.append(Question(dataset, example, retrieved, tuple(sorted(gold))))
    return found


def retrieval_values(
    questions: Sequence[Question], store: PassageStore
) -> list[Values]:
    """answer@k, and gold@k and MRR on datasets whose gold passages are known.

    Datasets for which nothing was retrieved have none.
    """
    found = []
    for dataset in dict.fromkeys(q.dataset for q in questions):
        ours = [q for q in questions if q.dataset == dataset]
        groups_N = _groups(ours)
        asked = tuple(q.example.id for q in ours)
        for name in ours[0].retrieved:
            ids = [q.retrieved[name][0] for q in ours]
            depth = min(max(metrics.DEPTHS), min(map(len, ids)))
            if not depth:
                continue
            ids_NC = np.asarray([row[:depth] for row in ids], np.int64)
            values = metrics.retrieval_values(
                ids_NC,
                answer_hits(ids_NC, [q.example for q in ours], store),
                [q.gold for q in ours],
            )
            found += [
                Values(name, dataset, metric, value_N, groups_N, asked)
                for metric, value_N in values.items()
            ]
    return found


def _groups(questions: Sequence[Question]) -> np.ndarray | None:
    """What questions are resampled by."""
    labels = [subject(q.example) for q in questions]
    return np.asarray(labels) if all(labels) else None


def generation(name: str, asked: Asked, answered: Answered) -> Generation:
    """An answer with everything that led to it, as the report keeps it."""
    example, prediction = asked.example, answered.prediction
    task = task_of(asked.dataset, bool(example.choices))
    # Without an ensemble of prompts one alone has read all passages.
    apart = len(answered.said) == len(asked.passages)
    said = answered.said if apart else [None] * len(asked.passages)
    return Generation(
        system=name,
        dataset=asked.dataset,
        question_id=example.id,
        kind=example.kind,
        question=example.question,
        answers=example.answers,
        prediction=prediction,
        passages=tuple(
            SourcePassage(
                *(p.id, p.title, p.section, p.text, weight if apart else None),
                *((one.text, one.log_probability, one.prompt) if one else ()),
            )
            for p, weight, one in zip(asked.passages, asked.weights, said, strict=True)
        ),
        metrics=metrics.score(task.metrics, prediction, example.answers),
        group=subject(example),
        prompt="" if apart else answered.said[0].prompt,
        confidence=answered.confidence,
        choices=example.choices,
        choice_scores=tuple(answered.choice_scores),
    )


def ask(
    system: System,
    question: Question,
    config: ConfigDict,
    temperature: float,
    store: PassageStore | None,
) -> Asked:
    """A question with the passages that a system reads for it.

    Args:
        system: a row of the table.
        question: with what was retrieved for it.
        config: of the run.
        temperature: of the weights.
        store: the corpus; None where no system reads any of it.
    """
    if system.background == "none" or store is None:
        return Asked(question.dataset, question.example, (), ())
    if system.background == "gold":
        passages = store.get(question.gold[:1])
        return Asked(question.dataset, question.example, passages, (1.0,))
    name = START
    if system.background == "r_ft":
        name = RETRIEVERS[config.r_ft.target]
    every_id, every_score = question.retrieved[name]
    ids = every_id[: config.evaluate.passages]
    scores = every_score[: config.evaluate.passages]
    weights: list[float] = []
    if ids:
        scores_BC = np.asarray([scores], np.float32)
        weights = passage_weights(scores_BC, temperature)[0].tolist()
    return Asked(question.dataset, question.example, store.get(ids), weights)


def check_settings(config: ConfigDict) -> None:
    """Stop before anything is read if a setting makes no sense.

    Raises:
        ValueError: naming the setting.
    """
    evaluate = config.evaluate
    check_rows("evaluate", evaluate)
    check_counts("evaluate", evaluate, ("passages", "prompt_tokens", "batch_tokens"))
    if evaluate.ensemble not in ENSEMBLES:
        raise ValueError(
            f"evaluate.ensemble = {evaluate.ensemble!r} is not one of "
            f"{', '.join(ENSEMBLES)}"
        )


def weights_temperature(config: ConfigDict) -> float:
    """Of the weights of passages; 1 where no system reads any.

    Raises:
        ValueError: as ``score_temperature``.
    """
    if "retrieved" not in inputs(config):
        return 1.0
    return score_temperature(config, "evaluate.score_temperature")


def check(config: ConfigDict) -> None:
    """Stop before a chain starts.

    Raises:
        ValueError: as ``weights_temperature`` and ``check_language_model``.
    """
    weights_temperature(config)
    check_language_model(config)


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Run every system and write the report; finished systems are kept."""
    check_settings(config)
    systems = _systems(config)
    store = None
    if "retrieved" in inputs(config):
        store = PassageStore(Path(config.workdir) / "passages")
    temperature = weights_temperature(config)
    asked = questions(config, store)
    if not asked:
        raise ValueError("no question to ask: set data.test")
    by_dataset: dict[str, list[Example]] = {}
    for question in asked:
        by_dataset.setdefault(question.dataset, []).append(question.example)
    shots = Shots(config, store, by_dataset)
    tokenizer = load_tokenizer(lm_folder(config))
    loaders: dict[bool, Callable[[], Llama]] = {
        False: lambda: load_llama(lm_folder(config), compute_dtype(config)),
        True: lambda: load_finetuned(config, compute_dtype(config)),
    }
    files = {
        name: folder / "systems" / f"{name.replace(' ', '_')}.jsonl" for name in systems
    }
    there = processes.from_first({name: file.exists() for name, file in files.items()})
    done: dict[str, list[Generation]] = {}
    for finetuned, load in loaders.items():
        reader: Reader | None = None
        for name, system in systems.items():
            if system.finetuned != finetuned:
                continue
            ours = asked
            if system.background == "gold":
                ours = [q for q in asked if q.gold]
            if not ours:
                log.warning("%s: left out, no question names its document", name)
                continue
            file = files[name]
            if not there[name]:
                if reader is None:
                    bos = config.lm_ft.bos if finetuned else tokenizer.add_bos
                    reader = Reader(config, load(), tokenizer, bos, shots)
                given = [
                    ask(system, question, config, temperature, store)
                    for question in ours
                ]
                answered = reader.answer(name, given)
                found = map(functools.partial(generation, name), given, answered)
                if processes.first():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    temporary = file.with_suffix(".tmp")
                    write_generations(temporary, found)
                    temporary.rename(file)
            if processes.first():
                done[name] = read_generations(file)
        del reader
        gc.collect()
    if not processes.first():
        return {}
    generations = [g for name in systems for g in done.get(name, [])]
    answers = answer_values(generations)
    retrieval = retrieval_values(asked, store) if store else []
    seed = config.seed
    tuned = [name for name in retrievers(config) if name != START]
    differences = [
        # A question without a gold passage has no answer from one.
        *compare(answers, [pair for pair in PAIRS if _comparable(pair, done)], seed),
        *compare(retrieval, [(START, name) for name in tuned], seed),
    ]
    write_report(
        folder,
        [measure(values, seed) for values in (*answers, *retrieval)],
        generations,
        differences,
        seed,
        config.evaluate.examples,
        vote,
        figures(config),
    )
    return {"questions": len(asked), "systems": list(done)}


def figures(config: ConfigDict) -> dict[str, Path]:
    """Curves of the fine-tunings that the systems come from."""
    workdir, needed = Path(config.workdir), inputs(config)
    found = {
        "LM-FT": workdir / "lm_ft" / "curves.png",
        "R-FT": workdir / "r_ft" / config.r_ft.target / "curves.png",
    }
    wanted = {"LM-FT": "lm_ft", "R-FT": "retrieved_r_ft"}
    return {
        f"Training curves of {name}": file
        for name, file in found.items()
        if wanted[name] in needed and file.is_file()
    }


def _comparable(
    pair: tuple[str, str], done: Mapping[str, Sequence[Generation]]
) -> bool:
    """Whether both systems of a pair answered, and the same questions."""
    asked = [{(g.dataset, g.question_id) for g in done.get(name, ())} for name in pair]
    return bool(asked[0]) and asked[0] == asked[1]


def summary(workdir: Path, examples: int = 3) -> str:
    """A finished report as text for a terminal: tables, and a few answers."""
    report = workdir / "report"
    # The terminal shows what R-FT did; the report has every comparison.
    shown = [
        found
        for found in read_differences(report)
        if "R-FT" in found.second
        and found.metric in ("em", "accuracy", "gold@1", "answer@1", "mrr")
    ]
    return text_report(
        read_rows(report),
        read_generations(report / "generations.jsonl"),
        shown,
        examples,
    )


def show(config: ConfigDict) -> None:
    """Run the stage, after ``prepare`` where that makes its inputs, and print it."""
    if "prepare" in config:
        run("prepare", prepare.STAGE, config)
    report = run("evaluate", STAGE, config)
    if processes.first():
        print(summary(Path(config.workdir)))
        print(
            f"\nTo look at in a browser, down to every prompt: {report / 'index.html'}"
        )


STAGE = Stage(
    *("report", inputs, ("lm",), settings, build, check),
    mesh="evaluate.mesh",
)
