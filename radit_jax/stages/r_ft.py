"""Stage ``r_ft``: scored/, index/ and a query encoder -> r_ft/, a better one.

RA-DIT's second half: the query encoder learns the language model's preferences among
the passages of a question, KL(p_R || p_LSR) (section 2.3). Passage embeddings are
gathered from the index and never change. Controls are trained the same way towards
other targets, each in a folder named after its target.
"""

import functools
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from radit_jax import losses, optim, processes, sharding
from radit_jax.batch import Candidates, Example
from radit_jax.data.candidates import (
    CandidateBatches,
    Questions,
    gather_embeddings,
    gather_tokens,
)
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tasks import gold_passages
from radit_jax.data.tokenize import load_tokenizer
from radit_jax.evaluation import metrics
from radit_jax.loop import TrainState
from radit_jax.models.encoder import Encoder
from radit_jax.models.huggingface import check_vocabulary
from radit_jax.retrieval.embed import EmbeddingStore
from radit_jax.retrieval.index import ExactIndex, Index, open_index
from radit_jax.stages.index import (
    build_structure,
    context_fingerprint,
    context_folder,
    embed_corpus,
    encoding,
    load_tower,
    score_temperature,
    tokenizing,
    tower_config,
)
from radit_jax.stages.refresh import Refresher
from radit_jax.stages.retrieve import CORPUS, Searcher, answer_hits, read_retrieved
from radit_jax.stages.stage import (
    Stage,
    check_counts,
    compute_dtype,
    field_fingerprint,
    section,
)
from radit_jax.stages.targets import (
    TARGETS,
    Scores,
    check_scored,
    control_targets,
    gold_agreement,
    lm_targets,
    read_scores,
    target_facts,
)
from radit_jax.stages.training import (
    COUNTS,
    Metric,
    load_checkpoint,
    train,
    training_settings,
)

log = logging.getLogger(__name__)

METRIC = Metric("mrr", higher_is_better=True)
# Cross-entropy with the passages of all questions of a batch to tell apart.
CONTRASTIVE = "contrastive"
LOSSES = (*losses.RETRIEVER_LOSSES, CONTRASTIVE)
# With probabilities of 0 in the target, KL(p_R || target) is infinite.
GOLD_LOSSES = ("reverse_kl", "pdist", CONTRASTIVE)


class Towers(NamedTuple):
    """What trains: the query encoder, or both."""

    query: Encoder
    context: Encoder | None = None  # None: frozen, its embeddings are in the index


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The r_ft section and the encoders' content; not the mesh."""
    return training_settings(config.r_ft) | {
        "encoder": field_fingerprint(config, "encoder"),
        "context_encoder": context_fingerprint(config),
        "pooling": section(config.pooling),
        "question_tokens": config.retrieve.max_tokens,
        "seed": config.seed,
        "dtype": config.dtype,
    }


def check_settings(config: ConfigDict) -> None:
    """Stop before any work if a setting makes no sense.

    Raises:
        ValueError: naming the setting.
    """
    r_ft = config.r_ft
    check_counts("r_ft", r_ft, ("validation_depth", "passage_tokens", *COUNTS))
    for name, known in (
        ("loss", LOSSES),
        ("score_mode", losses.SCORE_MODES),
        ("target", TARGETS),
        ("towers", ("query", "both")),
    ):
        if r_ft[name] not in known:
            raise ValueError(
                f"r_ft.{name} = {r_ft[name]!r} is not one of {', '.join(known)}"
            )
    for control in r_ft.controls:
        if control not in TARGETS or control == r_ft.target:
            others = [target for target in TARGETS if target != r_ft.target]
            raise ValueError(
                f"r_ft.controls: {control!r} is not one of {', '.join(others)}"
            )
    if r_ft.target == "gold" and r_ft.loss not in GOLD_LOSSES:
        raise ValueError(
            f"r_ft.target = 'gold' gives passages no probability at all, and r_ft.loss "
            f"= {r_ft.loss!r} would be infinite; take one of {', '.join(GOLD_LOSSES)}"
        )
    if r_ft.loss == CONTRASTIVE and r_ft.target != "gold":
        raise ValueError(
            f"r_ft.loss = {CONTRASTIVE!r} knows right and wrong passages only; it "
            f"needs r_ft.target=gold, not {r_ft.target!r}"
        )
    if r_ft.refresh_every < 0:
        raise ValueError(
            f"r_ft.refresh_every = {r_ft.refresh_every} must be 0 (never) or more"
        )
    if r_ft.refresh_every and (r_ft.target != "lm" or r_ft.controls):
        raise ValueError(
            "r_ft.refresh_every scores new candidates with the language model; it goes "
            "with r_ft.target=lm and no r_ft.controls"
        )
    if not 0 <= r_ft.corpus_share <= 1:
        raise ValueError(
            f"r_ft.corpus_share = {r_ft.corpus_share} must be between 0 and 1"
        )
    if r_ft.target_temperature <= 0:
        raise ValueError(
            f"r_ft.target_temperature = {r_ft.target_temperature} must be positive"
        )
    sharding.check_rows(r_ft.rows, f"r_ft.rows = {r_ft.rows}")


