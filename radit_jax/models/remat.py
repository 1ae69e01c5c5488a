"""What a layer keeps for its backward pass, by name.

The rest is computed again: memory against FLOPs. Arrays that a policy may want are
named where they are made (``checkpoint_name``).
"""

import jax

# Attention's output and the normalisers of its softmax: with them kept, the backward
# pass need not run attention forward again.
ATTENTION = "attention"

# Matrix products and attention, while the element-wise work between them is done again.
KEEP_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(ATTENTION),
)

REMAT_POLICIES = {
    "none": None,
    "dots": KEEP_PRODUCTS,
    "full": jax.checkpoint_policies.nothing_saveable,
}
