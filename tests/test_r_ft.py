"""R-FT: the query encoder, and it alone, learns what the scores prefer."""

import functools
import hashlib
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radit_jax import losses, optim, sharding
from radit_jax.artifacts import ArtifactError
from radit_jax.batch import Candidates, Passage
from radit_jax.data.candidates import (
    CandidateBatches,
    Questions,
    gather_embeddings,
    gather_tokens,
)
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tasks import gold_passages
from radit_jax.evaluation import metrics
from radit_jax.loop import TrainState
from radit_jax.models.encoder import Encoder, EncoderConfig
from radit_jax.models.huggingface import load_encoder
from radit_jax.retrieval.embed import EmbeddingStore
from radit_jax.stages import r_ft, refresh, retrieve_r_ft
from radit_jax.stages.index import score_temperature
from radit_jax.stages.lm_score import Scorer
from radit_jax.stages.r_ft import Towers
from radit_jax.stages.retrieve import read_retrieved
from radit_jax.stages.stage import run
from radit_jax.stages.targets import control_targets, read_scores

F32 = jnp.dtype(jnp.float32)
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
CONFIG = EncoderConfig(
    vocab_size=50,
    width=32,
    layers=2,
    heads=8,
    mlp_width=64,
    max_length=16,
    pooling="mean",
    normalize=True,
)
ROWS, C, L, T = 8, 4, 12, 3


def batch(preferred, sharpness=8.0):
    """Eight questions with four random passages; the last question has only two."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50, (ROWS, L)).astype(np.int32)
    mask = np.arange(L) < rng.integers(4, L + 1, (ROWS, 1))
    passages = rng.standard_normal((ROWS, C, 32)).astype(np.float32)
    passages /= np.linalg.norm(passages, axis=-1, keepdims=True)
    log_p = np.full((ROWS, C), -sharpness, np.float32)
    log_p[np.arange(ROWS), preferred] = -1.0
    log_p[-1, 2:] = -np.inf
    log_q = losses.lsr_log_target(jnp.asarray(log_p), jnp.ones(ROWS, jnp.int32), 1.0)
    ids = np.arange(ROWS * C, dtype=np.int32).reshape(ROWS, C)
    ids[-1, 2:] = -1
    # Every token of an answer prefers the same passage.
    tokens_log_p = np.repeat(np.maximum(log_p, -99)[:, None] / T, T, axis=1)
    return Candidates(
        tokens,
        mask,
        ids,
        np.asarray(log_q),
        passages_BCE=passages,
        token_log_p_BTC=tokens_log_p * (ids >= 0)[:, None],
    )


PREFERRED = np.array([0, 1, 2, 3, 3, 1, 2, 0])


def with_tokens(data):
    """The same with passages as tokens, for a context encoder that trains."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 50, (ROWS, C, L)).astype(np.int32)
    mask = np.arange(L) < rng.integers(4, L + 1, (ROWS, C, 1))
    return data._replace(
        passages_BCE=None, passage_tokens_BCL=tokens, passage_mask_BCL=mask
    )


def gold_only(data, preferred):
    """One right passage, and no probability for the others."""
    log_q = np.full((ROWS, C), losses.ABSENT, np.float32)
    log_q[np.arange(ROWS), preferred] = 0.0
    return data._replace(log_targets_BC=log_q)


def towers(both=False):
    keys = jax.random.split(jax.random.key(0))
    encoders = [Encoder(CONFIG, key) for key in keys]
    return Towers(encoders[0], encoders[1] if both else None)


def train(data, steps, sizes=(1, 1, 1), loss="kl", rate=3e-3):
    """Curve (loss, grad_norm, agreement), towers before and after, final scores."""
    both = data.passages_BCE is None
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        params = jax.jit(functools.partial(towers, both))()
        before = jax.tree.map(np.asarray, params)
        schedule = optim.schedule(rate, rate, 0, 1000)
        tx = optim.optimizer(schedule, 0.9, 0.999, 1e-8, 0.0, 2.0)
        state = TrainState(
            jnp.int32(0), params, jax.jit(tx.init)(params), jnp.zeros(2, jnp.uint32)
        )
        step = r_ft.make_step(tx, schedule, F32, loss, 0.05)
        curve = []
        placed = r_ft.place(data)
        for _ in range(steps):
            state, found = step(state, placed)
            curve.append([float(found[k]) for k in ("loss", "grad_norm", "agreement")])
        after = jax.tree.map(np.asarray, state.params)
        scores = jnp.einsum(
            "BE,BCE->BC",
            state.params.query(placed.tokens_BL, placed.mask_BL),
            r_ft._passages(state.params, placed, F32),
        )
        scores = np.where(data.ids_BC >= 0, np.asarray(scores), -np.inf)
    return np.asarray(curve), before, after, scores


