"""What R-FT trains towards: the language model's preferences, or a control's."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from radit_jax import artifacts, losses
from radit_jax.batch import Example
from radit_jax.stages.retrieve import CORPUS, read_retrieved
from radit_jax.stages.stage import field_fingerprint

log = logging.getLogger(__name__)

# "lm" is RA-DIT. The others are controls: passages known to be right, the language
# model's preferences handed to the wrong passages, and none at all.
TARGETS = ("lm", "gold", "shuffled", "uniform")
# Entropy above this share of the largest possible: a target that says nothing.
FLAT = 0.95
# Settings of lm_score that say what the language model was asked.
PROMPT = ("passages", "bos", "eos", "row_tokens")
# A passage with more than this: a target that says one thing.
SHARP = 0.95


class Scores(NamedTuple):
    """Examples with their candidates and the language model's scores of them."""

    examples: list[Example]
    ids: np.ndarray  # int64 [examples, C]; -1: none
    log_p: np.ndarray  # float32 [examples, C]; -inf: no passage
    tokens: np.ndarray  # int32 [examples], of the answer
    token_log_p: np.ndarray  # float32 [tokens of all answers, C]

    def by_example(self) -> list[np.ndarray]:
        """``token_log_p`` of each example, [tokens of its answer, C]."""
        return np.split(self.token_log_p, np.cumsum(self.tokens)[:-1])

    def only(self, wanted: np.ndarray) -> "Scores":
        """Those examples for which a mask is True."""
        return Scores(
            [e for e, kept in zip(self.examples, wanted, strict=True) if kept],
            self.ids[wanted],
            self.log_p[wanted],
            self.tokens[wanted],
            self.token_log_p[np.repeat(wanted, self.tokens)],
        )


def check_scored(config: ConfigDict) -> None:
    """Whether the scores are those that the config asks for.

    Raises:
        ArtifactError: the examples were made anew since, or the language model or the
            prompts were other ones.
    """
    folder = Path(config.workdir) / "scored"
    for name in ("retrieved", "scored"):
        artifacts.check_inputs(folder.with_name(name))
    made = artifacts.read_manifest(folder)["settings"]
    wanted = {name: config.lm_score[name] for name in PROMPT}
    if config.lm:
        wanted["lm"] = field_fingerprint(config, "lm")
    for name, value in wanted.items():
        if made[name] != value:
            what = "another lm" if name == "lm" else f"lm_score.{name} = {made[name]}"
            now = config.lm if name == "lm" else value
            raise artifacts.ArtifactError(
                f"{folder} was made with {what}, and the config now says {now}; run "
                "lm_score again"
            )


def read_scores(workdir: Path, split: str) -> Scores:
    """The scored examples of a split, datasets one after the other.

    Raises:
        ValueError: the split was not scored, a score is not a log-probability, or a
            question has the same passage twice.
    """
    found: list[Scores] = []
    for name, (part, _) in read_retrieved(workdir, split).items():
        file = workdir / "scored" / split / name / "scores.npz"
        if not file.is_file():
            raise ValueError(
                f"{file}: no such file; run lm_score with {split!r} among "
                "lm_score.splits"
            )
        arrays = dict(np.load(file))
        scores = Scores(
            [part[i] for i in arrays["places"]],
            *(arrays[name] for name in Scores._fields[1:]),
        )
        _check(scores, file)
        found.append(scores)
    if not found:
        raise ValueError(
            f"{workdir / 'retrieved'}: no examples from the corpus, which "
            "r_ft.corpus_share wants; set retrieve.corpus_examples, or "
            "r_ft.corpus_share=0"
            if split == CORPUS
            else f"{workdir / 'retrieved' / split}: no dataset"
        )
    return Scores(
        [example for scores in found for example in scores.examples],
        *(
            np.concatenate(arrays)
            for arrays in zip(*(s[1:] for s in found), strict=True)
        ),
    )


