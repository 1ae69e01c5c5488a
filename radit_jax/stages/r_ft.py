"""Stage ``r_ft``: scored/, index/ and a query encoder -> r_ft/, a better one.

RA-DIT's second half: the query encoder learns the language model's preferences among
the passages of a question, KL(p_R || p_LSR) (section 2.3). Passage embeddings are
gathered from the index and never change.
"""

import contextlib
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
from radit_jax.checkpoint import PARAMS, Checkpoints
from radit_jax.data.candidates import Questions, candidate_batches
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tasks import gold_passages
from radit_jax.data.tokenize import Tokenizer, load_tokenizer
from radit_jax.evaluation import metrics
from radit_jax.loop import Schedule, TrainState, fit
from radit_jax.models.encoder import Encoder, EncoderConfig
from radit_jax.models.huggingface import (
    check_vocabulary,
    load_encoder,
    read_encoder_config,
)
from radit_jax.retrieval.embed import EmbeddingStore, embed_queries
from radit_jax.retrieval.index import Index, open_index
from radit_jax.stages.retrieve import read_retrieved
from radit_jax.stages.stage import (
    Stage,
    compute_dtype,
    field_fingerprint,
    section,
    settings_of,
)
from radit_jax.tracker import METRICS_FILE, Tracker, plot_curves

log = logging.getLogger(__name__)