def unchanged(before, after):
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    )
    return [str(path) for (path, old), new in leaves if (old == new).all()]


def test_one_step_changes_every_weight_of_the_query_encoder():
    _, before, after, _ = train(batch(PREFERRED), 1)
    assert unchanged(before, after) == []
    assert after.context is None


def test_one_step_of_both_towers_changes_every_weight_of_both():
    _, before, after, _ = train(with_tokens(batch(PREFERRED)), 1)
    assert unchanged(before, after) == []
    sizes = [len(jax.tree.leaves(tower)) for tower in after]
    assert sizes[0] == sizes[1] > 10


def case(loss, preferred):
    data = batch(preferred)
    return gold_only(data, preferred) if loss == r_ft.CONTRASTIVE else data


@pytest.mark.parametrize("loss", r_ft.LOSSES)
@pytest.mark.parametrize("seed", [None, 1])
def test_the_preferred_passage_comes_first_whichever_it_is(loss, seed):
    """With a random preference it learns the random passage: the target teaches."""
    preferred = PREFERRED
    if seed is not None:
        preferred = np.random.default_rng(seed).integers(0, C, ROWS)
        preferred[-1] %= 2
    data = case(loss, preferred)
    curve, _, _, scores = train(data, 150, loss=loss)
    assert scores.argmax(axis=1).tolist() == preferred.tolist()
    # EMDR2 is bounded below by what the language model itself makes of the answer.
    least = -float(data.token_log_p_BTC.max(-1).sum(1).mean()) if loss == "emdr2" else 0
    assert curve[-1, 0] - least < 0.2 * (curve[0, 0] - least)


def test_both_towers_learn_the_preferred_passage():
    curve, _, _, scores = train(with_tokens(batch(PREFERRED)), 60)
    assert scores.argmax(axis=1).tolist() == PREFERRED.tolist()
    assert curve[-1, 0] < 0.2 * curve[0, 0]


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("kl", sizes) for sizes in MESHES[1:]]
    + [(kind, MESHES[-1]) for kind in ("emdr2", r_ft.CONTRASTIVE, "both")],
    ids=str,
)
def test_the_result_is_the_same_on_every_mesh(kind, sizes):
    loss = "kl" if kind == "both" else kind
    data = case(loss, PREFERRED)
    if kind == "both":
        data = with_tokens(data)
    expected, *_ = train(data, 3, loss=loss)
    found, *_ = train(data, 3, sizes, loss=loss)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("loss", r_ft.LOSSES)
def test_what_absent_places_hold_changes_nothing(loss):
    data = case(loss, PREFERRED)
    passages = data.passages_BCE.copy()
    passages[-1, 2:] = 1e3
    expected, _, after, _ = train(data, 2, loss=loss)
    found, _, other, _ = train(data._replace(passages_BCE=passages), 2, loss=loss)
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, after, other)


