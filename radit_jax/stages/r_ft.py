"""Stage ``r_ft``: scored/, index/ and a query encoder -> r_ft/, a better one.

RA-DIT's second half: the query encoder learns the language model's preferences among
the passages of a question, KL(p_R || p_LSR) (section 2.3). Passage embeddings are
gathered from the index and never change.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from radit_jax import artifacts, losses, optim, sharding
from radit_jax.batch import Candidates, Example
from radit_jax.data.candidates import Questions, candidate_batches
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tasks import gold_passages
from radit_jax.data.tokenize import Tokenizer, load_tokenizer
from radit_jax.evaluation import metrics
from radit_jax.loop import TrainState
from radit_jax.models.encoder import Encoder, EncoderConfig
from radit_jax.models.huggingface import check_vocabulary, read_encoder_config
from radit_jax.retrieval.embed import EmbeddingStore, embed_queries
from radit_jax.retrieval.index import Index, open_index
from radit_jax.stages.index import encoding, load_tower, tokenizing
from radit_jax.stages.retrieve import answer_hits, read_retrieved
from radit_jax.stages.stage import (
    Stage,
    check_counts,
    compute_dtype,
    field_fingerprint,
    section,
)
from radit_jax.stages.training import (
    COUNTS,
    Metric,
    load_best,
    train,
    training_settings,
)

log = logging.getLogger(__name__)

METRIC = Metric("mrr", higher_is_better=True)
LOSSES = ("kl", "reverse_kl")
# Entropy above this share of the largest possible: a target that says nothing.
FLAT = 0.95
# A passage with more than this: a target that says one thing.
SHARP = 0.95


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The r_ft section and the query encoder's content; not the mesh."""
    return training_settings(config.r_ft) | {
        "encoder": field_fingerprint(config, "encoder"),
        "pooling": section(config.pooling),
        "seed": config.seed,
        "dtype": config.dtype,
    }


def check_settings(config: ConfigDict, encoder: EncoderConfig) -> float:
    """Stop before any work if a setting makes no sense; returns the temperature of p_R.

    Raises:
        ValueError: naming the setting.
    """
    r_ft = config.r_ft
    check_counts("r_ft", r_ft, ("max_tokens", "validation_depth", *COUNTS))
    for name, known in (("loss", LOSSES), ("score_mode", losses.SCORE_MODES)):
        if r_ft[name] not in known:
            raise ValueError(
                f"r_ft.{name} = {r_ft[name]!r} is not one of {', '.join(known)}"
            )
    if r_ft.target_temperature <= 0:
        raise ValueError(
            f"r_ft.target_temperature = {r_ft.target_temperature} must be positive"
        )
    temperature = r_ft.score_temperature
    if temperature is None and encoder.normalize:
        raise ValueError(
            "r_ft.score_temperature is not set, and this encoder normalises: its "
            "scores lie within [-1, 1], and p_R would be flat whatever it learns. Try "
            "--config.r_ft.score_temperature=0.05"
        )
    if temperature is not None and temperature <= 0:
        raise ValueError(f"r_ft.score_temperature = {temperature} must be positive")
    sharding.check_rows(r_ft.rows, f"r_ft.rows = {r_ft.rows}")
    return 1.0 if temperature is None else temperature


class Scores(NamedTuple):
    """A split with the language model's scores, datasets one after the other."""

    examples: list[Example]
    ids: np.ndarray  # int64 [examples, C]
    log_p: np.ndarray  # float32 [examples, C]; -inf: no passage
    tokens: np.ndarray  # int32 [examples]


def read_scores(workdir: Path, split: str) -> Scores:
    """Retrieved examples with their scores.

    Raises:
        ValueError: the split was not scored, or a score is not a number.
    """
    examples: list[Example] = []
    arrays: list[dict[str, np.ndarray]] = []
    for name, (part, _) in read_retrieved(workdir, split).items():
        file = workdir / "scored" / split / name / "scores.npz"
        if not file.is_file():
            raise ValueError(
                f"{file}: no such file; run lm_score with {split!r} among "
                "lm_score.splits"
            )
        arrays.append(dict(np.load(file)))
        examples += part
        log_p = arrays[-1]["log_p"]
        for i in np.flatnonzero(np.isnan(log_p).any(axis=1) | (log_p > 0).any(axis=1)):
            raise ValueError(
                f"{file}: question {part[i].id} has the log-probabilities {log_p[i]}; "
                "run lm_score again"
            )
    ids, log_p, tokens = (
        np.concatenate([part[name] for part in arrays])
        for name in ("ids", "log_p", "tokens")
    )
    return Scores(examples, ids, log_p, tokens)


