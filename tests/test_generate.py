"""Generation against a reference that reads the whole sequence anew for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radit_jax import sharding
from radit_jax.inference import generate as module
from radit_jax.inference import packing
from radit_jax.inference.generate import (
    GREEDY,
    Sampling,
    generate,
    generate_mixed,
    stop_tokens,
)
from radit_jax.models.attention import Kernel, Layout
from radit_jax.models.llama import Llama, LlamaConfig

V, NEW, LONGEST = 48, 10, 64
CONFIG = LlamaConfig(
    vocab_size=V,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=4,
    mlp_width=24,
    max_length=LONGEST,
)


class Letters:
    """Token 0 ends; 1 .. 40 are letters; the model's vocabulary is padded to 48."""

    eos_id = 0
    vocab_size = 41

    def decode(self, ids):
        return "".join(
            chr(64 + id) if id < self.vocab_size else "?" for id in ids if id
        )


def build():
    """A random model whose logits are far apart, so that greedy has no near ties."""
    model = Llama(CONFIG, jax.random.key(3))
    model.embedding[...] = model.embedding[...] * 20
    model.head[...] = model.head[...] * 8
    return model


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(sharding.make_mesh()):
        yield


@pytest.fixture(scope="module")
def model():
    with jax.set_mesh(sharding.make_mesh()):
        return build()


@jax.jit
def log_probabilities(model, tokens_BL):
    """Of every next token, without a cache; causal, so what follows may be padding."""
    columns_BL = jax.lax.broadcasted_iota(jnp.int32, tokens_BL.shape, 1)
    layout = Layout(jnp.ones_like(columns_BL), columns_BL)
    return jax.nn.log_softmax(model.logits(model.hidden(tokens_BL, layout)), axis=-1)


def next_log_V(model, tokens):
    padded_BL = np.zeros((1, LONGEST), np.int32)
    padded_BL[0, : len(tokens)] = tokens
    return np.asarray(log_probabilities(model, padded_BL))[0, len(tokens) - 1]


def reference(model, prompt, new=NEW, stops=(0,)):
    """Greedy tokens and the sum of their log-probabilities."""
    tokens, total = list(prompt), 0.0
    for _ in range(new):
        log_V = next_log_V(model, tokens)
        tokens.append(int(log_V.argmax()))
        total += float(log_V.max())
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :], total


def random_prompts(count, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(1, 41, rng.integers(1, longest)).tolist() for _ in range(count)
    ]


PROMPTS = random_prompts(9)


@pytest.fixture(scope="module")
def expected(model):
    with jax.set_mesh(sharding.make_mesh()):
        return [reference(model, prompt) for prompt in PROMPTS]


def run(model, prompts=PROMPTS, **options):
    options = {"max_new_tokens": NEW, "batch_tokens": 200} | options
    return generate(model, Letters(), prompts, **options)


def test_greedy_is_the_reference_token_by_token(model, expected):
    for found, (tokens, total) in zip(run(model), expected, strict=True):
        assert found.tokens == tokens
        assert found.log_probability == pytest.approx(total, abs=1e-4)
        assert found.text == Letters().decode(tokens).strip()
        assert found.stopped == (tokens[-1] == 0)
    assert len({len(set(tokens)) for tokens, _ in expected}) > 1  # not one loop


@pytest.mark.parametrize(
    ("batch_tokens", "bucket", "long_row"), [(1, 64, 1), (240, 16, 1), (900, 128, 128)]
)
def test_mates_and_rows_change_nothing(
    model, expected, batch_tokens, bucket, long_row, monkeypatch
):
    """Also one row at a time, and prompts longer than every bucket."""
    monkeypatch.setattr(packing, "BUCKETS", (bucket,))
    monkeypatch.setattr(packing, "LONG_ROW", long_row)
    order = np.random.default_rng(1).permutation(len(PROMPTS))
    found = run(model, [PROMPTS[i] for i in order], batch_tokens=batch_tokens)
    for result, i in zip(found, order, strict=True):
        assert result.tokens == expected[i][0]
        assert result.log_probability == pytest.approx(expected[i][1], abs=1e-4)


