"""Stage ``evaluate``: passages, retrieved questions and both models -> report/.

    python -m radit_jax.main --config configs/evaluate.py --config.lm=FOLDER

Every system of the table answers every test question; the four that retrieve are the
paper's dual ablation (Table 6). With retrieval, each of the top
passages is read on its own and the answers are mixed by retrieval weight (RA-DIT
section 2.4). Zero-shot prompts of Table 12, greedy decoding, SQuAD normalisation,
95 % bootstrap intervals.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import lm_ft, r_ft
from configs.base import FACTBOOK, SMALL, base


def section(config: ConfigDict, variant: str) -> None:
    """Add the stage's fields to a config."""
    c = config.evaluate = ConfigDict()
    c.systems = (
        "LM",
        "LM + retrieval",
        "LM + R-FT",
        "LM-FT",
        "LM-FT + retrieval",
        "RA-DIT (LM-FT + R-FT)",
        "LM + gold passage",
        "LM-FT + gold passage",
    )
    c.passages = 10  # k read in parallel
    # Of the softmax over passages: 1 for DRAGON+ (raw dot products, eq. 2); encoders
    # that normalise, whose scores lie within [-1, 1], need a small one of their own.
    c.score_temperature = placeholder(float)
    c.max_new_tokens = 32
    c.stop = ("\n",)
    c.limit = 0  # questions per test file, 0 for all
    c.batch_tokens = 65536  # rows x tokens of a generation batch
    c.examples = 8  # answers shown side by side in the report
    if variant in (*FACTBOOK, "tiny"):
        c.score_temperature = 0.05
    if variant in (*SMALL, "tiny"):
        c.max_new_tokens = 16
        c.batch_tokens = 8192
    if variant in SMALL:
        c.passages = 3
    if variant == "demo":
        c.limit = 200
    if variant == "mini":
        c.limit = 250
        c.systems = (
            "LM + retrieval",
            "LM + R-FT",
            "LM-FT + retrieval",
            "RA-DIT (LM-FT + R-FT)",
        )
    if variant == "tiny":
        c.passages = 2
        c.max_new_tokens = 6
        c.limit = 20
        c.batch_tokens = 2048


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of the stage alone; prompts begin and fit as in LM-FT."""
    config = base("evaluate", variant)
    section(config, variant)
    lm_ft.section(config, variant)
    r_ft.section(config, variant)
    return config
