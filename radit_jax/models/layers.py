"""Weights, norms and rotary positions, shared by the language model and the encoder."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import reshard
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from radit_jax import sharding


def weight(key: Array, shape: tuple[int, ...], spec: jax.P, std: float) -> nnx.Param:
    """A float32 master weight, declared once: shape, initialiser and spec.

    The abstract tree, the checkpoint target and the sharding of the optimizer's
    moments all follow from this line through ``jax.eval_shape``.
    """
    return nnx.Param(std * jax.random.normal(key, shape, out_sharding=spec))


def constant(value: float, shape: tuple[int, ...], spec: jax.P) -> nnx.Param:
    """A weight that starts as a constant (biases and the scales of norms)."""
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=spec))


def use(param: nnx.Param | Array, dtype: DTypeLike) -> Array:
    """A weight ready for compute: cast first, then gathered over FSDP.

    Casting first halves the bytes of the all-gather in bf16; the transpose of the
    gather is the reduce-scatter of the gradient.
    """
    value = param[...].astype(dtype)
    return reshard(value, sharding.without_fsdp(jax.typeof(value).sharding.spec))


def linear(x: Array, w: Array, contract: int = 1) -> Array:
    """``x`` times ``w`` over the last ``contract`` axes of x and the first of w.

    Rows and columns are flattened first: XLA then multiplies two plain matrices,
    forward and backward, where an einsum over (B, L) makes it write transposed
    copies for the gradient of the weight, several times slower on a CPU.

    Only the first axis of each flattened group may be sharded. Contracting over a
    sharded axis sums over its devices.
    """
    rows, inner = x.shape[: x.ndim - contract], w.shape[:contract]
    columns = w.shape[contract:]
    x_spec, w_spec = (jax.typeof(array).sharding.spec for array in (x, w))
    row, column = x_spec[0], w_spec[contract]
    flat_x = jax.lax.reshape(
        x,
        (math.prod(rows), math.prod(inner)),
        out_sharding=jax.P(row, x_spec[len(rows)]),
    )
    flat_w = jax.lax.reshape(
        w,
        (math.prod(inner), math.prod(columns)),
        out_sharding=jax.P(w_spec[0], column),
    )
    flat = jnp.dot(flat_x, flat_w, out_sharding=jax.P(row, column))
    return jax.lax.reshape(
        flat,
        (*rows, *columns),
        out_sharding=jax.P(*x_spec[: len(rows)], *w_spec[contract:]),
    )


def rms_norm(
    x_BLD: Float[Array, "B L D"], scale_D: Float[Array, " D"], eps: float
) -> Float[Array, "B L D"]:
    """RMSNorm in float32, as in Llama: the scale is applied after the cast back."""
    x = x_BLD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x.astype(x_BLD.dtype) * scale_D.astype(x_BLD.dtype)[None, None]


def layer_norm(
    x_BLD: Float[Array, "B L D"],
    scale_D: Float[Array, " D"],
    bias_D: Float[Array, " D"],
    eps: float,
) -> Float[Array, "B L D"]:
    """LayerNorm with mean and variance in float32."""
    x = x_BLD.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * scale_D[None, None] + bias_D[None, None]).astype(x_BLD.dtype)


@dataclass(frozen=True)
class Rope:
    """Rotary positions with the scaling kinds published for Llama models.

    Attributes:
        theta: base of the geometric series of frequencies.
        kind: ``default``, ``linear``, ``dynamic``, ``llama3`` or ``yarn``.
        factor: by how much the context was stretched.
        original_length: context length before stretching (tokens).
        low_factor: ``llama3`` only: wavelengths above original / low are stretched.
        high_factor: ``llama3`` only: wavelengths under original / high are kept.
        beta_fast: ``yarn`` only: rotations above which a frequency is kept.
        beta_slow: ``yarn`` only: rotations below which it is stretched.
        attention_factor: ``yarn`` only: scale of sines and cosines; 0 derives it.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 2048
    low_factor: float = 1.0
    high_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0

    KINDS = ("default", "linear", "dynamic", "llama3", "yarn")

    def frequencies(self, head_size: int, length: int) -> tuple[np.ndarray, float]:
        """Frequencies [K / 2] in radians per token, and the scale of sin and cos.

        Args:
            head_size: K.
            length: longest sequence of the program; only ``dynamic`` looks at it.
        """
        exponent = np.arange(0, head_size, 2, dtype=np.float64) / head_size
        base = self.theta**-exponent
        if self.kind == "linear":
            return base / self.factor, 1.0
        if self.kind == "dynamic":
            # NTK-aware: the base grows once the sequence outgrows the original.
            stretch = self.factor * max(length, self.original_length)
            stretch = stretch / self.original_length - (self.factor - 1)
            theta = self.theta * stretch ** (head_size / (head_size - 2))
            return theta**-exponent, 1.0
        if self.kind == "llama3":
            wavelength = 2 * math.pi / base
            smooth = (self.original_length / wavelength - self.low_factor) / (
                self.high_factor - self.low_factor
            )
            smooth = np.clip(smooth, 0.0, 1.0)
            return (1 - smooth) * base / self.factor + smooth * base, 1.0
        if self.kind == "yarn":
            return self._yarn(base, head_size)
        return base, 1.0

    def _yarn(self, base: np.ndarray, head_size: int) -> tuple[np.ndarray, float]:
        def dimension(rotations: float) -> float:
            turns = self.original_length / (rotations * 2 * math.pi)
            return head_size * math.log(turns) / (2 * math.log(self.theta))

        low = max(math.floor(dimension(self.beta_fast)), 0)
        high = min(math.ceil(dimension(self.beta_slow)), head_size - 1)
        ramp = (np.arange(head_size // 2) - low) / max(high - low, 1e-3)
        stretched = np.clip(ramp, 0.0, 1.0)
        scale = self.attention_factor
        if not scale:
            scale = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return base / self.factor * stretched + base * (1 - stretched), scale


def rope_tables(
    rope: Rope, head_size: int, positions_BL: Int[Array, "B L"], length: int
) -> tuple[Float[Array, "B L half"], Float[Array, "B L half"]]:
    """Sines and cosines of every position, once per forward pass, in float32."""
    frequencies, scale = rope.frequencies(head_size, length)
    angles = (
        positions_BL[..., None].astype(jnp.float32)
        * jnp.asarray(frequencies, jnp.float32)[None, None]
    )
    return jnp.sin(angles) * scale, jnp.cos(angles) * scale


def rotate(
    x_BLHK: Float[Array, "B L H K"],
    tables: tuple[Float[Array, "B L half"], Float[Array, "B L half"]],
) -> Float[Array, "B L H K"]:
    """Rotary embedding in the rotate-half convention of Hugging Face checkpoints."""
    sin, cos = (table[:, :, None].astype(x_BLHK.dtype) for table in tables)
    first, second = jnp.split(x_BLHK, 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


def pick(
    x_BLD: Float[Array, "B L D"], sites_BT: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Rows of each sequence at the given sites; local to the devices of a row."""

    def of_row(x_LD: Array, sites_T: Array) -> Array:
        return x_LD.at[sites_T].get(mode="clip")

    return jax.vmap(of_row)(x_BLD, sites_BT)


@jax.custom_vjp
def look_up(table_VD: Array, ids_BL: Array) -> Array:
    """Rows [B, L, D] of a table of which a device holds a part, under ``shard_map``.

    Zero where another device of the tensor axis has the row: their sum is what is
    asked for. Not a number where no device has it. The gradient adds up in float32, as
    a matrix product's would: in bfloat16 the row of a word that turns up a thousand
    times would stop growing.
    """
    return _look_up(table_VD, ids_BL)[0]


def _look_up(table_VD: Array, ids_BL: Array) -> tuple[Array, tuple[Array, Array]]:
    here = len(table_VD)
    at_BL = ids_BL - jax.lax.axis_index(sharding.TENSOR) * here
    # Negative positions would count from the end.
    at_BL = jnp.where(at_BL < 0, here, at_BL)
    found_BLD = table_VD.at[at_BL].get(mode="fill", fill_value=0)
    total = here * jax.lax.axis_size(sharding.TENSOR)
    exists_BL = (ids_BL >= 0) & (ids_BL < total)
    found_BLD = jnp.where(exists_BL[..., None], found_BLD, jnp.nan)
    # Of the table the backward pass wants the shape alone.
    return found_BLD, (table_VD[:, :0], at_BL)


def _look_up_backward(saved: tuple[Array, Array], d_BLD: Array) -> tuple[Array, None]:
    table, at_BL = saved
    zeros_VD = jnp.zeros((len(table), d_BLD.shape[-1]), jnp.float32)
    zeros_VD = jax.lax.pcast(zeros_VD, sharding.AXES, to="varying")
    d_table_VD = zeros_VD.at[at_BL].add(d_BLD.astype(jnp.float32), mode="drop")
    return jax.lax.psum(d_table_VD.astype(table.dtype), sharding.ROWS), None


look_up.defvjp(_look_up, _look_up_backward)
