"""What every stage is: settings that make its key, and a build that fills a folder."""

import dataclasses
import functools
import json
import logging
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from radit_jax import artifacts, processes, sharding
from radit_jax.artifacts import fingerprint
from radit_jax.data.packages import cache_folder
from radit_jax.data.registry import missing
from radit_jax.mirror import reachable
from radit_jax.models.attention import Kernel, choose_kernel
from radit_jax.models.gguf import convert_gguf
from radit_jax.models.huggingface import read_llama_config
from radit_jax.models.llama import Llama

log = logging.getLogger(__name__)


class Stage(NamedTuple):
    """One step of the chain, from artifacts to an artifact."""

    output: str  # name of the artifact
    # Artifacts it reads; those of a config where that decides.
    inputs: tuple[str, ...] | Callable[[ConfigDict], tuple[str, ...]]
    required: tuple[str, ...]  # config fields that must be set, dotted
    # All that the artifact depends on besides its inputs, JSON-serialisable.
    settings: Callable[[ConfigDict], Mapping[str, Any]]
    # (config, folder to fill) -> counts for the manifest.
    build: Callable[[ConfigDict, Path], Mapping[str, Any]]
    # Raises if files or settings of its own will not do, before a chain starts; on its
    # own mesh.
    check: Callable[[ConfigDict], object] = lambda config: None
    # Work of the host: one process does it, the others wait.
    alone: bool = False
    # Config field of the sizes of its mesh, dotted.
    mesh: str = "mesh"


def run(name: str, stage: Stage, config: ConfigDict) -> Path:
    """Make a stage's artifact unless it is there already; returns its folder.

    Several processes make it together, in one folder that all of them see: the first
    one writes the manifest and gives the folder its name.

    Raises:
        ValueError: a required field is not set, an input artifact is missing, the
            mirror cannot be reached, or processes have other settings or files.
    """
    check_required(name, stage.required, config)
    workdir = Path(config.workdir)
    inputs = stage.inputs(config) if callable(stage.inputs) else stage.inputs
    # The first process fetches and copies, for all share the work folder.
    mirrored = config.mirror and processes.first()
    mirror = reachable(config.mirror) if mirrored else None
    if mirror:
        # What the recipes that bring their own inputs prepare is no artifact's input.
        mirror.bring(workdir, ("inputs", *inputs))
    processes.barrier(f"{name} has its inputs")
    plan = artifacts.plan(
        workdir,
        stage.output,
        {"stage": name, **stage.settings(config)},
        {input: workdir / input for input in inputs},
    )
    processes.check_same(
        f"stage {name}", {"settings": plan.settings, "inputs": plan.inputs}
    )
    if mirror and not artifacts.is_complete(plan):
        mirror.fetch(plan)
    if processes.from_first(artifacts.is_complete(plan)):
        log.info("%s: %s is complete, skipped", name, plan.folder)
        if mirror:
            mirror.keep(plan)
        processes.wait_for(plan.folder / artifacts.MANIFEST)
        return plan.folder
    log.info("%s: making %s", name, plan.folder)
    start = time.perf_counter()
    if processes.first():
        artifacts.begin(plan)
        if mirror:
            mirror.attach(plan)
        text = config.to_json_best_effort(indent=2)
        (plan.partial / "config.json").write_text(text + "\n")
    processes.barrier(f"{name} begins")
    processes.wait_for(plan.partial / "config.json")
    counts: Mapping[str, Any] = {}
    if processes.first() or not stage.alone:
        if stage.alone and processes.count() > 1:
            own = sharding.make_mesh(devices=jax.local_devices()[:1])
        else:
            own = mesh(config, stage.mesh)
        with jax.set_mesh(own):
            counts = stage.build(config, plan.partial)
    processes.barrier(f"{name} is built")
    seconds = time.perf_counter() - start
    if processes.first():
        artifacts.finish(plan, {**counts, "seconds": round(seconds, 1)})
    if mirror:
        # Even if there is one: it was damaged.
        mirror.send(plan)
        mirror.keep(plan)
    processes.barrier(f"{name} is finished")
    processes.wait_for(plan.folder / artifacts.MANIFEST)
    log.info("%s: done in %s: %s", name, clock(seconds), json.dumps(dict(counts)))
    return plan.folder


