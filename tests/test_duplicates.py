import random

import numpy as np
import pytest

from radit_jax.data import duplicates
from radit_jax.data.duplicates import (
    KEY_BITS,
    Buckets,
    Marks,
    band_keys,
    band_rows,
    banding,
    jaccard,
    repeats,
    shingles,
    similar,
    split_rows,
)


@pytest.mark.parametrize("size", [1, 8, 77])
def test_marks_are_a_bool_array_of_bits(size):
    rng = np.random.default_rng(0)
    marks, oracle = Marks(size), np.zeros(size, bool)
    for _ in range(3):
        positions = rng.integers(size, size=size // 4 + 1)  # repeats among them
        marks.mark(positions)
        oracle[positions] = True
    assert marks.count() == oracle.sum()
    for start in range(size + 1):
        for stop in range(start, size + 1):
            np.testing.assert_array_equal(
                marks.between(start, stop), oracle[start:stop]
            )
    again = Marks(size, marks.bits)
    np.testing.assert_array_equal(again.between(0, size), oracle)


@pytest.mark.parametrize("held", [1, 60, 10_000])
def test_buckets_give_back_their_rows_in_order(tmp_path, monkeypatch, held):
    monkeypatch.setattr(duplicates, "_HELD", held)
    rng = np.random.default_rng(1)
    keys = rng.integers(2**KEY_BITS, size=500)
    rows = np.stack([keys, np.arange(500), rng.integers(9, size=500)], axis=1)
    buckets = Buckets(tmp_path / "buckets", columns=3, bits=4)
    for start in range(0, 500, 7):
        buckets.add(rows[start : start + 7])
    assert buckets.rows == 500
    found = list(buckets)
    assert len(found) == 16
    for bucket in found:
        assert len(set(bucket[:, 0] >> (KEY_BITS - 4))) == 1
        assert list(bucket[:, 1]) == sorted(bucket[:, 1])
    together = np.concatenate(found)
    expected = rows[np.argsort(keys >> (KEY_BITS - 4), kind="stable")]
    np.testing.assert_array_equal(together, expected)


def test_no_rows_have_no_buckets():
    assert list(split_rows(np.zeros((0, 2), np.int64))) == []


def test_the_first_of_equal_keys_is_kept():
    rng = np.random.default_rng(2)
    rows = np.stack([rng.integers(300, size=1000), rng.permutation(1000)], axis=1)
    first: dict[int, int] = {}
    expected = []
    for key, position in sorted(rows.tolist(), key=lambda row: row[1]):
        if key in first:
            expected.append((first[key], position))
        first.setdefault(key, position)
    found = repeats(rows)
    assert list(zip(*map(np.ndarray.tolist, found), strict=True)) == expected


# Near-duplicates.


def test_shingles_are_runs_of_five_words():
    assert shingles("a b c d e f") == {tuple("abcde"), tuple("bcdef")}
    assert shingles("a b\nc") == {tuple("abc")}
    assert jaccard(shingles("a b c d e f"), shingles("b c d e f g")) == 1 / 3


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95])
def test_bands_find_pairs_at_the_threshold(threshold):
    bands, rows = banding(threshold)
    assert bands * rows <= duplicates.PERMUTATIONS
    assert 1 - (1 - threshold**rows) ** bands >= 0.99
    # One row more would miss some.
    fewer = duplicates.PERMUTATIONS // (rows + 1)
    assert 1 - (1 - threshold ** (rows + 1)) ** fewer < 0.99


def _text(rng, words):
    return [f"w{rng.randrange(5000)}" for _ in range(words)]


def _altered(rng, words, changes):
    words = list(words)
    for at in rng.sample(range(len(words)), changes):
        words[at] = "altered"
    return words


def test_signatures_agree_as_often_as_texts_are_similar():
    rng = random.Random(3)
    for changes in (0, 2, 6, 20):
        differences = []
        for _ in range(30):
            one = _text(rng, 200)
            pair = [" ".join(one), " ".join(_altered(rng, one, changes))]
            signatures = duplicates._signatures(pair)
            agree = (signatures[0] == signatures[1]).mean()
            differences.append(agree - jaccard(*map(shingles, pair)))
        # The standard deviation of one is at most 0.045.
        assert max(map(abs, differences)) < 0.15
        assert abs(np.mean(differences)) < 0.025


def test_keys_are_the_same_in_every_process_and_batch():
    texts = ["The same text gives the same keys everywhere.", "short", "x " * 300]
    keys = band_keys(texts, 0.8)
    assert keys.shape == (3, banding(0.8)[0])
    assert (keys >= 0).all()
    assert keys[:2, 0].tolist() == [3589217237145408679, 8061884421545211004]
    for at, text in enumerate(texts):
        np.testing.assert_array_equal(band_keys([text], 0.8)[0], keys[at])
    many = band_keys(texts * 50, 0.8)
    np.testing.assert_array_equal(many, np.tile(keys, (50, 1)))


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates_are_those_of_an_exact_comparison(threshold):
    rng = random.Random(4)
    texts = []
    for _ in range(60):
        one = _text(rng, rng.randint(40, 160))
        texts.append(one)
        for changes in (1, 2, 3, 5, 8, 12):
            if rng.random() < 0.5:
                texts.append(_altered(rng, one, changes))
    rng.shuffle(texts)
    texts = [" ".join(words) for words in texts]
    sets = list(map(shingles, texts))
    similarity = np.array([[jaccard(a, b) for b in sets] for a in sets])
    earlier = np.tril(similarity, -1).max(axis=1)
    rows = band_rows(np.arange(len(texts)), texts, threshold)
    found = {
        int(position)
        for _, bucket in split_rows(rows)
        for position in similar(bucket, texts.__getitem__, threshold)
    }
    expected = set(np.flatnonzero(earlier >= threshold).tolist())
    assert len(expected) > 40
    # Comparison is exact, so nothing is dropped that should stay; what shares no band
    # with its like is missed, by a chance of 1 % at the threshold and less above.
    assert found <= expected
    assert len(expected - found) <= 0.02 * len(expected)
