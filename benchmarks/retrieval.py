"""Retrieval: exact search and ScaNN over made-up passages, from 0.1 to 2 million.

    python benchmarks/retrieval.py --passages 100000 500000 2000000

Every phase of every size is a process of its own: the vectors are drawn and written as
the index stage would, the exact index is loaded and searched, ScaNN is built, ScaNN is
searched. Needs 3.5 GB of disk in --folder and 4 GB of memory per million passages.
Results are added to --results; a phase whose result is there is not run again, so a
long run can be cut.

Vectors are 768 wide. Like those of a text encoder they lie in clusters of clusters and
use few directions: a document has about 12 passages (log-normal), a topic about 30
documents; of the variance 40 % is between topics, 30 % between the documents of one and
30 % between the passages of one. All three are Gaussian in 256 latent directions, the
standard deviation of direction i falls as exp(-(i / 29) ** 0.75 / 2), turned at random
into the 768; a common mean has a fifth of the variance. ``--like FILES`` prints, beside
the same figures of drawn vectors, those of real embeddings that this follows. A query
is a random passage moved by a Gaussian of the same directions, with 40 % of the
variance.

Printed per size: seconds to build; peak resident memory of the building process, of
which so much was there before it began, over the size of the vectors; queries a second
of 256 at once; recall@10 against exact search, also with half and with three times the
leaves searched.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, LATENT = 768, 256
QUERIES = 256
BETWEEN = {"topic": 0.4, "document": 0.3, "passage": 0.3}
QUERY_NOISE = 0.4
MEAN = 0.2
PHASES = ("draw", "exact", "build", "scann")


class Drawn:
    """Rows in order of documents, drawn when they are asked for, in order."""

    def __init__(self, size: int, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        spread = np.exp(-((np.arange(LATENT) / 29) ** 0.75) / 2)
        spread /= np.sqrt((spread**2).sum())
        turn, _ = np.linalg.qr(self.rng.standard_normal((WIDTH, LATENT)))
        self.directions = (spread[:, None] * turn.T).astype(np.float32)
        mean = self.rng.standard_normal(WIDTH)
        self.mean = (mean * np.sqrt(MEAN) / np.linalg.norm(mean)).astype(np.float32)
        lengths = np.ceil(self.rng.lognormal(2.0, 1.0, size // 8 + 100))
        ends = np.cumsum(lengths).astype(np.int64)
        self.document = np.searchsorted(ends, np.arange(size), side="right")
        documents = int(self.document[-1]) + 1
        topics = self.normal(max(documents // 30, 1), BETWEEN["topic"])
        self.centres = topics[self.rng.integers(0, len(topics), documents)]
        self.centres += self.normal(documents, BETWEEN["document"])

    def normal(self, rows: int, variance: float) -> np.ndarray:
        """Latent vectors."""
        scale = np.float32(np.sqrt(variance))
        return scale * self.rng.standard_normal((rows, LATENT), np.float32)

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, rows: slice) -> np.ndarray:
        documents = self.document[rows]
        latent = self.centres[documents]
        latent = latent + self.normal(len(documents), BETWEEN["passage"])
        return latent @ self.directions + self.mean


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def draw(folder: Path, size: int) -> dict[str, Any]:
    """The store and the queries."""
    from radit_jax.retrieval.embed import write_embeddings

    drawn = Drawn(size)
    store = write_embeddings(drawn, folder, shard_size=131_072)
    ids = np.sort(drawn.rng.choice(size, QUERIES, replace=False))
    noise = drawn.normal(QUERIES, QUERY_NOISE) @ drawn.directions
    queries_BE = drawn.rng.permutation(store[ids] + noise)
    np.save(folder / "queries.npy", queries_BE.astype(np.float32))
    return {"bytes": size * WIDTH * 4}


def searched(index: Any, queries_BE: np.ndarray) -> tuple[np.ndarray, float]:
    """Ids of the best 10, and queries a second once programs are compiled."""
    index.search(queries_BE[:16], 10)
    index.search(queries_BE, 10)
    start = time.perf_counter()
    ids = index.search(queries_BE, 10).ids
    return ids, len(queries_BE) / (time.perf_counter() - start)


def exact(folder: Path, size: int) -> dict[str, Any]:
    """The exact index on one device."""
    from radit_jax import sharding
    from radit_jax.retrieval.embed import EmbeddingStore
    from radit_jax.retrieval.index import ExactIndex

    mesh = sharding.make_mesh(1, 1, 1)
    before, start = memory("VmRSS"), time.perf_counter()
    index = ExactIndex(EmbeddingStore(folder), mesh)
    seconds, peak = time.perf_counter() - start, memory("VmHWM")
    ids, speed = searched(index, np.load(folder / "queries.npy"))
    np.save(folder / "true.npy", ids)
    return {"seconds": seconds, "before": before, "peak": peak, "queries/s": speed}


def build(folder: Path, size: int, shards: int) -> dict[str, Any]:
    """ScaNN, as the index stage builds it."""
    from radit_jax.retrieval.embed import EmbeddingStore
    from radit_jax.retrieval.index import build_index

    before = memory("VmRSS")
    built = build_index(
        "scann",
        EmbeddingStore(folder),
        folder / f"index-{shards}",
        shards=shards,
        queries_BE=np.load(folder / "queries.npy"),
        sample=QUERIES,
    )
    files = (folder / f"index-{shards}" / "scann").rglob("*")
    return {
        "seconds": built.seconds,
        "before": before,
        "peak": memory("VmHWM"),
        "disk": sum(file.stat().st_size for file in files if file.is_file()),
        "structure": built.structure,
        "recall": built.recall_at_10,
        **built.settings,
    }


def scann(folder: Path, size: int, shards: int) -> dict[str, Any]:
    """Recall and speed for several numbers of leaves."""
    from radit_jax.retrieval.embed import EmbeddingStore
    from radit_jax.retrieval.index import ScannIndex, ScannSettings

    store, queries_BE = EmbeddingStore(folder), np.load(folder / "queries.npy")
    true = np.load(folder / "true.npy")
    where = folder / f"index-{shards}"
    content = json.loads((where / "index.json").read_text())
    settings = ScannSettings(**content["settings"])
    found: dict[str, Any] = {}
    for share in (0.05, 0.1, 0.3):
        searching = settings
        if settings.leaves is not None:
            leaves = max(round(share * settings.leaves), 1)
            searching = dataclasses.replace(settings, leaves_to_search=leaves)
        index = ScannIndex.load(store, where / "scann", searching, shards)
        ids, speed = searched(index, queries_BE)
        hits = [np.intersect1d(a, b).size for a, b in zip(ids, true, strict=True)]
        found[f"recall {share}"] = float(np.sum(hits) / true.size)
        found[f"queries/s {share}"] = speed
    return found | {"peak": memory("VmHWM")}


def like(files: list[str]) -> None:
    """Print what drawn vectors should have in common with real ones."""
    real = np.concatenate([np.load(file) for file in files])
    for name, x_NE in (("real", real), ("drawn", Drawn(len(real))[:])):
        mean = x_NE.mean(0)
        x_NE = x_NE - mean
        squares = (x_NE**2).sum(1)
        values = np.linalg.eigvalsh(np.cov(x_NE.T))[::-1] / squares.mean()
        some_BE = x_NE[:: max(len(x_NE) // 400, 1)]
        distances = (some_BE**2).sum(1)[:, None] + squares - 2 * some_BE @ x_NE.T
        nearest = np.median(np.sort(distances, 1), axis=0) / distances.mean()
        shares = [f"{values[:n].sum():.2f}" for n in (1, 8, 32, 64, 128, 256)]
        ranks = [f"{nearest[rank]:.2f}" for rank in (1, 10, 100, 1000)]
        print(f"{name}: mean {(mean**2).sum() / squares.mean():.2f} of the variance")
        print(f"  variance in the first 1, 8, 32, 64, 128, 256: {', '.join(shares)}")
        print(f"  squared distance of neighbours 1, 10, 100, 1000: {', '.join(ranks)}")


def table(results: dict[str, Any], shards: int) -> None:
    """Print all sizes."""
    print(
        f"{'passages':>10s} {'GB':>5s} {'build s':>8s} {'peak GB':>8s} {'(before)':>8s}"
        f" {'peak/size':>9s} {'exact q/s':>9s} {'ScaNN q/s':>9s} {'recall@10':>9s}"
        f"  at 0.5x and 3x leaves"
    )
    for size, row in sorted(results.items(), key=lambda item: int(item[0])):
        built, found = row.get(f"build-{shards}"), row.get(f"scann-{shards}")
        if built is None or found is None:
            continue
        whole = row["draw"]["bytes"]
        others = ", ".join(
            f"{found[f'recall {share}']:.3f} ({found[f'queries/s {share}']:.0f} q/s)"
            for share in (0.05, 0.3)
        )
        print(
            f"{int(size):10,d} {whole / 1e9:5.2f} {built['seconds']:8.1f} "
            f"{built['peak'] / 1e9:8.2f} {built['before'] / 1e9:8.2f} "
            f"{built['peak'] / whole:9.2f} {row['exact']['queries/s']:9.0f} "
            f"{found['queries/s 0.1']:9.0f} {found['recall 0.1']:9.3f}  {others}"
        )


def main() -> None:
    """Run what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, nargs="+", default=[100_000, 500_000])
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--folder", type=Path, default=Path("runs/retrieval"))
    parser.add_argument("--results", type=Path, default=Path("runs/retrieval.json"))
    parser.add_argument("--clean", action="store_true", help="delete each size's files")
    parser.add_argument("--like", nargs="+", help=".npy files of real embeddings")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.like:
        like(options.like)
        return
    if options.worker:
        size = options.passages[0]
        folder = options.folder / str(size)
        given = [options.shards] if options.worker in ("build", "scann") else []
        found = {"draw": draw, "exact": exact, "build": build, "scann": scann}[
            options.worker
        ](folder, size, *given)
        print(json.dumps(found))
        return
    results = (
        json.loads(options.results.read_text()) if options.results.exists() else {}
    )
    for size in options.passages:
        row = results.setdefault(str(size), {})
        for phase in options.phases:
            sharded = phase in ("build", "scann")
            name = f"{phase}-{options.shards}" if sharded else phase
            if name in row:
                continue
            start = time.perf_counter()
            command = [sys.executable, __file__, "--worker", phase]
            command += ["--passages", str(size), "--shards", str(options.shards)]
            command += ["--folder", str(options.folder)]
            said = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            row[name] = json.loads(said.splitlines()[-1])
            print(f"{size:,d} {name}: {time.perf_counter() - start:.1f} s", flush=True)
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(results, indent=2) + "\n")
        if options.clean:
            shutil.rmtree(options.folder / str(size))
    table(results, options.shards)


if __name__ == "__main__":
    main()