def test_in_batch_negatives_are_those_of_numpy():
    """Everyone's candidates, but none that is a candidate of the question itself."""
    data = gold_only(batch(PREFERRED), PREFERRED)
    ids = data.ids_BC.copy()
    passages = data.passages_BCE.copy()
    # The third question's first candidate is the first question's second.
    ids[2, 0], passages[2, 0] = ids[0, 1], passages[0, 1]
    data = data._replace(ids_BC=ids, passages_BCE=passages)
    with jax.set_mesh(sharding.make_mesh()):
        params = towers()
        queries = np.asarray(params.query(*map(jnp.asarray, data[:2])), np.float64)
        found, _ = r_ft.retriever_loss(
            params, r_ft.place(data), F32, r_ft.CONTRASTIVE, 0.05
        )
    expected = []
    for b in range(ROWS):
        logits = {}
        for a in range(ROWS):
            for c in range(C):
                own = a == b
                if ids[a, c] >= 0 and (own or ids[a, c] not in ids[b]):
                    logits[a, c] = queries[b] @ passages[a, c] / 0.05
        normaliser = np.log(np.sum(np.exp(list(logits.values()))))
        expected.append(normaliser - logits[b, PREFERRED[b]])
        assert len(logits) == ROWS * C - 2 - (b in (0, 2))
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("loss", r_ft.LOSSES)
def test_gradients_are_those_of_finite_differences(loss, monkeypatch):
    """All of it in float64: encoder, scores and loss, one weight at a time."""
    data = case(loss, PREFERRED)
    if loss != r_ft.CONTRASTIVE:
        data = batch(PREFERRED, sharpness=3.0)
    with jax.enable_x64(True), jax.set_mesh(sharding.make_mesh()):
        # What the code casts to float32 for stability it now casts to float64.
        monkeypatch.setattr(jnp, "float32", jnp.float64)
        params = jax.tree.map(lambda w: w.astype(jnp.float64), towers())
        placed = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == np.float32 else x, data
        )
        placed = r_ft.place(placed)
        value = jax.jit(
            lambda p: r_ft.retriever_loss(p, placed, jnp.dtype(jnp.float64), loss, 0.5)[
                0
            ]
        )
        assert value(params).dtype == np.float64
        grads, tree = jax.tree.flatten(jax.grad(value)(params))
        leaves = jax.tree.leaves(params)
        for i, leaf in enumerate(leaves):
            if np.abs(grads[i]).max() == 0:
                continue
            # The entry with the largest gradient: words that do not occur have none.
            at = np.unravel_index(np.abs(grads[i]).argmax(), leaf.shape)
            shift = np.zeros(leaf.shape)
            shift[at] = 1e-6
            slope = 0.0
            for sign in (1, -1):
                moved = [*leaves]
                moved[i] = leaf + jax.device_put(sign * shift, leaf.sharding)
                slope += sign * float(value(jax.tree.unflatten(tree, moved))) / 2e-6
            assert float(grads[i][at]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


# --- batches --------------------------------------------------------------------


class Rows:
    """Embedding i is (i, i, ...); counts what is gathered."""

    def __init__(self):
        self.asked = []

    def __getitem__(self, ids):
        self.asked += ids.ravel().tolist()
        return np.repeat(ids[..., None], 3, axis=-1).astype(np.float32)


def questions(count=10, first=0):
    ids = np.arange(count * 2).reshape(count, 2)
    ids[3, 1] = -1
    log_q = np.log(np.full((count, 2), 0.5, np.float32))
    tokens = [[first + i + 1] * (1 + i % 4) for i in range(count)]
    return Questions(tokens, ids, log_q)


def batches_of(parts, rows=5, passages=None, **settings):
    gather = gather_embeddings(Rows() if passages is None else passages)
    return CandidateBatches(parts, gather, rows, 6, 0, **settings)


def test_batches_pair_each_question_with_its_own_passages_once_per_epoch():
    batches = batches_of([(questions(), 1.0)])
    seen = []
    for data in (next(batches), next(batches)):
        # As long as the longest of them, in eights, and the longest of all at most.
        assert data.tokens_BL.shape == data.mask_BL.shape == (5, 6)
        assert data.token_log_p_BTC is data.passage_tokens_BCL is None
        for tokens, mask, ids, passages in zip(
            data.tokens_BL, data.mask_BL, data.ids_BC, data.passages_BCE, strict=True
        ):
            i = int(tokens[0]) - 1
            seen.append(i)
            assert mask.sum() == 1 + i % 4
            assert (tokens[mask] == i + 1).all()
            assert not tokens[~mask].any()
            assert ids.tolist() == [2 * i, -1 if i == 3 else 2 * i + 1]
            expected = [2 * i, 0 if i == 3 else 2 * i + 1]
            assert passages[:, 0].tolist() == expected
    assert sorted(seen) == list(range(10))
    state = batches.get_state()
    following = next(batches)
    batches.set_state(state)
    np.testing.assert_array_equal(next(batches).tokens_BL, following.tokens_BL)
    batches.close()


def test_a_batch_is_as_long_as_its_longest_on_every_process():
    tokens = [[i + 1] * min(i + 1, 36) for i in range(40)]
    ids = np.arange(80).reshape(40, 2)
    many = Questions(tokens, ids, np.zeros((40, 2), np.float32))

    def read(**settings):
        gather = gather_embeddings(Rows())
        batches = CandidateBatches([(many, 1.0)], gather, 4, 36, 0, **settings)
        found = [next(batches) for _ in range(20)]
        batches.close()
        return found

    lengths = set()
    parts = [read(process=process, processes=2) for process in range(2)]
    for whole, *halves in zip(read(), *parts, strict=True):
        size = whole.tokens_BL.shape[1]
        lengths.add(size)
        longest = whole.mask_BL.sum(axis=1).max()
        assert size == min(-(-longest // 8) * 8, 36)
        for process, half in enumerate(halves):
            for found, expected in zip(half, whole, strict=True):
                if expected is not None:
                    mine = expected[2 * process : 2 * process + 2]
                    np.testing.assert_array_equal(found, mine)
    assert len(lengths) > 2


def test_parts_are_mixed_by_their_shares():
    batches = batches_of([(questions(), 0.25), (questions(first=100), 0.75)], rows=8)
    first = np.concatenate([next(batches).tokens_BL[:, 0] for _ in range(5)])
    batches.close()
    assert (first > 100).sum() == 30


def test_other_candidates_take_their_place_where_the_reading_stood():
    straight, replaced = (batches_of([(questions(), 1.0)]) for _ in range(2))
    next(straight), next(replaced)
    other = questions()._replace(ids=questions().ids[::-1].copy())
    replaced.replace([(other, 1.0)])
    expected, found = next(straight), next(replaced)
    np.testing.assert_array_equal(found.tokens_BL, expected.tokens_BL)
    i = found.tokens_BL[:, 0] - 1
    np.testing.assert_array_equal(found.ids_BC, other.ids[i])
    assert (found.ids_BC != expected.ids_BC).any()
    for part in (straight, replaced):
        part.close()


def test_token_scores_are_filled_with_what_adds_nothing():
    count = 10
    token_log_p = [np.full((1 + i % 3, 2), -1.0 - i, np.float32) for i in range(count)]
    token_log_p[3][:, 1] = -np.inf
    data = next(batches_of([(questions()._replace(token_log_p=token_log_p), 1.0)], 10))
    assert data.token_log_p_BTC.shape == (10, 3, 2)
    for first, rows in zip(data.tokens_BL[:, 0], data.token_log_p_BTC, strict=True):
        i = int(first) - 1
        size = 1 + i % 3
        assert (rows[:size, 0] == -1.0 - i).all()
        assert (rows[:size, 1] == (0.0 if i == 3 else -1.0 - i)).all()
        assert not rows[size:].any()


def test_passages_come_as_tokens_where_the_context_encoder_trains():
    class Store:
        def get(self, ids):
            return [Passage(int(id), "d", f"t{id}", "", "x" * id) for id in ids]

    def tokenize(texts):
        return [[len(text)] * min(len(text), 7) for text in texts]

    gather = gather_tokens(Store(), tokenize, 8)
    data = next(CandidateBatches([(questions(), 1.0)], gather, 5, 6, 0))
    assert data.passages_BCE is None
    assert data.passage_tokens_BCL.shape == (5, 2, 8)
    for ids, tokens, mask in zip(
        data.ids_BC, data.passage_tokens_BCL, data.passage_mask_BCL, strict=True
    ):
        for id, row, kept in zip(np.maximum(ids, 0), tokens, mask, strict=True):
            size = len(f"t{id} {'x' * id}".strip())
            assert kept.sum() == min(size, 7)
            assert (row[kept] == size).all()


def test_processes_share_the_questions():
    parts = [
        batches_of([(questions(), 1.0)], 10, process=process, processes=2)
        for process in range(2)
    ]
    seen = [int(t) for part in parts for t in next(part).tokens_BL[:, 0]]
    assert sorted(seen) == list(range(1, 11))
    for part in parts:
        part.close()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_impossible_batches_are_told():
    with pytest.raises(ValueError, match="rows = 11 is more than the 10 training"):
        batches_of([(questions(), 1.0)], 11)
    with pytest.raises(ValueError, match="rows = 5 does not divide over 2 processes"):
        batches_of([(questions(), 1.0)], 5, process=0, processes=2)


# --- targets --------------------------------------------------------------------


def test_targets_of_controls():
    ids = np.array([[4, 7, 9], [5, 2, -1], [1, 3, 8]])
    log_q = np.log(np.array([[0.7, 0.2, 0.1], [0.6, 0.4, 1e-30], [0.5, 0.3, 0.2]]))
    log_q[1, 2] = losses.ABSENT
    gold = [{7, 9}, {2}, {99}]
    found = control_targets("gold", ids, log_q, gold, 0)
    expected = [[0, 0.5, 0.5], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(np.exp(found), expected, atol=1e-6)
    found = control_targets("uniform", ids, log_q, gold, 0)
    np.testing.assert_allclose(
        np.exp(found), [[1 / 3] * 3, [0.5, 0.5, 0], [1 / 3] * 3], atol=1e-6
    )
    found = control_targets("shuffled", ids, log_q, gold, 0)
    np.testing.assert_allclose(np.sort(found), np.sort(log_q))
    assert (found != log_q).any()
    assert found[1, 2] == losses.ABSENT


# --- the stage ------------------------------------------------------------------


def rescore(workdir, prefer):
    """Replace the scores: ``prefer`` gives a row's columns from best to worst."""
    for file in workdir.glob("scored/*/*/scores.npz"):
        arrays = dict(np.load(file))
        for i, ids in enumerate(arrays["ids"]):
            order = prefer(ids)
            arrays["log_p"][i, order] = -2.0 * np.arange(1, len(order) + 1)
        arrays["tokens"][:] = 2
        arrays["token_log_p"] = np.repeat(arrays["log_p"] / 2, 2, axis=0)
        np.savez(file, **arrays)


@pytest.fixture
def ready(scored, tmp_path):
    """A work folder whose scores prefer passages with small ids."""
    workdir = shutil.copytree(scored, tmp_path / "work", symlinks=True)
    rescore(workdir, np.argsort)
    return workdir


@pytest.fixture
def plain(tiny_config):
    """Makes the config of a run on questions alone, without controls."""

    def make(workdir, **changes):
        fields = {"controls": (), "corpus_share": 0.0} | changes
        return tiny_config(workdir, **{f"r_ft.{k}": v for k, v in fields.items()})

    return make


def digests(folder):
    return {
        file: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_the_stage_trains_the_query_encoder_and_touches_nothing_else(ready, plain):
    config = plain(ready)
    before = digests(ready)
    folder = run("r_ft", r_ft.STAGE, config)
    after = {f: d for f, d in digests(ready).items() if folder not in f.parents}
    assert after == before
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"passages", "index", "retrieved", "scored"}
    assert manifest["counts"]["targets"]["train"]["flat"] == 0
    rows = [json.loads(line) for line in (folder / "lm" / "metrics.jsonl").open()]
    validated = {r["step"]: r["validation/mrr"] for r in rows if "validation/mrr" in r}
    assert sorted(validated) == [0, 3, 6]
    # The best of them is kept, the start included; of equals the earlier.
    best = max(validated, key=lambda step: (validated[step], -step))
    assert manifest["counts"]["runs"]["lm"]["best_step"] == best
    with jax.set_mesh(sharding.make_mesh()):
        kept = r_ft.load_finetuned_towers(config, folder / "lm")
        start = Towers(load_encoder(config.encoder))
        same = jax.tree.map(lambda a, b: bool((a == b).all()), kept, start)
    assert all(jax.tree.leaves(same)) == (best == 0)
    logged = {"loss", "kl", "entropy", "target_entropy", "agreement"}
    assert {f"train/{name}" for name in logged} <= set(rows[1])


def test_validation_before_training_is_what_retrieve_found(ready, plain):
    config = plain(ready, validation_examples=10_000)
    folder = run("r_ft", r_ft.STAGE, config)
    row = json.loads((folder / "lm" / "metrics.jsonl").open().readline())
    store = PassageStore(ready / "passages")
    depth = config.r_ft.validation_depth
    ((examples, found),) = read_retrieved(ready, "dev").values()
    gold = [gold_passages(example, store) for example in examples]
    expected = metrics.reciprocal_rank(found.ids[:, :depth], gold).mean()
    assert row["validation/mrr"] == pytest.approx(expected)
    first = np.mean([ids[0] in g for ids, g in zip(found.ids, gold, strict=True)])
    assert row["validation/gold@1"] == pytest.approx(first)


def test_where_no_gold_passage_is_known_the_first_answer_counts(ready, plain):
    (file,) = ready.glob("retrieved/dev/*/examples.jsonl")
    examples = [json.loads(line) | {"document": ""} for line in file.open()]
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    config = plain(ready, validation_examples=10_000)
    folder = run("r_ft", r_ft.STAGE, config)
    row = json.loads((folder / "lm" / "metrics.jsonl").open().readline())
    assert not any("gold@" in name for name in row)
    ((asked, found),) = read_retrieved(ready, "dev").values()
    store = PassageStore(ready / "passages")
    ranks = []
    for example, ids in zip(asked, found.ids, strict=True):
        passages = store.get(ids[: config.r_ft.validation_depth])
        hits = [metrics.contains_answer(p.display, example.answers) for p in passages]
        ranks.append(1 / (hits.index(True) + 1) if any(hits) else 0.0)
    assert 0 < np.mean(ranks) < 1
    assert row["validation/mrr"] == pytest.approx(np.mean(ranks))


def test_flat_targets_are_refused_with_what_would_do(ready, plain):
    changes = {"score_mode": "sequence_probability", "target_temperature": 10.0}
    message = (
        r"sequence_probability with r_ft.target_temperature = 10: 100 % of the targets "
        r"of questions are flat, .* clear under mean_log_probability with temperature 1"
    )
    with pytest.raises(ValueError, match=message):
        run("r_ft", r_ft.STAGE, plain(ready, **changes))


def test_scores_that_tell_nothing_apart_are_refused(ready, plain):
    for file in ready.glob("scored/*/*/scores.npz"):
        arrays = dict(np.load(file))
        arrays["log_p"][:] = -3.0
        np.savez(file, **arrays)
    with pytest.raises(ValueError, match="tell passages apart under no temperature"):
        run("r_ft", r_ft.STAGE, plain(ready))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"score_temperature": None},
            r"score_temperature is not set, and this encoder",
        ),
        ({"score_temperature": 0.0}, r"score_temperature = 0.0 must be positive"),
        ({"target_temperature": -1.0}, r"target_temperature = -1.0 must be positive"),
        ({"loss": "klr"}, r"r_ft.loss = 'klr' is not one of kl, reverse_kl"),
        ({"score_mode": "sum"}, r"r_ft.score_mode = 'sum' is not one of mean_log"),
        ({"target": "mine"}, r"r_ft.target = 'mine' is not one of lm, gold, shuffled"),
        ({"controls": ("lm",)}, r"controls: 'lm' is not one of gold, shuffled, unif"),
        ({"target": "gold"}, r"'kl' would be infinite; take one of reverse_kl, pdist"),
        ({"loss": "contrastive"}, r"needs r_ft.target=gold, not 'lm'"),
        ({"towers": "context"}, r"r_ft.towers = 'context' is not one of query, both"),
        ({"refresh_every": -1}, r"refresh_every = -1 must be 0 \(never\) or more"),
        ({"refresh_every": 2, "controls": ("gold",)}, r"no r_ft.controls"),
        ({"corpus_share": 1.5}, r"corpus_share = 1.5 must be between 0 and 1"),
        ({"rows": 0}, r"r_ft.rows = 0 must be at least 1"),
        ({"rows": 100_000}, r"rows = 100000 is more than the \d+ training questions"),
        ({"warmup_steps": 6}, r"warmup_steps = 6 must be"),
    ],
)
def test_settings_that_make_no_sense_are_refused(ready, plain, changes, message):
    config = plain(ready, **changes)
    with pytest.raises(ValueError, match=message):
        run("r_ft", r_ft.STAGE, config)


