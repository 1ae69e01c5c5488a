"""The front door: ``python -m radit_jax.main --config configs/STAGE.py[:variant]``."""

import ast
import difflib
import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags
from absl import logging as absl_logging
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict, config_flags

from radit_jax import processes
from radit_jax.loop import Stopped
from radit_jax.stages import evaluate, preview
from radit_jax.stages.radit import STAGES, run_chain
from radit_jax.stages.stage import run, section, settings_of

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="A recipe such as configs/radit.py:demo.", lock_config=True
)

# Exit status of a run that was stopped by a signal after saving: it can go on.
INTERRUPTED = 75

COMMANDS: dict[str, Callable[[ConfigDict], object]] = {
    "radit": run_chain,
    **{name: functools.partial(run, name, stage) for name, stage in STAGES.items()},
    "preview": preview.show,
    "evaluate": evaluate.show,
}


def main(argv: Sequence[str]) -> None:
    """Run the stage that the config names."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if _CONFIG.value is None:
        raise app.UsageError("give a recipe: --config configs/radit.py:demo")
    config = _CONFIG.value
    absl_logging.set_verbosity(absl_logging.INFO)
    quiet_libraries()
    use_compilation_cache(config)
    try:
        processes.start(settings_of(processes.Settings, config.distributed))
        if not processes.first():
            # What all of them do is told once; their warnings are their own.
            absl_logging.set_verbosity(absl_logging.WARNING)
        processes.check_same_start(section(config))
        COMMANDS[config.stage](config)
        processes.finish()
    except Stopped as stopped:
        logging.error("%s", stopped)
        processes.finish()
        sys.exit(INTERRUPTED if type(stopped) is Stopped else 1)
    except (ValueError, OSError) as error:
        # The user's to mend: the message says what. --config.debug shows where.
        if config.debug:
            leave_all(error)
            raise
        print(f"error: {error}", file=sys.stderr)
        leave_all(error, shown=True)
        sys.exit(1)
    except JaxRuntimeError as error:
        if processes.count() > 1:
            logging.error("an operation between processes failed: %s", error)
            processes.await_verdict()
        leave_all(error)
        raise
    except BaseException as error:
        leave_all(error)
        raise


def leave_all(error: BaseException, shown: bool = False) -> None:
    """Where there are several processes: tell the others of an error, and end.

    Args:
        error: is told.
        shown: whether the user of this process has seen it.
    """
    if processes.count() == 1:
        return
    if not shown:
        traceback.print_exception(error)
    processes.fail(str(error) or type(error).__name__)
    sys.stdout.flush()
    sys.stderr.flush()
    # An orderly end would wait for the others.
    os._exit(1)


def quiet_libraries() -> None:
    """Checkpointing and data libraries tell of every file at INFO; keep warnings."""
    for name in ("orbax", "jax", "grain", "tensorstore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("jax._src.xla_bridge",):
        logging.getLogger(name).setLevel(logging.ERROR)
    noisy = ("orbax", "jax", "grain", "tensorstore", "flax")

    def ours(record: logging.LogRecord) -> bool:
        from_library = any(f"/{name}/" in record.pathname for name in noisy)
        return record.levelno >= logging.WARNING or not from_library

    # Orbax logs through absl's one logger, so it can only be told by its path.
    absl_logging.get_absl_handler().addFilter(ours)


def use_compilation_cache(config: ConfigDict) -> None:
    """Keep compiled programs between runs, unless the config switches it off."""
    if config.compilation_cache:
        folder = Path(config.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def check_recipe(arguments: Sequence[str]) -> None:
    """Say which recipes there are when the one asked for is not; make ``configs``
    importable from wherever the command is run.

    Raises:
        SystemExit: there is no such file.
    """
    for i, argument in enumerate(arguments):
        value = ""
        if argument in ("--config", "-config") and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(("--config=", "-config=")):
            value = argument.split("=", 1)[1]
        if not value:
            continue
        path = Path(value.split(":", 1)[0])
        if not path.is_file():
            known = sorted(
                str(p)
                for p in path.parent.glob("*.py")
                if "def get_config(" in p.read_text()
            ) or [f"configs/{name}.py" for name in COMMANDS]
            near = difflib.get_close_matches(str(path), known, 1, 0.3)
            hint = f"; did you mean {near[0]}?" if near else "."
            sys.exit(f"error: no recipe {path}{hint} There are: {', '.join(known)}")
        # Recipes import their siblings as ``configs.<name>``.
        sys.path.insert(0, str(path.resolve().parent.parent))


def parse_flags(arguments: list[str]) -> list[str]:
    """Read the command line; what is wrong with it is said in one line.

    Raises:
        SystemExit: the recipe has no such field or variant, or a value is of the wrong
            kind.
    """
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        text = str(error)
        if text[:1] == text[-1:] and text[:1] in ("'", '"'):
            # What was a KeyError shows its message as Python would quote it.
            text = str(ast.literal_eval(text))
        # ml_collections folds the traceback of what a recipe raised into its message.
        lines = [line for line in text.splitlines() if line.strip()]
        message = lines[-1] if "Traceback" in text else " ".join(lines)
        sys.exit(f"error: {message.removeprefix('ValueError: ')}")


def front_door() -> None:
    """Check the command line, then run what it asks for."""
    check_recipe(sys.argv[1:])
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    front_door()
