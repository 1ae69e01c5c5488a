"""Corpus: MB of text a second, and memory, of the stage that cuts passages.

    python benchmarks/corpus.py                              # 0.2 GB
    python benchmarks/corpus.py --gigabytes 0.2 2            # memory does not grow
    python benchmarks/corpus.py --engine single beam --workers 2

Documents are made up, with the statistics of Wikipedia sections: words by Zipf's law,
English word lengths, lines and texts of very different length, one document in fifty a
repetition of an earlier one, one in twenty in another script than Latin. Making them is
not timed. The stage's ``build`` runs in a process of its own, without JAX's devices.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
VOCABULARY = 200_000
WORDS_AT_ONCE = 200_000
FILES = 4  # of a corpus, so that Beam has something to spread


def documents(seed: int, size: float) -> Iterator[dict[str, str]]:
    """Rows of a corpus with some ``size`` bytes of text."""
    rng = np.random.default_rng(seed)
    letters = {
        "latin": list("etaoinshrdlucmfwygpbvk"),
        "greek": list("αοιεστηνρκπυμλωδγθχφβ"),
    }
    # Words share the seed, so that all files have the same vocabulary.
    words_of = {
        name: _vocabulary(np.random.default_rng(0), alphabet)
        for name, alphabet in letters.items()
    }
    chances = 1 / np.arange(10, VOCABULARY + 10)
    borders = np.cumsum(chances / chances.sum())
    written = 0
    number = 0
    earlier: list[tuple[str, str]] = []
    while written < size:
        ranks = np.searchsorted(borders, rng.random(WORDS_AT_ONCE))
        ranks = np.minimum(ranks, VOCABULARY - 1)
        at = 0
        while at < WORDS_AT_ONCE and written < size:
            number += 1
            script = "greek" if rng.random() < 0.05 else "latin"
            lines = []
            for _ in range(1 + rng.geometric(0.25)):
                length = 1 + int(rng.lognormal(3.7, 0.9))
                lines.append(" ".join(words_of[script][ranks[at : at + length]]))
                at += length
            text = "\n".join(lines)
            title = " ".join(words_of["latin"][rng.integers(VOCABULARY, size=2)])
            if earlier and rng.random() < 0.02:
                title, text = earlier[rng.integers(len(earlier))]
            elif len(earlier) < 1000:
                earlier.append((title, text))
            yield {"id": f"{number}", "title": title, "section": "", "text": text}
            written += len(text.encode())


def _vocabulary(rng: np.random.Generator, letters: list[str]) -> np.ndarray:
    lengths = 1 + rng.poisson(4.0, VOCABULARY)
    drawn = rng.choice(letters, int(lengths.sum()))
    ends = np.cumsum(lengths)
    words = [
        "".join(drawn[end - length : end])
        for end, length in zip(ends, lengths, strict=True)
    ]
    return np.array(words, object)


def make(folder: Path, gigabytes: float) -> int:
    """Write the files of a corpus unless they are there; returns their bytes."""
    size = gigabytes * 1e9 / FILES
    for at in range(FILES):
        path = folder / f"documents-{gigabytes}-{at}.jsonl"
        if path.is_file():
            continue
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            for row in documents(at, size):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        partial.rename(path)
    return sum(p.stat().st_size for p in folder.glob(f"documents-{gigabytes}-*"))


def work(options: dict[str, Any]) -> None:
    """Run the stage's function in this process; prints what it took as JSON."""
    sys.path.insert(0, str(ROOT))
    from configs import corpus as recipe
    from radit_jax.stages import corpus

    config = recipe.get_config("own")
    config.corpus.update(options["corpus"])
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options["folder"]) as folder:
        counts = corpus.build(config, Path(folder))
    seconds = time.perf_counter() - start
    own, children = (
        resource.getrusage(who)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    cpu = sum(u.ru_utime + u.ru_stime for u in (own, children))
    print(
        json.dumps(
            {
                **counts,
                "seconds": seconds,
                "cpu": cpu,
                "imported": imported / 1024,
                "peak": own.ru_maxrss / 1024,
            }
        )
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.2])
    parser.add_argument("--engine", nargs="+", default=["single"])
    parser.add_argument("--workers", type=int, default=1, help="processes of Beam")
    parser.add_argument("--near-duplicates", type=float, default=0.0)
    parser.add_argument("--max-words", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keeps the made-up documents")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(json.loads(options.work))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for gigabytes in options.gigabytes:
            size = make(folder, gigabytes)
            for _ in range(options.repeats):
                for engine in options.engine:
                    _measure(folder, gigabytes, size, engine, options)


def _measure(
    folder: Path, gigabytes: float, size: int, engine: str, options: Any
) -> None:
    beam = f"--direct_num_workers={options.workers}"
    if options.workers > 1:
        beam += " --direct_running_mode=multi_processing"
    settings = {
        "documents": f"{folder}/documents-{gigabytes}-*.jsonl",
        "engine": engine,
        "beam_options": beam,
        "near_duplicates": options.near_duplicates,
        "max_words": options.max_words,
    }
    argument = json.dumps({"corpus": settings, "folder": str(folder)})
    done = subprocess.run(
        [sys.executable, __file__, "--work", argument],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{engine:7s} {size / 1e9:5.2f} GB   {size / 1e6 / found['seconds']:6.1f} MB/s"
        f"   {found['passages'] / found['seconds']:8,.0f} passages/s"
        f"   {found['seconds']:7.1f} s   CPU {found['cpu']:7.1f} s"
        f"   peak {found['peak']:7.0f} MB ({found['imported']:.0f} MB when it began)"
        f"   {found['passages']:,} passages,"
        f" {found['duplicate_passages']:,} duplicates,"
        f" {found['near_duplicates']:,} near-duplicates",
        flush=True,
    )


if __name__ == "__main__":
    main()
