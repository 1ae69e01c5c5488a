"""Stage ``evaluate``: questions, passages and both language models -> report/."""

import gc
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from radit_jax.batch import Example, Passage
from radit_jax.data import prompts
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tasks import gold_passages, subject
from radit_jax.data.tokenize import Tokenizer, load_tokenizer
from radit_jax.evaluation import metrics
from radit_jax.evaluation.report import (
    Generation,
    SourcePassage,
    Values,
    answer_values,
    compare,
    measure,
    read_differences,
    read_rows,
    text_report,
    write_report,
)
from radit_jax.inference.ensemble import passage_weights, vote
from radit_jax.inference.generate import Generated, generate
from radit_jax.models.huggingface import load_llama
from radit_jax.models.llama import Llama
from radit_jax.stages.index import score_temperature
from radit_jax.stages.lm_ft import load_finetuned
from radit_jax.stages.retrieve import answer_hits, read_retrieved
from radit_jax.stages.stage import (
    Stage,
    compute_dtype,
    field_fingerprint,
    lm_folder,
    section,
)
from radit_jax.tracker import progress

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
    """The evaluate section, the untuned model and how prompts begin."""
    return section(config.evaluate) | {
        "lm": field_fingerprint(config, "lm"),
        "target": config.r_ft.target,
        "bos": config.lm_ft.bos,
        "row_tokens": config.lm_ft.row_tokens,
        "seed": config.seed,
        "dtype": config.dtype,
    }


def inputs(config: ConfigDict) -> tuple[str, ...]:
    """Artifacts that the systems of the table need."""
    systems = _systems(config).values()
    needed = ["passages", "retrieved"]
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
    found = {START: "retrieved"}
    if "retrieved_r_ft" in inputs(config):
        # The tuned one first, its controls after it.
        targets = sorted(
            path.name
            for path in (Path(config.workdir) / "retrieved_r_ft").iterdir()
            if path.name in RETRIEVERS
        )
        targets.sort(key=lambda target: target != config.r_ft.target)
        found |= {RETRIEVERS[name]: f"retrieved_r_ft/{name}" for name in targets}
    return found


def questions(config: ConfigDict, store: PassageStore) -> list[Question]:
    """The first ``evaluate.limit`` questions of every test file (0: all)."""
    found = []
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
    """answer@k, and gold@k and MRR on datasets whose gold passages are known."""
    found = []
    for dataset in dict.fromkeys(q.dataset for q in questions):
        ours = [q for q in questions if q.dataset == dataset]
        groups_N = _groups(ours)
        asked = tuple(q.example.id for q in ours)
        for name in ours[0].retrieved:
            ids = [q.retrieved[name][0] for q in ours]
            depth = min(max(metrics.DEPTHS), min(map(len, ids)))
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


class Reader:
    """Answers questions from passages with one language model.

    What it has read once it remembers: a gold passage is often among the retrieved.
    """

    def __init__(
        self, config: ConfigDict, model: Llama, tokenizer: Tokenizer, bos: bool
    ):
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.bos = bos
        self.dtype = compute_dtype(config)
        self._known: dict[tuple[int, ...], Generated] = {}

    def render(self, question: str, passage: str) -> list[int]:
        """The prompt of a question and one passage ("" for none)."""
        room = min(self.config.lm_ft.row_tokens, self.model.config.max_length)
        return prompts.render(
            self.tokenizer,
            question,
            room - self.config.evaluate.max_new_tokens,
            passage=passage,
            bos=self.bos,
        ).tokens

    def answer(
        self,
        name: str,
        questions: Sequence[Question],
        passages: Sequence[Sequence[Passage]],
        weights: Sequence[Sequence[float]],
    ) -> list[Generation]:
        """One prompt per passage (one without any where the list is empty), and the
        answer with the largest weighted probability."""
        evaluate = self.config.evaluate
        owner, rendered = [], []
        for i, question in enumerate(questions):
            for text in [p.display for p in passages[i]] or [""]:
                owner.append(i)
                rendered.append(tuple(self.render(question.example.question, text)))
        new = [p for p in dict.fromkeys(rendered) if p not in self._known]
        with progress(len(rendered), f"evaluate {name}", "prompts") as bar:
            bar.skip(len(rendered) - len(new))
            found = generate(
                self.model,
                self.tokenizer,
                new,
                max_new_tokens=evaluate.max_new_tokens,
                stop=tuple(evaluate.stop),
                batch_tokens=evaluate.batch_tokens,
                dtype=self.dtype,
                progress=bar.update,
            )
        self._known |= zip(new, found, strict=True)
        answers: list[list[Generated]] = [[] for _ in questions]
        for i, prompt in zip(owner, rendered, strict=True):
            answers[i].append(self._known[prompt])
        return [
            self._generation(name, question, list(read), list(weight) or [1.0], result)
            for question, read, weight, result in zip(
                questions, passages, weights, answers, strict=True
            )
        ]

    @staticmethod
    def _generation(
        name: str,
        question: Question,
        passages: list[Passage],
        weights: list[float],
        results: list,
    ) -> Generation:
        votes = vote(
            [result.text for result in results],
            [result.log_probability for result in results],
            weights,
            metrics.normalise,
        )
        prediction, example = votes[0].text, question.example
        return Generation(
            system=name,
            dataset=question.dataset,
            question_id=example.id,
            kind=example.kind,
            question=example.question,
            answers=example.answers,
            prediction=prediction,
            passages=tuple(
                SourcePassage(p.id, p.title, p.section, p.text, w, result.text)
                for p, w, result in zip(passages, weights, results, strict=True)
            )
            if passages
            else (),
            em=metrics.exact_match(prediction, example.answers),
            f1=metrics.f1(prediction, example.answers),
            group=subject(example),
        )


