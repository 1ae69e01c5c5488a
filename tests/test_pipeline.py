"""Instances, mixture, packing: nothing lost, nothing split, exact when resumed."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from radit_jax.batch import Example, Packed, Passage
from radit_jax.data import pipeline, prompts
from radit_jax.data.counting import report
from radit_jax.data.pipeline import (
    Dataset,
    Mixture,
    context_roles,
    features,
    fixed_shares,
    instances,
    mixture_weights,
    padding_share,
    training_batches,
    validation_batches,
)


class Letters:
    """One token per character."""

    bos_id = 1
    eos_id = 2

    def encode(self, text):
        return [ord(c) for c in text]


class Corpus:
    """Passages that name themselves: ``T17: x...``."""

    def __len__(self):
        return 40

    def __getitem__(self, id):
        return Passage(id, f"d{id}", f"T{id}", "", "x" * (id % 7))


def dataset(name, size, k=3, context="none"):
    """Example i of ``a`` asks ``a5?``, is answered ``<a5>`` and reads i, i+1, ..."""
    examples = [
        Example(f"{name}{i}", f"{name}{i}?", (f"<{name}{i}>", "other"), f"C{i}")
        for i in range(size)
    ]
    ids = (np.arange(size)[:, None] + np.arange(k)[None]) % len(Corpus())
    return Dataset(name, examples, ids, context)


SMALL = Mixture(
    passages_per_example=2,
    plain_text_share=0.0,
    row_tokens=128,
    row_targets=48,
    rows=4,
    packing_bins=8,
)


def test_every_example_is_paired_with_each_of_its_top_passages():
    assert instances(dataset("a", 2), 2).tolist() == [[0, 0], [0, 1], [1, 1], [1, 2]]


def test_a_given_context_is_read_alone_or_besides():
    assert instances(dataset("a", 2, context="only"), 2).tolist() == [[0, -1], [1, -1]]
    both = [[0, -1], [0, 0], [1, -1], [1, 1]]
    assert instances(dataset("a", 2, context="add"), 1).tolist() == both
    assert instances(dataset("a", 2), 1).tolist() == [[0, 0], [1, 1]]


def test_passages_that_a_small_corpus_lacks_are_no_instances():
    few = dataset("a", 2)._replace(passage_ids=np.asarray([[5, -1, -1], [-1, -1, -1]]))
    assert instances(few, 3).tolist() == [[0, 5]]
    none = few._replace(passage_ids=np.full((2, 3), -1))
    with pytest.raises(ValueError, match="dataset a yields no training instance"):
        instances(none, 3)


def test_an_example_without_the_context_it_needs_is_named():
    bare = dataset("a", 2, context="only")
    examples = [example._replace(context="") for example in bare.examples]
    with pytest.raises(ValueError, match="dataset a: example a0 has no `context`"):
        instances(bare._replace(examples=examples), 2)


def test_every_dataset_has_its_own_role_for_contexts():
    names = ["nq", "squad", "cnn"]
    assert context_roles("none", names, {}) == dict.fromkeys(names, "none")
    assert context_roles("squad=add,cnn = only", names, {}) == {
        "nq": "none",
        "squad": "add",
        "cnn": "only",
    }
    assert context_roles("add, nq=none", names, {"squad": "only"}) == {
        "nq": "none",
        "squad": "add",
        "cnn": "add",
    }
    assert context_roles("nq=only", names, {"squad": "add"}) == {
        "nq": "only",
        "squad": "add",
        "cnn": "none",
    }


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sometimes", "'sometimes' is not one of none, only, add"),
        ("squad=", "'' is not one of"),
        ("sqaud=add", "there is no dataset 'sqaud'; did you mean squad?"),
        ("none, add", "two roles for all"),
    ],
)
def test_bad_roles_are_refused(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        context_roles(setting, ["nq", "squad"], {})
    assert f"lm_ft.context = {setting!r}" in str(error.value)


def test_fixed_shares_are_read_by_name():
    assert fixed_shares("", ["nq"]) == {}
    assert fixed_shares("nq = 0.05,talk=.2", ["nq", "talk"]) == {
        "nq": 0.05,
        "talk": 0.2,
    }


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("nqq=0.1", "there is no dataset 'nqq'; did you mean nq?"),
        ("nq=much", "a share between 0 and 1, such as nq=0.05"),
        ("nq=1", "a share between 0 and 1, such as nq=0.05"),
        ("0.1", "a share between 0 and 1, such as nq=0.05"),
    ],
)
def test_bad_shares_are_refused(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        fixed_shares(setting, ["nq", "squad"])
    assert f"lm_ft.shares = {setting!r}" in str(error.value)


def test_mixture_weights_are_sizes_with_a_cap():
    sets = [dataset("a", 10), dataset("b", 30), dataset("c", 1000)]
    found = mixture_weights(sets, SMALL._replace(dataset_cap=60, plain_text_share=0.2))
    assert found == pytest.approx([0.08, 0.24, 0.48, 0.2])
    assert mixture_weights(sets[:2], SMALL) == pytest.approx([0.25, 0.75])


def test_a_fixed_share_is_taken_first_and_the_rest_goes_by_size():
    sets = [dataset("a", 10), dataset("b", 30), dataset("c", 1000)]
    mixture = SMALL._replace(plain_text_share=0.1, shares={"c": 0.05})
    found = mixture_weights(sets, mixture)
    assert found == pytest.approx([0.85 / 4, 0.85 * 3 / 4, 0.05, 0.1])


@pytest.mark.parametrize(
    ("shares", "left"),
    [({"a": 0.6, "b": 0.5}, "-0.1"), ({"a": 0.6, "b": 0.4}, "0"), ({"c": 0.5}, "")],
)
def test_shares_must_leave_something_for_the_others(shares, left):
    sets = [dataset("a", 10), dataset("b", 30), dataset("c", 5)]
    if not left:
        sets = sets[2:]
    with pytest.raises(ValueError, match=rf"leave {left or '0.5'}\S* of the mixture"):
        mixture_weights(sets, SMALL._replace(shares=shares))


def segments(batch):
    """Every segment of a batch as its text, checked against the packing rules."""
    found = []
    flat = Packed(*(field.reshape(-1, field.shape[-1]) for field in batch))
    for tokens, ids, positions, sites, targets, weights in zip(*flat, strict=True):
        used = weights > 0
        # Padding is at the end; segments count up from 1 without gaps.
        assert set(np.diff(ids[ids > 0])) <= {0, 1}
        assert (ids > 0).sum() == 0 or ids[0] == 1
        assert not (ids[(ids > 0).sum() :]).any()
        # A site's target is the token after it, in the same segment.
        np.testing.assert_array_equal(tokens[sites[used] + 1], targets[used])
        np.testing.assert_array_equal(ids[sites[used] + 1], ids[sites[used]])
        assert (targets[~used] == 0).all()
        assert len(set(sites[used])) == used.sum()
        for segment in range(1, ids.max() + 1):
            mine = np.flatnonzero(ids == segment)
            np.testing.assert_array_equal(positions[mine], np.arange(len(mine)))
            assert tokens[mine[0]] == Letters.bos_id
            assert tokens[mine[-1]] == Letters.eos_id
            # Neither split nor two in one.
            assert (tokens[mine[1:-1]] > 2).all()
            body = "".join(map(chr, tokens[mine[1:-1]]))
            answer = targets[used & (ids[sites] == segment)]
            assert answer[-1] == Letters.eos_id
            found.append((body, "".join(map(chr, answer[:-1]))))
    return found


def take(batches, count):
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def stream(sets, mixture, count, **shards):
    """The first ``count`` instances as (question name, passage, answer) triples."""
    batches = training_batches(sets, Corpus(), Letters(), mixture, **shards)
    found = []
    while len(found) < count:
        found += segments(next(batches))
    batches.close()
    return found


def test_what_is_packed_is_what_was_rendered():
    for body, answer in stream([dataset("a", 12)], SMALL, 60):
        background, asked = body.split("\n\n")
        assert background.startswith("Background: T")
        name = answer.strip("< >")
        assert asked.endswith(f":{answer}")
        assert asked.split("\n")[0].removeprefix("Q: ").removeprefix("Question: ") == (
            f"{name}?"
        )
        assert answer == f" <{name}>"


def test_every_instance_comes_once_per_epoch():
    """Packing holds a few back, so an epoch's end is seen a little later."""
    expected = {(f"a{i}", f"T{(i + j) % 40}") for i in range(30) for j in range(2)}
    found = stream([dataset("a", 30)], SMALL, 4 * 60)
    pairs = Counter(
        (answer.strip(" <>"), body.split(" ")[1].rstrip(":\n").split("\n")[0])
        for body, answer in found
    )
    assert set(pairs) == expected
    assert max(pairs.values()) - min(pairs.values()) <= 2
    assert sum(pairs.values()) == len(found)


