"""Plans of the stages' own steps: checked in, compiled again, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs import plan as recipes
from radit_jax import sharding
from radit_jax.planning import aot, page, slices
from radit_jax.stages import plan
from radit_jax.stages.plan import Choice
from radit_jax.stages.programs import BUILDERS

pytest.importorskip("libtpu", reason="libtpu has wheels for Linux on x86-64 only")

ROOT = Path(__file__).parents[1]
# Seconds each to compile; between them every kind of step.
COMPILED_AGAIN = (
    *("lm_ft:llama_7b", "lm_score:llama_7b", "r_ft:dragon_plus"),
    *("embed:dragon_plus", "search:wiki_and_web"),
)


def stored(name):
    return json.loads((ROOT / "plans" / plan.file_name(name)).read_text())


@pytest.fixture
def config():
    return recipes.get_config()


def wire(report):
    return sum(c["wire"] for c in report["collectives"])


@pytest.mark.parametrize("name", COMPILED_AGAIN)
def test_plans_hold_when_compiled_again(name, config):
    wanted = plan.recipe(config, name, "")
    found = plan.make(wanted, plan.first_choice(config, wanted)).report()
    before = stored(name)
    assert found["fits"]
    for what, value, old in (
        ("HBM of a chip", found["hbm"]["total"], before["hbm"]["total"]),
        ("bytes of collectives", wire(found), wire(before)),
        ("FLOPs", found["flops"]["per_chip"], before["flops"]["per_chip"]),
    ):
        assert value == pytest.approx(old, rel=0.05), (
            f"{what} of {name} changed by over 5 %. If that is meant, "
            "`python -m radit_jax.main --config configs/plan.py:scale` plans anew"
        )


@pytest.mark.parametrize("name", sorted({*recipes.RECIPES} - {*COMPILED_AGAIN}))
def test_the_other_steps_trace_for_their_slices(name, config):
    wanted = plan.recipe(config, name, "")
    choice = plan.first_choice(config, wanted)
    mesh = sharding.make_mesh(*choice[:3], devices=slices.devices(wanted.target))
    step = BUILDERS[wanted.stage](wanted.config, wanted.shape, mesh)
    with aot.tracing(mesh):
        lowered = step.function.trace(*step.arguments, **step.static).lower()
    assert lowered.out_info


def test_checked_in_plans_are_of_the_recipes_as_they_are(config):
    for name in config.recipes:
        wanted = plan.recipe(config, name, "")
        assert stored(name)["key"] == plan.recipe_key(wanted), name


def test_the_page_shows_the_plans(config):
    text = page.of_all(plan.stored(ROOT / "plans", list(config.recipes)))
    assert (ROOT / "docs" / "scale.md").read_text() == text
    for name in config.recipes:
        assert name in text


def test_goals_of_the_papers_largest_run():
    """65B, 128 rows of 2048 tokens, on 64 chips."""
    found = stored("lm_ft:llama_65b")
    assert (found["slice"], found["settings"]["rows"]) == ("v5p:4x4x4", 128)
    assert found["hbm"]["total"] < 85 * slices.GIB
    assert found["flops"]["recompute"] < 1.15
    seconds = found["seconds"]
    assert sum(seconds["interconnect"].values()) < seconds["compute"]
    assert found["utilisation"] >= 0.65


def test_command_writes_an_artifact(config, tmp_path, capsys):
    config.workdir = str(tmp_path)
    config.stage_config, config.slice = "search:wiki_and_web", "v5e:8x8"
    plan.show(config)
    shown = capsys.readouterr().out
    folder = tmp_path / "plan"
    report = json.loads((folder / "plan.json").read_text())
    assert report["fits"]
    assert (folder / "manifest.json").exists()
    assert (folder / "plan.md").read_text() in shown
    # The corpus in bfloat16 over 64 chips.
    assert report["hbm"]["kinds"]["embeddings of the passages"] == pytest.approx(
        399e6 * 768 * 2 / 64, rel=1e-3
    )
    assert report["flops"]["recompute"] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage_config": "lm_ft:llama_65"}, "did you mean lm_ft:llama_65b"),
        ({"slice": "v5p:4x4x3"}, "v5p:4x4x4"),
        ({"mesh.fsdp": 3, "mesh.tensor": 1}, r"needs 3 devices, there are 8"),
        ({"mesh.tensor": 3}, "8 devices do not divide by 3"),
        ({"remat": "some"}, r"lm_ft\.remat = 'some' is not one of"),
        ({"rows": 12}, r"lm_ft\.rows / lm_ft\.micro_batches = 12 rows do not divide"),
        ({"micro_batches": 3}, r"rows = 64 does not divide by lm_ft\.micro_batches"),
        ({"stage_config": "search:wiki_and_web", "rows": 3}, "has no rows"),
        ({"stage_config": "generate:llama_7b", "rows": 3}, "has no rows"),
        ({"batch_tokens": 3}, "lm_ft:llama_7b has no batch_tokens"),
        (
            {"stage_config": "generate:llama_7b", "batch_tokens": 999},
            r"evaluate\.batch_tokens = 999 holds no row of 1024 tokens",
        ),
    ],
)
def test_bad_input(config, tmp_path, changes, message):
    config.update_from_flattened_dict({"workdir": str(tmp_path), **changes})
    with pytest.raises(ValueError, match=message):
        plan.show(config)


def test_heads_that_do_not_divide(config, tmp_path):
    config.update_from_flattened_dict(
        {"stage_config": "lm_ft:llama_13b", "mesh.tensor": 16, "mesh.fsdp": 1}
    )
    config.workdir = str(tmp_path)
    with pytest.raises(ValueError, match="LM attention heads = 40 does not divide"):
        plan.show(config)


START = Choice(1, 16, 4, "dots", 1)


def searched(monkeypatch, memory, seconds=100.0, stop_at_fit=True):
    """A search where a choice's memory, in chips' full, is known without compiling."""
    wanted = plan.recipe(recipes.get_config(), "lm_ft:llama_65b", "")
    full = wanted.target.chip.usable_gib * slices.GIB
    made = []

    def make(wanted, choice):
        made.append(choice)
        if choice.tensor > 8:
            raise ValueError("heads")
        return plan.Plan(
            wanted,
            choice,
            program=SimpleNamespace(items=1),
            compiled=SimpleNamespace(refused=""),
            memory=SimpleNamespace(total=int(memory(choice) * full)),
            cost=None,
            bounds=SimpleNamespace(one_by_one=memory(choice)),
        )

    monkeypatch.setattr(plan, "make", make)
    return plan.search(wanted, START, seconds, stop_at_fit), made


def test_the_nearest_choice_that_fits_is_taken(monkeypatch):
    found, made = searched(monkeypatch, lambda c: 3 / c.micro_batches)
    assert made[0] == START
    assert found[-1].choice == START._replace(micro_batches=4)
    assert [p.fits for p in found] == [False] * (len(found) - 1) + [True]
    found, _ = searched(monkeypatch, lambda c: 2 if c.remat == "dots" else 1)
    assert found[-1].choice == START._replace(remat="mlp")
    found, _ = searched(monkeypatch, lambda c: 1 if c.remat == "full" else 2)
    assert found[-1].choice == START._replace(remat="full")
    found, _ = searched(monkeypatch, lambda c: 8 / c.tensor)
    assert found[-1].choice == START._replace(tensor=8, fsdp=8)


def test_a_search_goes_on_past_the_first_fit_until_time_is_up(monkeypatch):
    found, _ = searched(monkeypatch, lambda c: 0.5, stop_at_fit=False, seconds=0.05)
    assert len(found) > 5
    assert len({p.choice for p in found}) == len(found)
    meshes = {(p.choice.fsdp, p.choice.tensor) for p in found}
    assert {(16, 4), (8, 8), (32, 2), (64, 1)} <= meshes
    assert all(fsdp * tensor == 64 for fsdp, tensor in meshes)
    found, made = searched(monkeypatch, lambda c: 2.0, seconds=-1.0)
    assert made == [START]


def test_a_search_goes_on_from_the_best_so_far(monkeypatch):
    found, _ = searched(monkeypatch, lambda c: 2.0**9 / c.micro_batches)
    assert found[-1].choice.micro_batches == 2**9
    # Each way there was tried at most once from each choice on it.
    assert len(found) < 9 * 9


def test_what_only_reads_may_have_replicas():
    choice = Choice(1, 2, 4)
    meshes = {other[:3] for other in plan.neighbours(choice)}
    assert meshes == {(1, 1, 8), (1, 4, 2), (2, 2, 2), (2, 1, 4)}
    trained = choice._replace(remat="dots")
    assert {other.data for other in plan.neighbours(trained)} == {1}
    assert (1, 4, 4) in {
        other[:3] for other in plan.neighbours(Choice(2, 2, 4, "dots"))
    }


def test_ranking_puts_what_fits_first(monkeypatch):
    found, _ = searched(
        monkeypatch, lambda c: c.fsdp / 16, stop_at_fit=False, seconds=0.05
    )
    order = plan.ranked(found)
    assert order[0].choice.fsdp == min(p.choice.fsdp for p in found)
    fits = [p.fits for p in order]
    assert fits == sorted(fits, reverse=True)
