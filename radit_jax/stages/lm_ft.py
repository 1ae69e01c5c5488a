"""Stage ``lm_ft``: retrieved/ and a language model -> lm_ft/, the fine-tuned one.

RA-DIT's first half: every example is shown with each of its top passages as
independent instances, and the loss falls on the answer alone (eq. 3).
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from radit_jax import optim, sharding
from radit_jax.batch import Packed
from radit_jax.data import pipeline
from radit_jax.data.corpus import PassageStore
from radit_jax.data.counting import Streams
from radit_jax.data.registry import DATASETS
from radit_jax.data.tokenize import Tokenizer, load_tokenizer
from radit_jax.inference.score import target_log_probabilities
from radit_jax.loop import TrainState
from radit_jax.models.attention import XLA, Kernel
from radit_jax.models.huggingface import (
    check_vocabulary,
    load_llama,
    read_llama_config,
)
from radit_jax.models.llama import Llama, LlamaConfig
from radit_jax.models.remat import REMAT_POLICIES
from radit_jax.stages import hardware
from radit_jax.stages.retrieve import chosen_datasets, read_retrieved
from radit_jax.stages.stage import (
    Stage,
    attention_kernel,
    check_counts,
    check_language_model,
    compute_dtype,
    field_fingerprint,
    lm_folder,
    settings_of,
)
from radit_jax.stages.training import (
    COUNTS,
    Metric,
    load_checkpoint,
    train,
    training_settings,
)

log = logging.getLogger(__name__)

METRIC = Metric("loss", higher_is_better=False)


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The lm_ft section and the language model's content.

    Not the mesh: a run may go on, and be read, on another one.
    """
    return training_settings(config.lm_ft) | {
        "lm": field_fingerprint(config, "lm"),
        "seed": config.seed,
        "dtype": config.dtype,
    }


def answer_loss(
    model: Llama,
    batch: Packed,
    dtype: jnp.dtype,
    remat: str,
    kernel: Kernel = XLA,
    stream: jax.P = sharding.ACT_BLD,
) -> dict[str, Float[Array, ""]]:
    """Summed negative log-likelihood of a batch's targets, and their number.

    Args:
        model: on the current mesh.
        batch: packed rows.
        dtype: of compute.
        remat: as of ``Llama.hidden``.
        kernel: of attention.
        stream: as of ``Llama.hidden``.
    """
    log_BT = target_log_probabilities(model, batch, None, dtype, remat, kernel, stream)
    return {
        "nll": -jnp.sum(log_BT * batch.weights_BT),
        "targets": jnp.sum(batch.weights_BT),
        "tokens": jnp.sum(batch.segment_ids_BL > 0).astype(jnp.float32),
    }