def read_for(
    system: System, question: Question, config: ConfigDict, temperature: float
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Ids and weights of the passages a system reads for a question.

    Args:
        system: a row of the table.
        question: with what was retrieved for it.
        config: of the run.
        temperature: of the weights.
    """
    if system.background == "none":
        return (), ()
    if system.background == "gold":
        return question.gold[:1], (1.0,)
    name = START
    if system.background == "r_ft":
        name = RETRIEVERS[config.r_ft.target]
    ids, scores = question.retrieved[name]
    k = config.evaluate.passages
    scores_BC = np.asarray([scores[:k]], np.float32)
    weights = passage_weights(scores_BC, temperature)[0]
    return ids[:k], tuple(weights.tolist())


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Run every system and write the report; finished systems are kept."""
    systems = _systems(config)
    temperature = score_temperature(config, "evaluate.score_temperature")
    store = PassageStore(Path(config.workdir) / "passages")
    asked = questions(config, store)
    tokenizer = load_tokenizer(lm_folder(config))
    loaders: dict[bool, Callable[[], Llama]] = {
        False: lambda: load_llama(lm_folder(config)),
        True: lambda: load_finetuned(config),
    }
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
            file = folder / "systems" / f"{name.replace(' ', '_')}.jsonl"
            if not file.exists():
                if reader is None:
                    bos = config.lm_ft.bos if finetuned else tokenizer.add_bos
                    reader = Reader(config, load(), tokenizer, bos)
                reads = [read_for(system, q, config, temperature) for q in ours]
                answered = reader.answer(
                    name,
                    ours,
                    [store.get(list(ids)) for ids, _ in reads],
                    [weights for _, weights in reads],
                )
                _save(file, answered)
            done[name] = _load(file)
        del reader
        gc.collect()
    generations = [g for name in systems for g in done.get(name, [])]
    answers = answer_values(generations)
    retrieval = retrieval_values(asked, store)
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
    )
    return {"questions": len(asked), "systems": list(done)}


def _comparable(
    pair: tuple[str, str], done: Mapping[str, Sequence[Generation]]
) -> bool:
    """Whether both systems of a pair answered, and the same questions."""
    asked = [{(g.dataset, g.question_id) for g in done.get(name, ())} for name in pair]
    return bool(asked[0]) and asked[0] == asked[1]


def _save(file: Path, generations: Sequence[Generation]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    with temporary.open("w") as stream:
        for generation in generations:
            passages = [passage._asdict() for passage in generation.passages]
            row = {**generation._asdict(), "passages": passages}
            stream.write(json.dumps(row) + "\n")
    temporary.rename(file)


def _load(file: Path) -> list[Generation]:
    found = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        row["answers"] = tuple(row["answers"])
        row["passages"] = tuple(SourcePassage(**p) for p in row["passages"])
        found.append(Generation(**row))
    return found


def summary(workdir: Path, examples: int = 3) -> str:
    """A finished report as text for a terminal: tables, and a few answers."""
    report = workdir / "report"
    # The terminal shows what R-FT did; the report has every comparison.
    shown = [
        found
        for found in read_differences(report)
        if "R-FT" in found.second
        and found.metric in ("em", "gold@1", "answer@1", "mrr")
    ]
    return text_report(
        read_rows(report), _load(report / "generations.jsonl"), shown, examples
    )


STAGE = Stage("report", inputs, ("lm", "encoder"), settings, build)
