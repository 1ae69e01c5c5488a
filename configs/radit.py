"""The chain: from documents to the table, skipping what is already there.

    python -m radit_jax.main --config configs/radit.py:demo
    python -m radit_jax.main --config configs/radit.py:tiny
    python -m radit_jax.main --config configs/radit.py:own \\
        --config.corpus.documents=docs.jsonl \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.lm=FOLDER_OR_GGUF --config.encoder=FOLDER --config.workdir=runs/mine

``:demo`` teaches a real language model of 135M weights to use retrieval, and a
retriever what the model can use, on two CPU cores in half an hour to an hour; ``:mini``
is the same with all controls and the paper's dual ablation on more test questions;
``:tiny`` runs the same code on random weights in a minute; ``:own`` runs it on your
files with the demo's sizes. Without a variant: the paper's settings for LLaMA 7B.
"""

from ml_collections import ConfigDict

from configs import (
    corpus,
    evaluate,
    export,
    index,
    lm_ft,
    lm_score,
    prepare,
    r_ft,
    retrieve,
)
from configs.base import PREPARED, base


def get_config(variant: str = "") -> ConfigDict:
    """Every stage's section in one recipe."""
    config = base("radit", variant)
    config.stages = (
        *("corpus", "index", "retrieve"),
        *("lm_score", "r_ft", "retrieve_r_ft"),
        *("lm_ft", "evaluate"),
    )
    for stage in (corpus, index, retrieve, lm_score, r_ft, lm_ft, evaluate, export):
        stage.section(config, variant)
    if variant in PREPARED:
        prepare.section(config, variant)
        config.stages = ("prepare", *config.stages)
    return config
