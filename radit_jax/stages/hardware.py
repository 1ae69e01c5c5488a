"""What the devices can do at most, for model FLOPs utilisation."""

import time

import jax
import jax.numpy as jnp

from radit_jax import sharding
from radit_jax.planning.slices import CHIPS

# Dense bf16 FLOP/s of one chip, from the vendors' data sheets; the longest name that a
# device's own begins with counts.
PEAK_BF16 = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
}


def peak_flops(dtype: jnp.dtype) -> float:
    """FLOP/s of all devices of the current mesh together.

    Known accelerators by their data sheet. On a CPU, whose sheet says little of what
    matrix products reach, the best of a few measured ones; 0 where nothing is known.
    """
    mesh = jax.sharding.get_mesh()
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        # Fake devices share the cores of one host.
        return measured_matmul(dtype)
    return mesh.size * data_sheet(device.device_kind)


def data_sheet(kind: str) -> float:
    """Dense bf16 FLOP/s of a chip by the name that JAX gives it; 0: not known."""
    known = sorted(filter(kind.startswith, PEAK_BF16), key=len)
    return PEAK_BF16[known[-1]] if known else 0.0


def measured_matmul(dtype: jnp.dtype, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of the fastest of a few square matrix products on the first device."""
    seconds = []
    with jax.set_mesh(sharding.make_mesh(devices=jax.local_devices()[:1])):
        x = jnp.ones((size, size), dtype)
        product = jax.jit(jnp.dot)
        product(x, x).block_until_ready()
        for _ in range(repeats):
            start = time.perf_counter()
            product(x, x).block_until_ready()
            seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
