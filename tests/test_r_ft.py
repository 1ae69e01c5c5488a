"""R-FT: the query encoder, and it alone, learns what the scores prefer."""

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
from radit_jax.batch import Candidates
from radit_jax.data.candidates import Questions, candidate_batches
from radit_jax.data.corpus import PassageStore
from radit_jax.data.tasks import gold_passages
from radit_jax.evaluation import metrics
from radit_jax.loop import TrainState
from radit_jax.models.encoder import Encoder, EncoderConfig
from radit_jax.models.huggingface import load_encoder
from radit_jax.stages import r_ft
from radit_jax.stages.retrieve import read_retrieved
from radit_jax.stages.stage import run

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
ROWS, C, L = 8, 4, 12


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
    return Candidates(tokens, mask, passages, np.asarray(log_q))


PREFERRED = np.array([0, 1, 2, 3, 3, 1, 2, 0])


def train(data, steps, sizes=(1, 1, 1), loss="kl", rate=3e-3):
    """Loss curve, agreement, and the encoder before and after."""
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        encoder = jax.jit(lambda: Encoder(CONFIG, jax.random.key(0)))()
        before = jax.tree.map(np.asarray, encoder)
        schedule = optim.schedule(rate, rate, 0, 1000)
        tx = optim.optimizer(schedule, 0.9, 0.999, 1e-8, 0.0, 2.0)
        state = TrainState(
            jnp.int32(0), encoder, jax.jit(tx.init)(encoder), jnp.zeros(2, jnp.uint32)
        )
        step = r_ft.make_step(tx, schedule, F32, loss, 0.05)
        curve = []
        for _ in range(steps):
            state, found = step(state, r_ft.place(data))
            curve.append([float(found[k]) for k in ("loss", "grad_norm", "agreement")])
        after = jax.tree.map(np.asarray, state.params)
        best = np.asarray(
            jnp.einsum(
                "BE,BCE->BC",
                state.params(*map(sharding.put_rows, data[:2])),
                sharding.put_rows(data.passages_BCE),
            )
        )
    return np.asarray(curve), before, after, best


def test_one_step_changes_every_weight_of_the_query_encoder():
    _, before, after, _ = train(batch(PREFERRED), 1)
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    )
    still = [str(path) for (path, old), new in leaves if (old == new).all()]
    assert still == []


@pytest.mark.parametrize("loss", r_ft.LOSSES)
@pytest.mark.parametrize("seed", [None, 1])
def test_the_preferred_passage_comes_first_whichever_it_is(loss, seed):
    """With a random preference it learns the random passage: the target teaches."""
    preferred = PREFERRED
    if seed is not None:
        preferred = np.random.default_rng(seed).integers(0, C, ROWS)
        preferred[-1] %= 2
    data = batch(preferred)
    curve, _, _, scores = train(data, 150, loss=loss)
    present = np.where(data.log_targets_BC > losses.ABSENT / 2, scores, -np.inf)
    assert present.argmax(axis=1).tolist() == preferred.tolist()
    assert curve[-1, 0] < 0.2 * curve[0, 0]


@pytest.mark.parametrize("sizes", MESHES[1:], ids=str)
def test_the_result_is_the_same_on_every_mesh(sizes):
    data = batch(PREFERRED)
    expected, *_ = train(data, 3)
    found, *_ = train(data, 3, sizes)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)


def test_what_absent_places_hold_changes_nothing():
    data = batch(PREFERRED)
    passages = data.passages_BCE.copy()
    passages[-1, 2:] = 1e3
    expected, _, after, _ = train(data, 2)
    found, _, other, _ = train(data._replace(passages_BCE=passages), 2)
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, after, other)


def test_gradients_are_those_of_finite_differences():
    """In float64 through loss and encoder-like scores, one weight at a time."""
    data = batch(PREFERRED, sharpness=3.0)
    rng = np.random.default_rng(1)
    w = rng.standard_normal((32, 32)) * 0.2
    x = rng.standard_normal((ROWS, 32))
    with jax.enable_x64(True):
        passages = jnp.asarray(data.passages_BCE, jnp.float64)
        log_q = jnp.asarray(data.log_targets_BC, jnp.float64)
        present = log_q > losses.ABSENT / 2

        def loss(w):
            scores = jnp.einsum("BE,BCE->BC", jnp.tanh(x @ w), passages)
            log_p = losses._log_softmax(scores / 0.5, present)
            return losses.divergence(log_p, log_q).mean()

        found = np.asarray(jax.grad(loss)(jnp.asarray(w)))
        for i, j in rng.integers(0, 32, (6, 2)):
            shift = np.zeros_like(w)
            shift[i, j] = 1e-6
            slope = (loss(w + shift) - loss(w - shift)) / 2e-6
            assert found[i, j] == pytest.approx(float(slope), rel=1e-5, abs=1e-9)


