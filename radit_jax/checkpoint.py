"""Checkpoints of a run: parameters, optimizer, step, RNG and data position, together.

Orbax's v1 API writes them asynchronously and renames them when they are whole, so a
process killed at any moment leaves only complete checkpoints behind.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

log = logging.getLogger(__name__)

PARAMS = "params"

# TensorStore, beneath Orbax, reports full disks and damaged files as ValueErrors.
_FAILURES = (OSError, ValueError)


class CheckpointError(ValueError):
    """A checkpoint is missing, does not fit the model, or could not be written."""


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree, concrete or from ``jax.eval_shape``.

    Orbax wants concrete shardings; ``eval_shape`` gives those of the abstract mesh.
    """
    mesh = jax.sharding.get_mesh()

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        sharding = jax.typeof(x).sharding if isinstance(x, jax.Array) else x.sharding
        spec = sharding.spec if sharding is not None else jax.P()
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map(leaf, tree)


class Checkpoints:
    """The checkpoints of one run: the newest ones and the best one are kept.

    Args:
        folder: where they live, one sub-folder per step; ``gs://`` as an epath.
        keep: how many of the newest are kept.
        metric: name of the validation metric that says which one is best.
        higher_is_better: for that metric.
        before_save: called before a checkpoint is begun, with all earlier ones whole.
    """

    def __init__(
        self,
        folder: Any,
        keep: int = 1,
        metric: str = "",
        higher_is_better: bool = False,
        before_save: Callable[[], None] = lambda: None,
    ):
        # A bucket has no other names for a folder; resolving would make one up.
        self.folder = folder.resolve() if isinstance(folder, Path) else folder
        self._before_save = before_save
        self.metric = metric
        self.higher_is_better = higher_is_better
        policies = ocp.training.preservation_policies
        preserve: Any = policies.LatestN(keep)
        if metric:
            preserve = policies.AnyPreservationPolicy(
                [
                    preserve,
                    policies.BestN(
                        get_metric_fn=self._goodness,
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            )
        self._writing: int | None = None
        self._checkpointer = ocp.training.Checkpointer(
            self.folder, preservation_policy=preserve, cleanup_tmp_directories=True
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None when there is none."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    @property
    def best(self) -> int | None:
        """Step with the best validation metric, else the newest."""
        rated = [c for c in self._checkpointer.checkpoints if c.metrics]
        if not (self.metric and rated):
            return self.latest
        return max(rated, key=lambda c: self._goodness(c.metrics)).step

    def _goodness(self, metrics: Any) -> Any:
        """What the best checkpoint has most of."""
        value = metrics[self.metric]
        # Of equals the earlier one, as patience would have it.
        return value if self.higher_is_better else -value, -metrics["step"]

    def save(
        self, step: int, trees: Mapping[str, Any], metrics: Mapping[str, float] | None
    ) -> None:
        """Start writing a checkpoint; returns once the arrays are copied.

        Raises:
            CheckpointError: this or the previous save failed, a full disk for
                instance; checkpoints that were complete before stay as they are.
        """
        # Orbax would wait for the previous save too, and blame this step for it.
        self.wait()
        self._before_save()
        self._writing = step
        try:
            self._checkpointer.save_checkpointables_async(
                step,
                dict(trees),
                # When to save is the loop's decision, not a policy's.
                force=True,
                metrics={**metrics, "step": step} if metrics else None,
            )
        except _FAILURES as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Block until everything is on disk; raises like ``save``."""
        try:
            self._checkpointer.wait()
        except _FAILURES as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        # From the disk: Orbax has the ones that this save would have replaced off its
        # list already.
        names = (path.name for path in self.folder.iterdir())
        complete = [int(name) for name in names if name.isdigit()]
        newest = f"step {max(complete)}" if complete else "none yet"
        return CheckpointError(
            f"{self.folder}: checkpoint {self._writing} could not be written ({error})."
            f" The newest complete one is {newest}; see that the disk has space and "
            "run the same command again to go on from there"
        )

    def restore(
        self, step: int, targets: Mapping[str, Any], dtype: DTypeLike | None = None
    ) -> dict[str, Any]:
        """Read trees back onto the current mesh, whichever mesh wrote them.

        Args:
            step: which checkpoint.
            targets: name -> tree of arrays (or their abstract values) to fill, or an
                object with its own state such as a Grain iterator.
            dtype: that all arrays are read as, whatever they were written as; None: as
                they were.

        Raises:
            CheckpointError: the checkpoint has other arrays, shapes or dtypes, or is
                damaged.
        """
        wanted = {}
        for name, target in targets.items():
            wanted[name] = target
            if _is_arrays(target):
                wanted[name] = abstract(target)
                self._check(step, name, wanted[name])
                if dtype is not None:
                    wanted[name] = jax.tree.map(
                        lambda x: x.update(dtype=dtype), wanted[name]
                    )
        try:
            return self._checkpointer.load_checkpointables(step, wanted)
        except _FAILURES as error:
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}/{step}: could not be read ({error}); if it is damaged, "
            "move it away to go on from the checkpoint before"
        )

    def _check(self, step: int, name: str, target: Any) -> None:
        """Compare trees first: Orbax reports a wrong tree opaquely and casts dtypes."""
        folder = self.folder / str(step)
        if not (folder / name).is_dir():
            raise CheckpointError(
                f"{folder}: no such checkpoint, or it has no {name!r}"
            )
        try:
            saved = ocp.metadata(folder, checkpointable_name=name).metadata
        except _FAILURES as error:
            raise self._damaged(step, error) from error
        if not saved:
            raise self._damaged(step, ValueError(f"{name} is empty"))
        ours, theirs = _leaves(target), _leaves(saved)
        where = f"{self.folder}/{step}: {name}"
        for path in sorted(set(ours) | set(theirs)):
            if path not in theirs:
                raise CheckpointError(f"{where} has no {path}; was it another model?")
            if path not in ours:
                raise CheckpointError(f"{where} has {path}, the model does not")
            if ours[path] != theirs[path]:
                raise CheckpointError(
                    f"{where}{path} is {theirs[path]}, the model needs {ours[path]}"
                )

    def close(self) -> None:
        """Finish writing and release the checkpointer."""
        self.wait()
        self._checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish writing even where the block fails: what was begun is not lost."""
        try:
            self.close()
        except CheckpointError as second:
            if error is None:
                raise
            # The first error is the one to tell; often it is this very one.
            log.warning("%s", second)


def _is_arrays(target: Any) -> bool:
    leaves = jax.tree.leaves(target)
    kinds = (jax.Array, jax.ShapeDtypeStruct)
    return bool(leaves) and all(isinstance(leaf, kinds) for leaf in leaves)


def _leaves(tree: Any) -> dict[str, tuple]:
    """Path -> (shape, dtype), whether the tree is of modules or of plain dicts."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = (
            getattr(part, "name", getattr(part, "key", getattr(part, "idx", "")))
            for part in path
        )
        name = "".join(f"/{key}" for key in keys)
        found[name] = (tuple(leaf.shape), str(leaf.dtype))
    return found