def test_markers_vary_by_instance():
    found = Counter(
        (body.split("\n\n")[1][:2] == "Q:", body.split("\n")[-1].split(":")[0])
        for body, _ in stream([dataset("a", 30)], SMALL, 200)
    )
    assert {marker for _, marker in found} == {"A", "Answer"}
    assert {q for q, _ in found} == {True, False}
    assert min(found.values()) > 10


def test_shares_follow_the_mixture():
    sets = [dataset("a", 10), dataset("b", 30), dataset("c", 100)]
    mixture = SMALL._replace(dataset_cap=40, plain_text_share=0.2)
    found = stream(sets, mixture, 1000)
    shares = Counter(
        answer[2] if answer.startswith(" <") else "plain" for _, answer in found
    )
    expected = {"a": 0.1, "b": 0.3, "c": 0.4, "plain": 0.2}
    for name, share in expected.items():
        assert shares[name] / len(found) == pytest.approx(share, abs=0.02)


def test_what_was_seen_is_counted():
    """Against the segments themselves."""
    sets = [dataset("a", 10), dataset("b", 30)]
    mixture = SMALL._replace(plain_text_share=0.2, micro_batches=2, row_tokens=30)
    batches = training_batches(sets, Corpus(), Letters(), mixture)
    expected = {name: np.zeros(4, int) for name in ("a", "b", "plain text")}
    for _ in range(40):
        for body, answer in segments(next(batches)):
            name = answer[2] if answer.startswith(" <") else "plain text"
            bos = eos = 1
            loss = len(answer) + eos
            asked = rf"(Q: |Question: )?{answer.strip(' <>')}\?\n(A|Answer):"
            whole = re.fullmatch(rf"Background: T(\d+) ?(x*)\n\n{asked}{answer}", body)
            cut = whole is None or len(whole[2]) != int(whole[1]) % 7
            cut &= name != "plain text"
            expected[name] += 1, bos + len(body) + eos, loss, cut
    batches.close()
    assert batches.columns == ("examples", "tokens", "loss_tokens", "truncated")
    assert dict(zip(batches.names, batches.counts.tolist(), strict=True)) == {
        name: row.tolist() for name, row in expected.items()
    }
    assert expected["a"][3] > 5


