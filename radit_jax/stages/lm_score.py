"""Stage ``lm_score``: retrieved/ and a language model -> scored/, for R-FT.

For every question and each of its passages, log p_LM(answer | passage, question) of
every token of the answer, and the same without a passage (RA-DIT section 2.3). The
model is frozen. Questions that retrieved the same passage stand together and read it
once; everything is packed into rows of one shape, so that one program scores it all.
Several processes share the pairs; each ends up with all scores.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from radit_jax import processes
from radit_jax.batch import Example
from radit_jax.data import prompts
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tasks import subject
from radit_jax.data.tokenize import Tokenizer, load_tokenizer
from radit_jax.models.huggingface import check_vocabulary, load_llama
from radit_jax.models.llama import Llama
from radit_jax.stages.retrieve import (
    CORPUS,
    SPLITS,
    chosen_datasets,
    read_retrieved,
    write_arrays,
)
from radit_jax.stages.scoring import PromptScorer, Scored, check_rows
from radit_jax.stages.stage import (
    Stage,
    attention_kernel,
    check_counts,
    check_language_model,
    compute_dtype,
    field_fingerprint,
    lm_folder,
    section,
)
from radit_jax.tracker import progress


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The lm_score section and the language model's content."""
    return section(config.lm_score) | {
        "lm": field_fingerprint(config, "lm"),
        "seed": config.seed,
        "dtype": config.dtype,
    }


def check_settings(config: ConfigDict) -> None:
    """Stop before anything is read if a setting makes no sense.

    Raises:
        ValueError: naming the setting.
    """
    lm_score = config.lm_score
    check_counts("lm_score", lm_score, ("passages", "row_tokens", "shard_size"))
    check_rows("lm_score", lm_score)
    known = (*SPLITS, CORPUS)
    unknown = [name for name in lm_score.splits if name not in known]
    if unknown or not lm_score.splits:
        raise ValueError(
            f"lm_score.splits = {tuple(lm_score.splits)}: expected some of "
            f"{', '.join(known)}"
        )
    for split, limit in lm_score.limit.items():
        if limit < 0:
            raise ValueError(
                f"lm_score.limit.{split} = {limit} must be 0 (all) or more"
            )


class Scorer(PromptScorer):
    """Scores questions with their passages under one frozen language model."""

    def __init__(self, config: ConfigDict, model: Llama, tokenizer: Tokenizer):
        check_vocabulary(tokenizer, model.config)
        super().__init__(
            *("lm_score", config.lm_score, model, compute_dtype(config)),
            attention_kernel(config, model.config.head_size),
        )
        self.config = config.lm_score
        self.tokenizer = tokenizer

    def render(self, example: Example, passage: str) -> prompts.Prompt:
        """A question with its first answer, after a passage ("" for none).

        Raises:
            ValueError: the answer tokenises to nothing or is too long; with the
                example's id.
        """
        try:
            prompt = prompts.render(
                self.tokenizer,
                prompts.pieces(example),
                self.config.row_tokens,
                passage=passage,
                bos=self.config.bos,
                eos=self.config.eos,
            )
        except ValueError as error:
            raise ValueError(f"question {example.id}: {error}") from error
        size = len(prompt.tokens) - prompt.answer_start
        if size > self.config.row_targets:
            raise ValueError(
                f"question {example.id}: an answer of {size} tokens is longer than "
                f"lm_score.row_targets = {self.config.row_targets}"
            )
        return prompt

    def __call__(
        self,
        pairs: Sequence[tuple[Example, str]],
        advance: Callable[[int], None] = lambda n: None,
    ) -> Scored:
        """Score examples, each after a text ("" for none).

        Args:
            pairs: those with the same text read it once; let them stand together.
            advance: called with the number of pairs just scored.
        """
        return self.score(
            [self.render(example, text) for example, text in pairs], advance
        )


class Pairs(NamedTuple):
    """Everything to be scored, in the order in which it is: by passage."""

    examples: np.ndarray  # int64, place among the examples of all datasets
    columns: np.ndarray  # int64, rank of the passage; -1: without one
    passages: np.ndarray  # int64, passage id; -1: without one


def all_pairs(ids_BC: np.ndarray) -> Pairs:
    """Every example without a passage and with each of its own [examples, k]."""
    ids_BC = np.concatenate([np.full((len(ids_BC), 1), -1), ids_BC], axis=1)
    wanted = ids_BC >= 0
    wanted[:, 0] = True
    examples, columns = np.nonzero(wanted)
    passages = ids_BC[examples, columns]
    order = np.lexsort((columns, examples, passages))
    return Pairs(examples[order], columns[order] - 1, passages[order])


class _Part(NamedTuple):
    """The examples of a dataset that are scored."""

    places: np.ndarray  # int64, among those retrieved for
    examples: list[Example]
    ids: np.ndarray  # int64 [examples, k]; -1: none