def retriever_loss(
    towers: Towers,
    batch: Candidates,
    dtype: jnp.dtype,
    loss_name: str,
    temperature: float,
) -> tuple[Array, dict[str, Array]]:
    """Mean loss of a batch's questions in nats, and what is logged beside it.

    Args:
        towers: what trains.
        batch: on the mesh.
        dtype: of compute; scores and probabilities are float32.
        loss_name: one of LOSSES.
        temperature: of p_R.
    """
    queries_BE = towers.query(batch.tokens_BL, batch.mask_BL, dtype)
    passages_BCE = _passages(towers, batch, dtype)
    scores_BC = jnp.einsum("BE,BCE->BC", queries_BE, passages_BCE)
    log_q_BC = batch.log_targets_BC
    log_p_BC = losses.retriever_log_probabilities(
        scores_BC, batch.ids_BC >= 0, temperature
    )
    if loss_name == CONTRASTIVE:
        log_p_BN, log_q_BN = _in_batch(queries_BE, passages_BCE, batch, temperature)
        found_B = losses.divergence(log_q_BN, log_p_BN)
    else:
        function = losses.RETRIEVER_LOSSES[loss_name]
        found_B = function(log_p_BC, log_q_BC, batch.token_log_p_BTC)
    # A control's target of no probability counts as e^-100, so that the KL is one.
    floor_BC = jnp.maximum(log_q_BC, -100.0)
    found = found_B.mean()
    return found, {
        "loss": found,
        "kl": losses.divergence(log_p_BC, floor_BC).mean(),
        "entropy": losses.entropy(log_p_BC).mean(),
        "target_entropy": losses.entropy(log_q_BC).mean(),
        "agreement": losses.rank_correlation(log_p_BC, log_q_BC).mean(),
        "tokens": batch.mask_BL.sum().astype(jnp.float32),
    }


def make_step(
    tx: Any,
    learning_rate: Callable[[Array], Array],
    dtype: jnp.dtype,
    loss_name: str,
    temperature: float,
) -> Callable[[TrainState, Candidates], tuple[TrainState, dict[str, Array]]]:
    """The jitted optimizer step."""
    loss = functools.partial(
        retriever_loss, dtype=dtype, loss_name=loss_name, temperature=temperature
    )

    @functools.partial(jax.jit, donate_argnames="state")
    def step(
        state: TrainState, batch: Candidates
    ) -> tuple[TrainState, dict[str, Array]]:
        (_, found), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        found |= {
            "grad_norm": optim.global_norm(grads),
            "learning_rate": learning_rate(state.step),
        }
        return state.updated(tx, grads), found

    return step


def _passages(towers: Towers, batch: Candidates, dtype: jnp.dtype) -> Array:
    """Embeddings [B, C, E]: as the index has them, or by the context encoder."""
    if towers.context is None:
        assert batch.passages_BCE is not None
        return batch.passages_BCE
    tokens, mask = batch.passage_tokens_BCL, batch.passage_mask_BCL
    assert tokens is not None
    assert mask is not None
    B, C, L = tokens.shape
    flat = functools.partial(
        jnp.reshape, shape=(B * C, L), out_sharding=sharding.ROWS_BL
    )
    found_BE = towers.context(flat(tokens), flat(mask), dtype)
    return jnp.reshape(found_BE, (B, C, -1), out_sharding=sharding.rows_spec(3))


