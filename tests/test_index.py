"""The index: exact search against numpy, ScaNN against exact search."""

import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

from radit_jax import processes, sharding
from radit_jax.batch import Retrieved
from radit_jax.retrieval import index
from radit_jax.retrieval.embed import write_embeddings

MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2)]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


def clustered(size, width, seed=0):
    """Passages in clusters of about 20, and queries near passages."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(size // 20, 1), width))
    passages = centres[rng.integers(0, len(centres), size)]
    passages = passages + 0.7 * rng.standard_normal((size, width))
    queries = passages[rng.integers(0, size, 60)]
    queries = queries + 0.5 * rng.standard_normal((60, width))
    return passages.astype(np.float32), queries.astype(np.float32)


def oracle(passages_NE, queries_BE, k):
    scores_BN = queries_BE.astype(np.float64) @ passages_NE.astype(np.float64).T
    ids = np.argsort(-scores_BN, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(scores_BN, ids, axis=1)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("size", [5, 64, 131])
def test_exact_is_argsort_with_ties_on_every_mesh(sizes, size, tmp_path):
    rng = np.random.default_rng(size)
    # Small integers: dot products are the same in any order of summation, and many
    # are equal. All scores are negative, so that a padding row's 0 would win.
    passages_NE = rng.integers(1, 3, (size, 6)).astype(np.float32)
    queries_BE = -rng.integers(1, 3, (21, 6)).astype(np.float32)
    store = write_embeddings(passages_NE, tmp_path, shard_size=50)
    exact = index.ExactIndex(store, sharding.make_mesh(*sizes), block_size=16)
    assert (exact.size, exact.width) == (size, 6)
    for k in (1, 7, size):
        ids, scores = oracle(passages_NE, queries_BE, k)
        found = exact.search(queries_BE, k)
        real = min(k, size)
        np.testing.assert_array_equal(found.ids[:, :real], ids)
        np.testing.assert_array_equal(found.scores[:, :real], scores)
        assert (found.ids[:, real:] == -1).all()
        assert found.ids.dtype == np.int64
        assert found.scores.dtype == np.float32


def test_exact_scores_near_400_keep_float32(tmp_path):
    rng = np.random.default_rng(3)
    passages_NE = (20 + 0.01 * rng.standard_normal((300, 64))).astype(np.float32)
    queries_BE = (0.3 + 0.01 * rng.standard_normal((4, 64))).astype(np.float32)
    store = write_embeddings(passages_NE, tmp_path)
    found = index.ExactIndex(store, sharding.make_mesh(2, 2, 2)).search(queries_BE, 10)
    _, scores = oracle(passages_NE, queries_BE, 10)
    assert scores.min() > 350
    np.testing.assert_allclose(found.scores, scores, atol=1e-3)


def test_exact_compiles_two_programs_per_k(tmp_path, mesh):
    passages_NE, queries_BE = clustered(100, 8)
    exact = index.ExactIndex(
        write_embeddings(passages_NE, tmp_path), mesh, block_size=16
    )
    index.exact_search.clear_cache()
    whole = exact.search(queries_BE, 3)
    for rows in (1, 5, 8, 9, 40):
        part = exact.search(queries_BE[:rows], 3)
        np.testing.assert_array_equal(part.ids, whole.ids[:rows])
    assert index.exact_search._cache_size() == 2


def test_exact_in_bfloat16_rounds_the_passages_alone(tmp_path):
    rng = np.random.default_rng(4)
    passages_NE = (20 + 0.5 * rng.standard_normal((300, 64))).astype(np.float32)
    queries_BE = (0.3 + 0.01 * rng.standard_normal((4, 64))).astype(np.float32)
    store = write_embeddings(passages_NE, tmp_path)
    found = index.ExactIndex(store, sharding.make_mesh(8), dtype=jnp.bfloat16).search(
        queries_BE, 10
    )
    rounded_NE = np.asarray(jnp.asarray(passages_NE, jnp.bfloat16), np.float32)
    ids, scores = oracle(rounded_NE, queries_BE, 10)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.scores, scores, atol=1e-3)


def test_score_matrix_is_bounded(tmp_path, mesh, monkeypatch):
    passages_NE, queries_BE = clustered(100, 8)
    monkeypatch.setattr(index, "MAX_SCORES", 350)
    exact = index.ExactIndex(write_embeddings(passages_NE, tmp_path), mesh)
    assert exact._block == 3
    ids, _ = oracle(passages_NE, queries_BE, 5)
    np.testing.assert_array_equal(exact.search(queries_BE, 5).ids, ids)


def test_recall_target_reaches_its_target(tmp_path):
    passages_NE, queries_BE = clustered(999, 16)
    store = write_embeddings(passages_NE, tmp_path)
    found = index.ExactIndex(store, sharding.make_mesh(8), recall_target=0.9).search(
        queries_BE, 10
    )
    assert recall(found.ids, oracle(passages_NE, queries_BE, 10)[0]) >= 0.9
    with pytest.raises(ValueError, match=r"recall_target must be in \(0, 1\], got 2"):
        index.ExactIndex(store, sharding.make_mesh(), recall_target=2.0)


def recall(found, true):
    hits = [np.intersect1d(a, b).size for a, b in zip(found, true, strict=True)]
    return np.sum(hits) / true.size


def build_scann(folder, passages_NE, monkeypatch, structure, **options):
    pytest.importorskip("scann", reason="scann has Linux wheels for Python < 3.14 only")
    if structure != "brute_force":
        monkeypatch.setattr(index, "BRUTE_FORCE_BELOW", 500)
    if structure == "tree_ah":
        monkeypatch.setattr(index, "PARTITION_FROM", 1000)
    store = write_embeddings(passages_NE, folder, shard_size=800)
    built = index.build_index("scann", store, folder, **options)
    assert built.structure == structure
    assert built.kind == "scann"
    return built


@pytest.mark.parametrize("structure", ["brute_force", "ah", "tree_ah"])
def test_scann_finds_the_clusters_and_scores_are_exact(
    structure, tmp_path, mesh, monkeypatch
):
    passages_NE, queries_BE = clustered(3000, 24)
    built = build_scann(
        tmp_path / "a",
        passages_NE,
        monkeypatch,
        structure,
        queries_BE=queries_BE,
        settings=index.ScannSettings(leaves=54, leaves_to_search=20),
    )
    is_tree = structure == "tree_ah"
    assert built.settings["leaves"] == (54 if is_tree else None)
    assert built.settings["leaves_to_search"] == (20 if is_tree else None)
    assert (tmp_path / "a" / "scann" / "dataset.npy").exists() == (
        structure == "brute_force"
    )
    shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    opened = index.open_index(tmp_path / "elsewhere", mesh)
    assert isinstance(opened, index.ScannIndex)
    assert (opened.size, opened.width) == (3000, 24)
    found = opened.search(queries_BE, 10)
    ids, _ = oracle(passages_NE, queries_BE, 10)
    measured = recall(found.ids, ids)
    assert built.recall_at_10 == pytest.approx(measured)
    assert measured > (0.9 if structure == "tree_ah" else 0.99)
    exact_BC = np.einsum("BE,BCE->BC", queries_BE, passages_NE[found.ids])
    np.testing.assert_allclose(found.scores, exact_BC, rtol=1e-5)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    # A query's result does not depend on the queries beside it.
    alone = opened.search(queries_BE[7:8], 10)
    np.testing.assert_array_equal(alone.ids[0], found.ids[7])
    np.testing.assert_array_equal(alone.scores[0], found.scores[7])


def everything(size):
    """Settings with which ScaNN misses nothing."""
    return index.ScannSettings(leaves=9, leaves_to_search=9, reorder=size)


@pytest.mark.parametrize("structure", ["brute_force", "ah", "tree_ah"])
def test_shards_find_what_one_index_finds(structure, tmp_path, mesh, monkeypatch):
    passages_NE, queries_BE = clustered(3001, 24)
    queries_BE = queries_BE[:20]
    ids, scores = oracle(passages_NE, queries_BE, 20)
    for shards in (1, 2, 3):
        built = build_scann(
            tmp_path / f"{shards}",
            passages_NE,
            monkeypatch,
            structure,
            settings=everything(3001),
            shards=shards,
            sample=20,
        )
        assert built.shards == shards
        assert built.recall_at_10 == 1
        opened = index.open_index(tmp_path / f"{shards}", mesh)
        assert len(opened._searchers) == shards
        assert not opened.together
        found = opened.search(queries_BE, 20)
        np.testing.assert_array_equal(found.ids, ids)
        np.testing.assert_allclose(found.scores, scores, rtol=1e-5)
        # More than a shard has.
        found = opened.search(queries_BE[:2], 3010)
        assert (np.sort(found.ids[:, :3001], axis=1) == np.arange(3001)[None]).all()
        assert (found.ids[:, 3001:] == -1).all()


def test_shards_rescore_no_more_than_one_index_does(tmp_path, mesh, monkeypatch):
    passages_NE, queries_BE = clustered(3000, 24)
    settings = index.ScannSettings(leaves=9, leaves_to_search=9, reorder=60)
    options = {"settings": settings, "shards": 3, "queries_BE": queries_BE}
    built = build_scann(tmp_path, passages_NE, monkeypatch, "tree_ah", **options)
    assert built.recall_at_10 > 0.95
    opened, asked = index.open_index(tmp_path, mesh), []
    scores = opened._scores
    monkeypatch.setattr(
        opened, "_scores", lambda q, ids: asked.append(ids.shape) or scores(q, ids)
    )
    opened.search(queries_BE, 10)
    assert asked == [(60, 60)]


class Together:
    """Threads that take themselves for processes."""

    def __init__(self, count, monkeypatch):
        self.own = threading.local()
        self.count = count
        self.sent = [None] * count
        self.met = threading.Barrier(count, timeout=60)
        monkeypatch.setattr(processes, "count", lambda: count)
        monkeypatch.setattr(processes, "index", lambda: self.own.index)
        monkeypatch.setattr(processes, "barrier", lambda _: self.met.wait())
        monkeypatch.setattr(processes, "gather", self.gather)
        monkeypatch.setattr(sharding, "from_each", lambda a: np.stack(self.gather(a)))

    def gather(self, value):
        self.sent[processes.index()] = value
        self.met.wait()
        found = list(self.sent)
        self.met.wait()
        return found

    def __call__(self, function):
        def run(number):
            self.own.index = number
            return function()

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(run, range(self.count)))


@pytest.mark.parametrize(("builders", "searchers"), [(2, 3), (3, 2), (2, 1)])
def test_any_number_of_processes_builds_and_searches(
    builders, searchers, tmp_path, mesh, monkeypatch
):
    pytest.importorskip("scann", reason="scann has Linux wheels for Python < 3.14 only")
    passages_NE, queries_BE = clustered(1001, 24)
    passages_NE[500:] = passages_NE[:501]  # ties over all shards
    store = write_embeddings(passages_NE, tmp_path, shard_size=300)
    settings = everything(1001)
    with monkeypatch.context() as patch:
        patch.setattr(index, "BRUTE_FORCE_BELOW", 100)
        patch.setattr(index, "PARTITION_FROM", 100)
        options = {"settings": settings, "queries_BE": queries_BE}
        for built in Together(builders, patch)(
            lambda: index.build_index("scann", store, tmp_path, **options)
        ):
            assert (built.shards, built.structure) == (builders, "tree_ah")
            assert built.recall_at_10 == 1
    results = []
    with monkeypatch.context() as patch:
        opened = Together(searchers, patch)(lambda: index.open_index(tmp_path, mesh))
        held = [first for one in opened for first, _ in one._searchers]
        assert sorted(held) == [
            first for first, _ in index._shard_ranges(1001, builders)
        ]
        assert all(one.together == (searchers > 1) for one in opened)
        group = Together(searchers, patch)
        results = group(lambda: opened[processes.index()].search(queries_BE, 30))
    ids, scores = oracle(passages_NE, queries_BE, 30)
    for found in results:
        np.testing.assert_array_equal(found.ids, ids)
        np.testing.assert_allclose(found.scores, scores, rtol=1e-5)


def test_one_shard_is_held_by_every_process(tmp_path, mesh, monkeypatch):
    passages_NE, queries_BE = clustered(90, 8)
    build_scann(tmp_path, passages_NE, monkeypatch, "brute_force")
    opened = Together(2, monkeypatch)(lambda: index.open_index(tmp_path, mesh))
    for one in opened:
        assert not one.together
        found = one.search(queries_BE, 5)
        np.testing.assert_array_equal(found.ids, oracle(passages_NE, queries_BE, 5)[0])


def test_ids_beyond_32_bits_are_merged(monkeypatch):
    ids = np.array([[[2**40, 7]], [[2**40 - 1, -1]]])
    scores = np.array([[[1, 0.5]], [[1, -np.inf]]], np.float32)
    found = Together(2, monkeypatch)(
        lambda: index._best_of_all(
            Retrieved(ids[processes.index()], scores[processes.index()])
        )
    )
    for one in found:
        np.testing.assert_array_equal(one.ids, [[2**40 - 1, 2**40]])
        np.testing.assert_array_equal(one.scores, [[1, 1]])


def test_a_missing_shard_is_told(tmp_path, mesh, monkeypatch):
    passages_NE, _ = clustered(90, 8)
    build_scann(tmp_path, passages_NE, monkeypatch, "brute_force", shards=3)
    shutil.rmtree(tmp_path / "scann" / "00001")
    with pytest.raises(FileNotFoundError, match="ScaNN shard 1 of 3 is not there"):
        index.open_index(tmp_path, mesh)


def test_settings_follow_the_size():
    few, many = (index.ScannSettings().resolve(n) for n in (120_000, 2_000_000))
    assert (few.leaves, few.leaves_to_search, few.training_sample) == (187, 19, 30_000)
    assert (many.leaves, many.leaves_to_search) == (1414, 142)
    assert many.training_sample == 100_000
    assert index.ScannSettings(training_sample=9).resolve(120_000).training_sample == 9


def test_scann_training_is_repeatable(tmp_path, mesh, monkeypatch):
    passages_NE, queries_BE = clustered(3000, 24)
    results = []
    for name in ("a", "b"):
        settings = index.ScannSettings(leaves_to_search=3, training_sample=1500)
        build_scann(
            tmp_path / name, passages_NE, monkeypatch, "tree_ah", settings=settings
        )
        results.append(index.open_index(tmp_path / name, mesh).search(queries_BE, 10))
    np.testing.assert_array_equal(results[0].ids, results[1].ids)


def test_scann_looks_further_where_leaves_hold_too_few(tmp_path, mesh, monkeypatch):
    passages_NE, queries_BE = clustered(1200, 8)
    settings = index.ScannSettings(leaves_to_search=1, leaves=100)
    build_scann(tmp_path, passages_NE, monkeypatch, "tree_ah", settings=settings)
    found = index.open_index(tmp_path, mesh).search(queries_BE, 1300)
    assert (np.sort(found.ids[:, :1200], axis=1) == np.arange(1200)[None]).all()
    assert (found.ids[:, 1200:] == -1).all()
    assert (found.scores[:, 1200:] == -np.inf).all()


def test_ties_go_to_the_lower_id(tmp_path, mesh, monkeypatch):
    passages_NE = np.ones((40, 4), np.float32)
    passages_NE[20:] = 2
    build_scann(tmp_path, passages_NE, monkeypatch, "brute_force")
    found = index.open_index(tmp_path, mesh).search(np.ones((2, 4), np.float32), 45)
    expected = [*range(20, 40), *range(20), -1, -1, -1, -1, -1]
    np.testing.assert_array_equal(found.ids, [expected, expected])


def test_without_scann_the_exact_index_serves(tmp_path, mesh, monkeypatch, caplog):
    passages_NE, queries_BE = clustered(100, 8)
    build_scann(tmp_path / "linux", passages_NE, monkeypatch, "brute_force")
    for module in [name for name in sys.modules if name.split(".")[0] == "scann"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "scann", None)
    store = write_embeddings(passages_NE, tmp_path / "here")
    with caplog.at_level("WARNING", logger="absl"):
        built = index.build_index("scann", store, tmp_path / "here")
        assert caplog.text.count("the exact index serves") == 1
        assert built.kind == "exact"
        assert built.recall_at_10 == 1.0
        for name in ("here", "linux"):
            opened = index.open_index(tmp_path / name, mesh)
            assert isinstance(opened, index.ExactIndex)
            np.testing.assert_array_equal(
                opened.search(queries_BE, 4).ids, oracle(passages_NE, queries_BE, 4)[0]
            )
        assert caplog.text.count("the exact index serves") == 2


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_wrong_queries_are_refused(kind, tmp_path, mesh, monkeypatch):
    passages_NE, queries_BE = clustered(100, 8)
    if kind == "scann":
        build_scann(tmp_path, passages_NE, monkeypatch, "brute_force")
    else:
        store = write_embeddings(passages_NE, tmp_path)
        index.build_index("exact", store, tmp_path)
    opened = index.open_index(tmp_path, mesh)
    with pytest.raises(ValueError, match=r"width 6, .* width 8; .*another encoder"):
        opened.search(queries_BE[:, :6], 3)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        opened.search(queries_BE, 0)
    queries_BE[2, 1] = np.inf
    with pytest.raises(ValueError, match="query 2 is not finite"):
        opened.search(queries_BE, 3)
    assert opened.search(queries_BE[:0], 3).ids.shape == (0, 3)


def test_wrong_arguments_of_a_build_are_named(tmp_path):
    store = write_embeddings(np.ones((3, 2), np.float32), tmp_path)
    with pytest.raises(ValueError, match=r"unknown index kind 'scan'.*'scann'"):
        index.build_index("scan", store, tmp_path)
    with pytest.raises(ValueError, match="4 shards of 3 passages: expected 1 to 3"):
        index.build_index("scann", store, tmp_path, shards=4)
    with pytest.raises(ValueError, match="reorder must be at least 1, got 0"):
        index.ScannSettings(reorder=0)
    for queries_BE, message in [
        (np.ones((2, 3), np.float32), "width 3, the index has width 2"),
        (np.ones((0, 2), np.float32), "no queries to measure"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.build_index("scann", store, tmp_path, queries_BE=queries_BE)
    with pytest.raises(ValueError, match="sample must be at least 1, got 0"):
        index.build_index("scann", store, tmp_path, sample=0)


def test_an_index_that_is_not_whole_is_refused(tmp_path, mesh):
    with pytest.raises(FileNotFoundError, match="holds no complete index"):
        index.open_index(tmp_path, mesh)
    store = write_embeddings(np.ones((3, 2), np.float32), tmp_path / "a")
    index.build_index("exact", store, tmp_path / "b")
    assert index.open_index(tmp_path / "b", mesh).size == 3
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="holds no embeddings"):
        index.open_index(tmp_path / "b", mesh)
    write_embeddings(np.ones((3, 4), np.float32), tmp_path / "a")
    with pytest.raises(ValueError, match=r"shape \(3, 2\), found \(3, 4\)"):
        index.open_index(tmp_path / "b", mesh)
