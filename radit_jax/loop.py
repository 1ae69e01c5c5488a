"""The training loop of both stages: pure step, thin loop.

The loop knows nothing about models or tasks. It moves batches, times phases, logs
one step late so that the device never waits for the host, validates, keeps
checkpoints and stops on a signal or on a loss that is not finite.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from radit_jax import processes, sharding
from radit_jax.checkpoint import Checkpoints
from radit_jax.tracker import NoTracker, Tracker, progress

log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """All that training changes; arrays, or their shapes where a step is planned."""

    step: Any  # int32 scalar, optimizer steps done
    params: Any
    opt_state: Any
    rng: Any  # key data of the run's key; fold the step in to use it

    def updated(self, tx: Any, grads: Any) -> "TrainState":
        """The state after an optimizer step with these gradients."""
        updates, opt_state = tx.update(grads, self.opt_state, self.params)
        params = jax.tree.map(jnp.add, self.params, updates)
        return TrainState(self.step + 1, params, opt_state, self.rng)


@runtime_checkable
class Batches(Protocol):
    """An iterator of host batches whose position can be saved and restored."""

    def __next__(self) -> Any:
        """The next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """What this process knows of the position, JSON-serialisable; processes that
        know something of the same name know the same."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position, given what all processes knew together."""
        ...


class Schedule(NamedTuple):
    """When the loop does what, in optimizer steps."""

    steps: int
    log_every: int
    validate_every: int
    save_every: int


class Stopped(RuntimeError):
    """Training ended before its last step; the message says where it can go on."""


class NonFiniteLoss(Stopped):
    """The loss or the gradient became NaN or infinite."""


def fit(
    state: TrainState,
    *,
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    batches: Batches,
    place: Callable[[Any], Any],
    validate: Callable[[Any], dict[str, float]],
    checkpoints: Checkpoints,
    tracker: Tracker | NoTracker,
    schedule: Schedule,
    before_step: Callable[[int, Any], None] = lambda done, params: None,
    flops_per_token: float = 0.0,
    peak_flops: float = 0.0,
) -> TrainState:
    """Train until ``schedule.steps``, going on from the newest checkpoint if any.

    Args:
        state: the initial state; it is donated.
        step: jitted and pure; its metrics hold ``loss``, ``grad_norm`` and ``tokens``
            (useful ones, padding apart), all scalars.
        batches: host batches.
        place: puts a host batch on the mesh.
        validate: parameters -> validation metrics; also called before the first step,
            so that the curve and the choice of the best checkpoint include the start.
        checkpoints: where the state goes, and which metric says what is best.
        tracker: where metrics go.
        schedule: how often.
        before_step: called with the steps done and the parameters before each step is
            given its batch, also after going on from a checkpoint; what it changes in
            the batches must follow from these two.
        flops_per_token: model FLOPs of one useful token, for utilisation.
        peak_flops: of all devices together, per second.

    Raises:
        NonFiniteLoss: with the step; nothing after the last good checkpoint is kept.
        Stopped: SIGTERM or SIGINT arrived; the state was saved first.
        CheckpointError: a checkpoint could not be written or read.
    """
    restored = processes.from_first(checkpoints.latest)
    if restored is not None:
        log.info("going on from step %d of %s", restored, checkpoints.folder)
        state = _restore(checkpoints, restored, state, batches)
    done = int(state.step)
    if done == 0 and restored is None:
        start = validate(state.params)
        tracker.log(0, start, prefix="validation")
        _check_scores(0, start, checkpoints)
        _save(checkpoints, 0, state, batches, start)
    timer = _Timer()
    late: tuple[int, dict[str, jax.Array]] | None = None
    with _signals() as signalled, progress(schedule.steps, "training", "steps") as bar:
        bar.skip(done)
        stop = _Agreement(signalled)
        while done < schedule.steps:
            with timer("before_step"):
                before_step(done, state.params)
            with timer("data"):
                batch = place(next(batches))
            with timer("step"):
                state, metrics = step(state, batch)
                done += 1
                # Wait for the step before: the device always has one queued.
                if late is not None:
                    _check(*late, timer, checkpoints)
            late = (done, metrics)
            bar.update()
            last = done == schedule.steps
            log_now = last or done % schedule.log_every == 0
            validate_now = last or done % schedule.validate_every == 0
            # Once a step: a signal that comes between two looks waits for the next.
            stopping = stop()
            save_now = validate_now or stopping or done % schedule.save_every == 0
            if log_now or save_now:
                with timer("step"):
                    _check(*late, timer, checkpoints)
                late = None
            if log_now:
                rates = timer.rates(flops_per_token, peak_flops)
                scalars = {name: float(value) for name, value in metrics.items()}
                tracker.log(done, scalars | rates, prefix="train")
            scores: dict[str, float] | None = None
            if validate_now:
                with timer("validate"):
                    scores = validate(state.params)
                tracker.log(done, scores, prefix="validation")
                _check_scores(done, scores, checkpoints)
            if save_now:
                with timer("checkpoint"):
                    if not all_finite(state.params):
                        raise _non_finite("a weight", "not finite", done, checkpoints)
                    _save(checkpoints, done, state, batches, scores)
            if stopping and not last:
                checkpoints.wait()
                raise Stopped(
                    f"stopped by a signal at step {done} of {schedule.steps}; saved in "
                    f"{checkpoints.folder}. Run the same command to go on"
                )
    checkpoints.wait()
    return state


