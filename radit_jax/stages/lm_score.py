"""Stage ``lm_score``: retrieved/ and a language model -> scored/, for R-FT.

For every question and each of its passages, log p_LM(answer | passage, question), and
the same without a passage (RA-DIT section 2.3). The model is frozen. Questions that
retrieved the same passage stand together and read it once; everything is packed into
rows of one shape, so that one program scores it all.
"""

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from radit_jax import sharding
from radit_jax.batch import Example, Packed, Retrieved
from radit_jax.data import pipeline, prompts
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tokenize import Tokenizer, load_tokenizer
from radit_jax.inference.score import target_log_probabilities
from radit_jax.models.huggingface import check_vocabulary, load_llama
from radit_jax.models.llama import Llama
from radit_jax.stages.retrieve import SPLITS, read_retrieved, write_arrays
from radit_jax.stages.stage import (
    Stage,
    check_counts,
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
        "dtype": config.dtype,
    }


def check_settings(config: ConfigDict) -> None:
    """Stop before anything is read if a setting makes no sense.

    Raises:
        ValueError: naming the setting.
    """
    lm_score = config.lm_score
    counts = ("passages", "row_tokens", "row_targets", "rows", "packing_bins")
    check_counts("lm_score", lm_score, (*counts, "shard_size"))
    unknown = [name for name in lm_score.splits if name not in SPLITS]
    if unknown or not lm_score.splits:
        raise ValueError(
            f"lm_score.splits = {tuple(lm_score.splits)}: expected some of "
            f"{', '.join(SPLITS)}"
        )
    sharding.check_rows(lm_score.rows, f"lm_score.rows = {lm_score.rows}")


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
        # Tokens of all pairs, those read, and the room of all rows.
        self.alone = self.read = self.slots = 0

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
        pairs: Sequence[tuple[Example, str]],
        advance: Callable[[int], None] = lambda n: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score examples, each after a text ("" for none).

        Args:
            pairs: those with the same text read it once; let them stand together.
            advance: called with the number of pairs just scored.

        Returns:
            Sum of the answer's log-probabilities in nats, float32, and number of its
            tokens, int32, of every pair.
        """
        sequences = [self.render(example, text) for example, text in pairs]
        sizes = [len(s.tokens) - s.answer_start for s in sequences]
        self.alone += sum(len(s.tokens) for s in sequences)
        sums = np.zeros(len(pairs), np.float64)
        late: tuple[jax.Array, np.ndarray] | None = None
        for packed in pipeline.scoring_batches(sequences, self.mixture):
            on_mesh = Packed(*map(sharding.put_rows, packed.batch))
            prefix_ids_BL = sharding.put_rows(packed.prefix_ids_BL)
            log_BT = self._log_probabilities(self.model, on_mesh, prefix_ids_BL)
            self.read += int((packed.batch.segment_ids_BL > 0).sum())
            self.slots += packed.batch.tokens_BL.size
            # The device works on this batch while the one before is added up.
            if late is not None:
                advance(_add(sums, *late))
            late = log_BT, packed.owners_BT
        if late is not None:
            advance(_add(sums, *late))
        return sums.astype(np.float32), np.asarray(sizes, np.int32)


def _add(sums: np.ndarray, log_BT: jax.Array, owners_BT: np.ndarray) -> int:
    """Add a batch's log-probabilities to their sequences; how many there were."""
    used = owners_BT >= 0
    np.add.at(sums, owners_BT[used], np.asarray(log_BT)[used].astype(np.float64))
    return len(np.unique(owners_BT[used]))


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


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Score shard by shard, a shard that is there is kept; then sort by example."""
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
    examples = [example for part, _ in parts.values() for example in part]
    ids_BC = np.concatenate([found.ids[:, :k] for _, found in parts.values()])
    pairs = all_pairs(ids_BC)
    shards = folder / "shards"
    files = []
    with progress(len(pairs.examples), "lm_score", "pairs") as bar:
        for start in range(0, len(pairs.examples), size):
            part = Pairs(*(array[start : start + size] for array in pairs))
            files.append(shards / f"{start:012d}.npz")
            if files[-1].exists():
                bar.skip(len(part.examples))
                continue
            read = np.unique(part.passages[part.passages >= 0])
            texts = {p.id: p.display for p in store.get(read)} | {-1: ""}
            log_p, tokens = scorer(
                [
                    (examples[example], texts[int(passage)])
                    for example, passage in zip(
                        part.examples, part.passages, strict=True
                    )
                ],
                bar.update,
            )
            write_arrays(files[-1], log_p=log_p, tokens=tokens)
    _write_scores(folder, parts, ids_BC, pairs, files)
    shutil.rmtree(shards)
    counts: dict[str, Any] = {
        f"{split}/{name}": len(part) for (split, name), (part, _) in parts.items()
    }
    if scorer.slots:
        # Of this run: what an earlier one scored is not known.
        counts["padding"] = round(1 - scorer.read / scorer.slots, 4)
        counts["tokens_read_once"] = round(1 - scorer.read / scorer.alone, 4)
    return counts | {"pairs": len(pairs.examples)}


def _write_scores(
    folder: Path,
    parts: Mapping[tuple[str, str], tuple[list[Example], Retrieved]],
    ids_BC: np.ndarray,
    pairs: Pairs,
    files: Sequence[Path],
) -> None:
    """Scores by example, one file per dataset."""
    shards = [np.load(file) for file in files]
    log_p_B1C = np.full((len(ids_BC), ids_BC.shape[1] + 1), -np.inf, np.float32)
    at = pairs.examples, pairs.columns + 1
    log_p_B1C[at] = np.concatenate([shard["log_p"] for shard in shards])
    tokens_B = np.zeros(len(ids_BC), np.int32)
    # The same after every passage: the answer is tokenised apart from it.
    tokens_B[pairs.examples] = np.concatenate([shard["tokens"] for shard in shards])
    end = 0
    for (split, name), (examples, _) in parts.items():
        start, end = end, end + len(examples)
        write_arrays(
            folder / split / name / "scores.npz",
            ids=ids_BC[start:end],
            log_p=log_p_B1C[start:end, 1:],
            log_p_alone=log_p_B1C[start:end, 0],
            tokens=tokens_B[start:end],
            characters=np.array([len(e.answers[0]) for e in examples], np.int32),
        )


STAGE = Stage("scored", ("passages", "retrieved"), ("lm",), settings, build)
