"""Stage ``export``: lm_ft/ and r_ft/ -> exported/, as Hugging Face folders.

    python -m radit_jax.main --config configs/export.py:demo

Writes the best checkpoints as ``exported/lm`` and ``exported/encoder`` with the
configuration and the tokenizer of the models they were trained from, array by array: no
host holds a whole model.
"""

from ml_collections import ConfigDict

from configs import lm_ft, r_ft
from configs.base import base


def section(config: ConfigDict, variant: str) -> None:
    """Add the stage's fields to a config."""
    c = config.export = ConfigDict()
    c.models = ("lm_ft", "r_ft")  # what is exported
    c.dtype = "float32" if variant == "tiny" else "bfloat16"  # or "float16"
    c.shard_megabytes = 4096  # of a file of weights


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of the stage alone."""
    config = base("export", variant)
    section(config, variant)
    r_ft.section(config, variant)
    lm_ft.section(config, variant)
    return config
