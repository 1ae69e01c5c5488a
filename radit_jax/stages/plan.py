"""Command ``plan``: a stage's step, compiled for a TPU slice that is not attached.

The artifact ``plan/`` says what the step needs of a chip's memory, what it does and
the least time that can take, and what to change where it does not fit.
"""

import difflib
import hashlib
import heapq
import importlib.metadata
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from radit_jax import artifacts, sharding
from radit_jax.models.remat import REMAT_POLICIES
from radit_jax.planning import aot, page, slices
from radit_jax.planning.bounds import Bounds, bound
from radit_jax.planning.cost import Cost, count
from radit_jax.planning.kernels import kernel_flops
from radit_jax.planning.memory import Memory, measure
from radit_jax.stages.programs import BUILDERS, SECTIONS, SIZES, Program
from radit_jax.stages.stage import section, value_of

log = logging.getLogger(__name__)

REPORT, PAGE = "plan.json", "plan.md"


class Choice(NamedTuple):
    """What a plan may change about a recipe without changing what is computed."""

    data: int
    fsdp: int
    tensor: int
    remat: str = ""  # "": the stage has no backward pass
    micro_batches: int = 1
    sequence: bool = False  # tokens of a row are split over tensor between layers

    def __str__(self) -> str:
        text = f"mesh data {self.data} x fsdp {self.fsdp} x tensor {self.tensor}"
        if self.sequence:
            text += " with sequence"
        if self.remat:
            text += f", remat {self.remat}, micro-batches {self.micro_batches}"
        return text

    def flags(self, section: str) -> str:
        """For the stage's own command line.

        Args:
            section: of the config, that has the mesh.
        """
        mesh = " ".join(
            f"--config.{section}.{axis}={size}"
            for axis, size in zip(sharding.AXES, self[:3], strict=True)
        )
        if not self.remat:
            return mesh
        return (
            f"{mesh} --config.mesh.sequence={self.sequence} "
            f"--config.lm_ft.remat={self.remat} "
            f"--config.lm_ft.micro_batches={self.micro_batches}"
        )


class Recipe(NamedTuple):
    """What is planned."""

    name: str  # STAGE:MODEL
    config: ConfigDict  # of the stage
    shape: ConfigDict  # of the model
    target: slices.Slice

    @property
    def stage(self) -> str:
        """Of the chain."""
        return self.name.split(":")[0]

    @property
    def section_name(self) -> str:
        """Of the stage's config, where the settings are."""
        return SECTIONS.get(self.stage, self.stage)

    @property
    def section(self) -> ConfigDict:
        """The settings."""
        return self.config[self.section_name]

    @property
    def mesh(self) -> str:
        """Field of the stage's config that has the sizes of its mesh, dotted."""
        return f"{self.section_name}.mesh" if "mesh" in self.section else "mesh"


def recipe(config: ConfigDict, name: str, target: str) -> Recipe:
    """A recipe by name, with the changes that the command line asks for.

    Raises:
        ValueError: there is no such recipe or slice.
    """
    known = sorted(config.recipes)
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.3)
        raise ValueError(
            f"stage_config = {name!r} is none that can be planned"
            + (f"; did you mean {' or '.join(near)}?" if near else ".")
            + f" There are {', '.join(known)}"
        )
    chosen = config.recipes[name].copy_and_resolve_references()
    found = Recipe(
        name, chosen.config, chosen.shape, slices.parse(target or chosen.slice)
    )
    for field in ("rows", "batch_tokens", "micro_batches", "remat"):
        if config[field]:
            if field not in SIZES[found.stage]:
                raise ValueError(f"{field} = {config[field]!r}: {name} has no {field}")
            found.section[field] = config[field]
    return found


