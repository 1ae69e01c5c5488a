"""Stage ``lm_ft``: LM-FT of RA-DIT (section 3.2, Tables 8 and 10).

    python -m radit_jax.main --config configs/lm_ft.py --config.lm=LLAMA_7B_FOLDER \\
        --config.mesh.fsdp=8

The settings without a variant are Table 8's for LLaMA 7B: 500 steps of 64 rows of 2048
tokens, 65M tokens, 8 A100s in the paper. ``:llama_13b``, ``:llama_65b`` and the other
names of configs/models.py take 128 rows, as the paper does for 13B and 65B, and the
mesh, remat policy and micro-batches of docs/scale.md. What the paper does not state and
is ours: AdamW with betas .9/.95, weight decay .1 and clipping at 1 (the LLaMA
convention), positions that restart with every packed example, plain text taken from the
passages of the corpus without ``Background:``, and the validation metric (loss per
answer token on dev questions with their top passage; the paper takes the mean score of
six KILT tasks).
"""

from ml_collections import ConfigDict

from configs.base import PAPER, SMALL, base


def section(config: ConfigDict, variant: str) -> None:
    """Add the stage's fields to a config."""
    c = config.lm_ft = ConfigDict()
    # Instances and their mixture.
    c.passages_per_example = 3  # k~, independent instances of an example (App. B)
    # Those of data.train that are read; "": all but those of R-FT alone (Table 1).
    c.datasets = ""
    # What a given context is for: "none" (nothing), "only" (instead of retrieval) or
    # "add" (besides it); for some datasets alone: "none, squad=add, cnn=only". "":
    # what docs/data.md says of a published dataset (footnote 4), nothing elsewhere.
    c.context = ""
    c.dataset_cap = 7500  # eta: the most examples a dataset weighs as
    c.shares = ""  # fixed shares of instances instead, "oasst1=0.05"
    # Of a dialogue, whether the loss falls on every answer or the last alone. The paper
    # does not say; every reply of OASST1 is the last one of an example of its own.
    c.every_turn = False
    c.plain_text_share = 0.1  # of instances; loss on all of their tokens
    c.bos = True  # every example is <bos> ... <eos>
    # Rows: several examples each, attention and positions within an example.
    c.row_tokens = 2048
    c.row_targets = 1024  # room for tokens that carry loss
    c.rows = 64  # per step, all devices together
    c.micro_batches = 1  # gradient accumulation
    # Rows packed at once, of all streams together: more means less padding (1.6 % with
    # 256, 1.0 % with 1024), and a longer wait for the first batch, for all are filled.
    c.packing_bins = 512
    # The instances are dealt to so many streams, each packed by itself; processes share
    # them. Batches depend on their number, and not on that of the processes.
    c.streams = 16
    # Optimisation.
    c.steps = 500
    c.learning_rate = 1e-5
    c.end_learning_rate = 1e-7
    c.warmup_steps = 200
    c.schedule = "cosine"
    c.beta1 = 0.9
    c.beta2 = 0.95
    c.eps = 1e-8
    c.weight_decay = 0.1
    c.clip_norm = 1.0
    # What a layer keeps for the backward pass, from everything to its input alone:
    # "none", "dots", "mlp", "qkv", "attention", "full"; "offload" keeps on the host.
    c.remat = "full"
    # Validation, logs and checkpoints, in steps.
    c.validation_examples = 2500
    c.validate_every = 100
    c.save_every = 100
    c.log_every = 10
    c.keep = 1  # newest checkpoints kept, besides the best one
    c.wandb_project = ""  # "": no wandb
    if variant in PAPER:
        c.shares = "oasst1=0.05"  # section 3.2
        if variant:
            c.remat = "dots"  # fits the slices of docs/scale.md; "full" smaller ones
        if variant not in ("", "llama_7b"):
            c.rows = 128  # Table 8, of LLaMA 13B and 65B
            c.micro_batches = 2
    if variant in SMALL:
        # For a model of 135M weights on two CPU cores: about seven minutes.
        c.row_tokens, c.row_targets, c.rows, c.micro_batches = 512, 192, 8, 2
        c.packing_bins, c.streams = 256, 1
        c.steps, c.warmup_steps, c.learning_rate, c.end_learning_rate = (
            40,
            4,
            1e-4,
            1e-5,
        )
        c.remat = "dots"
        c.validation_examples, c.validate_every, c.save_every = 64, 20, 20
        c.log_every = 2
    if variant == "tiny":
        c.row_tokens, c.row_targets, c.rows, c.micro_batches = 128, 64, 8, 1
        c.packing_bins, c.streams = 64, 4
        c.steps, c.warmup_steps, c.learning_rate = 6, 1, 1e-3
        c.remat = "none"
        c.validation_examples, c.validate_every, c.save_every = 16, 3, 2
        c.log_every = 1


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of the stage alone."""
    config = base("lm_ft", variant)
    section(config, variant)
    return config
