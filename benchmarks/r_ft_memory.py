"""Memory of R-FT: the peak of training from an index of a million passages.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/r_ft_memory.py

Needs the demo's encoder (--workdir, runs/demo by default) and 1.6 GB of disk. A made-up
index of a million embeddings of width 384 is written to a temporary folder; a fresh
process then trains all-MiniLM-L6-v2 by the stage's step over its batches, 32 questions
with 10 random candidates each, every step new ones. Searching the index, which the
stage does at validation, is no part of it.

Printed: the peak resident memory of that process, and its parts, anonymous memory,
which the process holds, and pages of files, which the system takes back when it needs
them.
"""

import argparse
import contextlib
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from radit_jax import losses, optim, sharding
from radit_jax.data.candidates import CandidateBatches, Questions, gather_embeddings
from radit_jax.loop import TrainState
from radit_jax.models.encoder import Encoder
from radit_jax.models.huggingface import load_encoder
from radit_jax.retrieval.embed import EmbeddingStore, write_embeddings
from radit_jax.stages.r_ft import Towers, make_step, place

ROWS, CANDIDATES, LENGTH = 32, 10, 32


def write_index(folder: Path, passages: int, width: int) -> None:
    """An index of noise; rows have length 1 but for a few percent.

    The rows overlap in a vector of noise, so that they are in memory shard by shard
    only. That makes neighbours no more alike than other rows: their places differ.
    """
    noise = np.random.default_rng(0).standard_normal(passages + width - 1, np.float32)
    rows_NE = np.lib.stride_tricks.sliding_window_view(noise / width**0.5, width)
    write_embeddings(rows_NE, folder)


def made_up_questions(count: int, encoder: Encoder, passages: int) -> Questions:
    """Random tokens, candidates and targets."""
    rng = np.random.default_rng(0)
    vocabulary = encoder.config.vocab_size
    scores_BC = -rng.exponential(5.0, (count, CANDIDATES)).astype(np.float32)
    targets = losses.lsr_log_target(
        jnp.asarray(scores_BC), jnp.full(count, 4, jnp.int32), 0.1
    )
    return Questions(
        rng.integers(vocabulary, size=(count, LENGTH)).tolist(),
        rng.integers(passages, size=(count, CANDIDATES)),
        np.asarray(targets),
    )


def status() -> dict[str, float]:
    """Memory of this process in GB by the names of /proc; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
    return {name: int(fields[name].split()[0]) * 1024 / 1e9 for name in names}


def train(folder: Path, index: Path, steps: int) -> None:
    """Train and print what memory it took."""
    learning_rate = optim.schedule(3e-5, 3e-5, 0, steps + 1)
    tx = optim.optimizer(learning_rate, 0.9, 0.999, 1e-8, 0.0, 2.0)
    before = status()
    with jax.set_mesh(sharding.make_mesh(1, 1, 1)):
        towers = Towers(load_encoder(folder))
        store = EmbeddingStore(index)
        questions = made_up_questions(steps * ROWS, towers.query, len(store))
        state = TrainState(jnp.int32(0), towers, jax.jit(tx.init)(towers), jnp.zeros(2))
        del towers  # its weights are the state's, which is donated
        step = make_step(tx, learning_rate, jnp.dtype(jnp.float32), "kl", 0.05)
        parts, gather = [(questions, 1.0)], gather_embeddings(store)
        seen, start = [], time.perf_counter()
        with contextlib.closing(
            CandidateBatches(parts, gather, ROWS, LENGTH, seed=0)
        ) as batches:
            for _ in range(steps):
                state, metrics = step(state, place(next(batches)))
                loss = float(metrics["loss"])
                seen.append(status())
        seconds = time.perf_counter() - start
    found = status()
    anonymous, files = (max(s[n] for s in seen) for n in ("RssAnon", "RssFile"))
    # Linux lets a child inherit the peak of its parent in ru_maxrss, never in VmHWM.
    maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    size, asked = np.prod(store.shape) * 4e-9, steps * ROWS * CANDIDATES
    print(
        f"index of {len(store)} passages, {size:.2f} GB; {steps} steps of {ROWS} "
        f"questions x {CANDIDATES} candidates in {seconds:.0f} s, last loss {loss:.3f}"
    )
    print(f"peak RSS {found['VmHWM']:.2f} GB (ru_maxrss {maxrss:.2f} GB)")
    print(
        f"  anonymous: {before['RssAnon']:.2f} GB before the model is loaded, "
        f"{anonymous:.2f} GB at most after a step, {found['RssAnon']:.2f} GB at the end"
    )
    print(
        f"  of files:  {before['RssFile']:.2f} GB before the model is loaded, "
        f"{files:.2f} GB at most after a step, {found['RssFile']:.2f} GB at the end; "
        f"the {asked} rows asked for are {asked * store.shape[1] * 4e-9:.2f} GB"
    )


def main() -> None:
    """Write the index and train in another process, or train from one that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--index", type=Path, help="train from this one, here")
    options = parser.parse_args()
    folder = options.workdir / "inputs" / "encoder"
    if options.index:
        train(folder, options.index, options.steps)
        return
    with tempfile.TemporaryDirectory() as index:
        write_index(Path(index), options.passages, 384)
        given = ["--workdir", str(options.workdir), "--steps", str(options.steps)]
        command = [sys.executable, __file__, *given, "--index", index]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
