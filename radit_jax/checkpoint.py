"""Checkpoints of a run: parameters, optimizer, step, RNG and data position, together.

Orbax's v1 API writes them asynchronously and renames them when they are whole, so a
process killed at any moment leaves only complete checkpoints behind.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

log = logging.getLogger(__name__)

PARAMS = "params"


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
        folder: where they live, one sub-folder per step.
        keep: how many of the newest are kept.
        metric: name of the validation metric that says which one is best.
        higher_is_better: for that metric.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 1,
        metric: str = "",
        higher_is_better: bool = False,
    ):
        self.folder = folder
        self.metric = metric
        self.higher_is_better = higher_is_better
        policies = ocp.training.preservation_policies
        preserve: Any = policies.LatestN(keep)
        if metric:
            preserve = policies.AnyPreservationPolicy(
                [
                    preserve,
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics[metric],
                        reverse=not higher_is_better,
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            )
        self._checkpointer = ocp.training.Checkpointer(
            folder.resolve(), preservation_policy=preserve, cleanup_tmp_directories=True
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
        sign = -1 if self.higher_is_better else 1
        # Of equals the earlier one, as patience would have it.
        return min(rated, key=lambda c: (sign * c.metrics[self.metric], c.step)).step

    def save(
        self, step: int, trees: Mapping[str, Any], metrics: Mapping[str, float] | None
    ) -> None:
        """Start writing a checkpoint; returns once the arrays are copied.

        Raises:
            CheckpointError: this or the previous save failed, a full disk for
                instance; checkpoints that were complete before stay as they are.
        """
        try:
            self._checkpointer.save_checkpointables_async(
                step,
                dict(trees),
                # When to save is the loop's decision, not a policy's.
                force=True,
                metrics=dict(metrics) if metrics else None,
            )
        except OSError as error:
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Block until everything is on disk; raises like ``save``."""
        try:
            self._checkpointer.wait()
        except OSError as error:
            raise self._failed(None, error) from error

    def _failed(self, step: int | None, error: OSError) -> CheckpointError:
        what = "the last checkpoint" if step is None else f"checkpoint {step}"
        return CheckpointError(
            f"{self.folder}: {what} could not be written ({error}). The newest "
            f"complete one is step {self.latest}; free some space and run the same "
            "command again to go on from there"
        )

    def restore(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        """Read trees back onto the current mesh, whichever mesh wrote them.

        Args:
            step: which checkpoint.
            targets: name -> tree of arrays (or their abstract values) to fill, or an
                object with its own state such as a Grain iterator.

        Raises:
            CheckpointError: the checkpoint has other arrays, shapes or dtypes.
        """
        wanted = {}
        for name, target in targets.items():
            wanted[name] = target
            if _is_arrays(target):
                wanted[name] = abstract(target)
                self._check(step, name, wanted[name])
        return self._checkpointer.load_checkpointables(step, wanted)

    def _check(self, step: int, name: str, target: Any) -> None:
        """Compare trees first: Orbax reports a wrong tree opaquely and casts dtypes."""
        folder = self.folder.resolve() / str(step)
        if not (folder / name).is_dir():
            raise CheckpointError(
                f"{folder}: no such checkpoint, or it has no {name!r}"
            )
        saved = ocp.metadata(folder, checkpointable_name=name).metadata
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
