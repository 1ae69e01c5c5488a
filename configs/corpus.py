"""Stage ``corpus``: documents (JSONL) -> passages/.

    python -m radit_jax.main --config configs/corpus.py \\
        --config.corpus.documents=docs.jsonl --config.workdir=runs/mine

A document is ``{"id", "title", "text"}`` with an optional ``section``. Sections longer
than ``max_words`` are cut into chunks of about equal size (RA-DIT section 4: fewer than
200 words for Wikipedia, fewer than 100 for CommonCrawl). About 20 MB of text a second
on one core.
"""

from ml_collections import ConfigDict

from configs.base import FACTBOOK, base


def section(config: ConfigDict, variant: str) -> None:
    """Add the stage's fields to a config."""
    c = config.corpus = ConfigDict()
    c.documents = ""  # JSONL file
    c.max_words = 200  # of a passage, white-space words
    c.keep_lines = True  # cut at line breaks where that fits
    c.passages_per_shard = 100_000
    if variant in (*FACTBOOK, "tiny"):
        c.documents = config.get_ref("workdir") + "/inputs/documents.jsonl"
    if variant in FACTBOOK:
        c.max_words = 80  # short passages: the demo's reader runs on two CPU cores
    if variant == "tiny":
        c.max_words = 12
        c.passages_per_shard = 50


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of the stage alone."""
    config = base("corpus", variant)
    section(config, variant)
    return config
