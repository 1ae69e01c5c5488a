"""Schedule and optimizer of both fine-tuning stages."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def schedule(
    peak: float, end: float, warmup_steps: int, steps: int, kind: str = "cosine"
) -> optax.Schedule:
    """Linear warmup from 0 to ``peak``, then cosine or linear decay to ``end``.

    RA-DIT Table 8 (cosine, LM-FT) and the dpr-scale defaults (linear, R-FT).

    Raises:
        ValueError: warmup that leaves no step to train, rates that are not positive, or
            an unknown kind.
    """
    if not (peak > 0 and end >= 0):
        raise ValueError(
            f"learning_rate = {peak} must be positive and end_learning_rate = {end} "
            "not negative"
        )
    if not 0 <= warmup_steps < steps:
        raise ValueError(
            f"warmup_steps = {warmup_steps} must be at least 0 and less than steps = "
            f"{steps}"
        )
    decay = steps - warmup_steps
    if kind == "cosine":
        after = optax.cosine_decay_schedule(peak, decay, alpha=end / peak)
    elif kind == "linear":
        after = optax.linear_schedule(peak, end, decay)
    else:
        raise ValueError(f"schedule {kind!r} is not one of ('cosine', 'linear')")
    # The first step already moves: step 0 has 1 / (warmup + 1) of the peak.
    ramp = optax.linear_schedule(peak / (warmup_steps + 1), peak, max(warmup_steps, 1))
    return optax.join_schedules([ramp, after], [warmup_steps])


def optimizer(
    learning_rate: optax.Schedule,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """AdamW with gradient clipping by global norm.

    Weight decay spares vectors (norm scales and biases), also where layers are
    stacked along a leading axis.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(
            learning_rate,
            b1=beta1,
            b2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            mask=decayed,
        ),
    )


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm of all leaves together, in float32."""
    return optax.tree.norm(tree)


def decayed(model: Any) -> Any:
    """True for the weights that decay: all but norms and biases, told by name."""

    def is_matrix(path: tuple, _: Any) -> bool:
        names = [str(getattr(part, "name", getattr(part, "key", ""))) for part in path]
        return not any("norm" in name or name.startswith("b_") for name in names)

    return jax.tree_util.tree_map_with_path(is_matrix, model)


def accumulate(gradient: Callable[[Any, Any], Any], model: Any, parts: Any) -> Any:
    """Sum of ``gradient(model, part)`` over parts stacked along a leading axis.

    Micro-batches run one after the other under ``jax.lax.scan``, so that memory is
    that of one of them. Sums (not means) are accumulated: the caller divides by the
    target tokens of the whole step, so that no micro-batch weighs more than its share.
    """
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        return gradient(model, jax.tree.map(lambda x: x[0], parts))
    shapes = jax.eval_shape(gradient, model, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding.spec), shapes
    )

    def step(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(model, part)), None

    return jax.lax.scan(step, zeros, parts)[0]