def test_the_count_of_a_run_that_was_stopped_is_that_of_one_that_was_not():
    def fresh():
        return training_batches([dataset("a", 9)], Corpus(), Letters(), SMALL)

    whole, first, second = fresh(), fresh(), fresh()
    for _ in range(7):
        next(whole)
    for _ in range(3):
        next(first)
    second.set_state(json.loads(json.dumps(first.get_state())))
    for _ in range(4):
        next(second)
    for batches in (whole, first, second):
        batches.close()
    np.testing.assert_array_equal(second.counts, whole.counts)
    assert second.counts.sum() > first.counts.sum()


TALK = Example(
    "t", "now?", ("rain",), template="dialogue", turns=("hi", "hello", "ok?", "no")
)


@pytest.mark.parametrize(("every", "room"), [(False, 5), (True, 15), (True, 14)])
def test_dialogues_carry_loss_on_as_many_answers_as_asked_for_and_fit(every, room):
    pieces = prompts.pieces(TALK, every_turn=every)
    found = features(prompts.render(Letters(), pieces, 200), max(room, 6), "t")
    carries = "".join(map(chr, found["targets"]))
    # 6 + 3 + 6 tokens; where they do not fit, the last answer alone is learnt.
    assert carries == (" hello no rain\x02" if every and room == 15 else " rain\x02")
    np.testing.assert_array_equal(found["tokens"][found["sites"] + 1], found["targets"])


