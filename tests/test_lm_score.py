"""Scores of answers: those of transformers, whatever they are packed with."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from radit_jax import sharding
from radit_jax.batch import Example, Packed
from radit_jax.data.corpus import PassageStore
from radit_jax.data.pipeline import Mixture, scoring_batches
from radit_jax.data.prompts import Piece, Prompt, render
from radit_jax.data.tasks import subject
from radit_jax.data.tokenize import load_tokenizer
from radit_jax.inference.score import target_log_probabilities
from radit_jax.models.huggingface import load_llama
from radit_jax.stages import lm_score, retrieve
from radit_jax.stages.retrieve import read_retrieved
from radit_jax.stages.stage import run

SMALL = Mixture(row_tokens=48, row_targets=16, rows=8, packing_bins=8)
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]


def sequences(count, vocabulary=60):
    """Prompts of random tokens: one of a few beginnings, then their own.

    The last few tokens are the target; some prompts have no beginning.
    """
    rng = np.random.default_rng(0)

    def draw(low, high):
        return rng.integers(3, vocabulary, rng.integers(low, high)).tolist()

    beginnings = [[], draw(1, 2), draw(9, 16), draw(9, 16)]
    found = []
    for _ in range(count):
        beginning = beginnings[rng.integers(len(beginnings))]
        question, target = draw(2, 12), draw(1, 5)
        tokens = beginning + question + target
        start = len(beginning)
        answer = start + len(question)
        spans = ((answer, len(tokens)),)
        found.append(Prompt(tokens, start, answer, spans, 0, 0))
    return found


def scores(model, prompts, mixture=SMALL):
    sums = np.zeros(len(prompts))
    score = jax.jit(target_log_probabilities)
    for packed in scoring_batches(prompts, mixture):
        batch = Packed(*map(sharding.put_rows, packed.batch))
        log_BT = np.asarray(
            score(model, batch, sharding.put_rows(packed.prefix_ids_BL))
        )
        used = packed.owners_BT >= 0
        np.add.at(sums, packed.owners_BT[used], log_BT[used])
    return sums


def published_token_scores(folder, prompts):
    """Of every target token, one sequence at a time, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for prompt in prompts:
        with torch.no_grad():
            logits = model(torch.tensor([prompt.tokens])).logits[0].log_softmax(-1)
        at = range(prompt.answer_start, len(prompt.tokens))
        found.append(np.array([float(logits[i - 1, prompt.tokens[i]]) for i in at]))
    return found


def published_scores(folder, prompts):
    return np.array([rows.sum() for rows in published_token_scores(folder, prompts)])


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
    for batch, _, owners_BT in batches:
        assert ((owners_BT >= 0) == (batch.weights_BT > 0)).all()
        for owner, target in zip(owners_BT.flat, batch.targets_BT.flat, strict=True):
            if owner >= 0:
                targets[int(owner)].append(int(target))
    for i, prompt in enumerate(prompts):
        assert targets[i] == prompt.tokens[prompt.answer_start :]
    assert any((owners_BT < 0).all(axis=1).any() for *_, owners_BT in batches)


