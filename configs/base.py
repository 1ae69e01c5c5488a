"""Fields that every recipe has, and the names of the variants."""

from difflib import get_close_matches

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

VARIANTS = ("", "tiny", "demo", "mini", "own")
FACTBOOK = ("demo", "mini")  # real small models, questions about the World Factbook
SMALL = (*FACTBOOK, "own")  # sizes for a model of 135M weights on two CPU cores


def base(stage: str, variant: str) -> ConfigDict:
    """Shared fields; ``variant`` is "" for the paper's settings.

    Raises:
        ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        near = get_close_matches(variant, VARIANTS, 1, 0.3) or ["demo"]
        raise ValueError(
            f"unknown variant :{variant}; there are {', '.join(VARIANTS[1:])} and the "
            f"paper's settings without a variant. Did you mean :{near[0]}?"
        )
    c = ConfigDict()
    c.stage = stage
    c.workdir = f"runs/{variant or 'paper'}"  # artifacts go here
    c.seed = 0
    c.debug = False  # True: show where an error was raised, not only what it says
    c.compilation_cache = "~/.cache/radit_jax/xla"  # "": compile anew each time
    c.dtype = "auto"  # of compute: float32 on CPU, bfloat16 on accelerators
    c.lm = ""  # Hugging Face folder or GGUF file of a Llama-family model
    c.encoder = ""  # folder of the query encoder
    c.context_encoder = ""  # folder of the context encoder; "": the same folder
    # "" and None: as the checkpoint's own metadata says (DRAGON+: cls, not normalised).
    c.pooling = ConfigDict({"kind": "", "normalize": placeholder(bool)})
    # Sizes of the device mesh; one may be -1, "all that are left".
    c.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
    c.data = ConfigDict()
    c.data.train = ""  # question files, JSONL, separated by commas
    c.data.dev = ""  # "": a share of train is set aside
    c.data.test = ""
    c.data.dev_share = 0.1
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
    if variant == "":
        c.mesh.fsdp = -1
    return c