def test_scores_of_other_examples_are_refused(ready, plain):
    file = ready / "retrieved" / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"key": "0123456789ab"}))
    message = r"scored was made from retrieved \w+, and .* is now 0123456789ab; run"
    with pytest.raises(ArtifactError, match=message):
        run("r_ft", r_ft.STAGE, plain(ready))


def test_examples_of_another_index_are_refused(ready, plain):
    file = ready / "index" / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"key": "0123456789ab"}))
    with pytest.raises(ArtifactError, match="retrieved was made from index"):
        run("r_ft", r_ft.STAGE, plain(ready))


@pytest.mark.parametrize("what", ["prompt", "model"])
def test_scores_of_another_prompt_or_model_are_refused(ready, plain, tmp_path, what):
    config = plain(ready)
    message = r"scored was made with lm_score.eos = False, and the config now says True"
    if what == "prompt":
        config.lm_score.eos = True
    else:
        config.lm = str(shutil.copytree(config.lm, tmp_path / "lm"))
        file = tmp_path / "lm" / "config.json"
        file.write_text(file.read_text() + "\n")
        message = r"scored was made with another lm, and the config now says .*/lm; run"
    with pytest.raises(ArtifactError, match=message):
        run("r_ft", r_ft.STAGE, config)


@pytest.mark.parametrize("value", [np.nan, 0.5])
def test_scores_that_are_none_are_refused_with_the_question(ready, plain, value):
    (file,) = ready.glob("scored/train/*/scores.npz")
    arrays = dict(np.load(file))
    arrays["log_p"][2, 1] = value
    np.savez(file, **arrays)
    ((examples, _),) = read_retrieved(ready, "train").values()
    with pytest.raises(ValueError, match=re.escape(f"question {examples[2].id} has")):
        run("r_ft", r_ft.STAGE, plain(ready))