class TargetFacts(NamedTuple):
    """What a set of targets is like."""

    entropy: float  # mean, as a share of the largest possible
    flat: float  # share of questions whose target says nothing
    sharp: float  # share whose target has nearly everything on one passage


def target_facts(log_q_BC: np.ndarray) -> TargetFacts:
    """Of targets with at least two passages each."""
    present_BC = log_q_BC > losses.ABSENT / 2
    entropy_B = np.asarray(losses.entropy(jnp.asarray(log_q_BC)))
    share_B = entropy_B / np.log(present_BC.sum(axis=1))
    return TargetFacts(
        float(share_B.mean()),
        float((share_B > FLAT).mean()),
        float((np.exp(log_q_BC.max(axis=1)) > SHARP).mean()),
    )


def targets(config: ConfigDict, scores: Scores) -> tuple[np.ndarray, TargetFacts]:
    """log p_LSR [examples, C], refused if most of it says nothing.

    Raises:
        ValueError: with settings under which the same scores would say something.
    """
    r_ft = config.r_ft

    def under(mode: str, temperature: float) -> tuple[np.ndarray, TargetFacts]:
        log_q_BC = np.asarray(
            losses.lsr_log_target(
                jnp.asarray(scores.log_p), jnp.asarray(scores.tokens), temperature, mode
            )
        )
        return log_q_BC, target_facts(log_q_BC)

    log_q_BC, facts = under(r_ft.score_mode, r_ft.target_temperature)
    log.info(
        "r_ft: targets of %d questions: mean entropy %.2f of the largest possible, "
        "%.0f %% flat (they teach nothing), %.0f %% with nearly all on one passage",
        len(log_q_BC),
        facts.entropy,
        100 * facts.flat,
        100 * facts.sharp,
    )
    if facts.flat > 0.5:
        better = []
        for mode in losses.SCORE_MODES:
            for temperature in (1.0, 0.3, 0.1, 0.03, 0.01):
                if under(mode, temperature)[1].flat <= 0.1:
                    better.append(f"{mode} with temperature {temperature:g}")
                    break
        hint = (
            f"With these scores, targets are clear under {' or '.join(better)}"
            if better
            else "These scores tell passages apart under no temperature from .01 to 1"
        )
        raise ValueError(
            f"r_ft.score_mode = {r_ft.score_mode} with r_ft.target_temperature = "
            f"{r_ft.target_temperature:g}: {100 * facts.flat:.0f} % of the targets are "
            f"flat, and a retriever trained on them unlearns what it knows. {hint}"
        )
    return log_q_BC, facts


def make_step(
    tx: Any,
    learning_rate: Callable[[Array], Array],
    dtype: jnp.dtype,
    loss_name: str,
    temperature: float,
) -> Callable[[TrainState, Candidates], tuple[TrainState, dict[str, Array]]]:
    """The jitted optimizer step."""

    def loss(encoder: Encoder, batch: Candidates) -> tuple[Array, dict[str, Array]]:
        queries_BE = encoder(batch.tokens_BL, batch.mask_BL, dtype)
        scores_BC = jnp.einsum("BE,BCE->BC", queries_BE, batch.passages_BCE)
        log_q_BC = batch.log_targets_BC
        present_BC = log_q_BC > losses.ABSENT / 2
        log_p_BC = losses.retriever_log_probabilities(
            scores_BC, present_BC, temperature
        )
        pair = (log_p_BC, log_q_BC) if loss_name == "kl" else (log_q_BC, log_p_BC)
        found = losses.divergence(*pair).mean()
        return found, {
            "loss": found,
            "entropy": losses.entropy(log_p_BC).mean(),
            "agreement": losses.rank_correlation(log_p_BC, log_q_BC).mean(),
            "tokens": batch.mask_BL.sum().astype(jnp.float32),
        }

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


def place(batch: Candidates) -> Candidates:
    """A host batch on the mesh, its rows over the data axes."""
    return Candidates(*map(sharding.put_rows, batch))


