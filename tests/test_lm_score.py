"""Scores of answers: those of transformers, whatever they are packed with."""

import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from radit_jax import sharding
from radit_jax.batch import Packed
from radit_jax.data.corpus import PassageStore
from radit_jax.data.pipeline import Mixture, scoring_batches
from radit_jax.data.prompts import Prompt, render
from radit_jax.data.tokenize import load_tokenizer
from radit_jax.inference.score import target_log_probabilities
from radit_jax.models.huggingface import load_llama
from radit_jax.stages import lm_score
from radit_jax.stages.retrieve import read_retrieved
from radit_jax.stages.stage import run

SMALL = Mixture(row_tokens=48, row_targets=16, rows=8, packing_bins=8)
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


def sequences(count, vocabulary=60):
    """Prompts of random tokens and lengths; the last few tokens are the target."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        tokens = rng.integers(3, vocabulary, rng.integers(6, 30)).tolist()
        found.append(Prompt(tokens, len(tokens) - int(rng.integers(1, 5)), 0, 0))
    return found


def scores(model, prompts, mixture=SMALL):
    sums = np.zeros(len(prompts))
    for owned in scoring_batches(prompts, mixture):
        batch = Packed(*map(sharding.put_rows, owned.batch))
        log_BT = np.asarray(jax.jit(target_log_probabilities)(model, batch))
        used = owned.owners_BT >= 0
        np.add.at(sums, owned.owners_BT[used], log_BT[used])
    return sums


def published_scores(folder, prompts):
    """One sequence at a time, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for prompt in prompts:
        with torch.no_grad():
            logits = model(torch.tensor([prompt.tokens])).logits[0].log_softmax(-1)
        at = range(prompt.answer_start, len(prompt.tokens))
        found.append(sum(float(logits[i - 1, prompt.tokens[i]]) for i in at))
    return np.array(found)


@pytest.fixture(scope="module")
def lm(retrieved):
    return retrieved / "inputs" / "lm"


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_scores_equal_transformers_on_every_mesh(lm, sizes):
    prompts = sequences(23)
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        found = scores(load_llama(lm), prompts)
    np.testing.assert_allclose(found, published_scores(lm, prompts), atol=1e-4)


def test_a_score_does_not_depend_on_what_it_is_packed_with(lm):
    prompts = sequences(23)
    with jax.set_mesh(sharding.make_mesh(1, 1, 1)):
        model = load_llama(lm)
        together = scores(model, prompts)
        alone = [scores(model, [p], SMALL._replace(rows=1))[0] for p in prompts[:4]]
        other = scores(
            model, prompts[::-1], SMALL._replace(row_tokens=96, row_targets=24)
        )
    np.testing.assert_allclose(together[:4], alone, atol=1e-5)
    np.testing.assert_allclose(together, other[::-1], atol=1e-5)


def test_every_target_has_its_owner_and_empty_rows_have_none():
    prompts = sequences(23)
    batches = list(scoring_batches(prompts, SMALL))
    assert {b.batch.tokens_BL.shape for b in batches} == {(8, 48)}
    targets = {i: [] for i in range(len(prompts))}
    for batch, owners_BT in batches:
        assert ((owners_BT >= 0) == (batch.weights_BT > 0)).all()
        for owner, target in zip(owners_BT.flat, batch.targets_BT.flat, strict=True):
            if owner >= 0:
                targets[int(owner)].append(int(target))
    for i, prompt in enumerate(prompts):
        assert targets[i] == prompt.tokens[prompt.answer_start :]
    assert any((owners_BT < 0).all(axis=1).any() for _, owners_BT in batches)


@pytest.fixture(scope="module")
def scored(retrieved, tiny_config, tmp_path_factory):
    """A work folder in which ``lm_score:tiny`` has run."""
    workdir = tmp_path_factory.mktemp("scored") / "work"
    shutil.copytree(retrieved, workdir, symlinks=True)
    config = small_config(tiny_config, workdir)
    run("lm_score", lm_score.STAGE, config)
    return config, workdir


def small_config(tiny_config, workdir, **changes):
    from configs import lm_score as recipe

    config = tiny_config(workdir)
    with config.unlocked():
        recipe.section(config, "tiny")
    config.update_from_flattened_dict({f"lm_score.{k}": v for k, v in changes.items()})
    return config


def read(workdir, split, name):
    files = sorted((workdir / "scored" / split / name).glob("shard-*.npz"))
    shards = [np.load(file) for file in files]
    return {key: np.concatenate([s[key] for s in shards]) for key in shards[0]}, files


