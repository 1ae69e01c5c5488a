"""The jitted steps of the stages with abstract inputs, as ``plan`` compiles them.

Every builder takes the stage's own function and the shapes, types and shardings that
the stage would give it; nothing here computes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from radit_jax import sharding
from radit_jax.batch import Packed
from radit_jax.models.attention import choose_kernel
from radit_jax.models.layers import Rope
from radit_jax.models.llama import Llama, LlamaConfig
from radit_jax.planning import aot
from radit_jax.stages import lm_ft
from radit_jax.stages.training import initial_state, optimizer

PLATFORM = "tpu"
# Of compute there, whatever the recipe's "auto" means on this machine.
DTYPE = jnp.dtype(jnp.bfloat16)

WEIGHTS, OPTIMIZER, BATCH = "weights", "optimizer state", "batch and counters"


class Program(NamedTuple):
    """A stage's step, ready to be compiled, and what it stands for."""

    function: Callable[..., Any]  # jitted
    arguments: tuple[Any, ...]  # abstract arrays on the mesh
    kinds: Mapping[str, str]  # beginnings of the arguments' names -> kind of memory
    model_flops: float  # of a step on all devices: what no step can do without
    items: float  # of a step: tokens, passages, queries
    unit: str  # what an item is
    steps: float  # of the whole run
    static: Mapping[str, Any] = {}
    loop_trips: int | None = None  # of loops that stop on data

    def kind_of(self, argument: str) -> str:
        """Kind of memory of an argument, by its name."""
        for beginning, kind in self.kinds.items():
            if argument.startswith(beginning):
                return kind
        return BATCH


def llama_config(shape: ConfigDict) -> LlamaConfig:
    """The shape of a named model."""
    fields = {f.name for f in dataclasses.fields(LlamaConfig)} - {"rope"}
    known = {name: value for name, value in shape.items() if name in fields}
    return LlamaConfig(**known, rope=Rope(**shape.rope))


def lm_ft_step(config: ConfigDict, shape: ConfigDict, mesh: Mesh) -> Program:
    """The optimizer step of stage ``lm_ft``."""
    section, model = config.lm_ft, llama_config(shape)
    lm_ft.check_settings(section)
    lm_ft.check_context(section, model)
    key = _key()
    with aot.tracing(mesh):
        parts = section.micro_batches
        rows, part = section.rows, section.rows // parts
        if rows % parts:
            raise ValueError(
                f"lm_ft.rows = {rows} does not divide into lm_ft.micro_batches = {parts}"
            )
        sharding.check_rows(part, f"lm_ft.rows / lm_ft.micro_batches = {part} rows")
        tx, learning_rate = optimizer(section)
        state = jax.eval_shape(
            lambda key: initial_state(Llama(model, key), tx, config.seed), key
        )
        kernel = choose_kernel(config.attention, PLATFORM, DTYPE, model.head_size)
        step = lm_ft.make_step(tx, learning_rate, DTYPE, section.remat, kernel)

    def of(length: int, dtype: Any = jnp.int32) -> Any:
        return aot.array(mesh, (parts, part, length), dtype, sharding.PARTS_BL)

    L, T = section.row_tokens, section.row_targets
    batch = Packed(of(L), of(L), of(L), of(T), of(T), of(T, jnp.float32))
    return Program(
        step,
        (aot.on(mesh, state), batch),
        {"state.params": WEIGHTS, "state.opt_state": OPTIMIZER},
        rows * L * lm_ft.flops_per_token(model, L, T / L),
        rows * L,
        "tokens",
        section.steps,
    )


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


BUILDERS: dict[str, Callable[[ConfigDict, ConfigDict, Mesh], Program]] = {
    "lm_ft": lm_ft_step,
}