def test_measured_shares_are_the_specified_ones():
    """OASST1's fixed 5 %, plain text's 10 %, the rest by size with a cap."""
    sets = [dataset("a", 10), dataset("b", 30), dataset("c", 100), dataset("talk", 50)]
    mixture = SMALL._replace(
        dataset_cap=40, plain_text_share=0.1, shares={"talk": 0.05}
    )
    batches = training_batches(sets, Corpus(), Letters(), mixture)
    for _ in range(250):
        next(batches)
    batches.close()
    found = report(batches.names, batches.columns, batches.counts)
    n = batches.counts[:, 0].sum()
    assert n > 2000
    sizes = {"a": 10 / 80, "b": 30 / 80, "c": 40 / 80}
    expected = {name: 0.85 * size for name, size in sizes.items()}
    for name, share in {**expected, "talk": 0.05, "plain text": 0.1}.items():
        error = 2 * (share * (1 - share) / n) ** 0.5
        assert found[name]["share"] == pytest.approx(share, abs=error)


def test_plain_text_is_a_passage_with_loss_on_all_of_it():
    mixture = SMALL._replace(plain_text_share=0.9)
    plain = [(b, a) for b, a in stream([dataset("a", 10)], mixture, 40) if a[0] != " "]
    assert len(plain) > 30
    for body, answer in plain:
        assert body == answer
        assert body.startswith("T")


def test_plain_text_is_cut_to_the_room_for_targets():
    mixture = SMALL._replace(plain_text_share=0.9, row_targets=6)
    found = stream([dataset("a", 10)], mixture, 40)
    assert max(len(body) for body, answer in found if answer[0] != " ") == 4


def test_a_mixture_of_plain_text_alone_is_refused():
    mixture = SMALL._replace(plain_text_share=1.0)
    with pytest.raises(ValueError, match=r"plain_text_share = 1.0 must be at least 0"):
        training_batches([dataset("a", 3)], Corpus(), Letters(), mixture)


def test_an_answer_longer_than_the_room_for_targets_is_an_error():
    mixture = SMALL._replace(row_targets=5)
    batches = training_batches([dataset("a", 3)], Corpus(), Letters(), mixture)
    with pytest.raises(ValueError, match=r"a\d: an answer of 6 tokens, .*targets = 5"):
        next(batches)


def test_shapes_are_micro_batches_of_rows():
    mixture = SMALL._replace(rows=8, micro_batches=2)
    (batch,) = take(
        training_batches([dataset("a", 9)], Corpus(), Letters(), mixture), 1
    )
    assert batch.tokens_BL.shape == (2, 4, 128)
    assert batch.targets_BT.shape == batch.sites_BT.shape == (2, 4, 48)
    kinds = [field.dtype for field in batch]
    assert kinds == [np.dtype(np.int32)] * 5 + [np.dtype(np.float32)]
    batches = training_batches(
        [dataset("a", 9)], Corpus(), Letters(), mixture, stream=1, streams=2
    )
    assert take(batches, 1)[0].tokens_BL.shape == (2, 2, 128)


def test_rows_that_do_not_divide_name_the_nearest_number():
    with pytest.raises(
        ValueError, match=r"rows = 10 .* 2 streams x 4 .*nearest multiple is 8"
    ):
        training_batches(
            [dataset("a", 3)],
            Corpus(),
            Letters(),
            SMALL._replace(rows=10, micro_batches=4),
            streams=2,
        )