def test_a_split_without_scores_is_told(ready, plain):
    shutil.rmtree(ready / "scored" / "dev")
    with pytest.raises(ValueError, match="run lm_score with 'dev' among"):
        run("r_ft", r_ft.STAGE, plain(ready))


def test_questions_with_one_passage_are_left_out(ready, plain, caplog):
    (file,) = ready.glob("scored/train/*/scores.npz")
    arrays = dict(np.load(file))
    arrays["log_p"][0, 1:] = -np.inf
    arrays["ids"][0, 1:] = -1
    np.savez(file, **arrays)
    folder = run("r_ft", r_ft.STAGE, plain(ready))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"]["questions"] == {"train": len(arrays["ids"]) - 1}
    assert f"1 of {len(arrays['ids'])} questions have fewer than two" in caplog.text


def test_a_dense_encoder_need_not_say_its_temperature(ready, plain):
    """DRAGON+ does not normalise: raw dot products, temperature 1."""
    config = plain(ready, score_temperature=None)
    modules = ready / "inputs" / "encoder" / "modules.json"
    modules.write_text(json.dumps(json.loads(modules.read_text())[:2]))
    assert score_temperature(config, "r_ft.score_temperature") == 1.0


def test_a_passage_that_stands_twice_is_refused(ready, plain):
    (file,) = ready.glob("scored/train/*/scores.npz")
    arrays = dict(np.load(file))
    arrays["ids"][3, 2] = arrays["ids"][3, 0]
    np.savez(file, **arrays)
    id = arrays["ids"][3, 0]
    with pytest.raises(ValueError, match=rf"question .* has passage {id} twice among"):
        run("r_ft", r_ft.STAGE, plain(ready))


