"""Command ``plan``: whether a stage's step fits a TPU slice, and how fast it can be.

    python -m radit_jax.main --config configs/plan.py \\
        --config.stage_config=lm_ft:llama_65b --config.slice=v5p:4x4x4

Compiles the very step that the stage runs, for a slice that need not be attached, on
the paper's settings (needs ``pip install "radit_jax[tpu]"``, no TPU and no weights).
What it needs of a chip's HBM by kind, its FLOPs and collectives, and the least time
that these can take by the chip's published figures, go to ``plan/`` and to the screen.
Where it does not fit, other meshes, remat policies and micro-batches are tried.
``--config.search=True`` tries them all the same and ranks them. ``:scale`` makes every
plan of docs/scale.md.
"""

from ml_collections import ConfigDict

from configs import evaluate, index, lm_ft, lm_score, models, r_ft, retrieve
from configs.base import base

# STAGE:MODEL -> the slice it is planned for in docs/scale.md.
RECIPES = {
    "lm_ft:llama_7b": "v5p:2x2x2",
    "lm_ft:llama_13b": "v5p:2x2x4",
    "lm_ft:llama_33b": "v5p:2x4x4",
    "lm_ft:llama_65b": "v5p:4x4x4",
    "lm_ft:llama2_70b": "v5p:4x4x4",
    "lm_ft:llama3_8b": "v5p:2x2x2",
    "lm_ft:llama3_70b": "v5p:4x4x4",
    "lm_score:llama_7b": "v5e:4x4",
    "lm_score:llama_65b": "v5p:4x4x4",
    "prefill:llama_7b": "v5e:4x4",
    "generate:llama_7b": "v5e:4x4",
    "prefill:llama_65b": "v5p:4x4x4",
    "generate:llama_65b": "v5p:4x4x4",
    "r_ft:dragon_plus": "v5e:4x4",
    "embed:dragon_plus": "v5e:2x4",
    "search:wiki_and_web": "v5e:8x8",
}
# The paper's corpus: 37M passages of Wikipedia, 362M of CommonCrawl (section 3.1).
CORPUS = {"passages": 399_000_000}


def get_config(variant: str = "") -> ConfigDict:
    """What to plan; ``scale`` plans all of RECIPES.

    Raises:
        ValueError: an unknown variant.
    """
    if variant not in ("", "scale"):
        raise ValueError(f"unknown variant :{variant}; there is :scale")
    c = base("plan", "")
    c.workdir = "runs/plan"
    c.compilation_cache = ""  # what comes from there says nothing about memory
    c.stage_config = "lm_ft:llama_7b"  # STAGE:MODEL
    c.slice = ""  # GENERATION:SHAPE, such as v5p:4x4x4; "": of the recipe
    # Changes to the recipe; 0 and "": none.
    c.mesh = ConfigDict({"data": 0, "fsdp": 0, "tensor": 0, "sequence": False})
    c.rows = 0
    c.batch_tokens = 0
    c.micro_batches = 0
    c.remat = ""
    c.search = False  # rank meshes, remat policies and micro-batches
    c.minutes = 10.0  # for looking further than the recipe
    c.all = variant == "scale"
    c.folder = "plans"  # of :scale
    c.page = "docs/scale.md"
    c.recipes = ConfigDict()
    for name, slice_ in RECIPES.items():
        c.recipes[name] = ConfigDict({"slice": slice_, **_recipe(*name.split(":"))})
    return c


def _recipe(stage: str, model: str) -> dict[str, ConfigDict]:
    """The stage's own recipe, and the shape of what it computes with."""
    if stage == "lm_ft":
        return {"config": lm_ft.get_config(model), "shape": models.shape(model)}
    if stage == "lm_score":
        # R-FT's examples (section 3.3), each after k = 10 passages and none; a question
        # reads each passage of about 160 tokens, and its own some 100.
        config, shape = lm_score.get_config(model), models.shape(model)
        shape.pairs = 947_000 * (config.lm_score.passages + 1)
        shape.pair_tokens = 260
        return {"config": config, "shape": shape}
    if stage in ("prefill", "generate"):
        # Of 2500 dev questions, after each of 10 passages.
        config, shape = evaluate.get_config(model), models.shape(model)
        shape.answers = 2500 * config.evaluate.passages
        shape.row_tokens, shape.prompts, shape.new = 1024, 4, 32
        return {"config": config, "shape": shape}
    if stage == "r_ft":
        config, shape = r_ft.get_config(), models.shape(model)
        shape.question_tokens = config.retrieve.max_tokens
        shape.candidates = config.lm_score.passages
        return {"config": config, "shape": shape}
    config = retrieve.get_config()
    index.section(config, "")
    if stage == "search":
        # All replicas' memory holds passages, so the mesh does not matter.
        sizes = {"width": 768, "queries": 128, "recall_target": 0.95}
        return {"config": config, "shape": ConfigDict(CORPUS | sizes)}
    # Every device has the whole encoder. 160 tokens: the bucket that passages of 100
    # words are filled up to.
    config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    config.index.batch_tokens = 8 * 512 * 160
    shape = models.shape(model).to_dict() | CORPUS | {"passage_tokens": 160}
    return {"config": config, "shape": ConfigDict(shape)}
