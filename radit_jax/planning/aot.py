"""Compiling a jitted function for devices that are not attached."""

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding

from radit_jax.planning.hlo import Module


class Compiled(NamedTuple):
    """A program as the compiler left it, whether it fits or not."""

    module: Module
    assignment: str  # text of the buffer assignment
    live_ranges: str
    code_bytes: int  # 0 where it does not fit: no code was made
    seconds: float  # to trace, lower and compile
    refused: str  # the compiler's words where it does not fit; "": it does


@contextlib.contextmanager
def tracing(mesh: Mesh) -> Iterator[None]:
    """Trace as if on a mesh of devices that cannot run anything.

    ``jax.set_mesh`` would move every constant to them.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def on(mesh: Mesh, tree: Any, default: jax.P = jax.P()) -> Any:  # noqa: B008
    """Abstract arrays, each with its own spec or else ``default``, on a mesh."""

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding is not None else default
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    return jax.tree.map(place, tree)


def array(mesh: Mesh, shape: tuple[int, ...], dtype: Any, spec: jax.P) -> Any:
    """An abstract array on the devices of a mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def compile_ahead(
    function: Callable[..., Any], mesh: Mesh, *arguments: Any, **static: Any
) -> Compiled:
    """Compile a jitted function for the devices of its abstract arguments.

    The compiler is asked to write its buffer assignment down; it does so before it
    refuses a program that does not fit.

    Raises:
        jax.errors.JaxRuntimeError: it does not compile, for any other reason than HBM.
    """
    start = time.perf_counter()
    with tracing(mesh):
        lowered = function.trace(*arguments, **static).lower()  # type: ignore[attr-defined]
    refused, code = "", 0
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        with _uncached():
            try:
                compiled = lowered.compile({"xla_dump_to": folder})
                code = compiled.memory_analysis().generated_code_size_in_bytes
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                refused = first_sentence(str(error))
        texts = [
            _dumped(Path(folder), f"after_optimizations{part}.txt")
            for part in ("", "-buffer-assignment", "-live-range")
        ]
    seconds = time.perf_counter() - start
    return Compiled(Module(texts[0]), texts[1], texts[2], code, seconds, refused)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without the compilation cache: what comes from there writes nothing down."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX looks at the setting once, unless told to forget.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def first_sentence(error: str) -> str:
    """Of a compiler's error, without its code."""
    text = re.sub(r"^\w+: ", "", " ".join(error.split()))
    return re.split(r"(?<=[a-z)])\. ", text)[0].removesuffix(".")


def _dumped(folder: Path, ending: str) -> str:
    found = sorted(folder.glob(f"*{ending}"))
    if not found:
        names = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise RuntimeError(f"the compiler wrote no *{ending}, but {names}")
    # Of one program; small helpers that come with it are compiled before it.
    return max(found, key=lambda p: p.stat().st_size).read_text()