def test_corpus_examples_that_were_not_made_are_told(ready, plain):
    shutil.rmtree(ready / "retrieved" / "corpus")
    with pytest.raises(ValueError, match=r"no examples from the corpus, which r_ft"):
        run("r_ft", r_ft.STAGE, plain(ready, corpus_share=0.5))


def test_the_chosen_shares_of_corpus_and_questions_are_learnt_from(ready, plain):
    config = plain(ready, corpus_share=0.5)
    with jax.set_mesh(sharding.make_mesh()):
        training = r_ft.Training(config, ready / "r_ft")
        parts = training.questions("lm", "kl", training.scores)
    assert [(len(q.tokens), share) for q, share in parts] == [
        (len(training.scores["train"].examples), 0.5),
        (len(training.scores["corpus"].examples), 0.5),
    ]
    assert len(training.scores["corpus"].examples) == config.retrieve.corpus_examples


@pytest.mark.parametrize("target", ["gold", "shuffled"])
def test_a_control_trains_in_a_folder_of_its_own(ready, plain, target):
    config = plain(ready, controls=(target,))
    folder = run("r_ft", r_ft.STAGE, config)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["counts"]["runs"]) == {"lm", target}
    found = run("retrieve_r_ft", retrieve_r_ft.STAGE, config)
    ((examples, start),) = read_retrieved(ready, "test").values()
    for name in ("lm", target):
        ((asked, tuned),) = read_retrieved(
            ready, "test", f"{found.name}/{name}"
        ).values()
        assert asked == examples
        assert tuned.ids.shape == start.ids.shape
    # What a shuffled target does is seen at the last step, were it the worst.
    with jax.set_mesh(sharding.make_mesh()):
        first = load_encoder(config.encoder)
        last = (
            r_ft.load_finetuned_towers(config, folder / "shuffled")
            if target != "gold"
            else 0
        )
        if last:
            assert unchanged(Towers(first), last) == []