def test_streams_share_the_epoch_without_overlap():
    one = dataset("a", 31)  # 62 instances, an odd number per stream
    whole = Counter(stream([one], SMALL, 62 * 4))
    parts = [
        Counter(stream([one], SMALL, 62 * 2, stream=p, streams=2)) for p in range(2)
    ]
    assert parts[0] != parts[1]

    def pairs(found):
        return Counter(
            (answer, body.split("\n")[0]) for body, answer in found.elements()
        )

    together = pairs(parts[0]) + pairs(parts[1])
    assert set(together) == set(pairs(whole))
    assert max(together.values()) - min(together.values()) <= 2


@pytest.mark.parametrize("seen", [1, 5, 23])
def test_the_position_in_the_data_is_exact(seen):
    sets = [dataset("a", 20), dataset("b", 5)]
    mixture = SMALL._replace(plain_text_share=0.1, micro_batches=2)

    def fresh():
        return training_batches(sets, Corpus(), Letters(), mixture)

    batches = fresh()
    for _ in range(seen):
        next(batches)
    state = batches.get_state()
    expected = take(batches, 6)
    again = fresh()
    next(again)  # going back works as well as going on
    again.set_state(state)
    for ours, theirs in zip(take(again, 6), expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_seeds_change_the_order():
    one, two, three = (
        stream([dataset("a", 20)], SMALL._replace(seed=seed), 20) for seed in (0, 0, 1)
    )
    assert one == two != three


def test_validation_has_every_example_once_with_its_top_passage():
    examples = dataset("a", 11)
    examples.passage_ids[3] = -1
    found = list(validation_batches([examples], Corpus(), Letters(), SMALL, rows=2))
    again = list(validation_batches([examples], Corpus(), Letters(), SMALL, rows=2))
    for ours, theirs in zip(found, again, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    bodies = sorted(body for batch in found for body, _ in segments(batch))
    expected = sorted(
        ("" if i == 3 else f"Background: {Corpus()[i].display}\n\n")
        + f"Q: a{i}?\nA: <a{i}>"
        for i in range(11)
    )
    assert bodies == expected
    assert {batch.tokens_BL.shape for batch in found} == {(2, 128)}


def test_validation_reads_the_context_that_training_reads():
    given = dataset("a", 3, context="add")
    found = validation_batches([given], Corpus(), Letters(), SMALL, rows=2)
    bodies = sorted(body for batch in found for body, _ in segments(batch))
    assert bodies == [f"Background: C{i}\n\nQ: a{i}?\nA: <a{i}>" for i in range(3)]


def test_more_bins_mean_less_padding():
    def share(bins):
        mixture = SMALL._replace(packing_bins=bins, rows=1)
        batches = training_batches([dataset("a", 30)], Corpus(), Letters(), mixture)
        return np.mean([padding_share(batch) for batch in take(batches, 60)])

    few, many = share(1), share(32)
    assert many < few
    assert many < 0.12


def test_all_streams_together_wait_for_the_bins(monkeypatch):
    filled, pack = [], pipeline._pack

    def seen(ds, mixture, bins):
        filled.append(bins)
        return pack(ds, mixture, bins)

    monkeypatch.setattr(pipeline, "_pack", seen)
    mixture = SMALL._replace(packing_bins=64)
    for streams in (1, 4):
        for stream in range(streams):
            given = [dataset("a", 30)], Corpus(), Letters(), mixture
            training_batches(*given, stream, streams).close()
        assert sum(filled) == 64
        filled.clear()


def test_padding_share_counts_padding():
    ids = np.asarray([[1, 1, 2, 0], [1, 0, 0, 0]], np.int32)
    batch = Packed(ids, ids, ids, ids, ids, ids.astype(np.float32))
    assert padding_share(batch) == pytest.approx(0.5)