class Validation:
    """Retrieval of dev questions with the encoder as it is."""

    def __init__(
        self,
        config: ConfigDict,
        examples: list[Example],
        gold: list[set[int]],
        store: PassageStore,
        index: Index,
        tokenizer: Tokenizer,
        length: int,
    ):
        order = np.random.default_rng(config.seed).permutation(len(examples))
        chosen = np.sort(order[: config.r_ft.validation_examples])
        self.examples = [examples[i] for i in chosen]
        self.gold = [gold[i] for i in chosen]
        self.store = store
        self.index = index
        self.length = length
        self.depth = min(config.r_ft.validation_depth, index.size)
        self.tokenize = tokenizing(tokenizer, length)
        self.batch_tokens = config.r_ft.batch_tokens
        self.encode = encoding(config)

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """MRR, and gold passages and answers among the first passages.

        MRR is of gold passages where every question names its document, else of the
        first passage that contains an answer.
        """
        queries_BE = embed_queries(
            [example.question for example in self.examples],
            self.tokenize,
            functools.partial(self.encode, encoder),
            batch_tokens=self.batch_tokens,
            max_length=self.length,
            row_multiple=sharding.row_shards(),
        )
        ids_NC = self.index.search(queries_BE, self.depth).ids
        hits_NC = answer_hits(ids_NC, self.examples, self.store)
        values = metrics.retrieval_values(ids_NC, hits_NC, self.gold)
        if METRIC.name not in values:
            first_N = hits_NC.argmax(axis=1) + 1
            values[METRIC.name] = hits_NC.any(axis=1) / first_N
        return {name: float(value_N.mean()) for name, value_N in values.items()}


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Fine-tune, keeping the checkpoint that retrieves dev questions best."""
    r_ft, workdir = config.r_ft, Path(config.workdir)
    encoder = load_tower(config, config.encoder)
    temperature = check_settings(config, encoder.config)
    tokenizer = load_tokenizer(config.encoder)
    check_vocabulary(tokenizer, encoder.config)
    for name in ("retrieved", "scored"):
        artifacts.check_inputs(workdir / name)
    scores = read_scores(workdir, "train")
    enough = np.isfinite(scores.log_p).sum(axis=1) >= 2
    if not enough.all():
        log.warning(
            "r_ft: %d of %d questions have fewer than two passages and are left out",
            (~enough).sum(),
            len(enough),
        )
    scores = Scores(
        [e for e, kept in zip(scores.examples, enough, strict=True) if kept],
        *(array[enough] for array in scores[1:]),
    )
    if not scores.examples:
        raise ValueError(f"{workdir / 'scored'}: no question has two passages or more")
    log_q_BC, facts = targets(config, scores)
    longest = min(r_ft.max_tokens, encoder.config.max_length)
    questions = [example.question for example in scores.examples]
    tokens = tokenizing(tokenizer, longest)(questions)
    # Few shapes to compile, little padding.
    length = min(-(-max(map(len, tokens)) // 16) * 16, longest)
    index_folder = workdir / "index"
    batches = candidate_batches(
        Questions(tokens, scores.ids, log_q_BC),
        EmbeddingStore(index_folder),
        r_ft.rows,
        length,
        config.seed,
        jax.process_index(),
        jax.process_count(),
    )
    store = PassageStore(workdir / "passages")
    dev = read_scores(workdir, "dev")
    gold = [gold_passages(example, store) for example in dev.examples]
    _log_gold_agreement(dev, gold)
    validate = Validation(
        config,
        dev.examples,
        gold,
        store,
        open_index(index_folder, jax.sharding.get_mesh()),
        tokenizer,
        longest,
    )
    log.info(
        "r_ft: a falling loss proves nothing; the validation MRR decides which "
        "checkpoint is kept, the start included"
    )
    found = train(
        r_ft,
        folder,
        encoder,
        config.seed,
        METRIC,
        functools.partial(
            make_step,
            dtype=compute_dtype(config),
            loss_name=r_ft.loss,
            temperature=temperature,
        ),
        batches,
        place,
        validate,
    )
    return {**found, "questions": len(scores.examples), **facts._asdict()}


def _log_gold_agreement(dev: Scores, gold: list[set[int]]) -> None:
    """How often the language model prefers the gold passage, where one is known."""
    agreed, known = 0, 0
    for right, ids, log_p in zip(gold, dev.ids, dev.log_p, strict=True):
        if right & set(ids.tolist()):
            known += 1
            agreed += int(ids[int(np.argmax(log_p))]) in right
    if known:
        share = agreed / known
        level = logging.WARNING if share < 0.5 else logging.INFO
        log.log(
            level,
            "r_ft: of the %d dev questions with a gold passage among the candidates, "
            "the language model prefers it for %.0f %%",
            known,
            100 * share,
        )


def load_finetuned_encoder(config: ConfigDict) -> Encoder:
    """The best checkpoint of the finished stage, on the current mesh."""
    shape = read_encoder_config(
        config.encoder, config.pooling.kind or None, config.pooling.normalize
    )
    return load_best(
        Path(config.workdir) / "r_ft", METRIC, lambda key: Encoder(shape, key)
    )


STAGE = Stage(
    "r_ft",
    ("passages", "index", "retrieved", "scored"),
    ("encoder",),
    settings,
    build,
)