# --- batches --------------------------------------------------------------------


class Rows:
    """Embedding i is (i, i, ...); counts what is gathered."""

    def __init__(self):
        self.asked = []

    def __getitem__(self, ids):
        self.asked += ids.ravel().tolist()
        return np.repeat(ids[..., None], 3, axis=-1).astype(np.float32)


def questions(count=10):
    ids = np.arange(count * 2).reshape(count, 2)
    ids[3, 1] = -1
    log_q = np.log(np.full((count, 2), 0.5, np.float32))
    return Questions([[i + 1] * (1 + i % 4) for i in range(count)], ids, log_q)


def test_batches_pair_each_question_with_its_own_passages_once_per_epoch():
    rows = Rows()
    batches = candidate_batches(questions(), rows, rows=5, length=6, seed=0)
    seen = []
    for data in (next(batches), next(batches)):
        assert data.tokens_BL.shape == data.mask_BL.shape == (5, 6)
        for tokens, mask, passages in zip(
            data.tokens_BL, data.mask_BL, data.passages_BCE, strict=True
        ):
            i = int(tokens[0]) - 1
            seen.append(i)
            assert mask.sum() == 1 + i % 4
            assert (tokens[mask] == i + 1).all()
            assert not tokens[~mask].any()
            expected = [2 * i, 0 if i == 3 else 2 * i + 1]
            assert passages[:, 0].tolist() == expected
    assert sorted(seen) == list(range(10))
    state = batches.get_state()
    following = next(batches)
    batches.set_state(state)
    np.testing.assert_array_equal(next(batches).tokens_BL, following.tokens_BL)
    batches.close()


def test_processes_share_the_questions():
    parts = [
        candidate_batches(questions(), Rows(), 10, 6, 0, process, 2)
        for process in range(2)
    ]
    seen = [int(t) for part in parts for t in next(part).tokens_BL[:, 0]]
    assert sorted(seen) == list(range(1, 11))
    for part in parts:
        part.close()


def test_impossible_batches_are_told():
    with pytest.raises(ValueError, match="rows = 11 is more than the 10 training"):
        candidate_batches(questions(), Rows(), 11, 6, 0)
    with pytest.raises(ValueError, match="rows = 5 does not divide over 2 processes"):
        candidate_batches(questions(), Rows(), 5, 6, 0, 0, 2)


# --- the stage ------------------------------------------------------------------


def rescore(workdir, prefer):
    """Replace the scores: ``prefer`` gives a row's columns from best to worst."""
    for file in workdir.glob("scored/*/*/scores.npz"):
        arrays = dict(np.load(file))
        for i, ids in enumerate(arrays["ids"]):
            order = prefer(ids)
            arrays["log_p"][i, order] = -2.0 * np.arange(1, len(order) + 1)
        arrays["tokens"][:] = 2
        np.savez(file, **arrays)


@pytest.fixture
def ready(scored, tmp_path):
    """A work folder whose scores prefer passages with small ids."""
    workdir = shutil.copytree(scored, tmp_path / "work", symlinks=True)
    rescore(workdir, np.argsort)
    return workdir


def digests(folder):
    return {
        file: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_the_stage_trains_the_query_encoder_and_touches_nothing_else(
    ready, tiny_config
):
    config = tiny_config(ready)
    before = digests(ready)
    folder = run("r_ft", r_ft.STAGE, config)
    after = {f: d for f, d in digests(ready).items() if folder not in f.parents}
    assert after == before
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"passages", "index", "retrieved", "scored"}
    assert manifest["counts"]["flat"] == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    validated = {r["step"]: r["validation/mrr"] for r in rows if "validation/mrr" in r}
    assert sorted(validated) == [0, 3, 6]
    # The best of them is kept, the start included; of equals the earlier.
    best = max(validated, key=lambda step: (validated[step], -step))
    assert manifest["counts"]["best_step"] == best
    with jax.set_mesh(sharding.make_mesh()):
        kept = r_ft.load_finetuned_encoder(config)
        start = load_encoder(config.encoder)
        same = jax.tree.map(lambda a, b: bool((a == b).all()), kept, start)
    assert all(jax.tree.leaves(same)) == (best == 0)
    assert {"train/loss", "train/entropy", "train/agreement"} <= set(rows[1])


