"""Training in R-FT: questions a second of an epoch, ours and PyTorch's, side by side.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/r_ft_training.py

Needs the demo's inputs, passages, index, retrieved and scored questions (--workdir,
runs/demo by default). From cached scores, all-MiniLM-L6-v2 learns the language model's
preferences among the candidates of each question: KL(p_LSR || p_R), in batches of 32,
float32, without dropout, AdamW at a constant rate. Contenders: ours, the stage's step
and batches, with passage embeddings from the index; sentence-transformers' trainer with
its DistillKLDivLoss, which encodes and trains the passages too; and a careful loop by
hand that embeds them once, which is our own design in PyTorch. Not counted: embedding
passages (ours, careful), tokenising questions (ours, careful), compiling and the first
epoch. Ours pays for starting its readers in every epoch.

All see the same batches in the same order, the whole ones of an epoch. The losses are
compared: of the first step in every contender, and in the careful loop of every step;
the trainer's passages move, so its later losses are others.
"""

import argparse
import contextlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peer_env import ensure
from workers import OURS, Peer, interleaved, median

from radit_jax import losses, optim, sharding
from radit_jax.batch import Candidates
from radit_jax.data.candidates import CandidateBatches, Questions, gather_embeddings
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tokenize import load_tokenizer
from radit_jax.loop import TrainState
from radit_jax.models.huggingface import load_encoder
from radit_jax.retrieval.embed import EmbeddingStore
from radit_jax.stages.index import tokenizing
from radit_jax.stages.r_ft import Towers, make_step, place
from radit_jax.stages.targets import Scores, read_scores

ROWS = 32
QUESTION_TOKENS = 128  # at most; retrieve.max_tokens
SCORE_TEMPERATURE = 0.02  # this and what follows: configs/r_ft.py:demo
TARGET_TEMPERATURE = 0.1
LEARNING_RATE = 3e-5
BETAS = (0.9, 0.999)
CLIP_NORM = 2.0
# The direction that sentence-transformers has; the stage's default is the other one.
LOSS = "reverse_kl"
CAREFUL = "PyTorch, passages frozen"
PEERS = {"trainer": "sentence-transformers", "frozen": CAREFUL}


class Ours:
    """The stage's step over its batches, one epoch a repeat."""

    def __init__(self, folder: Path, index: Path, questions: Questions, steps: int):
        learning_rate = optim.schedule(LEARNING_RATE, LEARNING_RATE, 0, 100_000)
        tx = optim.optimizer(learning_rate, *BETAS, 1e-8, 0.0, CLIP_NORM)
        towers = Towers(load_encoder(folder))
        self.state = TrainState(
            jnp.int32(0), towers, jax.jit(tx.init)(towers), jnp.zeros(2)
        )
        self.step = make_step(
            tx, learning_rate, jnp.dtype(jnp.float32), LOSS, SCORE_TEMPERATURE
        )
        self.questions = questions
        self.gather = gather_embeddings(EmbeddingStore(index))
        self.steps = steps
        self.losses: list[float] = []

    def batches(self) -> CandidateBatches:
        """Those of an epoch and on, from its start."""
        return CandidateBatches(
            [(self.questions, 1.0)], self.gather, ROWS, QUESTION_TOKENS, seed=0
        )

    def __call__(self) -> dict[str, Any]:
        """One epoch; its readers start with it and read nothing in a peer's turn."""
        found = []
        start = time.perf_counter()
        with contextlib.closing(self.batches()) as batches:
            for _ in range(self.steps):
                self.state, metrics = self.step(self.state, place(next(batches)))
                found.append(metrics["loss"])
            self.losses += map(float, found)
            seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "count": self.steps * ROWS,
            "losses": list(self.losses),
        }


def targets(scores: Scores) -> np.ndarray:
    """log p_LSR of the candidates."""
    log_p, tokens = map(jnp.asarray, (scores.log_p, scores.tokens))
    return np.asarray(losses.lsr_log_target(log_p, tokens, TARGET_TEMPERATURE))


