"""Log-likelihoods of many prompts' answers: packed, sharded, over all processes."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from radit_jax import sharding
from radit_jax.batch import Packed
from radit_jax.data import pipeline, prompts
from radit_jax.inference.score import target_log_probabilities
from radit_jax.models.attention import XLA, Kernel
from radit_jax.models.llama import Llama
from radit_jax.stages.stage import check_counts

COUNTS = ("row_targets", "rows", "packing_bins")


def check_rows(name: str, config: ConfigDict) -> None:
    """Stop before anything is read if the shape of a batch makes no sense.

    Args:
        name: of the section, for errors.
        config: the section, with COUNTS.

    Raises:
        ValueError: naming the setting.
    """
    check_counts(name, config, COUNTS)
    sharding.check_rows(config.rows, f"{name}.rows = {config.rows}")


class Scored(NamedTuple):
    """Log-probabilities of the answers of a list of pairs, in nats."""

    token_log_p: np.ndarray  # float32, the tokens of all answers one after the other
    tokens: np.ndarray  # int32 [pairs], of each answer

    @property
    def log_p(self) -> np.ndarray:
        """Summed over each answer, float32 [pairs]."""
        owners = np.repeat(np.arange(len(self.tokens)), self.tokens)
        sums = np.bincount(owners, self.token_log_p, len(self.tokens))
        return sums.astype(np.float32)


def make_score(
    dtype: DTypeLike, kernel: Kernel = XLA
) -> Callable[[Llama, Packed, jax.Array], jax.Array]:
    """The jitted function from packed rows to log-probabilities [B, T], whole on every
    device: every process needs the scores of all rows, not of its own alone."""

    @functools.partial(jax.jit, out_shardings=jax.P())
    def log_probabilities(
        model: Llama, batch: Packed, prefix_ids_BL: jax.Array
    ) -> jax.Array:
        log_BT = target_log_probabilities(
            model, batch, prefix_ids_BL, dtype, kernel=kernel
        )
        return jax.sharding.reshard(log_BT, jax.P())

    return log_probabilities


class PromptScorer:
    """Scores answers under one frozen language model.

    Args:
        name: of the config's section, for errors.
        config: the section: ``row_tokens`` of a packed row, ``row_targets`` in it,
            ``rows`` of a batch on all devices, and ``packing_bins``.
        model: on the current mesh.
        dtype: of compute.
        kernel: of attention.

    Raises:
        ValueError: rows do not divide over the processes, or are longer than the
            model's context.
    """

    def __init__(
        self,
        name: str,
        config: ConfigDict,
        model: Llama,
        dtype: DTypeLike,
        kernel: Kernel = XLA,
    ):
        self.model = model
        if config.row_tokens > model.config.max_length:
            raise ValueError(
                f"{name}.row_tokens = {config.row_tokens} is more than the "
                f"model's context of {model.config.max_length} tokens"
            )
        # Processes that split heads among each other score the same rows.
        self.part, parts = sharding.process_rows()
        if config.rows % parts:
            raise ValueError(
                f"{name}.rows = {config.rows} does not divide over {parts} processes"
            )
        self.parts = parts
        self.mixture = pipeline.Mixture(
            row_tokens=config.row_tokens,
            row_targets=config.row_targets,
            rows=config.rows // parts,
            packing_bins=config.packing_bins,
        )

        self._log_probabilities = make_score(dtype, kernel)
        # Tokens of all sequences, those read, and the room of all rows; of this
        # process.
        self.alone = self.read = self.slots = 0

    def score(
        self,
        sequences: Sequence[prompts.Prompt],
        advance: Callable[[int], None] = lambda n: None,
    ) -> Scored:
        """Score the answers of prompts.

        Args:
            sequences: those that begin alike, up to ``question_start``, read the
                beginning once; let them stand together.
            advance: called with the number of sequences just scored.
        """
        tokens = np.array([len(s.tokens) - s.answer_start for s in sequences], np.int32)
        starts = np.cumsum(tokens) - tokens
        token_log_p = np.zeros(int(tokens.sum()), np.float32)
        late: tuple[jax.Array, np.ndarray] | None = None
        for packed in self._batches(sequences):
            on_mesh = Packed(*map(sharding.put_own_rows, packed.batch))
            prefix_ids_BL = sharding.put_own_rows(packed.prefix_ids_BL)
            log_BT = self._log_probabilities(self.model, on_mesh, prefix_ids_BL)
            # The device works on this batch while the one before is filed.
            if late is not None:
                advance(_file(token_log_p, starts, *late))
            late = log_BT, packed.owners_BT
        if late is not None:
            advance(_file(token_log_p, starts, *late))
        return Scored(token_log_p, tokens)

    def _batches(
        self, sequences: Sequence[prompts.Prompt]
    ) -> Iterator[pipeline.ScoringBatch]:
        """This process' rows of every batch; the owners are those of all rows."""
        # Neighbours share a passage, so that each process has a stretch of them.
        bounds = np.linspace(0, len(sequences), self.parts + 1).astype(int)
        start, stop = bounds[self.part : self.part + 2]
        step = 0  # every process has as many rows in every batch
        if self.parts == 1:
            shards = sharding.row_shards()
            step = -(-self.mixture.rows // (4 * shards)) * shards
        mine = pipeline.scoring_batches(sequences[start:stop], self.mixture, step)
        if self.parts > 1:
            mine = self._in_step(mine, int(start))
        for packed in mine:
            self.read += int((packed.batch.segment_ids_BL > 0).sum())
            self.slots += packed.batch.tokens_BL.size
            yield packed
        self.alone += sum(len(s.tokens) - 1 for s in sequences[start:stop])

    def _in_step(
        self, batches: Iterator[pipeline.ScoringBatch], start: int
    ) -> Iterator[pipeline.ScoringBatch]:
        """As many batches on every process, with the owners of everyone's rows."""
        while True:
            packed = next(batches, None)
            if not sharding.any_process(packed is not None):
                return
            if packed is None:
                packed = pipeline.empty_batch(self.mixture)
            owners_BT = np.where(
                packed.owners_BT >= 0, packed.owners_BT + start, packed.owners_BT
            )
            everyone = sharding.fetch(sharding.put_own_rows(owners_BT))
            yield packed._replace(owners_BT=everyone)


def _file(
    token_log_p: np.ndarray,
    starts: np.ndarray,
    log_BT: jax.Array,
    owners_BT: np.ndarray,
) -> int:
    """Put a batch's log-probabilities in their place; of how many sequences."""
    used = owners_BT >= 0
    owners = owners_BT[used]
    # A sequence stands in one row, its sites in order.
    order = np.argsort(owners, kind="stable")
    owners = owners[order]
    unique, first = np.unique(owners, return_index=True)
    within = np.arange(len(owners)) - np.repeat(first, np.diff([*first, len(owners)]))
    token_log_p[starts[owners] + within] = np.asarray(log_BT)[used][order]
    return len(unique)
