"""LM-FT and lm_score on NVIDIA GPUs: tokens a second and model FLOPs utilisation.

    python -m pip install -e ".[cuda]"
    python benchmarks/gpu.py

Llama-3.2-1B's shape with random weights, in bfloat16, in training with float32 master
weights and optimizer moments, on all GPUs of this machine (one copy of the weights
shared by all). Rows of 2048 tokens are full of segments of 512, of which the last 128
carry loss. The step and the scoring program are the stages' own, once for each kernel
of attention; repeats take turns, the last number is the ratio of the two kernels in
this run. Without a GPU it says so and ends with status 1.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from radit_jax import optim, sharding
from radit_jax.batch import Packed
from radit_jax.loop import TrainState
from radit_jax.models.attention import Kernel, choose_kernel
from radit_jax.models.layers import Rope
from radit_jax.models.llama import Llama, LlamaConfig
from radit_jax.models.remat import REMAT_POLICIES
from radit_jax.stages import hardware
from radit_jax.stages.lm_ft import flops_per_token, make_step, place
from radit_jax.stages.scoring import make_score

LLAMA_1B = LlamaConfig(
    vocab_size=128_256,
    width=2048,
    layers=16,
    heads=32,
    kv_heads=8,
    head_size=64,
    mlp_width=8192,
    max_length=131_072,
    rope=Rope(500_000.0, "llama3", factor=32.0, original_length=8192),
    tied=True,
)
DTYPE = jnp.dtype(jnp.bfloat16)
SEGMENTS = 4  # of a row
TARGETS = 4  # one of so many tokens carries loss


def batch_of(config: LlamaConfig, rows: int, length: int) -> Packed:
    """Rows full of equal segments, the end of each the answer; on the host."""
    rng = np.random.default_rng(0)
    size = length // SEGMENTS
    places = np.arange(length)
    sites = places[places % size >= size - size // TARGETS] - 1
    tokens_BL = rng.integers(config.vocab_size, size=(rows, length), dtype=np.int32)

    def repeated(row: np.ndarray) -> np.ndarray:
        return np.tile(row.astype(np.int32), (rows, 1))

    return Packed(
        tokens_BL=tokens_BL,
        segment_ids_BL=repeated(places // size + 1),
        positions_BL=repeated(places % size),
        sites_BT=repeated(sites),
        targets_BT=tokens_BL[:, sites + 1],
        weights_BT=np.ones((rows, len(sites)), np.float32),
    )


def training(
    config: LlamaConfig, rows: int, length: int, remat: str, kernel: Kernel
) -> Callable[[], float]:
    """A function that does one optimizer step of ``lm_ft`` and gives its loss."""
    learning_rate = optim.schedule(1e-5, 1e-6, 1, 1000)
    tx = optim.optimizer(learning_rate, 0.9, 0.95, 1e-8, 0.1, 1.0)
    step = make_step(tx, learning_rate, DTYPE, remat, kernel)
    batch = place(Packed(*(x[None] for x in batch_of(config, rows, length))))
    model = weights(config)
    state = TrainState(
        jnp.int32(0), model, jax.jit(tx.init)(model), jnp.zeros(2, jnp.uint32)
    )

    def once() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return once


def scoring(
    config: LlamaConfig, rows: int, length: int, kernel: Kernel
) -> Callable[[], float]:
    """A function that scores one batch as ``lm_score`` does and gives the mean."""
    score = make_score(DTYPE, kernel)
    batch = Packed(*map(sharding.put_rows, batch_of(config, rows, length)))
    # All segments of a row go on from its first one.
    prefix_ids_BL = jnp.ones_like(batch.segment_ids_BL)
    model = jax.tree.map(lambda x: x.astype(DTYPE), weights(config))
    return lambda: float(score(model, batch, prefix_ids_BL).mean())


def weights(config: LlamaConfig) -> Llama:
    """Random ones, made where they will lie."""
    return jax.jit(lambda: Llama(config, jax.random.key(0)))()


def measure(
    programs: dict[str, Callable[[], float]], repeats: int
) -> dict[str, tuple[float, list[float]]]:
    """Median seconds of each program, and what it gave each time; they take turns."""
    for once in programs.values():
        once()  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    values: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, once in programs.items():
            start = time.perf_counter()
            values[name].append(once())
            seconds[name].append(time.perf_counter() - start)
    return {name: (float(np.median(seconds[name])), values[name]) for name in programs}


def report(
    config: LlamaConfig,
    kernels: Sequence[Kernel],
    rows: int,
    length: int,
    remat: str,
    repeats: int,
) -> None:
    """Measure both programs with every kernel on the current mesh, and print."""
    peak = hardware.peak_flops(DTYPE)
    if not peak:
        print("this device's peak is not in stages/hardware.py: no utilisation")
    flops = flops_per_token(config, length / SEGMENTS, 1 / TARGETS)
    makers = {
        "LM-FT": (functools.partial(training, config, rows, length, remat), flops),
        "lm_score": (functools.partial(scoring, config, rows, length), flops / 3),
    }
    for name, (make, cost) in makers.items():
        found = measure({kernel.name: make(kernel) for kernel in kernels}, repeats)
        for line in lines(name, found, rows * length, cost, peak):
            print(line)


def lines(
    name: str,
    found: dict[str, tuple[float, list[float]]],
    tokens: int,
    cost: float,
    peak: float,
) -> Iterator[str]:
    """What is printed of a program.

    Args:
        name: of the program.
        found: of each kernel, as ``measure`` gives it.
        tokens: of a run.
        cost: model FLOPs of a token.
        peak: FLOP/s of all devices; 0: not known.
    """
    speeds = {kernel: tokens / seconds for kernel, (seconds, _) in found.items()}
    for kernel, speed in speeds.items():
        use = f"MFU {100 * speed * cost / peak:5.1f} %  " if peak else ""
        shown = ", ".join(f"{value:.4f}" for value in found[kernel][1][:3])
        yield f"{name:9s} {kernel:6s} {speed:12,.0f} tokens/s  {use}({shown})"
    first, *others = speeds
    for other in others:
        ratio = speeds[first] / speeds[other]
        yield f"{name:9s} {first} is {ratio:.2f}x as fast as {other}"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4, help="on each GPU")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--remat", default="dots", choices=sorted(REMAT_POLICIES))
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit(
            f"no GPU: JAX computes on {jax.default_backend()} here. On a machine with "
            "NVIDIA GPUs and driver 580 or later: python -m pip install -e '.[cuda]'"
        )
    with jax.set_mesh(sharding.make_mesh(fsdp=-1)) as mesh:
        print(f"{mesh.size} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
        kernels = [
            choose_kernel(name, "gpu", DTYPE, LLAMA_1B.head_size)
            for name in ("cudnn", "xla")
        ]
        report(
            LLAMA_1B,
            kernels,
            options.rows * mesh.size,
            options.length,
            options.remat,
            options.repeats,
        )


if __name__ == "__main__":
    main()
