"""The index: one protocol, an exact search on the mesh, and ScaNN on the hosts.

Several processes search as one: each holds a part of the passages, answers every query
from it, and all of them merge what they found. Embeddings are those of the whole, in
one folder; ScaNN is built over shards of them, ``scann/00000``, ``scann/00001``, ...
(``scann`` itself where there is but one), which any number of processes deal out among
each other.

Scores are dot products in float32, never less: those of DRAGON+ are near 400, where
bfloat16 steps by 2.
"""

import dataclasses
import difflib
import functools
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int64

from radit_jax import processes, sharding
from radit_jax.batch import Retrieved
from radit_jax.retrieval.embed import EmbeddingStore

KINDS = ("scann", "exact")

# ScaNN's own guidance (scann/docs/algorithms.md): score exactly below 20k points,
# quantise and rescore up to 100k, partition into about sqrt(N) leaves above.
BRUTE_FORCE_BELOW = 20_000
PARTITION_FROM = 100_000
# Passages of a leaf, at least: ScaNN writes an index with a codebook per leaf in
# memory, 2.5 kB for each dimension, which for leaves of 640 is as much as the passages.
LEAF_SIZE = 640

# A few queries run in a program of their own, so that one question does not pay for
# a whole block.
FEW_QUERIES = 8

# Rows that are read at a time, 50 MB of width 768.
READ_ROWS = 16384

# Float32 scores that one device holds at a time, 512 MiB.
MAX_SCORES = 2**27

INDEX_FILE = "index.json"
_ASSETS = "scann_assets.pbtxt"  # that ScaNN writes last
_FORMAT = 1