def _parts(config: ConfigDict) -> dict[tuple[str, str], _Part]:
    """(Split, dataset) -> a random choice of the split's ``lm_score.limit``.

    Subjects are drawn, with all their questions: these share passages.
    """
    lm_score = config.lm_score
    found: dict[tuple[str, str], _Part] = {}
    splits = {
        split: read_retrieved(Path(config.workdir), split)
        for split in dict.fromkeys(("train", *lm_score.splits))
    }
    used = chosen_datasets("lm_score.datasets", lm_score.datasets, splits, "R")
    for split in lm_score.splits:
        parts = {name: part for name, part in splits[split].items() if name in used}
        subjects = [
            subject(example) or f"{name} {example.id}"
            for name, (examples, _) in parts.items()
            for example in examples
        ]
        _, of_example = np.unique(subjects, return_inverse=True)
        rng = np.random.default_rng(config.seed)
        drawn = rng.permutation(len(subjects))[of_example]
        limit = lm_score.limit[split] or None
        chosen = np.sort(np.argsort(drawn, kind="stable")[:limit])
        start = 0
        for name, (examples, retrieved) in parts.items():
            mine = (chosen >= start) & (chosen < start + len(examples))
            places = chosen[mine] - start
            start += len(examples)
            found[split, name] = _Part(
                places,
                [examples[i] for i in places],
                retrieved.ids[places, : lm_score.passages],
            )
    return found


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Score shard by shard, a shard that is there is kept; then sort by example."""
    check_settings(config)
    store = PassageStore(Path(config.workdir) / "passages")
    tokenizer = load_tokenizer(lm_folder(config))
    model = load_llama(lm_folder(config), compute_dtype(config))
    scorer = Scorer(config, model, tokenizer)
    parts = _parts(config)
    size = config.lm_score.shard_size
    examples = [example for part in parts.values() for example in part.examples]
    ids_BC = np.concatenate([part.ids for part in parts.values()])
    pairs = all_pairs(ids_BC)
    shards = folder / "shards"
    starts = range(0, len(pairs.examples), size)
    files = [shards / f"{start:012d}.npz" for start in starts]
    there = processes.from_first([file.exists() for file in files])
    with progress(len(pairs.examples), "lm_score", "pairs") as bar:
        for start, file, done in zip(starts, files, there, strict=True):
            part = Pairs(*(array[start : start + size] for array in pairs))
            if done:
                bar.skip(len(part.examples))
                continue
            scored = scorer(texts_of(part, examples, store), bar.update)
            if processes.first():
                write_arrays(file, **scored._asdict())
    if processes.first():
        _write_scores(folder, parts, ids_BC, pairs, files)
        shutil.rmtree(shards)
    counts: dict[str, Any] = {
        f"{split}/{name}": len(part.examples) for (split, name), part in parts.items()
    }
    if scorer.slots:
        # Of this run: what an earlier one scored is not known.
        counts["padding"] = round(1 - scorer.read / scorer.slots, 4)
        counts["tokens_read_once"] = round(1 - scorer.read / scorer.alone, 4)
    return counts | {"pairs": len(pairs.examples)}


def texts_of(
    pairs: Pairs, examples: Sequence[Example], store: PassageStore
) -> list[tuple[Example, str]]:
    """What ``Scorer`` is given of pairs: the example and the text of the passage."""
    read = np.unique(pairs.passages[pairs.passages >= 0])
    texts = {passage.id: passage.display for passage in store.get(read)} | {-1: ""}
    return [
        (examples[example], texts[int(passage)])
        for example, passage in zip(pairs.examples, pairs.passages, strict=True)
    ]


class ScoreTable(NamedTuple):
    """Scores by example; the first column is of no passage."""

    log_p: np.ndarray  # float32 [examples, k + 1]; -inf: not scored
    token_log_p: np.ndarray  # float32 [tokens of all answers, k + 1]; the same


def score_table(
    scored: Scored, pairs: Pairs, tokens: np.ndarray, columns: int
) -> ScoreTable:
    """Scores of pairs in any order as a table.

    Args:
        scored: the scores.
        pairs: what they are of; column -1 becomes the first one of the table.
        tokens: of each example's answer, the same after every passage.
        columns: of the table.
    """
    at = pairs.columns + 1
    log_p = np.full((len(tokens), columns), -np.inf, np.float32)
    log_p[pairs.examples, at] = scored.log_p
    token_log_p = np.full((int(tokens.sum()), columns), -np.inf, np.float32)
    starts = np.cumsum(tokens) - tokens
    within = np.arange(len(scored.token_log_p)) - np.repeat(
        np.cumsum(scored.tokens) - scored.tokens, scored.tokens
    )
    rows = np.repeat(starts[pairs.examples], scored.tokens) + within
    token_log_p[rows, np.repeat(at, scored.tokens)] = scored.token_log_p
    return ScoreTable(log_p, token_log_p)


def _write_scores(
    folder: Path,
    parts: Mapping[tuple[str, str], _Part],
    ids_BC: np.ndarray,
    pairs: Pairs,
    files: Sequence[Path],
) -> None:
    """Scores by example, one file per dataset."""
    shards = [np.load(file) for file in files]
    scored = Scored(
        *(np.concatenate([shard[name] for shard in shards]) for name in Scored._fields)
    )
    tokens = np.zeros(len(ids_BC), np.int32)
    tokens[pairs.examples] = scored.tokens
    table = score_table(scored, pairs, tokens, ids_BC.shape[1] + 1)
    bounds = np.concatenate([[0], np.cumsum(tokens)])
    end = 0
    for (split, name), part in parts.items():
        start, end = end, end + len(part.examples)
        write_arrays(
            folder / split / name / "scores.npz",
            places=part.places,
            ids=part.ids,
            log_p=table.log_p[start:end, 1:],
            log_p_alone=table.log_p[start:end, 0],
            token_log_p=table.token_log_p[bounds[start] : bounds[end], 1:],
            tokens=tokens[start:end],
            characters=np.array([len(e.answers[0]) for e in part.examples], np.int32),
        )


STAGE = Stage(
    *("scored", ("passages", "retrieved"), ("lm",), settings, build),
    check_language_model,
)
