"""Stage ``lm_score``: retrieved/ and a language model -> scored/.

    python -m radit_jax.main --config configs/lm_score.py --config.lm=FOLDER

The log-likelihood of every question's first answer after each of its passages, and
after none, under the frozen language model (RA-DIT section 2.3, the p_LM of eq. 4). It
is computed once: every run of R-FT, whatever its temperature and loss, reads it.
Questions that retrieved the same passage share the reading of it.
"""

from ml_collections import ConfigDict

from configs.base import SMALL, base


def section(config: ConfigDict, variant: str) -> None:
    """Add the stage's fields to a config."""
    c = config.lm_score = ConfigDict()
    # Those of data.train that are scored; "": all but those of LM-FT alone (Table 1).
    c.datasets = ""
    c.splits = ("train", "dev", "corpus")  # corpus: see retrieve.corpus_examples
    c.limit = ConfigDict()  # examples of a split, by subjects drawn at random; 0: all
    c.limit.train = 0
    c.limit.dev = 0  # dev scores only say how often the best passage is the gold one
    c.limit.corpus = 0
    c.passages = 10  # k; what retrieve kept bounds it
    c.bos = True  # every sequence begins with <bos>, where the tokenizer has one
    c.eos = False  # whether <eos> is part of the answer; the paper does not say
    c.row_tokens = 2048  # of a packed row; a longer prompt loses the end of its passage
    c.row_targets = 512  # room for answer tokens in a row
    c.rows = 64  # per batch, all devices together
    c.packing_bins = 256
    c.shard_size = 65_536  # pairs of question and passage; what a kill loses at most
    if variant in SMALL:
        c.passages, c.limit.train, c.limit.dev, c.limit.corpus = 6, 400, 50, 400
        c.row_tokens, c.row_targets, c.rows = 512, 64, 8
        c.shard_size = 4096
    if variant == "tiny":
        c.row_tokens, c.row_targets, c.rows = 128, 32, 8
        c.packing_bins = 16
        c.shard_size = 256


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of the stage alone."""
    config = base("lm_score", variant)
    section(config, variant)
    return config
