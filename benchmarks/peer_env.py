"""Makes the virtual environment of the PyTorch peer, apart from ours.

    python benchmarks/peer_env.py [FOLDER]

prints the path of its Python. The first call installs (a minute or more), later calls
return at once.

The wheel of torch is the one pip finds first under the exact pin. Where that is a CUDA
build, point pip at a folder or an index of CPU wheels (`PIP_FIND_LINKS`,
`PIP_EXTRA_INDEX_URL`) before the first call. The peer computes on the CPU either way
and says in its first answer which build it runs.
"""

import json
import logging
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / ".venv-peer"
TORCH = "torch==2.13.0"
LIBRARIES = (
    "transformers>=5.23,<6",
    "sentence-transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
)
MARKER = "peer-requirements.json"


def ensure(folder: str | Path = FOLDER) -> Path:
    """Returns the Python of the peer's environment, made or completed where needed."""
    folder = Path(folder).absolute()
    python = folder / (
        "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
    )
    marker = folder / MARKER
    wanted = json.dumps([TORCH, *LIBRARIES], indent=1)
    if python.exists() and marker.exists() and marker.read_text() == wanted:
        return python
    if (
        folder.exists()
        and any(folder.iterdir())
        and not (folder / "pyvenv.cfg").exists()
    ):
        raise ValueError(
            f"{folder} is neither empty nor a virtual environment: name another folder"
        )
    logging.info("making the peer's environment in %s", folder)
    venv.create(folder, with_pip=True)
    # torch comes first and stays pinned in the second call: the others ask for it
    # without a version, and pip would bring the newest.
    _install(python, TORCH)
    _install(python, TORCH, *LIBRARIES)
    marker.write_text(wanted)
    return python


def _install(python: Path, *requirements: str) -> None:
    # pip's own output goes to stderr, as it comes: stdout is for the path.
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *requirements],
        stdout=sys.stderr,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"pip could not install {', '.join(requirements)}: exit code "
            f"{done.returncode}, its reasons are above"
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.stdout.write(f"{ensure(*sys.argv[1:2])}\n")
