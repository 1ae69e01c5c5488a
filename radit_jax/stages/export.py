"""Stage ``export``: lm_ft/ and r_ft/ -> exported/, as Hugging Face folders.

``exported/lm`` and ``exported/encoder`` are read by transformers, sentence-transformers
and whatever serves such folders, and by this package itself (``config.lm``,
``config.encoder``).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from radit_jax.models.encoder import Encoder
from radit_jax.models.huggingface import save
from radit_jax.models.llama import Llama
from radit_jax.stages.index import context_fingerprint, context_folder
from radit_jax.stages.lm_ft import load_finetuned
from radit_jax.stages.r_ft import load_finetuned_towers
from radit_jax.stages.stage import (
    Stage,
    check_counts,
    field_fingerprint,
    lm_folder,
    section,
)

MODELS = ("lm_ft", "r_ft")
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The export section, and what is taken over from the models as they came."""
    models = config.export.models
    found: dict[str, Any] = section(config.export)
    if "lm_ft" in models:
        found["lm"] = field_fingerprint(config, "lm")
    if "r_ft" in models:
        found |= {
            "encoder": field_fingerprint(config, "encoder"),
            "context_encoder": context_fingerprint(config),
            "target": config.r_ft.target,
            "pooling": section(config.pooling),
        }
    return found


def inputs(config: ConfigDict) -> tuple[str, ...]:
    """The fine-tunings that are exported.

    Raises:
        ValueError: an unknown one.
    """
    unknown = [name for name in config.export.models if name not in MODELS]
    if unknown or not config.export.models:
        raise ValueError(
            f"export.models = {tuple(config.export.models)}: expected some of "
            f"{', '.join(MODELS)}"
        )
    return tuple(config.export.models)


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Write the best checkpoint of each model.

    Raises:
        ValueError: an unknown dtype.
    """
    export = config.export
    check_counts("export", export, ("shard_megabytes",))
    if export.dtype not in DTYPES:
        raise ValueError(
            f"export.dtype = {export.dtype!r} is not one of {', '.join(DTYPES)}"
        )
    counts: dict[str, Any] = {}

    def write(model: Llama | Encoder, name: str, like: str | Path) -> None:
        files = save(
            model,
            folder / name,
            like,
            DTYPES[export.dtype],
            export.shard_megabytes * 2**20,
        )
        counts[name] = {"files": len(files)}

    if "lm_ft" in export.models:
        write(load_finetuned(config), "lm", lm_folder(config))
    if "r_ft" in export.models:
        towers = load_finetuned_towers(
            config, Path(config.workdir) / "r_ft" / config.r_ft.target
        )
        write(towers.query, "encoder", config.encoder)
        if towers.context is not None:
            write(towers.context, "context_encoder", context_folder(config))
    return counts


STAGE = Stage("exported", inputs, (), settings, build)