def _in_batch(
    queries_BE: Array, passages_BCE: Array, batch: Candidates, temperature: float
) -> tuple[Array, Array]:
    """log p_R and the target over the candidates of all questions, [B, B * C].

    A passage that is a candidate of the question itself counts there alone: what is
    right for it is no negative, wherever it turns up.
    """
    B, C = batch.ids_BC.shape
    everyone_ACE = jax.sharding.reshard(passages_BCE, jax.P())
    ids_AC = jax.sharding.reshard(batch.ids_BC, jax.P())
    scores_BAC = jnp.einsum("BE,ACE->BAC", queries_BE, everyone_ACE)
    own_BA1 = jnp.eye(B, dtype=bool)[:, :, None]
    seen_BAC = (batch.ids_BC[:, None, None, :] == ids_AC[None, :, :, None]).any(-1)
    present_BAC = (ids_AC >= 0)[None] & (own_BA1 | ~seen_BAC)
    log_q_BAC = jnp.where(own_BA1, batch.log_targets_BC[:, None, :], losses.ABSENT)
    log_p_BN = losses.retriever_log_probabilities(
        scores_BAC.reshape(B, B * C), present_BAC.reshape(B, B * C), temperature
    )
    return log_p_BN, log_q_BAC.reshape(B, B * C)


def place(batch: Candidates) -> Candidates:
    """This process' rows of a batch on the mesh, over the data axes."""
    return jax.tree.map(sharding.put_own_rows, batch)


class Corpus:
    """What is searched while the towers change.

    Args:
        config: of the run.
        folder: for embeddings of a context encoder that trains.
        store: the passages.
    """

    def __init__(self, config: ConfigDict, folder: Path, store: PassageStore):
        self.config = config
        self.folder = folder
        self.store = store
        self.encode = encoding(config)
        where = context_folder(config)
        shape = tower_config(config, where)
        self.length = min(config.index.max_tokens, shape.max_length)
        self.tokenize = tokenizing(load_tokenizer(where), self.length)
        self.frozen: Index | None = None
        if config.r_ft.towers == "query":
            self.frozen = open_index(
                Path(config.workdir) / "index", jax.sharding.get_mesh()
            )

    def index(self, towers: Towers) -> Index:
        """The index as it is, or all passages as the context encoder now sees them."""
        if self.frozen is not None:
            return self.frozen
        # Not while another process still reads what is to go.
        processes.barrier("index")
        if processes.first():
            shutil.rmtree(self.folder, ignore_errors=True)
        self.embed(towers, self.folder)
        return ExactIndex(EmbeddingStore(self.folder), jax.sharding.get_mesh())

    def embed(self, towers: Towers, folder: Path) -> None:
        """All passages by the context encoder that trains."""
        assert towers.context is not None
        context = sharding.on_own_mesh(towers.context)
        encode = functools.partial(self.encode, context)
        embed_corpus(
            self.config, self.store, encode, self.tokenize, self.length, folder
        )


class Validation:
    """Retrieval of dev questions with the towers as they are."""

    def __init__(
        self,
        config: ConfigDict,
        examples: list[Example],
        gold: list[set[int]],
        store: PassageStore,
        searcher: Callable[[Towers], Searcher],
    ):
        order = np.random.default_rng(config.seed).permutation(len(examples))
        chosen = np.sort(order[: config.r_ft.validation_examples])
        self.examples = [examples[i] for i in chosen]
        self.gold = [gold[i] for i in chosen]
        self.store = store
        self.searcher = searcher
        self.depth = min(config.r_ft.validation_depth, len(store))

    def __call__(self, towers: Towers) -> dict[str, float]:
        """MRR, and gold passages and answers among the first passages.

        MRR is of gold passages where every question names its document, else of the
        first passage that contains an answer.
        """
        ids_NC = self.searcher(towers)(self.examples, self.depth).ids
        hits_NC = answer_hits(ids_NC, self.examples, self.store)
        values = metrics.retrieval_values(ids_NC, hits_NC, self.gold)
        if METRIC.name not in values:
            first_N = hits_NC.argmax(axis=1) + 1
            values[METRIC.name] = hits_NC.any(axis=1) / first_N
        return {name: float(value_N.mean()) for name, value_N in values.items()}