def _check(
    step: int,
    metrics: Mapping[str, jax.Array],
    timer: "_Timer",
    checkpoints: Checkpoints,
) -> None:
    """Fetch a step's metrics and refuse to go on from a broken one."""
    for name in ("loss", "grad_norm"):
        value = float(metrics[name])
        if not math.isfinite(value):
            raise _non_finite(name, str(value), step, checkpoints)
    timer.tokens += float(metrics["tokens"])


def _check_scores(
    step: int, scores: Mapping[str, float], checkpoints: Checkpoints
) -> None:
    """A model that validates to NaN must not become the newest or best checkpoint."""
    for name, value in scores.items():
        if not math.isfinite(value):
            raise _non_finite(f"validation {name}", str(value), step, checkpoints)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no leaf holds a NaN or an infinity."""
    return jnp.all(
        jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])
    )


def _non_finite(
    name: str, value: str, step: int, checkpoints: Checkpoints
) -> NonFiniteLoss:
    checkpoints.wait()
    newest = checkpoints.latest
    kept = (
        "No checkpoint was written"
        if newest is None
        else f"The newest checkpoint, of step {newest}, is from before that"
    )
    return NonFiniteLoss(
        f"{name} is {value} at step {step}. {kept}; lower the learning rate, or look "
        "at the weights and at that batch"
    )


def _trees(state: TrainState) -> dict[str, Any]:
    """What a checkpoint keeps, besides the position in the data."""
    return {
        "params": state.params,
        "opt_state": state.opt_state,
        "rng": {"key_data": state.rng, "step": state.step},
    }


def _save(
    checkpoints: Checkpoints,
    step: int,
    state: TrainState,
    batches: Batches,
    scores: Mapping[str, float] | None,
) -> None:
    position = processes.united(batches.get_state())
    checkpoints.save(step, _trees(state) | {"data": position}, scores)


def _restore(
    checkpoints: Checkpoints, step: int, state: TrainState, batches: Batches
) -> TrainState:
    found = checkpoints.restore(step, _trees(state) | {"data": None})
    batches.set_state(found["data"])
    return TrainState(
        step=found["rng"]["step"],
        params=found["params"],
        opt_state=found["opt_state"],
        rng=found["rng"]["key_data"],
    )


class _Agreement:
    """Whether to stop, the same at the same step on all processes.

    With several of them each look asks, and answers what was asked a look ago, so that
    the devices are never waited for.
    """

    def __init__(self, signalled: threading.Event):
        self._signalled = signalled
        self._asked: jax.Array | None = None

    def __call__(self) -> bool:
        if processes.count() == 1:
            return self._signalled.is_set()
        asked, self._asked = (
            self._asked,
            sharding.any_process(self._signalled.is_set()),
        )
        return asked is not None and bool(asked)


class _Timer:
    """Seconds of each named phase, and tokens, since the last report."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.tokens = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    def rates(self, flops_per_token: float, peak_flops: float) -> dict[str, float]:
        """Report and start over; rates count data and step, not validation."""
        training = self.seconds.get("data", 0.0) + self.seconds.get("step", 0.0)
        speed = self.tokens / training if training else 0.0
        found = {f"seconds/{name}": value for name, value in self.seconds.items()}
        found["tokens_per_second"] = speed
        if peak_flops:
            found["mfu"] = speed * flops_per_token / peak_flops
        self.seconds, self.tokens = {}, 0.0
        return found


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """SIGTERM and the first Ctrl-C ask the loop to save and stop."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handled = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in handled}

    def ask(number: int, frame: Any) -> None:
        log.warning("signal %d: saving after this step, then stopping", number)
        stop.set()
        # A second one is obeyed at once.
        signal.signal(number, before[signal.Signals(number)])

    for number in handled:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number in handled:
            signal.signal(number, before[number])