def make_step(
    tx: Any,
    learning_rate: Callable[[Array], Array],
    dtype: jnp.dtype,
    remat: str,
    kernel: Kernel = XLA,
    stream: jax.P = sharding.ACT_BLD,
) -> Callable[[TrainState, Packed], tuple[TrainState, dict[str, Array]]]:
    """The jitted optimizer step; a batch's arrays are [micro-batches, rows, ...].

    Args:
        tx: the optimizer.
        learning_rate: of a step, for the log.
        dtype: of compute.
        remat: as of ``Llama.hidden``.
        kernel: of attention.
        stream: as of ``Llama.hidden``.
    """

    def gradient(model: Llama, part: Packed) -> tuple[dict[str, Array], Llama]:
        def loss(model: Llama) -> tuple[Array, dict[str, Array]]:
            sums = answer_loss(model, part, dtype, remat, kernel, stream)
            return sums["nll"], sums

        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(model)
        return sums, grads

    @functools.partial(jax.jit, donate_argnames="state")
    def step(state: TrainState, batch: Packed) -> tuple[TrainState, dict[str, Array]]:
        sums, grads = optim.accumulate(gradient, state.params, batch)
        count = jnp.maximum(sums["targets"], 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        metrics = {
            "loss": sums["nll"] / count,
            "grad_norm": optim.global_norm(grads),
            "learning_rate": learning_rate(state.step),
            "tokens": sums["tokens"],
            "targets": sums["targets"],
        }
        size = batch.tokens_BL.size
        metrics["padding"] = 1.0 - sums["tokens"] / size
        return state.updated(tx, grads), metrics

    return step


def place(batch: Packed) -> Packed:
    """This process' rows of a batch on the mesh: rows over the data axes, micro-batches
    in order."""
    put = functools.partial(sharding.put_own, spec=sharding.PARTS_BL)
    return Packed(*(put(array) for array in batch))


def validation(
    batches: list[Packed], dtype: jnp.dtype, kernel: Kernel = XLA
) -> Callable[[Llama], dict[str, float]]:
    """Negative log-likelihood per target token over fixed batches, as a function."""
    sums = jax.jit(
        functools.partial(answer_loss, dtype=dtype, remat="none", kernel=kernel)
    )

    def validate(model: Llama) -> dict[str, float]:
        nll = targets = 0.0
        for batch in batches:
            found = sums(model, Packed(*map(sharding.put_rows, batch)))
            nll += float(found["nll"])
            targets += float(found["targets"])
        return {METRIC.name: nll / targets}

    return validate


def flops_per_token(config: LlamaConfig, row_tokens: float, targets: float) -> float:
    """Model FLOPs of a training token: 6 per weight used, plus causal attention.

    Args:
        config: of the model.
        row_tokens: mean length of a segment, over which attention runs.
        targets: share of tokens that pass through the output head.
    """
    D, F, K = config.width, config.mlp_width, config.head_size
    layer = D * K * (2 * config.heads + 2 * config.kv_heads) + 3 * D * F
    attention = row_tokens * config.heads * K  # 2 products, half of them masked
    head = targets * D * config.vocab_size
    return 6.0 * (config.layers * (layer + attention) + head)


def sample(
    datasets: list[pipeline.Dataset], count: int, seed: int
) -> list[pipeline.Dataset]:
    """A fixed random choice of ``count`` examples of all datasets together."""
    sizes = [len(dataset.examples) for dataset in datasets]
    chosen = np.sort(np.random.default_rng(seed).permutation(sum(sizes))[:count])
    found = []
    for dataset, end in zip(datasets, np.cumsum(sizes), strict=True):
        start = end - len(dataset.examples)
        places = chosen[(chosen >= start) & (chosen < end)] - start
        examples = [dataset.examples[i] for i in places]
        ids = dataset.passage_ids[places]
        found.append(dataset._replace(examples=examples, passage_ids=ids))
    return found


def context_roles(config: ConfigDict, names: Sequence[str]) -> dict[str, str]:
    """What the given context of each dataset is for, as the config or its paper says.

    Raises:
        ValueError: as ``pipeline.context_roles``.
    """
    usual = {name: DATASETS[name].context for name in names if name in DATASETS}
    return pipeline.context_roles(config.lm_ft.context, names, usual)


def prepare_data(
    config: ConfigDict, tokenizer: Tokenizer
) -> tuple[Streams, list[Packed]]:
    """Training batches without end, and the validation batches, whole on every process.

    Training reads ``lm_ft.streams`` streams, each process those of its own rows.
    """
    workdir = Path(config.workdir)
    passages = PassageStore(workdir / "passages")
    mixture = settings_of(pipeline.Mixture, config.lm_ft, seed=config.seed, shares={})
    rows = mixture.rows // mixture.micro_batches
    sharding.check_rows(rows, f"lm_ft.rows / lm_ft.micro_batches = {rows} rows")
    splits = {name: read_retrieved(workdir, name) for name in ("train", "dev")}
    used = chosen_datasets("lm_ft.datasets", config.lm_ft.datasets, splits, "L")
    roles = context_roles(config, used)
    mixture = mixture._replace(shares=pipeline.fixed_shares(config.lm_ft.shares, used))
    datasets = {
        split: [
            pipeline.Dataset(name, examples, found.ids, roles[name])
            for name, (examples, found) in parts.items()
            if name in used
        ]
        for split, parts in splits.items()
    }
    for parts in datasets.values():
        pipeline.check_answers(parts, tokenizer, mixture)
    count = config.lm_ft.streams
    streams = {
        stream: pipeline.training_batches(
            datasets["train"], passages, tokenizer, mixture, stream, count
        )
        for stream in own_streams(count)
    }
    batches = Streams(streams, axis=1)
    fixed = pipeline.validation_batches(
        sample(datasets["dev"], config.lm_ft.validation_examples, config.seed),
        passages,
        tokenizer,
        mixture,
        rows,
    )
    return batches, list(fixed)


def own_streams(count: int) -> range:
    """Those of ``count`` streams whose rows this process holds.

    Raises:
        ValueError: they do not divide over the processes.
    """
    part, parts = sharding.process_rows()
    if count % parts:
        raise ValueError(
            f"lm_ft.streams = {count} does not divide over the {parts} processes that "
            f"hold different rows; the nearest multiple is "
            f"{max(round(count / parts), 1) * parts}"
        )
    size = count // parts
    return range(part * size, (part + 1) * size)


def check_settings(lm_ft: ConfigDict) -> None:
    """Stop before anything is read if a setting makes no sense.

    Raises:
        ValueError: naming the setting.
    """
    counts = (
        "passages_per_example",
        "dataset_cap",
        "row_tokens",
        "row_targets",
        "micro_batches",
        "packing_bins",
        "streams",
    )
    check_counts("lm_ft", lm_ft, (*counts, *COUNTS))
    if lm_ft.remat not in REMAT_POLICIES:
        raise ValueError(
            f"lm_ft.remat = {lm_ft.remat!r} is not one of {', '.join(REMAT_POLICIES)}"
        )


def check_context(lm_ft: ConfigDict, model: LlamaConfig) -> None:
    """Stop if rows are longer than what the model can read.

    Raises:
        ValueError: naming the setting.
    """
    if lm_ft.row_tokens > model.max_length:
        raise ValueError(
            f"lm_ft.row_tokens = {lm_ft.row_tokens} is more than the model's context "
            f"of {model.max_length} tokens"
        )


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Fine-tune, keeping the checkpoint with the best validation loss."""
    lm_ft = config.lm_ft
    check_settings(lm_ft)
    tokenizer = load_tokenizer(lm_folder(config))
    dtype = compute_dtype(config)
    stream = sharding.stream_spec(config.mesh.sequence, lm_ft.row_tokens)
    kernel = attention_kernel(config, read_llama_config(lm_folder(config)).head_size)
    batches, fixed = prepare_data(config, tokenizer)
    model = load_llama(lm_folder(config))
    check_vocabulary(tokenizer, model.config)
    check_context(lm_ft, model.config)
    weights = sum(x.size for x in jax.tree.leaves(model))
    log.info(
        "lm_ft: %.1fM weights, mesh %s, steps of %d x %d tokens in %d micro-batches",
        weights / 1e6,
        dict(jax.sharding.get_mesh().shape),
        lm_ft.rows,
        lm_ft.row_tokens,
        lm_ft.micro_batches,
    )
    first = fixed[0]
    useful = float((first.segment_ids_BL > 0).sum())
    segments = float((np.diff(first.segment_ids_BL, prepend=0) > 0).sum())
    found = train(
        lm_ft,
        folder,
        model,
        config.seed,
        METRIC,
        functools.partial(
            make_step, dtype=dtype, remat=lm_ft.remat, kernel=kernel, stream=stream
        ),
        batches,
        place,
        validation(fixed, dtype, kernel),
        flops_per_token=flops_per_token(
            model.config, useful / segments, float(first.weights_BT.sum()) / useful
        ),
        peak_flops=hardware.peak_flops(dtype),
    )
    return {**found, "weights": weights}


def load_finetuned(config: ConfigDict, dtype: DTypeLike | None = None) -> Llama:
    """The best checkpoint of the finished stage, on the current mesh.

    Args:
        config: the recipe.
        dtype: of the weights in memory; None: as they were trained.
    """
    shape = read_llama_config(lm_folder(config))
    return load_checkpoint(
        Path(config.workdir) / "lm_ft",
        METRIC,
        lambda key: Llama(shape, key),
        dtype=dtype,
    )


STAGE = Stage(
    *("lm_ft", ("passages", "retrieved"), ("lm",), settings, build),
    check_language_model,
)
