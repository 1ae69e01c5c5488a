"""Candidates that follow the query encoder while it trains."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from radit_jax import processes
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tokenize import load_tokenizer
from radit_jax.models.huggingface import load_llama
from radit_jax.stages.lm_score import Pairs, Scorer, score_table, texts_of
from radit_jax.stages.retrieve import Searcher, write_arrays
from radit_jax.stages.stage import compute_dtype, lm_folder
from radit_jax.stages.targets import Scores

log = logging.getLogger(__name__)


class Refresher:
    """Retrieves and scores the training examples anew every so many steps.

    Not in RA-DIT, which keeps the candidates of the start; Atlas and REPLUG refresh.
    Only pairs that the round before had not are scored. A round's result is a file, so
    that a run that goes on reads what the one before it made.

    Args:
        config: of the run; ``r_ft.refresh_every`` says how often.
        folder: of the rounds.
        scores: split -> candidates and scores of the start.
        store: the passages.
        searcher: searches with towers.
    """

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        scores: Mapping[str, Scores],
        store: PassageStore,
        searcher: Callable[[Any], Searcher],
    ):
        self.config = config
        self.folder = folder
        self.scores = dict(scores)
        self.store = store
        self.searcher = searcher
        self.round = 0
        self.scorer: Scorer | None = None

    def __call__(self, done: int, towers: Any) -> dict[str, Scores] | None:
        """The scores to go on with where a round begins, else None.

        Raises:
            ValueError: an earlier round, which a checkpoint goes on from, is missing.
        """
        every = self.config.r_ft.refresh_every
        wanted = done // every
        if wanted == self.round:
            return None
        # Once for all splits: with both towers training it embeds the corpus.
        searcher: Searcher | None = None
        for round in range(self.round + 1, wanted + 1):
            for split in self.scores:
                file = self.folder / f"{round * every:09d}-{split}.npz"
                if not processes.from_first(file.exists()):
                    if round * every != done:
                        raise ValueError(
                            f"{file}: missing, and the retriever of step "
                            f"{round * every} is gone; move {self.folder.parent} away "
                            "to train from the start"
                        )
                    searcher = searcher or self.searcher(towers)
                    self._make(file, split, searcher)
                arrays = np.load(file)
                self.scores[split] = self.scores[split]._replace(
                    **{name: arrays[name] for name in arrays.files}
                )
        self.round = wanted
        return dict(self.scores)

    def _make(self, file: Path, split: str, searcher: Searcher) -> None:
        """Retrieve, and score what is new."""
        old = self.scores[split]
        k = old.ids.shape[1]
        ids_BC = searcher(old.examples, k).ids
        same_BCC = ids_BC[:, :, None] == old.ids[:, None, :]
        known_BC = same_BCC.any(axis=2) & (ids_BC >= 0)
        at_BC = same_BCC.argmax(axis=2)
        examples, columns = np.nonzero(~known_BC & (ids_BC >= 0))
        passages = ids_BC[examples, columns]
        order = np.lexsort((examples, passages))
        new = Pairs(examples[order], columns[order], passages[order])
        log.info(
            "r_ft: refresh of %s: %d of %d candidates are new, they are scored",
            split,
            len(examples),
            ids_BC.size,
        )
        log_p = np.full(ids_BC.shape, -np.inf, np.float32)
        token_log_p = np.full((len(old.token_log_p), k), -np.inf, np.float32)
        if len(examples):
            scored = self._scorer()(texts_of(new, old.examples, self.store))
            table = score_table(scored, new, old.tokens, k + 1)
            log_p, token_log_p = table.log_p[:, 1:], table.token_log_p[:, 1:]
        owners = np.repeat(np.arange(len(old.tokens)), old.tokens)
        log_p = np.where(known_BC, np.take_along_axis(old.log_p, at_BC, 1), log_p)
        token_log_p = np.where(
            known_BC[owners],
            np.take_along_axis(old.token_log_p, at_BC[owners], 1),
            token_log_p,
        )
        if processes.first():
            write_arrays(file, ids=ids_BC, log_p=log_p, token_log_p=token_log_p)
        processes.barrier("refresh")
        processes.wait_for(file)

    def _scorer(self) -> Scorer:
        """The language model, once it is needed."""
        if self.scorer is None:
            folder = lm_folder(self.config)
            model = load_llama(folder, compute_dtype(self.config))
            self.scorer = Scorer(self.config, model, load_tokenizer(folder))
        return self.scorer