def peer_examples(
    batches: list[Candidates], texts: dict[tuple[int, ...], str], store: PassageStore
) -> list[dict[str, Any]]:
    """The rows of batches as text; a softmax of their scores is p_LSR.

    Args:
        batches: of one epoch.
        texts: of questions, by their tokens.
        store: the passages.
    """
    return [
        {
            "question": texts[tuple(tokens_L[mask_L].tolist())],
            "passages": [passage.display for passage in store.get(ids_C)],
            "scores": log_q_C.tolist(),
        }
        for batch in batches
        for tokens_L, mask_L, ids_C, log_q_C in zip(*batch[:4], strict=True)
    ]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, help="of an epoch; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--batch-size", type=int, default=8, help="of trainer's passes")
    options = parser.parse_args()
    folder = (options.workdir / "inputs" / "encoder").resolve()
    scores = read_scores(options.workdir, "train")
    if (scores.ids < 0).any():
        raise ValueError("DistillKLDivLoss takes as many passages for every question")
    names = [example.question for example in scores.examples]
    tokens = tokenizing(load_tokenizer(folder), QUESTION_TOKENS)(names)
    texts = dict(zip(map(tuple, tokens), names, strict=True))
    steps = min(options.steps or len(names) // ROWS, len(names) // ROWS)
    with (
        tempfile.NamedTemporaryFile("w", suffix=".json") as file,
        jax.set_mesh(sharding.make_mesh(1, 1, 1)),
    ):
        questions = Questions(tokens, scores.ids, targets(scores))
        ours = Ours(folder, options.workdir / "index", questions, steps)
        with contextlib.closing(ours.batches()) as batches:
            epoch = [next(batches) for _ in range(steps)]
        store = PassageStore(options.workdir / "passages")
        json.dump(peer_examples(epoch, texts, store), file)
        file.flush()
        python = ensure()
        peers = {
            PEERS[style]: Peer(
                python,
                "r_ft",
                model=str(folder),
                examples=file.name,
                style=style,
                questions_per_step=ROWS,
                batch_size=options.batch_size,
                student_temperature=SCORE_TEMPERATURE,
                learning_rate=LEARNING_RATE,
                betas=BETAS,
                clip_norm=CLIP_NORM,
            )
            for style in options.peers
        }
        found = interleaved(ours, peers, options.repeats)
    report(found, epoch)


def report(found: dict[str, list[dict[str, Any]]], epoch: list[Candidates]) -> None:
    """Medians, ratios and how far the losses agree."""
    speeds = {
        name: median([r | {"speed": r["count"] / r["seconds"]} for r in rs], "speed")
        for name, rs in found.items()
    }
    for name, speed in speeds.items():
        print(
            f"{name:24s} {speed:7.2f} questions/s   ours is "
            f"{speeds[OURS] / speed:6.2f}x   first loss "
            f"{found[name][-1]['losses'][0]:.5f}"
        )
    if CAREFUL in found:
        # The last counted epochs may not be the same one.
        both = (found[name][-1]["losses"] for name in (OURS, CAREFUL))
        pairs = list(zip(*both, strict=False))
        print(
            f"losses of ours and the careful loop: {pairs[0][0]:.4f} at first, "
            f"{pairs[-1][0]:.4f} after {len(pairs)} steps, largest difference "
            f"{max(abs(a - b) for a, b in pairs):.1e}"
        )
    rows = len(epoch) * ROWS
    useful, filled = (
        sum(int(count(batch.mask_BL)) for batch in epoch) / rows
        for count in (np.sum, np.size)
    )
    print(
        f"{rows} questions of {useful:.0f} tokens, filled up to {filled:.0f} in ours; "
        f"{epoch[0].ids_BC.shape[1]} candidates each"
    )


if __name__ == "__main__":
    main()
