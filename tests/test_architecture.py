"""The rules of docs/architecture.md, checked by reading the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "radit_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# What a room may import of the package, besides itself. Everyone may import BASE.
BASE = {"sharding", "batch", "processes"}
MIDDLE = {
    "models",
    "inference",
    "data",
    "retrieval",
    "evaluation",
    "planning",
    "loop",
    "losses",
    "optim",
    "checkpoint",
    "tracker",
    "artifacts",
    "mirror",
}
ALLOWED = {
    "main": {"stages", "loop"},
    "stages": MIDDLE,
    "inference": {"models", "losses"},
    "loop": {"checkpoint", "tracker"},
    "mirror": {"artifacts"},
    **{room: set() for room in MIDDLE - {"inference", "loop", "mirror"}},
    **{room: set() for room in BASE},
}
NEVER = {"torch", "tensorflow", "tensorflow_datasets", "clu", "haiku"}
# What a file may import of these where it needs it, inside a function.
LAZY = {"data/sources.py": {"tensorflow_datasets"}}
NUMPY_ONLY = ("data", "evaluation")


def imports(file):
    """Dotted names of all modules a file imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(parts):
    return parts[0].removesuffix(".py")


def rooms_imported(file):
    names = (name.split(".") for name in imports(file))
    return {parts[1] for parts in names if parts[0] == "radit_jax" and len(parts) > 1}


def name(file):
    return str(file.relative_to(ROOT))


def test_there_is_something_to_check():
    assert len(FILES) > 25
    assert "stages" in rooms_imported(PACKAGE / "main.py")


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_go_downhill(file):
    parts = file.relative_to(PACKAGE).parts
    if parts == ("__init__.py",):
        assert not imports(file)
        return
    own = room(parts)
    assert own in ALLOWED, f"{own} has no place in docs/architecture.md"
    below = set() if own in BASE else BASE
    extra = rooms_imported(file) - {own} - below - ALLOWED[own]
    assert not extra, f"{name(file)} imports {sorted(extra)}"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_other_frameworks_are_not_imported(file):
    lazy = LAZY.get(file.relative_to(PACKAGE).as_posix(), set())
    assert not (NEVER - lazy) & {n.split(".")[0] for n in imports(file)}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_readers_and_metrics_are_numpy_only(file):
    if room(file.relative_to(PACKAGE).parts) not in NUMPY_ONLY:
        return
    modules = {n.split(".")[0] for n in imports(file)}
    assert not modules & {"jax", "jaxlib", "flax", "optax", "orbax"}
    # These import jax.
    assert not {"sharding", "processes"} & rooms_imported(file)


def test_losses_are_pure():
    modules = {n.split(".")[0] for n in imports(PACKAGE / "losses.py")}
    assert modules == {"jax", "jaxtyping"}


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=name)
def test_recipes_import_ml_collections_and_each_other(file):
    modules = {n.split(".")[0] for n in imports(file)}
    assert modules <= {"ml_collections", "configs", "difflib"}


def axis_names(file):
    """Mesh axes spelled as strings: in a spec, or as an argument about axes."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func).split(".")[-1]
        specs = [k.value for k in node.keywords if "axis_name" in (k.arg or "")]
        if called in ("P", "PartitionSpec", "psum", "all_gather", "axis_index"):
            specs += node.args
        for spec in specs:
            for part in ast.walk(spec):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    found.add(part.value)
    return found


@pytest.mark.parametrize("file", FILES, ids=name)
def test_only_sharding_spells_mesh_axes(file):
    text = file.read_text()
    if file.name == "sharding.py":
        assert 'AXES = ("data", "fsdp", "tensor")' in text
        return
    assert not axis_names(file)
    # "data" is a common word; the other two have no other meaning.
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant):
            assert node.value not in ("fsdp", "tensor")


def test_the_map_in_the_docs_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for file in PACKAGE.iterdir():
        if file.name.startswith("__"):
            continue
        shown = f"{file.name}/" if file.is_dir() else file.name
        assert shown in text, f"docs/architecture.md does not show {shown}"


# Imported one by one in a fresh interpreter each: (statement, what must not be loaded).
LOADED = [
    ("import radit_jax.main", {"torch", "tensorflow", "transformers"}),
    (
        "import radit_jax.data.tasks, radit_jax.data.corpus, radit_jax.data.prompts, "
        "radit_jax.data.tokenize, radit_jax.evaluation.report",
        {"torch", "tensorflow", "transformers", "jax", "flax"},
    ),
    (
        "import radit_jax.data.sources",
        {"torch", "tensorflow", "tensorflow_datasets", "pandas", "jax"},
    ),
]


@pytest.mark.parametrize(
    ("statement", "banned"), LOADED, ids=["main", "data", "sources"]
)
def test_what_importing_loads(statement, banned):
    code = f"{statement}; import sys; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert not banned & set(found.stdout.split())
