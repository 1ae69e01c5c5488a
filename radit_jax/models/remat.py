"""What a layer keeps for its backward pass, by name.

The rest is computed again: memory against FLOPs. Arrays that a policy may want are
named where they are made (``checkpoint_name``). The input of every layer is always
kept.
"""

import jax

# Queries, keys and values as attention reads them.
QKV = "qkv"
# Attention's output and the normalisers of its softmax: with them kept, the backward
# pass need not run attention forward again.
ATTENTION = "attention"
# The residual stream between attention and the MLP.
MIDDLE = "middle"

_policies = jax.checkpoint_policies
_keep = _policies.save_only_these_names

# Matrix products and attention, while the element-wise work between them is done again.
KEEP_PRODUCTS = _policies.save_from_both_policies(
    _policies.dots_with_no_batch_dims_saveable, _keep(ATTENTION)
)

REMAT_POLICIES = {
    # Everything is kept.
    "none": None,
    # Every matrix product is kept; norms, rotations and activations are done again.
    "dots": KEEP_PRODUCTS,
    # All is kept but the MLP's inside: its first two products are done again.
    "mlp": _keep(QKV, ATTENTION, MIDDLE),
    # As ``mlp``, and the product after attention is done again too.
    "qkv": _keep(QKV, ATTENTION),
    # Attention is not run again; all matrix products but the last are.
    "attention": _keep(ATTENTION),
    # As ``mlp``, with what is kept waiting in the host's memory (TPU, GPU).
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[QKV, ATTENTION, MIDDLE],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # Nothing but the layer's input is kept.
    "full": _policies.nothing_saveable,
}