@runtime_checkable
class Index(Protocol):
    """Finds the passages with the largest dot products."""

    size: int  # passages
    width: int  # of an embedding
    # Whether all processes must search together, for the same queries.
    together: bool

    def search(self, queries_BE: Float32[np.ndarray, "B E"], k: int) -> Retrieved:
        """The best ``k`` passages of each query, best first, ties by the lower id.

        Where the index has fewer than ``k`` passages, ids end in -1 and scores in -inf.

        Raises:
            ValueError: queries of another width than the index, or not finite; k < 1.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ScannSettings:
    """What ScaNN trades between speed and recall; None is chosen from the size.

    Attributes:
        leaves: partitions, by default the square root of the number of passages, and at
            least 640 passages in each.
        leaves_to_search: partitions each query looks into, by default a tenth.
        reorder: candidates per query whose exact scores are computed (at least 2 k).
        training_sample: passages that the partitions and codes are learnt from, by
            default a quarter of them, but 100,000 at most and 40 per leaf at least.
        threads: by default the cores this process may use.
    """

    leaves: int | None = None
    leaves_to_search: int | None = None
    reorder: int = 100
    training_sample: int | None = None
    threads: int | None = None

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value is not None and value < 1:
                raise ValueError(f"ScaNN's {name} must be at least 1, got {value}")

    def resolve(self, size: int) -> "ScannSettings":
        """These settings for ``size`` passages; leaves stay None if there are none."""
        leaves = leaves_to_search = None
        if _structure(size) == "tree_ah":
            leaves = max(min(math.isqrt(size), size // LEAF_SIZE), 1)
            leaves = min(self.leaves or leaves, size)
            leaves_to_search = min(self.leaves_to_search or -(-leaves // 10), leaves)
        return ScannSettings(
            leaves=leaves,
            leaves_to_search=leaves_to_search,
            reorder=self.reorder,
            training_sample=min(
                self.training_sample
                or max(min(size // 4, 100_000), 40 * (leaves or 0), 1),
                size,
            ),
            threads=self.threads or _cores(),
        )


class Built(NamedTuple):
    """What ``build_index`` made, for the manifest."""

    kind: str  # "exact" where ScaNN was asked for and cannot be imported
    structure: str  # "exact", or ScaNN's "brute_force", "ah", "tree_ah"
    recall_at_10: float  # against exact search, on sampled queries
    seconds: float
    shards: int  # of ScaNN; 1 for exact
    settings: dict[str, int | None]  # ScaNN's, as resolved for a shard; {} for exact


class ExactIndex:
    """Every score is computed, on the mesh; each device holds its share of the rows.

    Device memory is ``4 * N * E / devices`` bytes, half of it in bfloat16, and at most
    512 MiB of scores.

    Args:
        embeddings: the passages; each device's rows are read straight from disk.
        mesh: the devices; all of them share the rows, whatever the axes.
        block_size: queries per program run; fewer where scores would not fit.
        recall_target: if given, ``jax.lax.approx_max_k`` picks each device's best, with
            this expected recall, at the speed of the matmul on a TPU. None is exact;
            so is ``approx_max_k`` on other backends.
        dtype: of the passages on the devices; scores of float32 queries with passages
            rounded to bfloat16 are exact but for that rounding.
    """

    def __init__(
        self,
        embeddings: EmbeddingStore,
        mesh: Mesh,
        *,
        block_size: int = 128,
        recall_target: float | None = None,
        dtype: DTypeLike = np.float32,
    ):
        if recall_target is not None and not 0 < recall_target <= 1:
            raise ValueError(f"recall_target must be in (0, 1], got {recall_target}")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.size, self.width = embeddings.shape
        self.together = processes.count() > 1
        self._mesh = mesh
        self._recall_target = recall_target
        rows = -(-self.size // mesh.size)
        fused = recall_target is not None and mesh.devices.flat[0].platform == "tpu"
        self._block = block_of(block_size, rows, fused)

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(rows * mesh.size)
            found = embeddings.rows(start, stop)
            padding = stop - start - len(found)
            found = np.pad(found, ((0, padding), (0, 0))) if padding else found
            return found.astype(dtype, copy=False)

        self._embeddings_NE = jax.make_array_from_callback(
            (rows * mesh.size, self.width),
            NamedSharding(mesh, sharding.INDEX_NE),
            read,
        )

    def search(self, queries_BE: Float32[np.ndarray, "B E"], k: int) -> Retrieved:
        """The best ``k`` passages of each query; see ``Index``."""
        _check_queries(queries_BE, self.width, k)
        found = _nothing(len(queries_BE), k)
        best = min(k, self.size)
        few = min(FEW_QUERIES, self._block)
        block = few if len(queries_BE) <= few else self._block
        with jax.set_mesh(self._mesh):
            for start in range(0, len(queries_BE), block):
                rows = queries_BE[start : start + block]
                padded_BE = np.zeros((block, self.width), np.float32)
                padded_BE[: len(rows)] = rows
                scores_BC, ids_BC = exact_search(
                    sharding.put(padded_BE, sharding.REPLICATED),
                    self._embeddings_NE,
                    k=best,
                    size=self.size,
                    recall_target=self._recall_target,
                )
                block_rows = slice(start, start + len(rows))
                found.scores[block_rows, :best] = np.asarray(scores_BC)[: len(rows)]
                found.ids[block_rows, :best] = np.asarray(ids_BC)[: len(rows)]
        return found


def block_of(block_size: int, rows: int, fused: bool) -> int:
    """Queries that are searched for at once.

    Args:
        block_size: the most.
        rows: passages that a device holds.
        fused: the best are picked as scores are made, as a TPU does ``approx_max_k``;
            so that no scores are kept.
    """
    return block_size if fused else max(min(block_size, MAX_SCORES // rows), 1)


@functools.partial(jax.jit, static_argnames=("k", "size", "recall_target"))
def exact_search(
    queries_BE: Float[Array, "B E"],
    embeddings_NE: Float[Array, "N E"],
    *,
    k: int,
    size: int,
    recall_target: float | None,
) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
    """Scores and ids of the best ``k`` rows among the first ``size``."""

    def local_best(queries_BE: Array, embeddings_NE: Array) -> tuple[Array, Array]:
        rows = len(embeddings_NE)
        first = jax.lax.axis_index(sharding.AXES) * rows
        # HIGHEST keeps TPUs from bfloat16 and GPUs from TF32.
        scores_BN = jax.lax.dot_general(
            queries_BE,
            embeddings_NE,
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        # Rows past the end only fill the last devices up.
        is_passage_N = first + jnp.arange(rows) < size
        scores_BN = jnp.where(is_passage_N[None, :], scores_BN, -jnp.inf)
        if recall_target is None:
            scores_BC, rows_BC = jax.lax.top_k(scores_BN, min(k, rows))
        else:
            scores_BC, rows_BC = jax.lax.approx_max_k(
                scores_BN, min(k, rows), recall_target=recall_target
            )
        return scores_BC, first + rows_BC

    scores_BC, ids_BC = jax.shard_map(
        local_best,
        in_specs=(sharding.REPLICATED, sharding.INDEX_NE),
        out_specs=(sharding.CANDIDATES_BC, sharding.CANDIDATES_BC),
    )(queries_BE, embeddings_NE)
    # Devices hold rows in order and top_k puts the earlier of two equals first, here
    # and above, so ties go to the lower id.
    scores_BC = jax.sharding.reshard(scores_BC, sharding.REPLICATED)
    ids_BC = jax.sharding.reshard(ids_BC, sharding.REPLICATED)
    scores_BC, best_BC = jax.lax.top_k(scores_BC, k)
    return scores_BC, jnp.take_along_axis(ids_BC, best_BC, axis=1)


class ScannIndex:
    """ScaNN on the hosts' CPUs finds candidates; their exact scores decide.

    ScaNN keeps 4-bit codes only, ``N * E / 4`` bytes, a sixteenth of the embeddings.
    Its own reordering would hold a second float32 copy of them in memory and on disk,
    so candidates are rescored here, from the store on disk.

    Where there are several shards and several processes, each process holds some of the
    shards, possibly none, and all search together. One shard alone is held by every
    process, which then searches by itself.

    Args:
        searchers: of the shards that this process holds, the first row and a ScaNN
            searcher of each.
        embeddings: all passages.
        settings: resolved settings that the shards were built with.
        shards: of all processes.
    """

    def __init__(
        self,
        searchers: Sequence[tuple[int, Any]],
        embeddings: EmbeddingStore,
        settings: ScannSettings,
        shards: int,
    ):
        self.size, self.width = embeddings.shape
        self.together = shards > 1 and processes.count() > 1
        self._searchers = searchers
        self._embeddings = embeddings
        self._settings = settings
        self._threads = settings.threads or _cores()
        for _, searcher in searchers:
            searcher.set_num_threads(self._threads)

    @classmethod
    def load(
        cls,
        embeddings: EmbeddingStore,
        folder: str | os.PathLike[str],
        settings: ScannSettings,
        shards: int,
    ) -> "ScannIndex":
        """Opens this process' shards of what ``build_index`` wrote, with the settings
        they were built with.

        Raises:
            FileNotFoundError: a shard is missing.
        """
        scann = _import_scann()
        assert scann is not None
        ranges = _shard_ranges(len(embeddings), shards)
        step = processes.count() if shards > 1 else 1
        searchers = []
        for shard in range(processes.index() % step, shards, step):
            path = _shard_folder(Path(folder), shard, shards)
            if not (path / _ASSETS).exists():
                raise FileNotFoundError(
                    f"{path / _ASSETS} is missing: the ScaNN shard {shard} of {shards} "
                    "is not there; delete index.json beside it and run the index stage "
                    "again"
                )
            searcher = scann.load_searcher(
                os.fspath(path), assets_backcompat_shim=False
            )
            searchers.append((ranges[shard][0], searcher))
        return cls(searchers, embeddings, settings, shards)

    def search(self, queries_BE: Float32[np.ndarray, "B E"], k: int) -> Retrieved:
        """The best ``k`` passages of each query; see ``Index``.

        The scores are exact; a passage whose partition was not searched is missed.
        """
        _check_queries(queries_BE, self.width, k)
        found = _nothing(len(queries_BE), k)
        candidates = max(self._settings.reorder, 2 * k)
        # Blocks bound the gathered rows to about 256 MiB.
        block = max(2**26 // (candidates * self.width), 1)
        for start in range(0, len(queries_BE), block):
            rows = slice(start, start + block)
            ids_BC = self._candidates(queries_BE[rows], candidates, k)
            scores_BC = self._scores(queries_BE[rows], ids_BC)
            best = _best(ids_BC, scores_BC, k)
            if self.together:
                best = _best_of_all(best)
            found.scores[rows], found.ids[rows] = best.scores, best.ids
        return found

    def _candidates(
        self, queries_BE: np.ndarray, candidates: int, k: int
    ) -> Int64[np.ndarray, "B C"]:
        """Ids of candidates in no order that matters, -1 where there were no more.

        Of all shards here together there are no more than of one: ScaNN's own scores
        choose.
        """
        ids_BC = np.empty((len(queries_BE), 0), np.int64)
        scores_BC = np.empty((len(queries_BE), 0), np.float32)
        for first, searcher in self._searchers:
            ids, scores = self._ask(searcher, queries_BE, candidates, k)
            ids_BC = np.concatenate([ids_BC, np.where(ids < 0, -1, first + ids)], 1)
            scores_BC = np.concatenate([scores_BC, scores], 1)
        if ids_BC.shape[1] > candidates:
            best_BC = np.argpartition(-scores_BC, candidates - 1, axis=1)
            ids_BC = np.take_along_axis(ids_BC, best_BC[:, :candidates], axis=1)
        return ids_BC

    def _ask(
        self, searcher: Any, queries_BE: np.ndarray, candidates: int, k: int
    ) -> tuple[Int64[np.ndarray, "B C"], Float32[np.ndarray, "B C"]]:
        """Rows of a shard, -1 where there were no more, and ScaNN's scores of them."""
        size = searcher.size()
        candidates = min(candidates, size)

        def ask(queries_BE: np.ndarray, leaves: int | None) -> tuple[Any, Any]:
            # Small batches too are spread over the threads.
            per_thread = -(-len(queries_BE) // self._threads)
            ids_BC, scores_BC = searcher.search_batched_parallel(
                np.ascontiguousarray(queries_BE),
                candidates,
                candidates,
                leaves,
                batch_size=min(per_thread, 256),
            )
            # Where the leaves held too few, ScaNN fills up with id 0 and a NaN score.
            nothing_BC = np.isnan(scores_BC)
            return (
                np.where(nothing_BC, -1, ids_BC.astype(np.int64)),
                np.where(nothing_BC, np.float32(-np.inf), scores_BC),
            )

        ids_BC, scores_BC = ask(queries_BE, self._settings.leaves_to_search)
        short = np.flatnonzero((ids_BC >= 0).sum(axis=1) < min(k, size))
        if len(short):
            ids_BC[short], scores_BC[short] = ask(
                queries_BE[short], self._settings.leaves
            )
        return ids_BC, scores_BC

    def _scores(
        self, queries_BE: np.ndarray, ids_BC: np.ndarray
    ) -> Float32[np.ndarray, "B C"]:
        """Exact scores of candidates."""
        passages_BCE = self._embeddings[np.maximum(ids_BC, 0)]
        scores_BC = np.matmul(passages_BCE, queries_BE[:, :, None])[:, :, 0]
        return np.where(ids_BC < 0, np.float32(-np.inf), scores_BC)


def _build_shard(
    embeddings: EmbeddingStore,
    start: int,
    stop: int,
    folder: Path,
    settings: ScannSettings,
    structure: str,
) -> None:
    """Trains ScaNN over some rows and serialises it into ``folder``, paths relative.

    The same embeddings give the same index: the sample is drawn with a fixed seed, and
    centres start from k-means++ with another one, because ScaNN's random start cannot
    be seeded.

    ScaNN copies what it is built over. So it is built over the training sample alone,
    and the rows follow block by block, each of them coded as it comes.
    """
    scann = _import_scann()
    assert scann is not None
    assert settings.training_sample is not None
    folder.mkdir(parents=True)
    size = stop - start
    if structure == "brute_force":
        sample = size
        first_NE = embeddings.rows(start, stop)
    else:
        sample = min(settings.training_sample, size)
        rows = np.random.default_rng(0).choice(size, sample, replace=False)
        first_NE = embeddings[start + np.sort(rows)]
    builder = scann.builder(first_NE, settings.reorder, "dot_product")
    builder.set_n_training_threads(settings.threads)
    if structure == "tree_ah":
        builder.tree(
            settings.leaves,
            settings.leaves_to_search,
            training_sample_size=sample,
            random_init=False,
        )
    if structure == "brute_force":
        builder.score_brute_force()
    else:
        # 2 dimensions per code and threshold 0.2 are the documented choices for maximum
        # inner product search.
        builder.score_ah(
            2, anisotropic_quantization_threshold=0.2, training_sample_size=sample
        )
    searcher = builder.build()
    del builder, first_NE
    if structure != "brute_force":
        searcher.set_num_threads(settings.threads)
        # The sample's places are taken by the first rows, the others are new.
        for row in range(0, size, READ_ROWS):
            rows_NE = embeddings.rows(start + row, min(start + row + READ_ROWS, stop))
            places = [
                place if place < sample else None
                for place in range(row, row + len(rows_NE))
            ]
            # Not by ScaNN's own wrapper, which keeps a dictionary of names.
            searcher.searcher.upsert(places, rows_NE, len(rows_NE))
    searcher.serialize(os.fspath(folder), relative_path=True)


def _shard_ranges(size: int, shards: int) -> list[tuple[int, int]]:
    """First row and end of each shard."""
    return [(size * s // shards, size * (s + 1) // shards) for s in range(shards)]


def _shard_folder(folder: Path, shard: int, shards: int) -> Path:
    return folder / f"{shard:05d}" if shards > 1 else folder


def _best(ids_BC: np.ndarray, scores_BC: np.ndarray, k: int) -> Retrieved:
    """The best ``k``, sorted, ties by the lower id, filled up where there are fewer."""
    found = _nothing(len(ids_BC), k)
    if scores_BC.shape[1] > k:
        # Only those as good as the k-th are sorted.
        least_B1 = np.partition(scores_BC, -k, axis=1)[:, -k, None]
        most = int((scores_BC >= least_B1).sum(axis=1).max())
        at_BC = np.argpartition(scores_BC, -most, axis=1)[:, -most:]
        ids_BC = np.take_along_axis(ids_BC, at_BC, axis=1)
        scores_BC = np.take_along_axis(scores_BC, at_BC, axis=1)
    order_BC = np.lexsort((ids_BC, -scores_BC), axis=-1)[:, :k]
    best = order_BC.shape[1]
    found.ids[:, :best] = np.take_along_axis(ids_BC, order_BC, axis=1)
    found.scores[:, :best] = np.take_along_axis(scores_BC, order_BC, axis=1)
    return found


def _best_of_all(own: Retrieved) -> Retrieved:
    """The best of what all processes have found for the same queries, on all of them.

    They must ask together.
    """
    queries, k = own.ids.shape
    # Bits, so that one message carries both, and JAX does not cut ids to 32 of them.
    bits = np.concatenate([own.ids.view(np.int32), own.scores.view(np.int32)], axis=1)
    all_PBX = sharding.from_each(bits)
    ids_PBC = np.ascontiguousarray(all_PBX[:, :, : 2 * k]).view(np.int64)
    scores_PBC = np.ascontiguousarray(all_PBX[:, :, 2 * k :]).view(np.float32)
    return _best(
        ids_PBC.transpose(1, 0, 2).reshape(queries, -1),
        scores_PBC.transpose(1, 0, 2).reshape(queries, -1),
        k,
    )


def build_index(
    kind: str,
    embeddings: EmbeddingStore,
    folder: str | os.PathLike[str],
    *,
    settings: ScannSettings | None = None,
    shards: int = 0,
    queries_BE: Float32[np.ndarray, "B E"] | None = None,
    sample: int = 200,
    seed: int = 0,
) -> Built:
    """Writes an index over the embeddings into ``folder``, and measures its recall.

    All processes must call it together; each builds its share of ScaNN's shards, one at
    a time.

    Args:
        kind: "scann" or "exact". Where ScaNN cannot be imported, "exact" is built and
            the log says so.
        embeddings: the passages, usually in the same folder. The index refers to them
            by a relative path, so the two can be moved together.
        folder: where ``open_index`` will look.
        settings: ScaNN's, of each shard.
        shards: of ScaNN; 0 is one per process.
        queries_BE: queries to measure recall with; by default perturbed passages.
        sample: how many queries to measure with.
        seed: of the sample.

    Raises:
        ValueError: the kind is unknown, the queries have another width or are empty, or
            sample < 1, or there are more shards than passages.
    """
    if kind not in KINDS:
        nearest = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown index kind {kind!r}, expected one of {', '.join(KINDS)}; "
            f"did you mean {nearest!r}?"
        )
    if queries_BE is not None:
        # Before the build, which may take hours.
        _check_queries(queries_BE, embeddings.shape[1], k=1)
        if not len(queries_BE):
            raise ValueError("there are no queries to measure the recall with")
    if sample < 1:
        raise ValueError(f"sample must be at least 1, got {sample}")
    size = len(embeddings)
    if not 0 <= shards <= size:
        raise ValueError(
            f"{shards} shards of {size} passages: expected 1 to {size}, or 0 for one "
            "per process"
        )
    if kind == "scann" and not _scann_everywhere():
        logging.warning(
            "ScaNN cannot be imported (it has wheels for Linux only); the exact index "
            "serves instead"
        )
        kind = "exact"
    folder = Path(folder)
    shards = (shards or min(processes.count(), size)) if kind == "scann" else 1
    # What is left of an earlier build must not be taken for this one.
    if processes.first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX_FILE).unlink(missing_ok=True)
        if (folder / "scann").exists():
            shutil.rmtree(folder / "scann")
    processes.barrier("index is cleared")
    started = time.perf_counter()
    if kind == "exact":
        built = Built("exact", "exact", 1.0, 0.0, 1, {})
    else:
        # Shards differ by one passage at most; all are built as the smallest.
        resolved = (settings or ScannSettings()).resolve(size // shards)
        structure = _structure(size // shards)
        ranges = _shard_ranges(size, shards)
        for shard in range(processes.index(), shards, processes.count()):
            _build_shard(
                embeddings,
                *ranges[shard],
                _shard_folder(folder / "scann", shard, shards),
                resolved,
                structure,
            )
        processes.barrier("shards")
        for shard in range(shards):
            path = _shard_folder(folder / "scann", shard, shards)
            processes.wait_for(path / _ASSETS)
        seconds = time.perf_counter() - started
        index = ScannIndex.load(embeddings, folder / "scann", resolved, shards)
        rng = np.random.default_rng(seed)
        if queries_BE is None:
            queries_BE = _perturbed_passages(embeddings, sample, rng)
        elif len(queries_BE) > sample:
            queries_BE = queries_BE[rng.choice(len(queries_BE), sample, replace=False)]
        built = Built(
            "scann",
            structure,
            _recall(index, embeddings, queries_BE),
            seconds,
            shards,
            dataclasses.asdict(resolved),
        )
    content = {
        "format": _FORMAT,
        "kind": built.kind,
        "passages": embeddings.shape[0],
        "width": embeddings.shape[1],
        "embeddings": os.path.relpath(embeddings.folder, folder),
        "shards": built.shards,
        "settings": built.settings,
    }
    if processes.first():
        (folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n")
    processes.barrier("index")
    processes.wait_for(folder / INDEX_FILE)
    return built


def open_index(folder: str | os.PathLike[str], mesh: Mesh) -> Index:
    """Opens what ``build_index`` wrote; the mesh serves the exact index.

    All processes must call it together; there may be another number of them than when
    it was built.

    Raises:
        FileNotFoundError: the folder holds no index, or its embeddings are gone.
        ValueError: the embeddings are not those that the index was built over.
    """
    folder = Path(folder)
    path = folder / INDEX_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {folder} holds no complete index")
    content = json.loads(path.read_text())
    if content.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: expected format {_FORMAT}, found {content.get('format')}; it was "
            "written by another version"
        )
    embeddings = EmbeddingStore(folder / content["embeddings"])
    expected = (content["passages"], content["width"])
    if embeddings.shape != expected:
        raise ValueError(
            f"{path}: built over embeddings of shape {expected}, found "
            f"{embeddings.shape} in {embeddings.folder}; build the index again"
        )
    if content["kind"] == "scann":
        if _scann_everywhere():
            settings = ScannSettings(**{**content["settings"], "threads": None})
            # Indexes of before there were shards have one.
            shards = content.get("shards", 1)
            return ScannIndex.load(embeddings, folder / "scann", settings, shards)
        logging.warning(
            "%s is a ScaNN index and ScaNN cannot be imported; the exact index serves "
            "instead",
            folder,
        )
    return ExactIndex(embeddings, mesh)


def _cores() -> int:
    # Containers often grant fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _import_scann() -> ModuleType | None:
    """ScaNN's numpy interface, None where it is not installed or does not load."""
    try:
        # It has no type stubs, and where it is not installed mypy cannot find it.
        from scann.scann_ops.py import (
            scann_ops_pybind,
        )
    except ImportError:
        return None
    return scann_ops_pybind


def _scann_everywhere() -> bool:
    """Whether ScaNN can be imported.

    Raises:
        ProcessError: by some of the processes only; they must all search alike.
    """
    there = _import_scann() is not None
    processes.check_same("packages", {"scann": there})
    return there


def _structure(size: int) -> str:
    if size < BRUTE_FORCE_BELOW:
        return "brute_force"
    return "ah" if size < PARTITION_FROM else "tree_ah"


def _check_queries(queries_BE: np.ndarray, width: int, k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if queries_BE.shape[1] != width:
        raise ValueError(
            f"queries have width {queries_BE.shape[1]}, the index has width {width}; "
            "were the passages embedded with another encoder?"
        )
    for row in np.flatnonzero(~np.isfinite(queries_BE).all(axis=1)):
        raise ValueError(f"the embedding of query {row} is not finite")


def _nothing(queries: int, k: int) -> Retrieved:
    return Retrieved(
        ids=np.full((queries, k), -1, np.int64),
        scores=np.full((queries, k), -np.inf, np.float32),
    )


def _perturbed_passages(
    embeddings: EmbeddingStore, sample: int, rng: np.random.Generator
) -> Float32[np.ndarray, "B E"]:
    """Passages moved by half of what passages differ by."""
    ids = rng.choice(len(embeddings), min(sample, len(embeddings)), replace=False)
    passages_BE = embeddings[np.sort(ids)]
    noise_BE = rng.standard_normal(passages_BE.shape, np.float32)
    return passages_BE + 0.5 * passages_BE.std(axis=0, keepdims=True) * noise_BE


def _recall(
    index: Index, embeddings: EmbeddingStore, queries_BE: np.ndarray, k: int = 10
) -> float:
    """Share of the true best ``k`` that the index returns."""
    k = min(k, index.size)
    found = index.search(queries_BE, k).ids
    # Streaming over the store needs no device memory: the corpus may have come to
    # ScaNN because the devices cannot hold it. Each process reads its share.
    true = _nothing(len(queries_BE), k)
    start, stop = _shard_ranges(index.size, processes.count())[processes.index()]
    for row in range(start, stop, READ_ROWS):
        rows_NE = embeddings.rows(row, min(row + READ_ROWS, stop))
        ids_BN = np.broadcast_to(
            np.arange(row, row + len(rows_NE)), (len(queries_BE), len(rows_NE))
        )
        true = _best(
            np.concatenate([true.ids, ids_BN], axis=1),
            np.concatenate([true.scores, queries_BE @ rows_NE.T], axis=1),
            k,
        )
    if processes.count() > 1:
        true = _best_of_all(true)
    hits = [
        len(np.intersect1d(row, best))
        for row, best in zip(found, true.ids, strict=True)
    ]
    return float(np.sum(hits) / true.ids.size)