def test_both_towers_bring_an_index_of_their_own(ready, plain):
    config = plain(ready, towers="both", steps=3, validate_every=3)
    before = digests(ready / "index")
    folder = run("r_ft", r_ft.STAGE, config)
    assert digests(ready / "index") == before
    assert not (folder / "index-now").exists()
    old, new = (EmbeddingStore(f) for f in (ready / "index", folder / "lm" / "index"))
    rows = [json.loads(line) for line in (folder / "lm" / "metrics.jsonl").open()]
    best = json.loads((folder / "manifest.json").read_text())["counts"]["runs"]["lm"]
    moved = np.abs(old.rows(0, 9) - new.rows(0, 9)).max()
    assert (moved > 1e-6) == (best["best_step"] > 0)
    # The tuned passages are what the tuned question is searched in.
    run("retrieve_r_ft", retrieve_r_ft.STAGE, config)
    ((_, found),) = read_retrieved(ready, "test", "retrieved_r_ft/lm").values()
    with jax.set_mesh(sharding.make_mesh()):
        towers = r_ft.load_finetuned_towers(config, folder / "lm")
        training = r_ft.Training(config, folder)
        ((examples, _),) = read_retrieved(ready, "test").values()
        expected = training.searcher(towers)(examples[:5], config.retrieve.k)
    np.testing.assert_allclose(found.scores[:5], expected.scores, atol=1e-5)
    assert len(rows) >= 2