def _check(scores: Scores, file: Path) -> None:
    """Refuse scores that are none, and candidates that stand twice."""
    log_p, ids = scores.log_p, scores.ids
    wrong = np.isnan(log_p) | (log_p > 0) | ((ids >= 0) & ~np.isfinite(log_p))
    for i in np.flatnonzero(wrong.any(axis=1)):
        raise ValueError(
            f"{file}: question {scores.examples[i].id} has the log-probabilities "
            f"{log_p[i]}; run lm_score again"
        )
    ordered = np.sort(ids, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    for i in np.flatnonzero(twice.any(axis=1)):
        raise ValueError(
            f"{file}: question {scores.examples[i].id} has passage "
            f"{ordered[i, 1:][twice[i]][0]} twice among its candidates {ids[i]}, which "
            "would count double; run retrieve and lm_score again"
        )


class TargetFacts(NamedTuple):
    """What a set of targets is like."""

    entropy: float  # mean, as a share of the largest possible
    flat: float  # share of questions whose target says nothing
    sharp: float  # share whose target has nearly everything on one passage


def target_facts(log_q_BC: np.ndarray, ids_BC: np.ndarray) -> TargetFacts:
    """Of targets with at least two passages each."""
    entropy_B = np.asarray(losses.entropy(jnp.asarray(log_q_BC)))
    share_B = entropy_B / np.log((ids_BC >= 0).sum(axis=1))
    return TargetFacts(
        float(share_B.mean()),
        float((share_B > FLAT).mean()),
        float((np.exp(log_q_BC.max(axis=1)) > SHARP).mean()),
    )


def lm_targets(config: ConfigDict, scores: Scores, what: str) -> np.ndarray:
    """log p_LSR [examples, C], refused if most of it says nothing.

    Args:
        config: its r_ft section is used.
        scores: with at least two passages each.
        what: names the examples in the log.

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
        return log_q_BC, target_facts(log_q_BC, scores.ids)

    log_q_BC, facts = under(r_ft.score_mode, r_ft.target_temperature)
    log.info(
        "r_ft: targets of %d %s: mean entropy %.2f of the largest possible, %.0f %% "
        "flat (they teach nothing), %.0f %% with nearly all on one passage",
        len(log_q_BC),
        what,
        facts.entropy,
        100 * facts.flat,
        100 * facts.sharp,
    )
    # EMDR2 reads the tokens' own probabilities.
    if facts.flat > 0.5 and r_ft.loss != "emdr2":
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
            f"{r_ft.target_temperature:g}: {100 * facts.flat:.0f} % of the targets of "
            f"{what} are flat, and a retriever trained on them unlearns what it knows. "
            f"{hint}"
        )
    return log_q_BC


def control_targets(
    kind: str,
    ids_BC: np.ndarray,
    log_q_BC: np.ndarray,
    gold: Sequence[set[int]],
    seed: int,
) -> np.ndarray:
    """Targets of a control, log [examples, C].

    Args:
        kind: "gold": equal shares for the gold passages among the candidates, and
            ABSENT throughout where there are none; "shuffled": the language model's,
            permuted within a question; "uniform".
        ids_BC: candidates; -1: none.
        log_q_BC: the language model's targets.
        gold: gold passages of each example.
        seed: of the permutation.
    """
    present_BC = ids_BC >= 0
    if kind == "gold":
        pairs = zip(ids_BC, gold, strict=True)
        present_BC = np.array([np.isin(ids, list(right)) for ids, right in pairs])
    if kind in ("gold", "uniform"):
        count_B1 = np.maximum(present_BC.sum(axis=1, keepdims=True), 1)
        equal_BC = np.broadcast_to(-np.log(count_B1), ids_BC.shape)
        return np.where(present_BC, equal_BC, losses.ABSENT).astype(np.float32)
    assert kind == "shuffled", kind
    rng = np.random.default_rng(seed)
    found_BC = log_q_BC.copy()
    for row, present in zip(found_BC, present_BC, strict=True):
        row[present] = rng.permutation(row[present])
    return found_BC


def gold_agreement(
    scores: Scores, gold: Sequence[set[int]]
) -> Mapping[str, float | int]:
    """How often the language model prefers the gold passage, where one is among the
    candidates; warns where it mostly does not."""
    agreed = known = 0
    for right, ids, log_p in zip(gold, scores.ids, scores.log_p, strict=True):
        if right & set(ids.tolist()):
            known += 1
            agreed += int(ids[int(np.argmax(log_p))]) in right
    if not known:
        return {}
    share = agreed / known
    log.log(
        logging.WARNING if share < 0.5 else logging.INFO,
        "r_ft: of the %d dev questions with a gold passage among the candidates, the "
        "language model prefers it for %.0f %%",
        known,
        100 * share,
    )
    return {"dev_prefers_gold": round(share, 4), "dev_with_gold": known}
