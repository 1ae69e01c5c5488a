"""Stage ``evaluate``: passages, retrieved questions and both models -> report/.

    python -m radit_jax.main --config configs/evaluate.py:demo
    python -m radit_jax.main --config configs/evaluate.py:offline

Every system of the table answers every test question; the four that retrieve are the
paper's dual ablation (Table 6). With retrieval, each of the top passages is read on its
own and the answers are mixed by retrieval weight (RA-DIT section 2.4). Prompts of Table
12, zero-shot or few-shot, greedy decoding; options are compared, and answers judged, as
the task wants it (Table 11); 95 % bootstrap intervals. ``:demo`` needs the demo to have
run; ``:offline`` asks SmolLM2 questions of MMLU, NQ, TriviaQA and the commonsense tasks
without a corpus, 200 of each (``--config.data.limit.test=0``: all).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import lm_ft, prepare, r_ft
from configs.base import FACTBOOK, PAPER, SMALL, base

# Devices that share a row, where they are not 8; the others hold replicas. By `plan`
# with `search`, and so that heads divide.
TENSOR = {"llama_33b": 4, "llama_65b": 16, "llama2_70b": 16, "llama3_70b": 16}


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
    c.passages = 10  # k that are read
    # How they are: "paper" decodes after each of them and sums the weighted probability
    # of each unique answer; "rescored" scores every answer after every passage (eq. 2);
    # "token" mixes next-token probabilities (REPLUG); "concatenated" is one prompt.
    c.ensemble = "paper"
    # Of the softmax over passages: 1 for DRAGON+ (raw dot products, eq. 2); encoders
    # that normalise, whose scores lie within [-1, 1], need a small one of their own.
    c.score_temperature = placeholder(float)
    # Demonstrations before a question, with their own top passage, from data.shots.
    c.shots = 0
    c.prompt_tokens = (
        2048  # of a prompt with its answer; demonstrations fill what is left
    )
    # 0 and (): as long as the answers of a task are, see radit_jax/evaluation/tasks.py.
    c.max_new_tokens = 0
    c.stop = ()
    # Rows that options are scored in, as in lm_score.
    c.row_targets = 1024
    c.rows = 64
    c.packing_bins = 256
    c.limit = 0  # questions per test file, 0 for all
    c.batch_tokens = 65536  # rows x tokens of a generation batch
    c.examples = 8  # answers shown side by side in the report
    # That of the run, unless it is set.
    sizes = ("data", "fsdp", "tensor")
    c.mesh = ConfigDict({size: config.mesh.get_ref(size).to_int() for size in sizes})
    # Over fsdp, each step of decoding would gather all weights for one token of every
    # prompt.
    if variant == "":
        c.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": -1})
    elif variant in PAPER:
        tensor = TENSOR.get(variant, 8)
        c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": tensor})
    if variant in (*FACTBOOK, "tiny"):
        c.score_temperature = 0.05
    if variant in (*SMALL, "tiny"):
        c.prompt_tokens, c.max_new_tokens = 512, 16
        c.batch_tokens = 16384
        c.row_targets, c.rows = 256, 8
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
    if variant == "offline":
        c.systems = ("LM",)
        # The tasks' own lengths; few rows, because a batch of a small set is full too.
        c.max_new_tokens, c.prompt_tokens, c.rows = 0, 1024, 4
        c.row_targets = 384
    if variant == "tiny":
        c.passages = 2
        c.prompt_tokens, c.max_new_tokens = 128, 6
        c.limit = 20
        c.batch_tokens = 2048
        c.row_targets, c.packing_bins = 64, 16


def get_config(variant: str = "") -> ConfigDict:
    """The recipe of the stage alone; prompts begin and fit as in LM-FT."""
    config = base("evaluate", variant)
    section(config, variant)
    if variant == "offline":
        prepare.section(config, variant)
        config.data.limit.test = 200
    lm_ft.section(config, variant)
    r_ft.section(config, variant)
    return config