def first_choice(config: ConfigDict, wanted: Recipe) -> Choice:
    """The recipe's own mesh on the slice, with the command line's changes.

    Raises:
        ValueError: the mesh does not multiply to the chips of the slice.
    """
    of_stage = value_of(wanted.config, wanted.mesh)
    sizes = {axis: config.mesh[axis] or of_stage[axis] for axis in sharding.AXES}
    if wanted.target.copies > 1 and not config.mesh.data and sizes[sharding.DATA] > 0:
        # Slices are replicas: little crosses the network between them.
        sizes[sharding.DATA] = wanted.target.copies
    if -1 not in sizes.values() and not config.mesh.fsdp:
        sizes[sharding.FSDP] = -1
    mesh = sharding.make_mesh(**sizes, devices=slices.devices(wanted.target))
    data, fsdp, tensor = mesh.devices.shape
    stage = wanted.section
    if "remat" not in stage:
        return Choice(data, fsdp, tensor)
    sequence = config.mesh.sequence or wanted.config.mesh.sequence
    return Choice(data, fsdp, tensor, stage.remat, stage.micro_batches, sequence)


# From what keeps most to what keeps least.
LADDER = [name for name in REMAT_POLICIES if name != "none"]


def neighbours(choice: Choice) -> Iterator[Choice]:
    """Choices that differ in one thing; those that need less memory first."""
    steps = LADDER.index(choice.remat) if choice.remat in LADDER else -1
    parts = choice.micro_batches
    if choice.remat:
        if steps + 1 < len(LADDER):
            yield choice._replace(remat=LADDER[steps + 1])
        yield choice._replace(micro_batches=parts * 2)
        if choice.remat != LADDER[-1]:
            yield choice._replace(remat=LADDER[-1])
        if choice.tensor > 1:
            yield choice._replace(sequence=not choice.sequence)
    for fewer, more in (
        *((sharding.DATA, sharding.FSDP), (sharding.DATA, sharding.TENSOR)),
        *((sharding.FSDP, sharding.TENSOR), (sharding.TENSOR, sharding.FSDP)),
        *((sharding.TENSOR, sharding.DATA), (sharding.FSDP, sharding.DATA)),
    ):
        if more == sharding.DATA and choice.remat:
            # Replicas of optimizer states take memory and save nothing.
            continue
        sizes = dict(zip(sharding.AXES, choice[:3], strict=True))
        if sizes[fewer] % 2 == 0:
            sizes[fewer] //= 2
            sizes[more] *= 2
            sequence = choice.sequence and sizes[sharding.TENSOR] > 1
            data, fsdp, tensor = sizes.values()
            yield choice._replace(
                data=data, fsdp=fsdp, tensor=tensor, sequence=sequence
            )
    if choice.remat:
        if parts % 2 == 0:
            yield choice._replace(micro_batches=parts // 2)
        if steps > 0:
            yield choice._replace(remat=LADDER[steps - 1])


class Plan(NamedTuple):
    """One compiled choice."""

    recipe: Recipe
    choice: Choice
    program: Program
    compiled: aot.Compiled
    memory: Memory
    cost: Cost
    bounds: Bounds

    @property
    def usable(self) -> int:
        """Bytes of HBM that a program may have."""
        return int(self.recipe.target.chip.usable_gib * slices.GIB)

    @property
    def fits(self) -> bool:
        """Whether it runs at all."""
        return not self.compiled.refused and self.memory.total <= self.usable

    @property
    def rank(self) -> tuple[bool, float]:
        """Lower is better: what fits, and of that the fastest if the interconnect is
        never hidden; of what does not fit, what needs the least memory."""
        if self.fits:
            return False, self.bounds.one_by_one / self.program.items
        return True, float(self.memory.total)

    @property
    def utilisation(self) -> float:
        """Model FLOPs of a step over what the chips could do in its least time."""
        chips = self.recipe.target
        return self.program.model_flops / (
            self.bounds.step * chips.size * chips.chip.flops
        )

    def report(self) -> dict[str, Any]:
        """As JSON values."""
        target, bounds, program = self.recipe.target, self.bounds, self.program
        stage = section(self.recipe.section)
        return {
            "recipe": self.recipe.name,
            "slice": str(target),
            "chips": target.size,
            "mesh": dict(zip(sharding.AXES, self.choice[:3], strict=True)),
            "settings": {
                name: stage[name]
                for name in SIZES[self.recipe.stage]
                if name not in Choice._fields
            }
            | (
                {
                    "remat": self.choice.remat,
                    "micro_batches": self.choice.micro_batches,
                    "sequence": self.choice.sequence,
                }
                if self.choice.remat
                else {}
            ),
            "versions": versions(),
            "compile_seconds": round(self.compiled.seconds, 1),
            "fits": self.fits,
            "refused": self.compiled.refused,
            "hbm": {
                "capacity": int(target.chip.hbm_gib * slices.GIB),
                "usable": self.usable,
                "total": self.memory.total,
                "kinds": self.memory.kinds,
                "largest": [b._asdict() for b in self.memory.buffers[:20]],
            },
            "flops": {
                "per_chip": self.cost.flops,
                "kernels": self.cost.kernel_flops,
                "model": program.model_flops,
                "recompute": self.cost.flops * target.size / program.model_flops,
            },
            "hbm_bytes": self.cost.hbm_bytes,
            "collectives": [t._asdict() for t in bounds.traffic if t.seconds],
            "seconds": {
                "compute": bounds.compute,
                "hbm": bounds.hbm,
                "interconnect": bounds.axes,
                "step": bounds.step,
                "one_by_one": bounds.one_by_one,
            },
            "utilisation": self.utilisation,
            "utilisation_one_by_one": self.utilisation
            * bounds.step
            / bounds.one_by_one,
            "unit": program.unit,
            "items_per_second": program.items / bounds.step,
            "steps": program.steps,
            "hours": program.steps * bounds.step / 3600,
        }


def versions() -> dict[str, str]:
    """Of what decides how a program is compiled."""
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def make(wanted: Recipe, choice: Choice) -> Plan:
    """Compile a choice and account for it.

    Raises:
        ValueError: the model does not divide over the mesh.
    """
    mesh = sharding.make_mesh(*choice[:3], devices=slices.devices(wanted.target))
    changed = wanted._replace(config=wanted.config.copy_and_resolve_references())
    if choice.remat:
        changed.section.remat = choice.remat
        changed.section.micro_batches = choice.micro_batches
        changed.config.mesh.sequence = choice.sequence
    program = BUILDERS[wanted.stage](changed.config, wanted.shape, mesh)
    log.info("plan: compiling %s for %s, %s", wanted.name, wanted.target, choice)
    compiled = aot.compile_ahead(
        program.function, mesh, *program.arguments, **program.static
    )
    memory = measure(
        compiled.module,
        compiled.assignment,
        compiled.live_ranges,
        program.kind_of,
        compiled.code_bytes,
    )
    cost = count(compiled.module, mesh.size, kernel_flops, program.loop_trips)
    plan = Plan(
        wanted,
        choice,
        program,
        compiled,
        memory,
        cost,
        bound(cost, wanted.target, mesh),
    )
    log.info(
        "plan: %.1f of %.1f GiB, at most %.1f %% of peak; compiled in %.0f s%s",
        memory.total / slices.GIB,
        wanted.target.chip.usable_gib,
        100 * plan.utilisation,
        compiled.seconds,
        "" if plan.fits else "; DOES NOT FIT",
    )
    return plan


def search(
    wanted: Recipe, start: Choice, seconds: float, stop_at_fit: bool
) -> list[Plan]:
    """Plans of a recipe: the first choice, then neighbours of the best one so far.

    Args:
        wanted: the recipe.
        start: where to begin.
        seconds: no further choice is begun after that; the first always is.
        stop_at_fit: end with the first plan that fits.
    """
    end = time.monotonic() + seconds
    seen, plans = {start}, []
    # By how good the plan was that a choice is a neighbour of, then first come.
    queue: list[tuple[tuple[bool, float], int, Choice]] = [((False, 0.0), 0, start)]
    while queue:
        _, _, choice = heapq.heappop(queue)
        try:
            plans.append(make(wanted, choice))
        except ValueError as error:
            if choice == start:
                raise
            log.info("plan: %s: %s", choice, error)
            continue
        if stop_at_fit and plans[-1].fits:
            break
        if time.monotonic() > end:
            log.info("plan: time is up, %d choices are left out", len(queue))
            break
        for other in neighbours(choice):
            if other not in seen:
                heapq.heappush(queue, (plans[-1].rank, len(seen), other))
                seen.add(other)
    return plans


def ranked(plans: list[Plan]) -> list[Plan]:
    """The best first."""
    return sorted(plans, key=lambda p: p.rank)


def settings(config: ConfigDict, name: str, target: str) -> Mapping[str, Any]:
    """All that a plan depends on: what is compiled, by whom, and this package."""
    found = section(config)
    found["recipes"] = found["recipes"][name]
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    for field in ("workdir", "debug", "compilation_cache", "folder", "page"):
        del found[field]
    return found | {
        "slice": target,
        "versions": versions(),
        "package": digest.hexdigest(),
    }


def show(config: ConfigDict) -> None:
    """Plan what the config names; into ``plan/`` and on the screen.

    Raises:
        ValueError: an unknown recipe or slice, a mesh that does not fit it, or no
            libtpu.
    """
    if config.all:
        make_all(config)
        return
    wanted = recipe(config, config.stage_config, config.slice)
    start = first_choice(config, wanted)
    place = artifacts.plan(
        Path(config.workdir),
        "plan",
        settings(config, wanted.name, str(wanted.target)),
        {},
    )
    if not artifacts.is_complete(place):
        folder = artifacts.begin(place)
        plans = search(wanted, start, 60.0 * config.minutes, not config.search)
        best = ranked(plans)[0]
        found = best.report() | {
            "tried": [
                {
                    "choice": str(p.choice),
                    "flags": p.choice.flags(wanted.mesh),
                    "fits": p.fits,
                    "total": p.memory.total,
                    "utilisation": p.utilisation,
                    "items_per_second": p.program.items / p.bounds.step,
                    "items_per_second_bare": p.program.items / p.bounds.one_by_one,
                }
                for p in (ranked(plans) if config.search else plans)
            ]
        }
        (folder / REPORT).write_text(json.dumps(found, indent=2) + "\n")
        (folder / PAGE).write_text(page.of_plan(found))
        artifacts.finish(place, {"choices": len(plans)})
    print((place.folder / PAGE).read_text())
    print(f"In {place.folder.resolve()}: {REPORT} has all of it")


def make_all(config: ConfigDict) -> None:
    """Plan every recipe on its slice, and write the page about them.

    A recipe whose file was made with the same settings by the same versions is kept.
    """
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(config.recipes)
    for name in names:
        wanted = recipe(config, name, "")
        key = recipe_key(wanted)
        file = folder / file_name(name)
        if file.exists() and json.loads(file.read_text())["key"] == key:
            log.info("plan: %s is up to date", file)
            continue
        plan = make(wanted, first_choice(config, wanted))
        file.write_text(json.dumps({"key": key, **plan.report()}, indent=1) + "\n")
    place = Path(config.page)
    place.write_text(page.of_all(stored(folder, names)))
    print(f"{len(names)} plans in {folder}, and a page about them in {place}")


def stored(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Plans of recipes as they were written, stage by stage, small models first."""
    plans = [json.loads((folder / file_name(name)).read_text()) for name in names]
    stages = list(BUILDERS)

    def place(plan: dict[str, Any]) -> tuple[int, float]:
        return stages.index(plan["recipe"].split(":")[0]), plan["flops"]["model"]

    return sorted(plans, key=place)


def file_name(name: str) -> str:
    """Of a recipe's plan."""
    return f"{name.replace(':', '-')}.json"


def recipe_key(wanted: Recipe) -> str:
    """Hash of what is compiled and by whom."""
    content = {
        "settings": section(wanted.section),
        "mesh": section(wanted.config.mesh),
        "attention": wanted.config.attention,
        "shape": section(wanted.shape),
        "slice": str(wanted.target),
        "versions": versions(),
    }
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