METRIC = "mrr"
LOSSES = ("kl", "reverse_kl")
# Entropy above this share of the largest possible: a target that says nothing.
FLAT = 0.95
# A passage with more than this: a target that says one thing.
SHARP = 0.95


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The r_ft section and the query encoder's content; not the mesh."""
    r_ft = section(config.r_ft)
    for name in ("log_every", "wandb_project"):
        del r_ft[name]
    return r_ft | {
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
    counts = ("rows", "max_tokens", "validation_examples", "validation_depth", "keep")
    for name in (*counts, *Schedule._fields):
        if r_ft[name] < 1:
            raise ValueError(f"r_ft.{name} = {r_ft[name]} must be at least 1")
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
    shards = sharding.row_shards()
    if r_ft.rows % shards:
        raise ValueError(
            f"r_ft.rows = {r_ft.rows} do not divide over the {shards} devices of mesh "
            "axes data x fsdp"
        )
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
        ArtifactError: the scores were made from other examples or passages.
        ValueError: the split was not scored, or a score is not a number.
    """
    artifacts.check_inputs(workdir / "scored")
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


def targets(config: ConfigDict, scores: Scores) -> np.ndarray:
    """log p_LSR [examples, C], refused if most of it says nothing.

    Raises:
        ValueError: with settings under which the same scores would say something.
    """
    r_ft = config.r_ft
    log_q_BC = np.asarray(
        losses.lsr_log_target(
            jnp.asarray(scores.log_p),
            jnp.asarray(scores.tokens),
            r_ft.target_temperature,
            r_ft.score_mode,
        )
    )
    facts = target_facts(log_q_BC)
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
                other = losses.lsr_log_target(
                    jnp.asarray(scores.log_p),
                    jnp.asarray(scores.tokens),
                    temperature,
                    mode,
                )
                flat = target_facts(np.asarray(other)).flat
                if flat <= 0.1:
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
    return log_q_BC


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
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        found |= {
            "grad_norm": optim.global_norm(grads),
            "learning_rate": learning_rate(state.step),
        }
        return TrainState(state.step + 1, params, opt_state, state.rng), found

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
        store: PassageStore,
        index: Index,
        tokenizer: Tokenizer,
        length: int,
    ):
        order = np.random.default_rng(config.seed).permutation(len(examples))
        chosen = np.sort(order[: config.r_ft.validation_examples])
        self.examples = [examples[i] for i in chosen]
        self.store = store
        self.index = index
        self.length = length
        self.depth = min(config.r_ft.validation_depth, index.size)
        self.gold = [gold_passages(e, store) for e in self.examples]
        self.tokenize = functools.partial(
            tokenizer.encode_batch, max_length=length, add_special_tokens=True
        )
        self.batch_tokens = config.r_ft.batch_tokens
        dtype = compute_dtype(config)
        self.apply = jax.jit(lambda encoder, *inputs: encoder(*inputs, dtype))

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """MRR, and recall and answers among the first passages.

        MRR is of gold passages where every question names its document, else of the
        first passage that contains an answer.
        """
        put = sharding.put_rows
        queries_BE = embed_queries(
            [example.question for example in self.examples],
            self.tokenize,
            lambda tokens, mask: self.apply(encoder, put(tokens), put(mask)),
            batch_tokens=self.batch_tokens,
            max_length=self.length,
            row_multiple=sharding.row_shards(),
        )
        ids_NC = self.index.search(queries_BE, self.depth).ids
        hits_NC = np.array(
            [
                [
                    metrics.contains_answer(passage.display, example.answers)
                    for passage in self.store.get(ids)
                ]
                for ids, example in zip(ids_NC, self.examples, strict=True)
            ]
        )
        found = {}
        for k in (1, 5, 10):
            if k <= self.depth:
                found[f"answer@{k}"] = float(metrics.answer_at(hits_NC, k).mean())
        if all(self.gold):
            right_NC = np.array(
                [
                    np.isin(ids, list(g))
                    for ids, g in zip(ids_NC, self.gold, strict=True)
                ]
            )
            for k in (1, 5, 10):
                if k <= self.depth:
                    found[f"gold@{k}"] = float(right_NC[:, :k].any(axis=1).mean())
        else:
            right_NC = hits_NC
        first_N = np.where(right_NC.any(axis=1), right_NC.argmax(axis=1) + 1, np.inf)
        return {METRIC: float((1 / first_N).mean()), **found}


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Fine-tune, keeping the checkpoint that retrieves dev questions best."""
    r_ft, workdir = config.r_ft, Path(config.workdir)
    encoder = load_encoder(
        config.encoder,
        pooling=config.pooling.kind or None,
        normalize=config.pooling.normalize,
    )
    temperature = check_settings(config, encoder.config)
    tokenizer = load_tokenizer(config.encoder)
    check_vocabulary(tokenizer, encoder.config)
    artifacts.check_inputs(workdir / "retrieved")
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
    log_q_BC = targets(config, scores)
    longest = min(r_ft.max_tokens, encoder.config.max_length)
    tokens = tokenizer.encode_batch(
        [example.question for example in scores.examples],
        max_length=longest,
        add_special_tokens=True,
    )
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
    _log_gold_agreement(dev, store)
    validate = Validation(
        config,
        dev.examples,
        store,
        open_index(index_folder, jax.sharding.get_mesh()),
        tokenizer,
        longest,
    )
    learning_rate = optim.schedule(
        r_ft.learning_rate,
        r_ft.end_learning_rate,
        r_ft.warmup_steps,
        r_ft.steps,
        r_ft.schedule,
    )
    tx = optim.optimizer(
        learning_rate,
        r_ft.beta1,
        r_ft.beta2,
        r_ft.eps,
        r_ft.weight_decay,
        r_ft.clip_norm,
    )
    state = TrainState(
        step=jnp.int32(0),
        params=encoder,
        opt_state=jax.jit(tx.init)(encoder),
        rng=jax.random.key_data(jax.random.key(config.seed)),
    )
    log.info(
        "r_ft: a falling loss proves nothing; the validation MRR decides which "
        "checkpoint is kept, the start included"
    )
    with (
        contextlib.closing(batches),
        Checkpoints(
            folder / "checkpoints", r_ft.keep, METRIC, higher_is_better=True
        ) as checkpoints,
        Tracker(
            folder,
            resume_step=0 if checkpoints.latest is None else checkpoints.latest + 1,
            wandb_project=r_ft.wandb_project,
        ) as tracker,
    ):
        state = fit(
            state,
            step=make_step(
                tx, learning_rate, compute_dtype(config), r_ft.loss, temperature
            ),
            batches=batches,
            place=place,
            validate=validate,
            checkpoints=checkpoints,
            tracker=tracker,
            schedule=settings_of(Schedule, r_ft),
        )
        best = checkpoints.best
    plot_curves(folder / METRICS_FILE, folder / "curves.png")
    return {
        "steps": int(state.step),
        "best_step": best,
        "questions": len(scores.examples),
        **target_facts(log_q_BC)._asdict(),
    }


def _log_gold_agreement(dev: Scores, store: PassageStore) -> None:
    """How often the language model prefers the gold passage, where one is known."""
    agreed, known = 0, 0
    for example, ids, log_p in zip(dev.examples, dev.ids, dev.log_p, strict=True):
        gold = gold_passages(example, store)
        if gold & set(ids.tolist()):
            known += 1
            agreed += int(ids[int(np.argmax(log_p))]) in gold
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
    folder = Path(config.workdir) / "r_ft" / "checkpoints"
    shape = jax.eval_shape(
        lambda: Encoder(
            read_encoder_config(
                config.encoder, config.pooling.kind or None, config.pooling.normalize
            ),
            jax.random.key(0),
        )
    )
    with Checkpoints(folder, 1, METRIC, higher_is_better=True) as checkpoints:
        step = checkpoints.best
        if step is None:
            raise ValueError(f"{folder}: no checkpoint")
        return checkpoints.restore(step, {PARAMS: shape})[PARAMS]


STAGE = Stage(
    "r_ft",
    ("passages", "index", "retrieved", "scored"),
    ("encoder",),
    settings,
    build,
)