def test_candidates_follow_the_query_encoder_where_asked_to(scored, plain, tmp_path):
    """Every round's are what the encoder of that step finds, scored as ever; a run that
    is stopped between two rounds goes on as if it had not been."""
    ready = shutil.copytree(scored, tmp_path / "work", symlinks=True)
    fields = {"refresh_every": 2, "corpus_share": 0.5, "target_temperature": 0.01}
    config = plain(ready, **fields)
    made = []
    real = refresh.Refresher._make

    def remember(self, file, split, searcher):
        real(self, file, split, searcher)
        known = self.scores[split]
        expected = searcher(known.examples, known.ids.shape[1]).ids
        made.append((file.name, split, known, expected))

    given = []
    replace = CandidateBatches.replace

    def spy(self, parts):
        given.append([questions.ids for questions, _ in parts])
        replace(self, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refresh.Refresher, "_make", remember)
        patch.setattr(CandidateBatches, "replace", spy)
        folder = run("r_ft", r_ft.STAGE, config)
    # Training goes on with what was found.
    found = [expected for *_, expected in made]
    for ids, expected in zip(
        [ids for pair in given for ids in pair], found, strict=True
    ):
        np.testing.assert_array_equal(ids, expected)
    assert [name for name, *_ in made] == [
        f"{step:09d}-{split}.npz" for step in (2, 4) for split in ("train", "corpus")
    ]
    with jax.set_mesh(sharding.make_mesh()):
        scorer = Scorer(
            config,
            refresh.load_llama(config.lm),
            refresh.load_tokenizer(config.lm),
        )
        store = PassageStore(ready / "passages")
        for name, split, known, expected in made[:2]:
            arrays = np.load(folder / "lm" / "refresh" / name)
            np.testing.assert_array_equal(arrays["ids"], expected)
            new = (expected[:, :, None] != known.ids[:, None, :]).all(axis=2)
            assert new.any()
            assert not new.all()
            if split == "corpus":
                sources = np.array([e.source for e in known.examples])
                assert (expected != sources[:, None]).all()
            i, c = (int(x[0]) for x in np.nonzero(new))
            # Known ones keep their scores; new ones are scored.
            passage = store[int(expected[i, c])].display
            fresh = scorer([(known.examples[i], passage)])
            assert arrays["log_p"][i, c] == pytest.approx(fresh.log_p[0], abs=1e-4)
            start = int(known.tokens[:i].sum())
            rows = slice(start, start + known.tokens[i])
            np.testing.assert_allclose(
                arrays["token_log_p"][rows, c], fresh.token_log_p, atol=1e-4
            )
            j, d = (int(x[0]) for x in np.nonzero(~new & (expected >= 0)))
            at = known.ids[j].tolist().index(expected[j, d])
            assert arrays["log_p"][j, d] == known.log_p[j, at]
    curve = [json.loads(line) for line in (folder / "lm" / "metrics.jsonl").open()]
    # Again, stopped after step 3: the second round's candidates are read, not made.
    shutil.rmtree(folder)

    def stop(self, done, towers):
        if done == 4:
            raise KeyboardInterrupt
        return call(self, done, towers)

    call = refresh.Refresher.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refresh.Refresher, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            run("r_ft", r_ft.STAGE, config)
    folder = run("r_ft", r_ft.STAGE, config)
    again = [json.loads(line) for line in (folder / "lm" / "metrics.jsonl").open()]
    losses_of = [
        {r["step"]: r["train/loss"] for r in rows if "train/loss" in r}
        for rows in (curve, again)
    ]
    assert losses_of[0].keys() == losses_of[1].keys() == set(range(1, 7))
    for step, loss in losses_of[0].items():
        assert losses_of[1][step] == pytest.approx(loss, rel=1e-5)


def test_a_round_that_is_gone_is_told(ready, plain):
    config = plain(ready, refresh_every=2)
    scores = {"train": read_scores(ready, "train")}
    store = PassageStore(ready / "passages")

    def never(towers):
        raise AssertionError("nothing is to be searched")

    refresher = refresh.Refresher(config, ready / "refresh", scores, store, never)
    assert refresher(1, None) is None
    with pytest.raises(ValueError, match=r"000000002-train.npz: missing, and the ret"):
        refresher(3, None)
