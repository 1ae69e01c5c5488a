"""LM-FT: useful tokens a second of our step and of PyTorch's, side by side.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/lm_ft.py --workdir runs/demo

Needs the demo's inputs, passages and retrieved questions. The same SmolLM2 weights, the
same tokenised instances and the same rule (AdamW, fp32, mean loss over the answer
tokens of 64 instances) in every contender: ours; `transformers.Trainer` with padded
batches of 8; and a careful loop by hand, packed, with SDPA and logits at the targets
only. Useful tokens are those that are not padding. Repeats take turns. The losses of
every counted step are printed: equal ones say that all three did the same work. Ours
pays for packing each step's instances alone; in training, where rows are packed from a
stream, about 7 % is padding.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from peer_env import ensure
from workers import OURS, Peer, interleaved, median

from radit_jax import optim, sharding
from radit_jax.batch import Packed
from radit_jax.data import pipeline, prompts
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tokenize import load_tokenizer
from radit_jax.loop import TrainState
from radit_jax.models.huggingface import load_llama
from radit_jax.stages import hardware
from radit_jax.stages.lm_ft import flops_per_token, make_step, place
from radit_jax.stages.retrieve import read_retrieved

PER_STEP = 64


def rendered(workdir: Path, count: int) -> list[prompts.Prompt]:
    """The first training instances: each question with its top passage."""
    tokenizer = load_tokenizer(workdir / "inputs" / "lm")
    passages = PassageStore(workdir / "passages")
    examples, found = read_retrieved(workdir, "train")["train"]
    return [
        prompts.render(
            tokenizer,
            prompts.pieces(example),
            512,
            passage=passages[int(found.ids[i, 0])].display,
        )
        for i, example in enumerate(examples[:count])
    ]


def steps_of(
    instances: list[prompts.Prompt], row_tokens: int, row_targets: int, rows: int
) -> list[Packed]:
    """Each step's instances packed into micro-batches [micro-batches, rows, ...]."""
    mixture = pipeline.Mixture(
        row_tokens=row_tokens, row_targets=row_targets, packing_bins=256
    )
    steps = []
    for start in range(0, len(instances), PER_STEP):
        source = [
            pipeline.features(p, mixture.row_targets, "")
            for p in instances[start : start + PER_STEP]
        ]
        micro = list(pipeline.pack_all(source, mixture, rows))
        steps.append(Packed(*(np.stack(fields) for fields in zip(*micro, strict=True))))
    # One shape for all steps: what a step lacks is padding.
    most = max(step.tokens_BL.shape[0] for step in steps)

    def fill(array: np.ndarray) -> np.ndarray:
        width = [(0, most - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
        return np.pad(array, width)

    return [Packed(*map(fill, step)) for step in steps]


class Ours:
    """Our step, one repeat at a time."""

    def __init__(self, folder: Path, steps: list[Packed], remat: str):
        learning_rate = optim.schedule(1e-5, 1e-5, 0, 1000)
        tx = optim.optimizer(learning_rate, 0.9, 0.95, 1e-8, 0.1, 1.0)
        self.model = load_llama(folder)
        self.state = TrainState(
            jnp.int32(0), self.model, jax.jit(tx.init)(self.model), jnp.zeros(2)
        )
        self.steps = steps
        self.count = 0
        step = make_step(tx, learning_rate, jnp.float32, remat)
        start = time.perf_counter()
        self.compiled = step.lower(self.state, place(steps[0])).compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> dict[str, float]:
        """One optimizer step."""
        batch = self.steps[self.count % len(self.steps)]
        self.count += 1
        start = time.perf_counter()
        self.state, metrics = self.compiled(self.state, place(batch))
        loss = float(metrics["loss"])
        return {
            "seconds": time.perf_counter() - start,
            "useful_tokens": float(metrics["tokens"]),
            "targets": float(metrics["targets"]),
            "padding": float(metrics["padding"]),
            "loss": loss,
        }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--row-tokens", type=int, default=512)
    parser.add_argument("--row-targets", type=int, default=192)
    parser.add_argument("--rows", type=int, default=2, help="per micro-batch")
    parser.add_argument("--remat", default="dots")
    options = parser.parse_args()
    folder = options.workdir / "inputs" / "lm"
    instances = rendered(options.workdir, PER_STEP * (options.repeats + 1))
    with (
        tempfile.TemporaryDirectory() as cache,
        tempfile.NamedTemporaryFile("w", suffix=".json") as file,
    ):
        rows = [
            {
                "tokens": p.tokens,
                "loss_mask": [int(i >= p.answer_start) for i in range(len(p.tokens))],
            }
            for p in instances
        ]
        json.dump(rows, file)
        file.flush()
        jax.config.update("jax_compilation_cache_dir", cache)
        with jax.set_mesh(sharding.make_mesh(1, 1, 1)):
            packed = steps_of(
                instances, options.row_tokens, options.row_targets, options.rows
            )
            ours = Ours(folder, packed, options.remat)
            jax.clear_caches()
            warm = Ours(folder, packed, options.remat).compile_seconds
            python = ensure()
            peers = {
                f"PyTorch, {style}": Peer(
                    python,
                    "lm_ft",
                    model=str(folder.resolve()),
                    instances=file.name,
                    style=style,
                    instances_per_step=PER_STEP,
                )
                for style in ("trainer", "careful")
            }
            found = interleaved(ours, peers, options.repeats)
            report(ours, warm, packed, found)


def report(ours: Ours, warm: float, packed: list[Packed], found: dict) -> None:
    """Medians, ratios, and the share of the machine's matrix speed."""
    speeds = {
        name: median(
            [r | {"speed": r["useful_tokens"] / r["seconds"]} for r in results], "speed"
        )
        for name, results in found.items()
    }
    for name, speed in speeds.items():
        ratio = speeds[OURS] / speed
        print(f"{name:28s} {speed:7.1f} useful tokens/s   ours is {ratio:.2f}x")
    last = found[OURS][-1]
    flops = flops_per_token(
        ours.model.config,
        last["useful_tokens"] / PER_STEP,
        last["targets"] / last["useful_tokens"],
    )
    peak = hardware.measured_matmul(jnp.dtype(jnp.float32))
    useful = speeds[OURS] * flops / peak
    padding = median(found[OURS], "padding")
    print(
        f"model FLOPs utilisation {100 * useful:.0f} % of {peak / 1e9:.0f} GFLOP/s "
        f"measured, {100 * useful / (1 - padding):.0f} % with the padding, which is "
        f"{100 * padding:.0f} % of the rows"
    )
    print(f"compile: {ours.compile_seconds:.1f} s cold, {warm:.1f} s from the cache")
    losses = {name: [round(r["loss"], 4) for r in rs] for name, rs in found.items()}
    print(f"losses of the counted steps: {losses}")


if __name__ == "__main__":
    main()
