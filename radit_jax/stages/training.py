"""What both fine-tuning stages have around the training loop."""

import contextlib
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array
from ml_collections import ConfigDict

from radit_jax import mirror, optim, processes, sharding
from radit_jax.checkpoint import PARAMS, Checkpoints
from radit_jax.data.counting import CountingBatches, Streams, report
from radit_jax.loop import Schedule, TrainState, fit
from radit_jax.stages.stage import section, settings_of
from radit_jax.tracker import METRICS_FILE, NoTracker, Tracker, plot_curves

log = logging.getLogger(__name__)

Model = TypeVar("Model")

SEEN_FILE = "seen.json"  # what a run was made of, by dataset

# What goes where the checkpoints go, so that the curves go on with them.
TRACKED = (METRICS_FILE, "tensorboard")

# Settings of training that must be at least 1.
COUNTS = ("rows", "validation_examples", "keep", *Schedule._fields)


class Metric(NamedTuple):
    """The validation metric that says which checkpoint is best."""

    name: str
    higher_is_better: bool

    def checkpoints(self, folder: Path, keep: int = 1) -> Checkpoints:
        """Those of a stage's folder."""
        return Checkpoints(
            mirror.checkpoints_of(folder),
            keep,
            self.name,
            self.higher_is_better,
            before_save=functools.partial(mirror.push, folder, TRACKED),
        )


def training_settings(config: ConfigDict) -> dict[str, Any]:
    """A section without what does not change the weights."""
    settings = section(config)
    for name in ("log_every", "wandb_project"):
        del settings[name]
    return settings


def train(
    config: ConfigDict,
    folder: Path,
    params: Any,
    seed: int,
    metric: Metric,
    make_step: Callable[[Any, Callable[[Array], Array]], Any],
    batches: CountingBatches | Streams,
    place: Callable[[Any], Any],
    validate: Callable[[Any], dict[str, float]],
    before_step: Callable[[int, Any], None] = lambda done, params: None,
    **rates: float,
) -> dict[str, int]:
    """Fine-tune, or go on with it, and draw the curves.

    Args:
        config: the stage's section.
        folder: of the stage.
        params: the model to start from; it is donated.
        seed: of the run.
        metric: says which checkpoint is kept.
        make_step: from an optimizer and its learning rate to the jitted step.
        batches: without end; they are closed, and what they were made of is written.
        place: puts a batch on the mesh.
        validate: parameters to validation metrics.
        before_step: as of ``fit``.
        **rates: ``flops_per_token`` and ``peak_flops`` of ``fit``.

    Returns:
        Number of steps and the best one, for the manifest.

    Raises:
        ValueError: an impossible schedule; and as ``fit``.
    """
    mirror.pull(folder, TRACKED)
    with contextlib.closing(batches):
        tx, learning_rate = optimizer(config)
        key_data = np.asarray(jax.random.key_data(jax.random.key(seed)))
        state = initial_state(
            params,
            tx,
            step=sharding.put(np.zeros((), np.int32), sharding.REPLICATED),
            key_data=sharding.put(key_data, sharding.REPLICATED),
        )
        with (
            metric.checkpoints(folder, config.keep) as checkpoints,
            _tracker(config, folder, checkpoints.latest) as tracker,
        ):
            state = fit(
                state,
                step=make_step(tx, learning_rate),
                batches=batches,
                place=place,
                validate=validate,
                checkpoints=checkpoints,
                tracker=tracker,
                schedule=settings_of(Schedule, config),
                before_step=before_step,
                **rates,
            )
            best = processes.from_first(checkpoints.best)
        seen = processes.united(batches.get_state())
    if processes.first():
        write_seen(folder / SEEN_FILE, batches, batches.counted(seen))
        plot_curves(folder / METRICS_FILE, folder / "curves.png")
    assert best is not None
    return {"steps": int(state.step), "best_step": best}


def optimizer(config: ConfigDict) -> tuple[Any, Callable[[Array], Array]]:
    """The optimizer of a stage's section, and its learning rate by step.

    Raises:
        ValueError: an impossible schedule.
    """
    learning_rate = optim.schedule(
        config.learning_rate,
        config.end_learning_rate,
        config.warmup_steps,
        config.steps,
        config.schedule,
    )
    tx = optim.optimizer(
        learning_rate,
        config.beta1,
        config.beta2,
        config.eps,
        config.weight_decay,
        config.clip_norm,
    )
    return tx, learning_rate


def initial_state(params: Any, tx: Any, step: Array, key_data: Array) -> TrainState:
    """What training starts from; moments are sharded as their weights are."""
    opt_state = jax.jit(tx.init)(params)
    return TrainState(step=step, params=params, opt_state=opt_state, rng=key_data)


def _tracker(
    config: ConfigDict, folder: Path, restored: int | None
) -> contextlib.AbstractContextManager[Tracker | NoTracker]:
    """Of several processes the first one keeps the metrics, which are those of all."""
    if not processes.first():
        return contextlib.nullcontext(NoTracker())
    return Tracker(
        folder,
        resume_step=0 if restored is None else restored + 1,
        wandb_project=config.wandb_project,
    )


def write_seen(
    file: Path, batches: CountingBatches | Streams, counts: np.ndarray
) -> None:
    """What a run was made of, all processes together: as JSON, and in the log."""
    seen = report(batches.names, batches.columns, counts)
    file.write_text(json.dumps(seen, indent=2) + "\n")
    for name, row in seen.items():
        shown = ", ".join(f"{row[column]:,} {column}" for column in batches.columns)
        log.info("seen of %s: %s (%.1f %%)", name, shown, 100 * row["share"])


def load_checkpoint(
    folder: Path,
    metric: Metric,
    build: Callable[[Array], Model],
    last: bool = False,
    dtype: DTypeLike | None = None,
) -> Model:
    """The best or the last checkpoint of a finished run, on the current mesh.

    Args:
        folder: of the run.
        metric: that it was trained with.
        build: makes the model from a key; only its shape is asked for.
        last: the newest rather than the best.
        dtype: of the weights in memory; None: as they were trained.

    Raises:
        ValueError: there is no checkpoint.
    """
    shape = jax.eval_shape(lambda: build(jax.random.key(0)))
    with metric.checkpoints(folder) as checkpoints:
        step = processes.from_first(checkpoints.latest if last else checkpoints.best)
        if step is None:
            raise ValueError(f"{checkpoints.folder}: no checkpoint")
        return checkpoints.restore(step, {PARAMS: shape}, dtype)[PARAMS]
