"""Packing of prompts: every row is read back, and saved tokens are the most."""

import itertools

import jax
import numpy as np
import pytest

from radit_jax import sharding
from radit_jax.inference import packing
from radit_jax.inference.packing import Bundle, bundles, pack


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(packing, "LEAST_SHARED", 2)
    monkeypatch.setattr(packing, "BUCKETS", (8, 16, 24, 32, 48, 64))
    monkeypatch.setattr(packing, "LONG_ROW", 24)
    with jax.set_mesh(sharding.make_mesh()):
        yield


def read_back(rows):
    """(place, tokens) of every prompt, from what its last token may attend to."""
    found = []
    for row, slot in np.argwhere(rows.owners_BQ >= 0):
        at = (row, slot)
        own, prefix = rows.segments_BQ[at], rows.prefixes_BQ[at]
        segments = rows.segment_ids_BL[row]
        seen = (segments == own) | ((segments == prefix) & (prefix > 0))
        site = rows.sites_BQ[at]
        assert np.flatnonzero(seen)[-1] == site
        size = rows.lengths_BQ[at]
        assert rows.positions_BL[row][seen].tolist() == list(range(size))
        # Its own tokens go on from the same beginning as it does.
        assert set(rows.prefix_ids_BL[row][segments == own]) <= {prefix}
        assert set(rows.prefix_ids_BL[row][segments == prefix]) <= {0}
        found.append((int(rows.owners_BQ[at]), rows.tokens_BL[row][seen].tolist()))
    return found


def families(seed, count=40, longest=12):
    """Prompts of a few beginnings, some of them whole beginnings or repeated."""
    rng = np.random.default_rng(seed)
    heads = [rng.integers(1, 9, rng.integers(1, 9)).tolist() for _ in range(5)]
    prompts = []
    for _ in range(count):
        tail = rng.integers(1, 9, rng.integers(0, longest)).tolist()
        prompts.append(heads[rng.integers(5)] + tail)
    return prompts


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [1, 60, 400])
def test_every_prompt_is_read_whole_once(seed, budget):
    prompts = families(seed)
    found = [pair for rows in pack(prompts, [], 4, budget) for pair in read_back(rows)]
    assert sorted(found) == list(enumerate(prompts))


@pytest.mark.parametrize("shards", [(8, 1, 1), (2, 2, 2)])
def test_rows_spread_over_the_devices(shards):
    prompts = families(1)
    with jax.set_mesh(sharding.make_mesh(*shards)):
        batches = pack(prompts, [], 4, 400)
        assert all(len(rows.tokens_BL) % sharding.row_shards() == 0 for rows in batches)
    found = [pair for rows in batches for pair in read_back(rows)]
    assert sorted(found) == list(enumerate(prompts))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [1, 90, 300])
def test_groups_stay_in_one_batch(seed, budget):
    prompts = families(seed)
    groups = [range(0, 7), range(7, 8), range(8, 20), range(20, 25), range(25, 40)]
    batches = pack(prompts, groups, 4, budget)
    found = [pair for rows in batches for pair in read_back(rows)]
    assert sorted(found) == list(enumerate(prompts))
    for group in groups:
        holding = [
            np.isin(rows.owners_BQ, list(group)).sum()
            for rows in batches
            if np.isin(rows.owners_BQ, list(group)).any()
        ]
        assert holding == [len(group)]


def saved(prompts, parts, row_tokens):
    total = 0
    for part in parts:
        size = part.size(prompts)
        if len(part.places) > 1 and size > row_tokens:
            return -1
        total += sum(len(prompts[place]) for place in part.places) - size
    return total


def every_choice(prompts, least):
    """All ways to cut the sorted prompts, each part with all that it has in common."""
    order = sorted(range(len(prompts)), key=lambda place: prompts[place])
    gaps = range(1, len(order))
    for count in range(len(order)):
        for cuts in itertools.combinations(gaps, count):
            parts = []
            for start, end in itertools.pairwise([0, *cuts, len(order)]):
                places = order[start:end]
                columns = zip(*(prompts[place] for place in places), strict=False)
                same = itertools.takewhile(lambda c: len(set(c)) == 1, columns)
                common = len(list(same)) if len(places) > 1 else 0
                parts.append(Bundle(common, places))
            if all(len(p.places) == 1 or p.beginning >= least for p in parts):
                yield parts


@pytest.mark.parametrize("seed", range(5))
def test_bundles_save_as_much_as_any_choice(seed):
    prompts = families(seed, count=9, longest=5)
    found = bundles(prompts, 16)
    assert sorted(p for part in found for p in part.places) == list(range(9))
    best = max(saved(prompts, parts, 16) for parts in every_choice(prompts, 2))
    assert saved(prompts, found, 16) == best > 0
    for part in found:
        heads = {tuple(prompts[place][: part.beginning]) for place in part.places}
        assert len(heads) == 1


def test_a_short_beginning_is_not_shared(monkeypatch):
    prompts = [[1, 2, 3, place] for place in range(4, 8)]
    assert [part.beginning for part in bundles(prompts, 24)] == [3]
    monkeypatch.setattr(packing, "LEAST_SHARED", 4)
    assert [part.beginning for part in bundles(prompts, 24)] == [0] * 4


def test_demonstrations_are_read_once_for_all_prompts_of_a_question():
    """Rows are made longer where a beginning takes up most of one."""
    demonstrations = list(range(1, 21))
    prompts = [[*demonstrations, place, place] for place in range(30, 40)]
    (rows,) = pack(prompts, [], 2, 200)
    assert rows.tokens_BL.shape[1] == 48
    assert (rows.segment_ids_BL > 0).sum() == 20 + 10 * 2
    assert sorted(read_back(rows)) == list(enumerate(prompts))


def test_rows_are_not_longer_than_all_prompts_together():
    (rows,) = pack([[1, 2, 3]], [], 4, 10_000)
    assert rows.tokens_BL.shape == (1, 8)


def test_little_is_padded():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 10**6, rng.integers(2, 24)).tolist() for _ in range(300)]
    batches = pack(prompts, [], 2, 1000)
    read = sum(int((rows.segment_ids_BL > 0).sum()) for rows in batches)
    slots = sum(rows.tokens_BL.size for rows in batches)
    assert read == sum(map(len, prompts))
    assert slots < 1.15 * read
    # One shape, but for the last.
    assert len({rows.tokens_BL.shape for rows in batches[:-1]}) == 1