def check_required(name: str, fields: tuple[str, ...], config: ConfigDict) -> None:
    """Stop before any work if a field that has no default is empty.

    Raises:
        ValueError: naming the fields, and the variants that need none.
    """
    missing = [field for field in fields if not value_of(config, field)]
    if missing:
        flags = " ".join(f"--config.{field}=..." for field in missing)
        raise ValueError(
            f"stage {name}: not set: {', '.join(missing)}. This recipe has the paper's "
            f"settings and wants your own weights and data: {flags}\n"
            "Without any of them, `--config configs/radit.py:demo` runs on real small "
            "models, and `--config configs/radit.py:tiny` on random weights in seconds"
        )


def value_of(config: ConfigDict, field: str) -> Any:
    """What a field holds, by its dotted name."""
    return functools.reduce(operator.getitem, field.split("."), config)


def check_counts(name: str, config: ConfigDict, fields: Sequence[str]) -> None:
    """Stop before any work if a number of a section must be positive and is not.

    Raises:
        ValueError: naming the setting.
    """
    for field in fields:
        if config[field] < 1:
            raise ValueError(f"{name}.{field} = {config[field]} must be at least 1")


def existing(config: ConfigDict, field: str) -> Path:
    """The file or folder that a field names.

    Raises:
        FileNotFoundError: it is not there; with the field, and the nearest name that
            is.
    """
    path = Path(value_of(config, field)).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"--config.{field}={path}: {missing(path)}")
    return path


def field_fingerprint(config: ConfigDict, field: str) -> str:
    """``fingerprint`` of the file or folder that a field names.

    Raises:
        FileNotFoundError: as ``existing``.
    """
    return fingerprint(existing(config, field))


def mesh(config: ConfigDict, field: str = "mesh") -> jax.sharding.Mesh:
    """The mesh whose sizes are in a field.

    Raises:
        ValueError: as ``sharding.make_mesh``; with the field.
    """
    sizes = value_of(config, field)
    try:
        return sharding.make_mesh(*(sizes[axis] for axis in sharding.AXES))
    except ValueError as error:
        raise ValueError(f"--config.{field}: {error}") from error


def compute_dtype(config: ConfigDict) -> jnp.dtype:
    """bfloat16 on accelerators, float32 on CPU, unless the config says otherwise.

    Raises:
        ValueError: an unknown name.
    """
    names = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    name = config.dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in names:
        raise ValueError(f"dtype = {name!r} is not one of auto, {', '.join(names)}")
    return jnp.dtype(names[name])


def attention_kernel(config: ConfigDict, head_size: int) -> Kernel:
    """What computes attention in this run.

    Args:
        config: the recipe.
        head_size: K of the model.

    Raises:
        ValueError: as ``choose_kernel``.
    """
    dtype = compute_dtype(config)
    return choose_kernel(config.attention, jax.default_backend(), dtype, head_size)


def check_language_model(config: ConfigDict) -> None:
    """Stop before any work if the model, of which only the shape is read, will not do.

    Raises:
        FileNotFoundError: a file of the model is missing.
        ValueError: it does not divide over the current mesh, or ``config.attention``
            cannot run.
    """
    shape = read_llama_config(lm_folder(config))
    jax.eval_shape(lambda: Llama(shape, jax.random.key(0)))
    attention_kernel(config, shape.head_size)


def lm_folder(config: ConfigDict) -> Path:
    """The language model's Hugging Face folder; a GGUF is converted once, to the cache.

    Raises:
        FileNotFoundError, ValueError: as ``convert_gguf``.
    """
    path = Path(config.lm)
    if path.suffix != ".gguf":
        return path
    return convert_gguf(path, cache_folder() / f"gguf-{fingerprint(path)[:12]}")


def section(config: ConfigDict) -> dict[str, Any]:
    """A section of the config as plain JSON values."""
    return json.loads(config.to_json_best_effort())


def settings_of(kind: Any, config: ConfigDict, **others: Any) -> Any:
    """Fill a NamedTuple or dataclass from the fields of the same name of a section."""
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
    else:
        names = list(kind._fields)
    return kind(**{n: config[n] for n in names if n not in others}, **others)


def clock(seconds: float) -> str:
    """Seconds as m:ss."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
