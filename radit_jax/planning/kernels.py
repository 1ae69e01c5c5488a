"""FLOPs of Pallas kernels, which the compiler sees as one instruction each."""

import re
from collections.abc import Sequence

from radit_jax.planning.hlo import Array, HloError, Instruction

# Matrix products over the scores, and whose sizes of a block they use: forward makes
# scores and outputs; backward makes scores, their gradient, and what is asked for.
_SPLASH = {
    "splash_mha_fwd": (2, "block_q", "block_kv"),
    "splash_mha_dq": (3, "block_q_dq", "block_kv_dq"),
    "splash_mha_dkv": (4, "block_q_dkv", "block_kv_dkv"),
}


def kernel_flops(call: Instruction, read: Sequence[Array]) -> float:
    """FLOPs of the matrix products inside a kernel.

    JAX's splash attention, causal: blocks behind the diagonal are never made, those on
    it are made whole.

    Args:
        call: of the kernel.
        read: its operands, of one device.

    Raises:
        HloError: it is no kernel that this package uses.
    """
    name = next((n for n in _SPLASH if n in call.scope or n in call.name), None)
    if name is None:
        raise HloError(f"nothing is known of the kernel {call.name} ({call.scope})")
    products, *sides = _SPLASH[name]
    blocks = {
        key: int(value)
        for key, value in re.findall(r'\\"(block_\w+)\\": (\d+)', call.attributes)
    }
    # Queries [..., H, L, K] are the first of the operands that are no mask.
    queries = next(a for a in read if len(a.dims) >= 3 and a.dtype[0] in "bf")
    *batch, length, head_size = queries.dims
    height, width = (min(blocks[side], length) for side in sides)
    seen = sum(
        -(-min((row + 1) * height, length) // width) for row in range(length // height)
    )
    for n in batch:
        seen *= n
    return 2.0 * products * seen * height * width * head_size