def test_validation_before_training_is_what_retrieve_found(ready, tiny_config):
    config = tiny_config(ready, **{"r_ft.validation_examples": 10_000})
    folder = run("r_ft", r_ft.STAGE, config)
    row = json.loads((folder / "metrics.jsonl").open().readline())
    store = PassageStore(ready / "passages")
    depth = config.r_ft.validation_depth
    ((examples, found),) = read_retrieved(ready, "dev").values()
    gold = [gold_passages(example, store) for example in examples]
    expected = metrics.reciprocal_rank(found.ids[:, :depth], gold).mean()
    assert row["validation/mrr"] == pytest.approx(expected)
    first = np.mean([ids[0] in g for ids, g in zip(found.ids, gold, strict=True)])
    assert row["validation/gold@1"] == pytest.approx(first)


def test_where_no_gold_passage_is_known_the_first_answer_counts(ready, tiny_config):
    (file,) = ready.glob("retrieved/dev/*/examples.jsonl")
    examples = [json.loads(line) | {"document": ""} for line in file.open()]
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    config = tiny_config(ready, **{"r_ft.validation_examples": 10_000})
    folder = run("r_ft", r_ft.STAGE, config)
    row = json.loads((folder / "metrics.jsonl").open().readline())
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


def test_flat_targets_are_refused_with_what_would_do(ready, tiny_config):
    changes = {
        "r_ft.score_mode": "sequence_probability",
        "r_ft.target_temperature": 10.0,
    }
    message = (
        r"sequence_probability with r_ft.target_temperature = 10: 100 % of the targets "
        r"are flat, .* clear under mean_log_probability with temperature 1"
    )
    with pytest.raises(ValueError, match=message):
        run("r_ft", r_ft.STAGE, tiny_config(ready, **changes))


def test_scores_that_tell_nothing_apart_are_refused(ready, tiny_config):
    for file in ready.glob("scored/*/*/scores.npz"):
        arrays = dict(np.load(file))
        arrays["log_p"][:] = -3.0
        np.savez(file, **arrays)
    with pytest.raises(ValueError, match="tell passages apart under no temperature"):
        run("r_ft", r_ft.STAGE, tiny_config(ready))


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
        ({"rows": 0}, r"r_ft.rows = 0 must be at least 1"),
        ({"rows": 100_000}, r"rows = 100000 is more than the \d+ training questions"),
        ({"warmup_steps": 6}, r"warmup_steps = 6 must be"),
    ],
)
def test_settings_that_make_no_sense_are_refused(ready, tiny_config, changes, message):
    config = tiny_config(ready, **{f"r_ft.{k}": v for k, v in changes.items()})
    with pytest.raises(ValueError, match=message):
        run("r_ft", r_ft.STAGE, config)


def test_scores_of_other_examples_are_refused(ready, tiny_config):
    file = ready / "retrieved" / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"key": "0123456789ab"}))
    message = r"scored was made from retrieved \w+, and .* is now 0123456789ab; run"
    with pytest.raises(ArtifactError, match=message):
        run("r_ft", r_ft.STAGE, tiny_config(ready))


def test_examples_of_another_index_are_refused(ready, tiny_config):
    file = ready / "index" / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"key": "0123456789ab"}))
    with pytest.raises(ArtifactError, match="retrieved was made from index"):
        run("r_ft", r_ft.STAGE, tiny_config(ready))


@pytest.mark.parametrize("value", [np.nan, 0.5])
def test_scores_that_are_none_are_refused_with_the_question(ready, tiny_config, value):
    (file,) = ready.glob("scored/train/*/scores.npz")
    arrays = dict(np.load(file))
    arrays["log_p"][2, 1] = value
    np.savez(file, **arrays)
    ((examples, _),) = read_retrieved(ready, "train").values()
    with pytest.raises(ValueError, match=re.escape(f"question {examples[2].id} has")):
        run("r_ft", r_ft.STAGE, tiny_config(ready))


def test_a_split_without_scores_is_told(ready, tiny_config):
    shutil.rmtree(ready / "scored" / "dev")
    with pytest.raises(ValueError, match="run lm_score with 'dev' among"):
        run("r_ft", r_ft.STAGE, tiny_config(ready))


def test_questions_with_one_passage_are_left_out(ready, tiny_config, caplog):
    (file,) = ready.glob("scored/train/*/scores.npz")
    arrays = dict(np.load(file))
    arrays["log_p"][0, 1:] = -np.inf
    arrays["ids"][0, 1:] = -1
    np.savez(file, **arrays)
    folder = run("r_ft", r_ft.STAGE, tiny_config(ready))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"]["questions"] == len(arrays["ids"]) - 1
    assert f"1 of {len(arrays['ids'])} questions have fewer than two" in caplog.text


def test_a_dense_encoder_need_not_say_its_temperature(ready, tiny_config):
    """DRAGON+ does not normalise: raw dot products, temperature 1."""
    config = tiny_config(ready, **{"r_ft.score_temperature": None})
    assert r_ft.check_settings(config, EncoderConfig(50, 32, 2, 8, 64, 16)) == 1.0