class Training:
    """What all targets of a run share: examples, batches and validation."""

    def __init__(self, config: ConfigDict, folder: Path):
        self.config = config
        self.folder = folder
        r_ft, workdir = config.r_ft, Path(config.workdir)
        check_settings(config)
        self.temperature = score_temperature(config, "r_ft.score_temperature")
        shape = tower_config(config, config.encoder)
        tokenizer = load_tokenizer(config.encoder)
        check_vocabulary(tokenizer, shape)
        check_scored(config)
        self.store = PassageStore(workdir / "passages")
        self.longest = min(config.retrieve.max_tokens, shape.max_length)
        self.tokenize = tokenizing(tokenizer, self.longest)
        parts = {"train": r_ft.corpus_share < 1, CORPUS: r_ft.corpus_share > 0}
        self.scores = {
            split: _usable(read_scores(workdir, split), split)
            for split, used in parts.items()
            if used
        }
        self.log_q = {
            split: lm_targets(
                config, scores, "questions" if split == "train" else "passages"
            )
            for split, scores in self.scores.items()
        }
        self.tokens = {
            split: self.tokenize([e.search_text for e in scores.examples])
            for split, scores in self.scores.items()
        }
        self.corpus = Corpus(config, folder / "index-now", self.store)
        self.gather = gather_embeddings(EmbeddingStore(workdir / "index"))
        if r_ft.towers == "both":
            size = min(r_ft.passage_tokens, self.corpus.length)
            tokenize = tokenizing(load_tokenizer(context_folder(config)), size)
            self.gather = gather_tokens(self.store, tokenize, size)
        # Scored or not: of all of them retrieval is judged.
        gold = {
            example: gold_passages(example, self.store)
            for examples, _ in read_retrieved(workdir, "dev").values()
            for example in examples
        }
        dev = read_scores(workdir, "dev")
        self.agreement = gold_agreement(dev, [gold[e] for e in dev.examples])
        self.validate = Validation(
            config, [*gold], [*gold.values()], self.store, self.searcher
        )

    def searcher(self, towers: Towers) -> Searcher:
        """Search with the towers as they are."""
        query = sharding.on_own_mesh(towers.query)
        encode = functools.partial(self.corpus.encode, query)
        return Searcher(
            self.config,
            self.corpus.index(towers),
            encode,
            self.tokenize,
            self.longest,
        )

    def questions(
        self, target: str, loss_name: str, scores: Mapping[str, Scores]
    ) -> list[tuple[Questions, float]]:
        """What is learnt from, and its share of every batch."""
        share = self.config.r_ft.corpus_share
        found = []
        for split, part in scores.items():
            log_q_BC = self.log_q[split]
            if part is not self.scores[split]:
                log_q_BC = lm_targets(self.config, part, f"refreshed {split} examples")
            if target != "lm":
                gold = [
                    gold_passages(example, self.store) if target == "gold" else set()
                    for example in part.examples
                ]
                log_q_BC = control_targets(
                    target, part.ids, log_q_BC, gold, self.config.seed
                )
            tokens = self.tokens[split]
            useful: np.ndarray = log_q_BC.max(axis=1) > losses.ABSENT / 2
            if not useful.all():
                log.warning(
                    "r_ft: %d of %d questions have no gold passage among their "
                    "candidates and are left out",
                    (~useful).sum(),
                    len(useful),
                )
                part, log_q_BC = part.only(useful), log_q_BC[useful]
                tokens = [tokens[i] for i in np.flatnonzero(useful)]
            if part.examples:
                token_log_p = part.by_example() if loss_name == "emdr2" else None
                found.append(
                    (
                        Questions(
                            tokens,
                            part.ids,
                            log_q_BC,
                            token_log_p,
                            [example.dataset or split for example in part.examples],
                        ),
                        share if split == CORPUS else 1 - share,
                    )
                )
        if not found:
            raise ValueError(
                f"r_ft: no question has a target of kind {target!r}; gold passages are "
                "known where questions name their `document`"
            )
        return found

    def run(self, target: str) -> dict[str, Any]:
        """Train towards one target, in a folder of its own."""
        config, r_ft, folder = self.config, self.config.r_ft, self.folder / target
        loss_name = r_ft.loss
        if target == "gold" and loss_name not in GOLD_LOSSES:
            loss_name = "reverse_kl"
        batches = CandidateBatches(
            self.questions(target, loss_name, self.scores),
            self.gather,
            r_ft.rows,
            self.longest,
            config.seed,
            *sharding.process_rows(),
        )
        extra: dict[str, Any] = {}
        if r_ft.refresh_every:
            refresher = Refresher(
                config, folder / "refresh", self.scores, self.store, self.searcher
            )

            def before_step(done: int, towers: Towers) -> None:
                scores = refresher(done, towers)
                if scores is not None:
                    batches.replace(self.questions(target, loss_name, scores))

            extra["before_step"] = before_step
        log.info(
            "r_ft: towards %s targets, by %s; a falling loss proves nothing, the "
            "validation MRR decides which checkpoint is kept, the start included",
            target,
            loss_name,
        )
        found = train(
            r_ft,
            folder,
            _towers(config, functools.partial(load_tower, config)),
            config.seed,
            METRIC,
            functools.partial(
                make_step,
                dtype=compute_dtype(config),
                loss_name=loss_name,
                temperature=self.temperature,
            ),
            batches,
            place,
            self.validate,
            **extra,
        )
        if processes.first():
            shutil.rmtree(self.corpus.folder, ignore_errors=True)
        if r_ft.towers == "both":
            towers = load_finetuned_towers(config, folder)
            self.corpus.embed(towers, folder / "index")
            build_structure(config, folder / "index")
        return found


