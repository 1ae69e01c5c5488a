"""Stage ``r_ft``: scored/, index/ and a query encoder -> r_ft/, a better one.

    python -m radit_jax.main --config configs/r_ft.py --config.encoder=FOLDER

R-FT of RA-DIT (section 2.3): the query encoder learns to give the passages of a
question the probabilities that the language model's own preferences give them, by
KL(p_R || p_LSR). Only the query encoder changes, so the index stays valid.

The settings without a variant are the paper's where it states them (batch 512, learning
rate 1e-5, 1237 warmup steps, one pass, k = 10) and dpr-scale's defaults elsewhere
(AdamW without decay, linear schedule to 0, clipping at 2). The target is not the
literal eq. 4: see ``score_mode``. A falling loss proves nothing, a flat target is
matched best by a retriever that knows nothing; the retrieval of dev questions decides
which checkpoint is kept, the start included.

Other methods are settings of the same stage:

=============  ============  ====================  ==================  ===========
method         loss          score_mode            target_temperature  target
=============  ============  ====================  ==================  ===========
RA-DIT eq. 4   kl            sequence_probability  .01                 lm
REPLUG         kl            sequence_probability  .1                  lm
REPLUG's code  reverse_kl    token_probability     .1                  lm
Atlas PDist    pdist         mean_log_probability  .01                 lm
EMDR2          emdr2         (tokens)                                  lm
contrastive    contrastive                                             gold
=============  ============  ====================  ==================  ===========

REPLUG's p_R has temperature .1 as well, Atlas' .01 over scores divided by
sqrt(768).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import index, lm_score, retrieve
from configs.base import FACTBOOK, PAPER, SMALL, base


def section(config: ConfigDict, variant: str) -> None:
    """Add the stage's fields to a config."""
    c = config.r_ft = ConfigDict()
    # The target p_LSR. "sequence_probability" with temperature .01 is eq. 4 to the
    # letter; for answers of several tokens it is flat and does harm.
    c.score_mode = "mean_log_probability"
    c.target_temperature = 0.1
    # Of p_R: 1 for raw dot products (DRAGON+); encoders that normalise need their own.
    c.score_temperature = placeholder(float)
    c.loss = "kl"  # KL(p_R || p_LSR), "reverse_kl": KL(p_LSR || p_R); and see above
    # What is learnt: "lm", or a control's "gold", "shuffled" or "uniform".
    c.target = "lm"
    c.controls = ()  # further targets to train towards, for comparison
    # Share of self-supervised examples in a batch (see retrieve.corpus_examples).
    c.corpus_share = 0.95 if variant in PAPER else 0.0
    c.towers = "query"  # "both": the context encoder trains too, on its own copy
    c.passage_tokens = 256  # of a passage, where both towers train
    c.refresh_every = 0  # steps between retrieving and scoring anew; 0: never
    c.rows = 512  # questions per step, all devices together
    c.steps = 1850
    c.learning_rate = 1e-5
    c.end_learning_rate = 0.0
    c.warmup_steps = 1237
    c.schedule = "linear"
    c.beta1 = 0.9
    c.beta2 = 0.999
    c.eps = 1e-8
    c.weight_decay = 0.0
    c.clip_norm = 2.0
    c.validation_examples = 2500
    c.validation_depth = 100  # passages searched for per dev question
    c.validate_every = 500
    c.save_every = 500
    c.log_every = 10
    c.keep = 1
    c.wandb_project = ""
    if variant in SMALL:
        # Chosen by the MRR of dev questions; docs/r_ft.md has what was tried.
        c.rows, c.steps, c.warmup_steps, c.learning_rate = 32, 80, 8, 3e-5
        c.validation_depth = 20
        c.validate_every, c.save_every = 20, 20
    if variant in FACTBOOK:
        c.score_temperature = 0.02
    if variant == "demo":
        c.controls = ("gold", "shuffled")
    if variant == "mini":
        c.controls = ("gold", "shuffled", "uniform")
    if variant == "tiny":
        c.score_temperature = 0.05
        c.rows, c.steps, c.warmup_steps, c.learning_rate = 8, 6, 1, 1e-3
        c.controls = ("gold",)
        c.corpus_share, c.passage_tokens = 0.25, 64
        c.validation_examples, c.validation_depth = 16, 5
        c.validate_every, c.save_every, c.log_every = 3, 2, 1


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of the stage alone."""
    config = base("r_ft", variant)
    for stage in (index, retrieve, lm_score):
        stage.section(config, variant)
    section(config, variant)
    return config