def test_the_stage_scores_each_answer_after_each_passage_and_alone(scored):
    config, workdir = scored
    tokenizer = load_tokenizer(config.lm)
    store = PassageStore(workdir / "passages")
    (name, (examples, found)), *_ = read_retrieved(workdir, "train").items()
    arrays, files = read(workdir, "train", name)
    assert len(files) == -(-len(examples) // config.lm_score.shard_size) > 1
    assert arrays["log_p"].shape == (len(examples), config.lm_score.passages)
    np.testing.assert_array_equal(arrays["ids"], found.ids)
    for i in (0, 1, len(examples) - 1):
        example = examples[i]
        texts = ["", *(p.display for p in store.get(found.ids[i]))]
        prompts = [
            render(
                tokenizer,
                example.question,
                128,
                passage=text,
                answer=example.answers[0],
                eos=False,
            )
            for text in texts
        ]
        expected = published_scores(config.lm, prompts)
        found_scores = [arrays["log_p_alone"][i], *arrays["log_p"][i]]
        np.testing.assert_allclose(found_scores, expected, atol=1e-3)
        assert arrays["tokens"][i] == len(prompts[0].tokens) - prompts[0].answer_start
        assert arrays["characters"][i] == len(example.answers[0])
        # Otherwise the comparison would show nothing.
        assert np.ptp(arrays["log_p"][i]) > 1e-3


def test_it_goes_on_at_the_first_missing_shard(
    scored, retrieved, tiny_config, tmp_path, monkeypatch
):
    workdir = shutil.copytree(retrieved, tmp_path / "work", symlinks=True)
    config = small_config(tiny_config, workdir)
    real, calls = lm_score.Scorer.__call__, itertools.count()

    def fail_the_third_time(self, *arguments):
        if next(calls) == 2:
            raise OSError("the machine is gone")
        return real(self, *arguments)

    monkeypatch.setattr(lm_score.Scorer, "__call__", fail_the_third_time)
    with pytest.raises(OSError, match="the machine is gone"):
        run("lm_score", lm_score.STAGE, config)
    done = {file: file.stat().st_mtime_ns for file in workdir.rglob("shard-*.npz")}
    kept = [file.name for file in done if "scored.partial" in str(file)]
    assert len(kept) == 2
    assert not (workdir / "scored").exists()
    run("lm_score", lm_score.STAGE, config)
    _, whole = scored
    for split in config.lm_score.splits:
        for name in read_retrieved(workdir, split):
            ours, _ = read(workdir, split, name)
            theirs, _ = read(whole, split, name)
            for key in theirs:
                np.testing.assert_array_equal(ours[key], theirs[key])
    stamps = {file.stat().st_mtime_ns for file in workdir.rglob("scored/**/*.npz")}
    partial = [t for file, t in done.items() if "scored.partial" in str(file)]
    assert set(partial) <= stamps


def test_missing_passages_have_no_score(scored):
    config, workdir = scored
    (_, (examples, found)), *_ = read_retrieved(workdir, "dev").items()
    store = PassageStore(workdir / "passages")
    with jax.set_mesh(sharding.make_mesh()):
        scorer = lm_score.Scorer(
            config, load_llama(config.lm), load_tokenizer(config.lm)
        )
        texts = [p.display for p in store.get(found.ids[0])]
        few = scorer(examples[:1], [texts[:2]])
        all_ = scorer(examples[:1], [texts])
    assert np.isneginf(few.log_p[0, 2:]).all()
    np.testing.assert_allclose(few.log_p[0, :2], all_.log_p[0, :2], atol=1e-5)
    assert np.isfinite(all_.log_p[0]).all()


def test_eos_is_scored_when_asked_for(scored, tiny_config):
    config, workdir = scored
    (_, (examples, _)), *_ = read_retrieved(workdir, "dev").items()
    both = []
    with jax.set_mesh(sharding.make_mesh()):
        for eos in (False, True):
            changed = small_config(tiny_config, workdir, eos=eos)
            scorer = lm_score.Scorer(
                changed, load_llama(config.lm), load_tokenizer(config.lm)
            )
            both.append(scorer(examples[:1], [[]]))
    without, with_ = both
    assert with_.tokens[0] == without.tokens[0] + 1
    assert with_.log_p_alone[0] < without.log_p_alone[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, r"lm_score.rows = 0 must be at least 1"),
        ({"splits": ("trian",)}, r"lm_score.splits = \('trian',\): expected some of"),
        ({"row_tokens": 1024}, r"row_tokens = 1024 is more than the model's context"),
        ({"row_targets": 1}, r"question .*: an answer of \d+ tokens is longer than"),
    ],
)
def test_settings_that_make_no_sense_are_refused(scored, tiny_config, changes, message):
    _, workdir = scored
    config = small_config(tiny_config, workdir, **changes)
    with pytest.raises(ValueError, match=message):
        run("lm_score", lm_score.STAGE, config)


def test_rows_must_divide_over_the_mesh(scored, tiny_config):
    _, workdir = scored
    config = small_config(tiny_config, workdir, rows=12)
    config.mesh.data = 8
    with pytest.raises(ValueError, match=r"rows = 12 do not divide .* is 16"):
        run("lm_score", lm_score.STAGE, config)


def test_bfloat16_stays_near(lm):
    prompts = sequences(8)
    with jax.set_mesh(sharding.make_mesh()):
        model = load_llama(lm)
        exact = scores(model, prompts)
        (owned,) = scoring_batches(prompts, SMALL)
        batch = Packed(*map(sharding.put_rows, owned.batch))
        log_BT = target_log_probabilities(model, batch, jnp.bfloat16)
    assert log_BT.dtype == jnp.float32
    sums = np.zeros(8)
    used = owned.owners_BT >= 0
    np.add.at(sums, owned.owners_BT[used], np.asarray(log_BT)[used])
    np.testing.assert_allclose(sums, exact, rtol=0.03)