def _usable(scores: Scores, split: str) -> Scores:
    """Those with at least two candidates."""
    enough: np.ndarray = np.sum(scores.ids >= 0, axis=1) >= 2
    if not enough.any():
        raise ValueError(f"scored/{split}: no question has two passages or more")
    if not enough.all():
        log.warning(
            "r_ft: %d of %d questions have fewer than two passages and are left out",
            (~enough).sum(),
            len(enough),
        )
    return scores.only(enough)


def _towers(config: ConfigDict, make: Callable[[str], Encoder]) -> Towers:
    """Those that train, each made from its folder."""
    query = make(config.encoder)
    if config.r_ft.towers == "query":
        return Towers(query)
    return Towers(query, make(context_folder(config)))


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Fine-tune, keeping the checkpoint that retrieves dev questions best."""
    training = Training(config, folder)
    targets = (config.r_ft.target, *config.r_ft.controls)
    runs = {target: training.run(target) for target in targets}
    facts = {
        split: target_facts(training.log_q[split], scores.ids)._asdict()
        for split, scores in training.scores.items()
    }
    return {
        "runs": runs,
        "questions": {
            split: len(scores.examples) for split, scores in training.scores.items()
        },
        "targets": facts,
        **training.agreement,
    }


def load_finetuned_towers(config: ConfigDict, folder: Path) -> Towers:
    """What the finished run of a target learnt, on the current mesh.

    The folder bears the target's name, as ``r_ft/lm``. The best checkpoint by
    validation; of targets that teach nothing right (shuffled, uniform) the last one:
    the best would be the start, and show nothing of what the target does.
    """

    def build(key: Array) -> Towers:
        return _towers(config, lambda name: Encoder(tower_config(config, name), key))

    last = folder.name in ("shuffled", "uniform")
    return load_checkpoint(folder, METRIC, build, last)


STAGE = Stage(
    "r_ft",
    ("passages", "index", "retrieved", "scored"),
    ("encoder",),
    settings,
    build,
    functools.partial(score_temperature, field="r_ft.score_temperature"),
)
