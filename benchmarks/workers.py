"""What the benchmarks share: peers as child processes, and who else used the CPU."""

import json
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

PEER = Path(__file__).parent / "peer.py"
# A repeat during which other programs used more of the CPU than this is not counted.
FOREIGN = 0.05


class Peer:
    """A PyTorch worker that runs one repeat at a time."""

    def __init__(self, python: Path, job: str, **settings: Any):
        self._process = subprocess.Popen(
            [str(python), str(PEER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.ready = self._ask({"job": job, **settings})

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._process.pid

    def __call__(self) -> dict[str, Any]:
        """One repeat."""
        return self._ask({"go": True})

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the peer ended"}
        if "error" in answer:
            raise RuntimeError(f"peer: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        self._process.stdin.write('{"quit": true}\n')
        self._process.stdin.close()
        self._process.wait(60)


def cpu_ticks() -> tuple[int, int]:
    """(busy, all) ticks of every processor since the machine started; Linux only."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    idle = fields[3] + fields[4]
    return sum(fields[:8]) - idle, sum(fields[:8])


def own_ticks(pids: list[int]) -> int:
    """Ticks that some processes have used."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total


OURS = "radit_jax"


def interleaved(
    ours: Any, peers: dict[str, Peer], repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Run every contender in turn, again and again; the first round warms up.

    A repeat disturbed by other programs is printed and left out. The peers are closed.
    """
    runs = {OURS: ours, **peers}
    pids = [os.getpid(), *(peer.pid for peer in peers.values())]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for round in range(1 + repeats):
        for name, run in runs.items():
            busy, ticks = cpu_ticks()
            own = own_ticks(pids)
            start = time.perf_counter()
            result = run()
            result.setdefault("seconds", time.perf_counter() - start)
            busy_now, ticks_now = cpu_ticks()
            spent = own_ticks(pids) - own
            foreign = max(busy_now - busy - spent, 0) / max(ticks_now - ticks, 1)
            result["foreign"] = foreign
            counted = round > 0 and foreign <= FOREIGN
            print(
                f"  round {round:2d}  {name:28s} {result['seconds']:8.2f} s   "
                f"others used {100 * foreign:4.1f} % of the CPU"
                f"{'' if counted else '   (not counted)'}",
                flush=True,
            )
            if counted:
                found[name].append(result)
    for peer in peers.values():
        peer.close()
    return found


def median(results: list[dict[str, Any]], field: str) -> float:
    """Median of a field of the counted repeats.

    Raises:
        RuntimeError: none was counted, the machine was too busy.
    """
    if not results:
        raise RuntimeError("no repeat was undisturbed; run again on a quieter machine")
    return statistics.median(result[field] for result in results)
