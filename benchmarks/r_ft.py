"""Scoring for R-FT: questions a second of ours and of PyTorch, side by side.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/r_ft.py

Needs the demo's inputs, passages and retrieved questions (--workdir, runs/demo by
default). The log-likelihood of the answers of the training questions after each of
their ten passages and after none, under the same SmolLM2 weights in float32: ours, from
text; `transformers` one pair at a time, as the packaged peer of RA-DIT does it; and
`transformers` in batches of like length with logits at the targets only, the best a
careful user would do. Both peers are given tokens. Repeats take turns, and the sums are
compared. How often questions share a passage decides much, so it is printed. Training:
r_ft_training.py and r_ft_memory.py.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from peer_env import ensure
from workers import OURS, Peer, interleaved, median

from radit_jax import sharding
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tokenize import load_tokenizer
from radit_jax.models.huggingface import load_llama
from radit_jax.stages import hardware
from radit_jax.stages.lm_ft import flops_per_token
from radit_jax.stages.lm_score import Scorer, all_pairs
from radit_jax.stages.retrieve import read_retrieved

SETTINGS = {  # those of configs/lm_score.py:demo
    "passages": 10,
    "bos": True,
    "eos": False,
    "row_tokens": 512,
    "row_targets": 64,
    "rows": 8,
    "packing_bins": 256,
}


class Ours:
    """The stage's scoring of all pairs, once a repeat."""

    def __init__(self, scorer: Scorer, pairs: list):
        self.scorer = scorer
        self.pairs = pairs

    def __call__(self) -> dict[str, Any]:
        """One pass."""
        start = time.perf_counter()
        sums = self.scorer(self.pairs).log_p
        return {"seconds": time.perf_counter() - start, "sums": sums.tolist()}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--questions", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    folder = options.workdir / "inputs" / "lm"
    store = PassageStore(options.workdir / "passages")
    examples, found = read_retrieved(options.workdir, "train")["train"]
    # Questions about the same country: passages are read again about as often as in
    # the whole file.
    countries = [example.document.split("/")[0] for example in examples]
    order = np.argsort(countries, kind="stable")[: options.questions]
    order_of = all_pairs(found.ids[order])
    pairs = [
        (examples[order[example]], store[int(id)].display if id >= 0 else "")
        for example, id in zip(order_of.examples, order_of.passages, strict=True)
    ]
    config = ConfigDict({"lm_score": SETTINGS, "dtype": "float32"})
    with (
        tempfile.NamedTemporaryFile("w", suffix=".json") as file,
        jax.set_mesh(sharding.make_mesh(1, 1, 1)),
    ):
        model = load_llama(folder)
        scorer = Scorer(config, model, load_tokenizer(folder))
        prompts = [scorer.render(example, text) for example, text in pairs]
        json.dump(
            [{"tokens": p.tokens, "start": p.answer_start} for p in prompts], file
        )
        file.flush()
        # Before the peers start: beside them it comes out too low, and the share of it
        # that is reached too high.
        peak = hardware.measured_matmul(jnp.dtype(jnp.float32))
        python = ensure()
        peers = {
            f"PyTorch, {style}": Peer(
                python,
                "score",
                model=str(folder.resolve()),
                sequences=file.name,
                style=style,
            )
            for style in ("single", "padded")
        }
        results = interleaved(Ours(scorer, pairs), peers, options.repeats)
    seconds = {name: median(found, "seconds") for name, found in results.items()}
    for name, spent in seconds.items():
        worst = np.abs(
            np.subtract(results[name][-1]["sums"], results[OURS][-1]["sums"])
        ).max()
        print(
            f"{name:18s} {options.questions / spent:6.2f} questions/s   ours is "
            f"{spent / seconds['radit_jax']:.2f}x   largest difference {worst:.1e} nats"
        )
    tokens = sum(len(p.tokens) for p in prompts)
    share = scorer.read / scorer.alone
    targets = sum(len(p.tokens) - p.answer_start for p in prompts)
    read = share * tokens
    flops = flops_per_token(model.config, tokens / len(prompts), targets / read) / 3
    speed = read / seconds[OURS]
    print(
        f"{len(pairs)} pairs of {tokens / len(pairs):.0f} tokens; "
        f"{100 * (1 - share):.0f} % of the tokens had been read for another question; "
        f"padding {100 * (1 - scorer.read / scorer.slots):.0f} %; "
        f"{100 * speed * flops / peak:.0f} % of {peak / 1e9:.0f} GFLOP/s measured"
    )


if __name__ == "__main__":
    main()
