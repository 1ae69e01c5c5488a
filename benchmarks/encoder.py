"""Encoder: passages a second of ours and of sentence-transformers, side by side.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/encoder.py

Needs the demo's inputs and passages (--workdir, runs/demo by default). The same
all-MiniLM-L6-v2 weights, the same passages drawn from the whole corpus, float32,
tokenisation included; up to 256 tokens of a passage, mean pooling and L2 norm. Peers:
sentence-transformers as it comes, and with an allocator that keeps its memory, which is
the best a careful user would do. Repeats take turns.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from peer_env import ensure
from workers import OURS, Peer, interleaved, median

from radit_jax import sharding
from radit_jax.data.corpus import PassageStore
from radit_jax.retrieval.embed import embed_passages
from radit_jax.stages.index import tower

MAX_TOKENS = 256


class Ours:
    """The index stage's embedding of the texts, one pass a repeat."""

    def __init__(self, folder: Path, texts: list[str], batch_tokens: int):
        config = ConfigDict(
            {"pooling": {"kind": "", "normalize": None}, "dtype": "float32"}
        )
        self.encode, self.tokenize, self.length = tower(config, folder, MAX_TOKENS)
        self.texts = texts
        self.batch_tokens = batch_tokens

    def __call__(self) -> dict[str, Any]:
        """One pass, into a folder that is thrown away."""
        with tempfile.TemporaryDirectory() as folder:
            stats = embed_passages(
                self.texts,
                self.tokenize,
                self.encode,
                folder,
                batch_tokens=self.batch_tokens,
                max_length=self.length,
            )
        return {
            "seconds": stats.seconds,
            "count": stats.passages,
            "padding": stats.padding,
            "shapes": len(stats.shapes),
        }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--passages", type=int, default=768)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    folder = (options.workdir / "inputs" / "encoder").resolve()
    store = PassageStore(options.workdir / "passages")
    ids = np.random.default_rng(0).choice(len(store), options.passages, replace=False)
    texts = [passage.display for passage in store.get(ids)]
    python = ensure()
    with (
        tempfile.NamedTemporaryFile("w", suffix=".json") as file,
        jax.set_mesh(sharding.make_mesh(1, 1, 1)),
    ):
        json.dump(texts, file)
        file.flush()
        peers = {
            name: Peer(
                python,
                "encoder",
                model=str(folder),
                texts=file.name,
                max_seq_length=MAX_TOKENS,
                keep_memory=keep_memory,
            )
            for name, keep_memory in (
                ("sentence-transformers", False),
                ("the same, memory kept", True),
            )
        }
        ours = Ours(folder, texts, options.batch_tokens)
        found = interleaved(ours, peers, options.repeats)
    seconds = {name: median(results, "seconds") for name, results in found.items()}
    for name, spent in seconds.items():
        ratio = spent / seconds[OURS]
        print(f"{name:24s} {len(texts) / spent:7.1f} passages/s   ours is {ratio:.2f}x")
    last = found[OURS][-1]
    print(f"padding {100 * last['padding']:.1f} %, {last['shapes']} programs")


if __name__ == "__main__":
    main()