def test_the_last_batch_has_only_the_rows_it_needs():
    prompts = sequences(60)
    whole = list(scoring_batches(prompts, SMALL))
    assert len(whole) > 1
    used = int((whole[-1].batch.segment_ids_BL.max(axis=1) > 0).sum())
    for step in (1, 2, 3):
        found = list(scoring_batches(prompts, SMALL, step))
        rows = min(-(-used // step) * step, SMALL.rows)
        assert [len(b.owners_BT) for b in found] == [SMALL.rows] * (len(whole) - 1) + [
            rows
        ]
        for ours, theirs in zip(found, whole, strict=True):
            size = len(ours.owners_BT)
            np.testing.assert_array_equal(ours.owners_BT, theirs.owners_BT[:size])
            assert not (theirs.owners_BT[size:] >= 0).any()


def test_a_beginning_is_read_once_for_all_that_share_it():
    prompts = [p for p in sequences(60) if p.question_start > 8]
    long = SMALL._replace(row_tokens=1024, row_targets=256)
    read = sum(
        int((b.batch.segment_ids_BL > 0).sum()) for b in scoring_batches(prompts, long)
    )
    beginnings = {tuple(p.tokens[: p.question_start]) for p in prompts}
    assert len(beginnings) == 2
    # What is scored last need not be read.
    own = sum(len(p.tokens) - p.question_start - 1 for p in prompts)
    assert read == sum(map(len, beginnings)) + own
    # In short rows it is read again where a row is full, and never cut.
    short = list(scoring_batches(prompts, SMALL))
    assert sum(int((b.batch.segment_ids_BL > 0).sum()) for b in short) > read


def test_what_does_not_fit_into_a_row_is_refused():
    (prompt,) = sequences(1)
    long = prompt._replace(tokens=prompt.tokens * 20)
    with pytest.raises(ValueError, match=r"sequence 1: \d+ tokens, .* do not fit into"):
        list(scoring_batches([prompt, long], SMALL))


def changed(tiny_config, workdir, **changes):
    return tiny_config(workdir, **{f"lm_score.{k}": v for k, v in changes.items()})


def read(workdir, split, name):
    return dict(np.load(workdir / "scored" / split / name / "scores.npz"))


def test_the_stage_scores_each_answer_after_each_passage_and_alone(scored, tiny_config):
    workdir, config = scored, tiny_config(scored)
    tokenizer = load_tokenizer(config.lm)
    store = PassageStore(workdir / "passages")
    for split in config.lm_score.splits:
        (name, (examples, found)), *_ = read_retrieved(workdir, split).items()
        arrays = read(workdir, split, name)
        np.testing.assert_array_equal(arrays["places"], np.arange(len(examples)))
        by_example = np.split(arrays["token_log_p"], np.cumsum(arrays["tokens"])[:-1])
        assert arrays["log_p"].shape == (len(examples), config.lm_score.passages)
        np.testing.assert_array_equal(arrays["ids"], found.ids)
        for i in (0, 1, len(examples) - 1):
            example = examples[i]
            asked = f"Q: {example.question}\nA:"
            if split == "corpus":
                asked = example.question
            pieces = [Piece(asked), Piece(f" {example.answers[0]}", loss=True)]
            prompts = [
                render(tokenizer, pieces, 128, passage=text, eos=False)
                for text in ["", *(p.display for p in store.get(found.ids[i]))]
            ]
            expected = published_token_scores(config.lm, prompts)
            ours = [arrays["log_p_alone"][i], *arrays["log_p"][i]]
            sums = [rows.sum() for rows in expected]
            np.testing.assert_allclose(ours, sums, atol=1e-3)
            # Of each token too: a column per passage.
            np.testing.assert_allclose(
                by_example[i], np.array(expected[1:]).T, atol=1e-4
            )
            size = len(prompts[0].tokens) - prompts[0].answer_start
            assert arrays["tokens"][i] == size
            assert arrays["characters"][i] == len(example.answers[0])
            # Otherwise the comparison would show nothing.
            assert np.ptp(arrays["log_p"][i]) > 1e-3
    assert not (workdir / "scored" / "shards").exists()
    manifest = json.loads((workdir / "scored" / "manifest.json").read_text())
    assert 0.2 < manifest["counts"]["tokens_read_once"] < 1


def test_text_of_the_corpus_goes_on_where_its_beginning_ends(scored, tiny_config):
    config = tiny_config(scored)
    ((examples, found),) = read_retrieved(scored, "corpus").values()
    assert len(examples) == config.retrieve.corpus_examples
    assert len({example.source for example in examples}) == len(examples)
    store = PassageStore(scored / "passages")
    encoder = load_tokenizer(config.encoder)
    for example, ids in zip(examples, found.ids, strict=True):
        whole = store[example.source].display
        answer = example.answers[0]
        assert whole.startswith(example.question)
        assert whole.endswith(answer)
        assert len(example.question) + len(answer) <= len(whole)
        for part in (example.question, answer):
            assert 0 < len(encoder.encode(part)) <= config.retrieve.corpus_tokens
        # Its own passage would say the answer; as many others are found.
        assert example.source not in ids
        assert (ids >= 0).all()
        assert len(set(ids.tolist())) == config.retrieve.k
    with jax.set_mesh(sharding.make_mesh()):
        tokenizer = load_tokenizer(config.lm)
        scorer = lm_score.Scorer(config, load_llama(config.lm), tokenizer)
        prompt = scorer.render(examples[0], store[int(found.ids[0, 0])].display)
    text = tokenizer.decode(prompt.tokens)
    expected = f"\n\n{examples[0].question} {examples[0].answers[0]}"
    assert text.startswith("Background: ")
    assert text.endswith(expected)


def test_too_few_passages_for_the_corpus_are_told(retrieved, tiny_config, tmp_path):
    workdir = shutil.copytree(retrieved, tmp_path / "work", symlinks=True)
    changes = {"retrieve.corpus_examples": 10_000}
    with pytest.raises(ValueError, match=r"corpus_examples = 10000, but only \d+ of"):
        run("retrieve", retrieve.STAGE, tiny_config(workdir, **changes))


def test_a_limit_takes_whole_subjects(retrieved, tiny_config, tmp_path):
    workdir = shutil.copytree(retrieved, tmp_path / "work", symlinks=True)
    limits = {"limit.train": 14, "limit.dev": 6}
    run("lm_score", lm_score.STAGE, changed(tiny_config, workdir, **limits))
    for split, limit in (("train", 14), ("dev", 6)):
        ((name, (examples, found)),) = read_retrieved(workdir, split).items()
        arrays = read(workdir, split, name)
        assert len(arrays["places"]) == limit
        np.testing.assert_array_equal(arrays["ids"], found.ids[arrays["places"]])
        taken = {subject(examples[i]) for i in arrays["places"]}
        partly = {
            subject(example)
            for i, example in enumerate(examples)
            if i not in arrays["places"] and subject(example) in taken
        }
        assert len(partly) <= 1
        assert len(taken) < limit or split == "dev"


PROCESS = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
sys.path.insert(0, sys.argv[5])
import numpy as np
from configs import radit
from radit_jax import sharding
from radit_jax.batch import Example
from radit_jax.data.tokenize import load_tokenizer
from radit_jax.models.huggingface import load_llama
from radit_jax.stages.lm_score import Scorer
config = radit.get_config("tiny")
config.lm = sys.argv[3]
texts = np.load(sys.argv[4])["texts"].tolist()
pairs = [(Example("q", "What?", (text[:9],)), text) for text in texts]
with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
    scorer = Scorer(config, load_llama(config.lm), load_tokenizer(config.lm))
    done = []
    scored = scorer(pairs, done.append)
assert sum(done) == len(pairs), done
np.savez(sys.argv[4] + sys.argv[2], scored.log_p, scored.token_log_p)
"""


def test_two_processes_score_what_one_does(lm, tiny_config, tmp_path, retrieved):
    """Each reads its own half, and one of them runs out of rows before the other."""
    store = PassageStore(retrieved / "passages")
    texts = [store[i % 7].display for i in range(24)] + ["x" * 9] * 9
    file = tmp_path / "texts.npz"
    np.savez(file, texts=np.array(texts))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", "-c", PROCESS, address, str(rank)),
                *(str(lm), str(file), str(Path(__file__).parents[1])),
            ],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors
    config = tiny_config(retrieved)
    with jax.set_mesh(sharding.make_mesh(1, 1, 1)):
        scorer = lm_score.Scorer(config, load_llama(lm), load_tokenizer(lm))
        expected = scorer(
            [(Example("q", "What?", (text[:9],)), text) for text in texts]
        )
    for rank in range(2):
        found = np.load(f"{file}{rank}.npz")
        np.testing.assert_allclose(found["arr_0"], expected.log_p, atol=1e-4)
        np.testing.assert_allclose(found["arr_1"], expected.token_log_p, atol=1e-4)


def test_it_goes_on_at_the_first_missing_shard(
    scored, retrieved, tiny_config, tmp_path, monkeypatch
):
    workdir = shutil.copytree(retrieved, tmp_path / "work", symlinks=True)
    config = changed(tiny_config, workdir)
    real, calls = lm_score.Scorer.__call__, []

    def fail_the_third_time(self, pairs, advance):
        calls.append(len(pairs))
        if len(calls) == 3:
            raise OSError("the machine is gone")
        return real(self, pairs, advance)

    monkeypatch.setattr(lm_score.Scorer, "__call__", fail_the_third_time)
    with pytest.raises(OSError, match="the machine is gone"):
        run("lm_score", lm_score.STAGE, config)
    assert len(list(workdir.glob("scored.partial-*/shards/*.npz"))) == 2
    assert not (workdir / "scored").exists()
    run("lm_score", lm_score.STAGE, config)
    total = 0
    for split in config.lm_score.splits:
        for name, (examples, found) in read_retrieved(workdir, split).items():
            ours, theirs = read(workdir, split, name), read(scored, split, name)
            for key in theirs:
                np.testing.assert_array_equal(ours[key], theirs[key])
            total += len(examples) + found.ids.size
    # The third call was made twice, the first two were not made again.
    assert sum(calls) - calls[2] == total
    assert calls[2] == calls[3]


def test_pairs_stand_by_passage_and_missing_passages_are_none():
    ids = np.array([[7, 5], [5, -1]])
    pairs = lm_score.all_pairs(ids)
    assert np.stack(pairs).T.tolist() == [
        [0, -1, -1],
        [1, -1, -1],
        [0, 1, 5],
        [1, 0, 5],
        [0, 0, 7],
    ]


def test_fewer_passages_than_asked_for_have_no_score(retrieved, tiny_config, tmp_path):
    workdir = shutil.copytree(retrieved, tmp_path / "work", symlinks=True)
    for file in workdir.glob("retrieved/dev/*/shard-*.npz"):
        arrays = dict(np.load(file))
        arrays["ids"][0, 2:], arrays["scores"][0, 2:] = -1, -np.inf
        np.savez(file, **arrays)
    config = changed(tiny_config, workdir, splits=("dev",))
    run("lm_score", lm_score.STAGE, config)
    (name, _), *_ = read_retrieved(workdir, "dev").items()
    found = read(workdir, "dev", name)
    assert np.isneginf(found["log_p"][0, 2:]).all()
    assert np.isfinite(found["log_p"][0, :2]).all()
    assert np.isfinite(found["log_p"][1:]).all()


def test_eos_is_scored_when_asked_for(retrieved, tiny_config):
    (_, (examples, _)), *_ = read_retrieved(retrieved, "dev").items()
    both = []
    with jax.set_mesh(sharding.make_mesh()):
        for eos in (False, True):
            config = changed(tiny_config, retrieved, eos=eos)
            scorer = lm_score.Scorer(
                config, load_llama(config.lm), load_tokenizer(config.lm)
            )
            both.append(scorer([(examples[0], "")]))
    without, with_ = both
    assert with_.tokens[0] == without.tokens[0] + 1
    assert with_.log_p[0] < without.log_p[0]
    # It is the last of the answer's tokens, the others are as before.
    np.testing.assert_allclose(with_.token_log_p[:-1], without.token_log_p, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, r"lm_score.rows = 0 must be at least 1"),
        ({"limit.dev": -1}, r"lm_score.limit.dev = -1 must be 0 \(all\) or more"),
        ({"splits": ("trian",)}, r"lm_score.splits = \('trian',\): expected some of"),
        ({"row_tokens": 1024}, r"row_tokens = 1024 is more than the model's context"),
        ({"row_targets": 1}, r"question .*: an answer of \d+ tokens is longer than"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    workdir, tiny_config, changes, message
):
    config = changed(tiny_config, workdir, **changes)
    with pytest.raises(ValueError, match=message):
        run("lm_score", lm_score.STAGE, config)


def test_rows_must_divide_over_the_mesh(workdir, tiny_config):
    config = changed(tiny_config, workdir, rows=12)
    config.mesh.data = 8
    with pytest.raises(ValueError, match=r"rows = 12 do not divide .* is 16"):
        run("lm_score", lm_score.STAGE, config)


def test_bfloat16_stays_near(lm):
    prompts = sequences(8)
    with jax.set_mesh(sharding.make_mesh()):
        model = load_llama(lm)
        exact = scores(model, prompts)
        (packed,) = scoring_batches(prompts, SMALL)
        batch = Packed(*map(sharding.put_rows, packed.batch))
        prefix_ids_BL = sharding.put_rows(packed.prefix_ids_BL)
        log_BT = target_log_probabilities(model, batch, prefix_ids_BL, jnp.bfloat16)
    assert log_BT.dtype == jnp.float32
    sums = np.zeros(8)
    used = packed.owners_BT >= 0
    np.add.at(sums, packed.owners_BT[used], np.asarray(log_BT)[used])
    np.testing.assert_allclose(sums, exact, rtol=0.03)
