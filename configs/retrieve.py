"""Stage ``retrieve``: question files and index/ -> retrieved/, with the query encoder.

    python -m radit_jax.main --config configs/retrieve.py --config.encoder=FOLDER \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl

A question is ``{"question", "answers": [...]}`` with optional ``id``, ``context``,
``kind``, ``document`` and ``evidence``. Every question is searched once; training and
evaluation read the result.
"""

from ml_collections import ConfigDict

from configs.base import PAPER, base


def section(config: ConfigDict, variant: str) -> None:
    """Add the stage's fields to a config."""
    c = config.retrieve = ConfigDict()
    c.k = 10  # passages kept per question (RA-DIT: k = 10)
    c.max_tokens = 128  # of a question
    c.batch_tokens = 8192
    c.shard_size = 8192  # questions per file; a finished file is not searched again
    # Self-supervised examples for R-FT (section 3.3): the first and the last tokens of
    # so many random passages, as question and answer.
    c.corpus_examples = 900_000 if variant in PAPER else 0
    c.corpus_tokens = 50
    if variant == "tiny":
        c.corpus_examples, c.corpus_tokens = 20, 4


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of the stage alone."""
    config = base("retrieve", variant)
    section(config, variant)
    return config
