"""Stage ``index``: passages/ -> index/, with the context encoder.

    python -m radit_jax.main --config configs/index.py --config.encoder=FOLDER

Embeds every passage once, in shards that survive an interruption, and builds the
structure that is searched: ScaNN by its own rule (brute force under 20,000 passages,
quantised with exact rescoring up to 100,000, a partitioned tree above). Its recall@10
against exact search is measured and stands in the manifest.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.base import SMALL, base


def section(config: ConfigDict, variant: str) -> None:
    """Add the stage's fields to a config."""
    c = config.index = ConfigDict()
    c.kind = "scann"  # or "exact": on the mesh
    c.max_tokens = 512  # of a passage; RA-DIT does not state it, BEIR runs use 512
    c.batch_tokens = 65536  # padded tokens per encoder batch
    c.shard_size = 131_072  # passages per file of embeddings
    c.shards = 0  # of ScaNN, spread over the processes; 0: one per process
    # ScaNN; empty ones follow its documented defaults for the size of a shard.
    c.leaves = placeholder(int)
    c.leaves_to_search = placeholder(int)
    c.reorder = 100  # candidates rescored exactly
    c.training_sample = placeholder(int)
    c.threads = placeholder(int)
    if variant in SMALL:
        c.batch_tokens = 8192
        c.shard_size = 4096
    if variant == "tiny":
        c.max_tokens = 64
        c.batch_tokens = 2048
        c.shard_size = 64


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of the stage alone."""
    config = base("index", variant)
    section(config, variant)
    return config