def test_prompts_are_read_by_the_kernel_that_is_asked_for(model, expected):
    """The fused kernel, also over prompts that go on from one beginning."""
    prompts = [PROMPTS[0] + PROMPTS[0], PROMPTS[0] + PROMPTS[1]]
    plain = run(model, [*PROMPTS, *prompts], batch_tokens=900)
    fused = run(
        model,
        [*PROMPTS, *prompts],
        batch_tokens=900,
        kernel=Kernel("splash", interpret=True),
    )
    for found, other in zip(fused, plain, strict=True):
        assert found.tokens == other.tokens
        assert found.log_probability == pytest.approx(other.log_probability, abs=1e-4)
    assert any(found != other for found, other in zip(fused, plain, strict=True))


def test_meshes_agree(expected):
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        found = run(build())
    assert [result.tokens for result in found] == [tokens for tokens, _ in expected]
    for result, (_, total) in zip(found, expected, strict=True):
        assert result.log_probability == pytest.approx(total, abs=1e-3)


def letter(token):
    return Letters().decode([token])


def test_a_stop_string_of_one_token_ends_the_row(model, expected):
    for i, (tokens, _) in enumerate(expected):
        stop = tokens[len(tokens) // 2]
        if stop == 0:
            continue
        (found,) = run(model, [PROMPTS[i]], stop=(letter(stop),))
        cut, total = reference(model, PROMPTS[i], stops=(0, stop))
        assert found.tokens == cut
        assert found.stopped
        assert letter(stop) not in found.text
        assert found.text == Letters().decode(cut[:-1]).strip()
        assert found.log_probability == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("at", [0, 3, 6, 7, 8])
def test_a_stop_string_of_several_tokens_ends_the_row(model, expected, at):
    """Also where it spans two of the chunks between which the text is looked at."""
    i = next(i for i, (tokens, _) in enumerate(expected) if len(tokens) == NEW)
    tokens = expected[i][0]
    stop = Letters().decode(tokens[at : at + 2])
    text = Letters().decode(tokens)
    first = text.index(stop)
    (found,) = run(model, [PROMPTS[i]], stop=(stop,))
    assert found.stopped
    assert found.tokens == tokens[: first + 2]
    assert found.text == text[:first]
    log = [
        next_log_V(model, PROMPTS[i] + tokens[:n])[tokens[n]] for n in range(first + 2)
    ]
    assert found.log_probability == pytest.approx(sum(log), abs=1e-4)


def test_stops_of_one_row_do_not_end_another(model, expected):
    i, j = [i for i, (tokens, _) in enumerate(expected) if len(tokens) == NEW][:2]
    stop = Letters().decode(expected[i][0][2:4])
    alone = [run(model, [PROMPTS[k]], stop=(stop,))[0].tokens for k in (i, j)]
    both = run(model, [PROMPTS[i], PROMPTS[j]], stop=(stop,))
    assert [result.tokens for result in both] == alone


def test_stops_know_tokens_by_their_text():
    stops = stop_tokens(Letters(), ("B", "D"), V)
    for table in (stops.first_V, stops.later_V):
        assert np.flatnonzero(table).tolist() == [0, 2, 4]
        assert table.shape == (V,)
    assert np.flatnonzero(stops.blank_V).tolist() == [0]


class Lines(Letters):
    """Some letters are new lines, alone or with a letter on one of their sides."""

    def __init__(self, texts):
        self.texts = texts

    def decode(self, ids):
        return "".join(self.texts.get(id, Letters.decode(self, [id])) for id in ids)


def test_a_new_line_stops_unless_nothing_was_said_before_it():
    stops = stop_tokens(Lines({3: "\n", 5: "x\n", 7: "\nx", 9: " "}), ("\n",), V)
    assert np.flatnonzero(stops.first_V).tolist() == [0, 5]
    assert np.flatnonzero(stops.later_V).tolist() == [0, 3, 5, 7]
    assert np.flatnonzero(stops.blank_V).tolist() == [0, 3, 9]


def test_an_answer_may_begin_on_the_next_line(model, expected):
    i = next(i for i, (tokens, _) in enumerate(expected) if len(set(tokens)) > 4)
    line = expected[i][0][0]
    kept, begun = [], False
    for token in expected[i][0]:
        kept.append(token)
        if begun and token == line:
            break
        begun |= token != line
    tokenizer = Lines({line: "\n"})
    for prompts in ([PROMPTS[i]], [PROMPTS[i], *PROMPTS]):
        found, *_ = generate(
            model, tokenizer, prompts, max_new_tokens=NEW, stop=("\n",)
        )
        assert found.tokens == kept
        assert len(kept) > 1
        assert found.text == tokenizer.decode(kept).strip() != ""


def test_sampling_depends_on_its_seed_alone(model):
    warm = Sampling(temperature=1.5, seed=1)
    prompts = [PROMPTS[0]] * 4 + PROMPTS[1:3]
    once, again = (run(model, prompts, sampling=warm) for _ in range(2))
    assert [r.tokens for r in once] == [r.tokens for r in again]
    other = run(model, prompts, sampling=warm._replace(seed=2))
    assert [r.tokens for r in once] != [r.tokens for r in other]
    # The same prompt twice is two samples.
    assert len({tuple(r.tokens) for r in once[:4]}) > 1
    # Prompt n is sampled alike whoever its mates are.
    mates = run(model, prompts[:2] + PROMPTS[5:], sampling=warm)
    assert [r.tokens for r in mates[:2]] == [r.tokens for r in once[:2]]


@pytest.mark.parametrize("sampling", [Sampling(1e-6), Sampling(3.0, 1e-6, 5)])
def test_the_limits_of_sampling_are_greedy(model, expected, sampling):
    found = run(model, sampling=sampling)
    assert [result.tokens for result in found] == [tokens for tokens, _ in expected]
    # The log-probability is the model's own, whatever the temperature.
    for result, (_, total) in zip(found, expected, strict=True):
        assert result.log_probability == pytest.approx(total, abs=1e-4)


def test_samples_follow_the_distribution(model):
    """First tokens of many samples against the temperature-scaled softmax."""
    prompt, count, temperature = PROMPTS[0], 2000, 4.0
    found = run(
        model,
        [prompt] * count,
        max_new_tokens=1,
        sampling=Sampling(temperature),
        batch_tokens=50_000,
    )
    log_V = next_log_V(model, prompt) / temperature
    p_V = np.exp(log_V) / np.exp(log_V).sum()
    seen_V = np.bincount([r.tokens[0] for r in found], minlength=V) / count
    np.testing.assert_allclose(seen_V, p_V, atol=5 * np.sqrt(p_V.max() / count))
    assert (seen_V > 0).sum() > 5


def test_a_nucleus_leaves_the_tail_out(model):
    prompt, count, top_p = PROMPTS[0], 500, 0.6
    sampling = Sampling(4.0, top_p)
    found = run(
        model,
        [prompt] * count,
        max_new_tokens=1,
        sampling=sampling,
        batch_tokens=50_000,
    )
    log_V = next_log_V(model, prompt) / 4.0
    p_V = np.exp(log_V) / np.exp(log_V).sum()
    order_V = np.argsort(-p_V)
    size = int(np.searchsorted(np.cumsum(p_V[order_V]), top_p)) + 1
    assert {r.tokens[0] for r in found} == set(order_V[:size].tolist())


def test_decoding_ends_once_every_row_has_stopped(model, expected, monkeypatch):
    i = next(i for i, (tokens, _) in enumerate(expected) if len(tokens) == NEW)
    steps = []
    decode = module.decode

    def counted(*args):
        state, seen = decode(*args)
        steps.append(int(seen.step))
        return state, seen

    monkeypatch.setattr(module, "decode", counted)
    stop = letter(expected[i][0][0])
    run(model, [PROMPTS[i]], stop=(stop,), max_new_tokens=18)
    assert steps == [1]


def test_progress_counts_prompts(model):
    done = []
    run(model, batch_tokens=100, progress=done.append)
    assert sum(done) == len(PROMPTS)
    assert len(done) > 1


def test_nothing_to_generate_is_nothing(model):
    assert run(model, []) == []


@pytest.mark.parametrize("length", [0, LONGEST - NEW + 1])
def test_prompts_that_do_not_fit_are_refused(model, length):
    with pytest.raises(
        ValueError, match=rf"prompt 1 has {length} tokens; between 1 and 54 fit"
    ):
        run(model, [[1], [1] * length])
    assert run(model, [[1] * (LONGEST - NEW)], sampling=GREEDY)


# Several prompts that say one thing together.

GROUPS = [PROMPTS[:3], PROMPTS[3:4], PROMPTS[4:6], PROMPTS[6:9]]
WEIGHTS = [[0.5, 0.2, 0.3], [2.0], [0.9, 0.1], [0.1, 0.1, 0.8]]


def run_mixed(model, groups=GROUPS, weights=WEIGHTS, **options):
    options = {"max_new_tokens": NEW, "batch_tokens": 200} | options
    return generate_mixed(model, Letters(), groups, weights, **options)


def reference_mixed(model, prompts, weights):
    """Mixed in float64 with numpy, one prompt at a time."""
    said, total = [], 0.0
    share = np.array(weights) / sum(weights)
    for _ in range(NEW):
        p_CV = np.exp([next_log_V(model, [*p, *said]).astype(float) for p in prompts])
        mixed_V = share @ p_CV
        said.append(int(mixed_V.argmax()))
        total += float(np.log(mixed_V.max()))
        if said[-1] == 0:
            break
    return said, total


def test_probabilities_are_mixed_token_by_token(model):
    expected = [
        reference_mixed(model, *group) for group in zip(GROUPS, WEIGHTS, strict=True)
    ]
    for found, (tokens, total) in zip(run_mixed(model), expected, strict=True):
        assert found.tokens == tokens
        assert found.log_probability == pytest.approx(total, abs=1e-4)
    # Otherwise the first passage alone, or a mean of logits, might do as well.
    alone = [reference(model, group[0])[0] for group in GROUPS]
    assert alone != [tokens for tokens, _ in expected]


def test_one_prompt_is_plain_generation(model):
    single = [[prompt] for prompt in PROMPTS]
    found = run_mixed(model, single, [[3.0]] * len(single))
    for mixed, plain in zip(found, run(model), strict=True):
        assert mixed.tokens == plain.tokens
        assert mixed.log_probability == pytest.approx(plain.log_probability, abs=1e-4)


@pytest.mark.parametrize("right", [0, 1, 2])
def test_all_weight_on_one_prompt_is_that_prompt(model, right):
    weights = [[float(i == right % len(g)) for i in range(len(g))] for g in GROUPS]
    plain = run(model, [g[right % len(g)] for g in GROUPS])
    for mixed, one in zip(run_mixed(model, weights=weights), plain, strict=True):
        assert mixed.tokens == one.tokens
        assert mixed.log_probability == pytest.approx(one.log_probability, abs=1e-4)


def test_neither_order_nor_mates_nor_padding_change_a_mixture(model):
    expected = run_mixed(model)
    turned = run_mixed(
        model,
        [group[::-1] for group in GROUPS[::-1]],
        [weight[::-1] for weight in WEIGHTS[::-1]],
        batch_tokens=1,
    )[::-1]
    for ours, theirs in zip(turned, expected, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.log_probability == pytest.approx(theirs.log_probability, abs=1e-4)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_a_mixture_is_the_same_on_every_mesh(model, sizes):
    expected = run_mixed(model)
    with jax.set_mesh(sharding.make_mesh(*sizes)):
        for ours, theirs in zip(run_mixed(build()), expected, strict=True):
            assert ours.tokens == theirs.tokens
            assert ours.log_probability == pytest.approx(
                theirs.log_probability, abs=1e-4
            )


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -0.5], [1.0]])
def test_weights_that_do_not_fit_are_refused(model, weights):
    with pytest.raises(
        ValueError, match=rf"question 0: {len(weights)} weights .* for 2"
    ):
        run_mixed(model, [PROMPTS[:2]], [weights])
