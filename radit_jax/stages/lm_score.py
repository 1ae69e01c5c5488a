"""Stage ``lm_score``: retrieved/ and a language model -> scored/, for R-FT.

For every question and each of its passages, log p_LM(answer | passage, question), and
the same without a passage (RA-DIT section 2.3). The model is frozen; everything is
packed into rows of one shape, so that one program scores it all.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from radit_jax import sharding
from radit_jax.batch import Example, Packed, Scored
from radit_jax.data import pipeline, prompts
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tokenize import Tokenizer, load_tokenizer
from radit_jax.inference.score import target_log_probabilities
from radit_jax.models.huggingface import check_vocabulary, load_llama
from radit_jax.models.llama import Llama
from radit_jax.stages.retrieve import SPLITS, read_retrieved
from radit_jax.stages.stage import (
    Stage,
    compute_dtype,
    field_fingerprint,
    lm_folder,
    section,
)
from radit_jax.tracker import progress

log = logging.getLogger(__name__)


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The lm_score section and the language model's content."""
    return section(config.lm_score) | {
        "lm": field_fingerprint(config, "lm"),
        "dtype": config.dtype,
    }


def check_settings(config: ConfigDict) -> None:
    """Stop before anything is read if a setting makes no sense.

    Raises:
        ValueError: naming the setting.
    """
    lm_score = config.lm_score
    counts = ("passages", "row_tokens", "row_targets", "rows", "packing_bins")
    for name in (*counts, "shard_size"):
        if lm_score[name] < 1:
            raise ValueError(f"lm_score.{name} = {lm_score[name]} must be at least 1")
    unknown = [name for name in lm_score.splits if name not in SPLITS]
    if unknown or not lm_score.splits:
        raise ValueError(
            f"lm_score.splits = {tuple(lm_score.splits)}: expected some of "
            f"{', '.join(SPLITS)}"
        )
    shards = sharding.row_shards()
    if lm_score.rows % shards:
        raise ValueError(
            f"lm_score.rows = {lm_score.rows} do not divide over the {shards} devices "
            f"of mesh axes data x fsdp; the nearest multiple is "
            f"{max(round(lm_score.rows / shards), 1) * shards}"
        )


class Scorer:
    """Scores questions with their passages under one frozen language model."""

    def __init__(self, config: ConfigDict, model: Llama, tokenizer: Tokenizer):
        check_vocabulary(tokenizer, model.config)
        self.config = config.lm_score
        self.model = model
        self.tokenizer = tokenizer
        if self.config.row_tokens > model.config.max_length:
            raise ValueError(
                f"lm_score.row_tokens = {self.config.row_tokens} is more than the "
                f"model's context of {model.config.max_length} tokens"
            )
        self.mixture = pipeline.Mixture(
            row_tokens=self.config.row_tokens,
            row_targets=self.config.row_targets,
            rows=self.config.rows,
            packing_bins=self.config.packing_bins,
        )
        self._log_probabilities = jax.jit(
            functools.partial(target_log_probabilities, dtype=compute_dtype(config))
        )
        self.tokens = self.slots = 0  # scored so far, and what they took in rows

    def render(self, example: Example, passage: str) -> prompts.Prompt:
        """A question with its first answer, after a passage ("" for none).

        Raises:
            ValueError: the answer tokenises to nothing or is too long; with the
                example's id.
        """
        try:
            prompt = prompts.render(
                self.tokenizer,
                example.question,
                self.config.row_tokens,
                passage=passage,
                answer=example.answers[0],
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
        examples: Sequence[Example],
        passages: Sequence[Sequence[str]],
        advance: Callable[[int], None] = lambda n: None,
    ) -> Scored:
        """Scores of the examples.

        Args:
            examples: questions with answers.
            passages: texts of each one's passages, best first.
            advance: called with the number of sequences just scored.
        """
        k = self.config.passages
        found = Scored(
            log_p=np.full((len(examples), k), -np.inf, np.float32),
            log_p_alone=np.zeros(len(examples), np.float32),
            tokens=np.zeros(len(examples), np.int32),
            characters=np.array([len(e.answers[0]) for e in examples], np.int32),
        )
        sequences, places = [], []
        for row, (example, texts) in enumerate(zip(examples, passages, strict=True)):
            for column, text in enumerate(["", *texts[:k]]):
                sequences.append(self.render(example, text))
                places.append((row, column - 1))
            # The same after every passage: the answer is tokenised apart from it.
            found.tokens[row] = len(sequences[-1].tokens) - sequences[-1].answer_start
        sums = np.zeros(len(sequences), np.float64)
        late: tuple[jax.Array, pipeline.Owned] | None = None
        for owned in pipeline.scoring_batches(sequences, self.mixture):
            on_mesh = Packed(*map(sharding.put_rows, owned.batch))
            log_BT = self._log_probabilities(self.model, on_mesh)
            self.tokens += int((owned.batch.segment_ids_BL > 0).sum())
            self.slots += owned.batch.tokens_BL.size
            # The device works on this batch while the one before is added up.
            if late is not None:
                advance(self._add(sums, *late))
            late = log_BT, owned
        if late is not None:
            advance(self._add(sums, *late))
        for (row, column), total in zip(places, sums, strict=True):
            if column < 0:
                found.log_p_alone[row] = total
            else:
                found.log_p[row, column] = total
        return found

    @staticmethod
    def _add(sums: np.ndarray, log_BT: jax.Array, owned: pipeline.Owned) -> int:
        """Add a batch's log-probabilities to their sequences; how many there were."""
        used = owned.owners_BT >= 0
        owners = owned.owners_BT[used]
        np.add.at(sums, owners, np.asarray(log_BT)[used].astype(np.float64))
        return len(np.unique(owners))


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Score shard by shard; a shard that is there is kept."""
    check_settings(config)
    workdir = Path(config.workdir)
    store = PassageStore(workdir / "passages")
    tokenizer = load_tokenizer(lm_folder(config))
    scorer = Scorer(config, load_llama(lm_folder(config)), tokenizer)
    parts = {
        (split, name): part
        for split in config.lm_score.splits
        for name, part in read_retrieved(workdir, split).items()
    }
    k, size = config.lm_score.passages, config.lm_score.shard_size
    total = sum(
        len(examples) + int((found.ids[:, :k] >= 0).sum())
        for examples, found in parts.values()
    )
    counts = {}
    with progress(total, "lm_score", "sequences") as bar:
        for (split, name), (examples, found) in parts.items():
            counts[f"{split}/{name}"] = len(examples)
            target = folder / split / name
            target.mkdir(parents=True, exist_ok=True)
            for start in range(0, len(examples), size):
                file = target / f"shard-{start:09d}.npz"
                chosen = slice(start, start + size)
                ids_BC = found.ids[chosen, :k]
                if file.exists():
                    bar.skip(len(ids_BC) + int((ids_BC >= 0).sum()))
                    continue
                texts = [
                    [passage.display for passage in store.get(ids[ids >= 0])]
                    for ids in ids_BC
                ]
                _write(file, scorer(examples[chosen], texts, bar.update), ids_BC)
    padding = 1 - scorer.tokens / scorer.slots if scorer.slots else 0.0
    return {**counts, "sequences": total, "padding": round(padding, 4)}


def _write(file: Path, scores: Scored, ids_BC: np.ndarray) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("wb") as stream:
        np.savez(stream, ids=ids_BC, **scores._asdict())
    temporary.rename(file)


STAGE = Stage("scored", ("passages", "retrieved"), ("lm",), settings, build)
