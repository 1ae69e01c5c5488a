"""Generation: prefill and decode with a KV cache, batched over prompts.

Prompts are sorted by length and cut into batches of a few bucketed shapes, so that
little is padding and few programs are compiled. What a prompt yields depends
neither on its batch mates nor on its bucket.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import reshard
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from radit_jax import sharding
from radit_jax.models.attention import Layout
from radit_jax.models.layers import pick
from radit_jax.models.llama import Cache, Llama

BUCKETS = (32, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 4096)
# Decoding steps between two looks at the text for stop strings of several tokens.
CHUNK = 8


@runtime_checkable
class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    eos_id: int
    vocab_size: int

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...


class Sampling(NamedTuple):
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0  # nucleus; only with a temperature
    seed: int = 0


GREEDY = Sampling()


class Generated(NamedTuple):
    """What one prompt yielded."""

    text: str  # up to the first stop, stripped
    tokens: list[int]  # the stopping token included, when there is one
    log_probability: float  # sum over ``tokens``, of the model's own distribution
    stopped: bool  # False when max_new_tokens ended it


# On the host, then on the mesh.
Table = Bool[np.ndarray, " V"] | Bool[Array, " V"]


class Stops(NamedTuple):
    """Which tokens end a row.

    White space in front of an answer is no part of it: a model that begins a new line
    before it answers, though a new line is a stop string, has not yet said anything.
    """

    first_V: Table  # before anything but white space was said
    later_V: Table
    blank_V: Table  # tokens that say nothing but white space


class Mixing(NamedTuple):
    """Rows that say one thing together: a question after each of its passages."""

    # Of every row's next-token distribution in that of each row.
    weights_BB: Float[np.ndarray, "B B"] | Float[Array, "B B"]
    leaders_B: Int[np.ndarray, " B"] | Int[Array, " B"]  # the row that decides


class Decoding(NamedTuple):
    """State of a batch between decoding steps."""

    cache: Cache
    logits_BV: Float[Array, "B V"]  # of the next token
    positions_B: Int[Array, " B"]  # of the next token
    begun_B: Bool[Array, " B"]  # something but white space was said
    done_B: Bool[Array, " B"]
    tokens_BL: Int[Array, "B L"]  # generated so far
    log_probabilities_BL: Float[Array, "B L"]
    step: Int[Array, ""]  # tokens generated so far


def stop_tokens(tokenizer: Tokenizer, stop: Sequence[str], size: int) -> Stops:
    """<eos> and every token whose text holds a stop string, as tables on the host.

    Args:
        tokenizer: gives the text of each token.
        stop: stop strings.
        size: V of the model, which may be padded beyond the tokenizer's.
    """
    stops = Stops(np.zeros(size, bool), np.zeros(size, bool), np.zeros(size, bool))
    if stop:
        for id in range(min(tokenizer.vocab_size, size)):
            text = tokenizer.decode([id])
            stops.first_V[id] = any(string in text.lstrip() for string in stop)
            stops.later_V[id] = any(string in text for string in stop)
            stops.blank_V[id] = not text.strip()
    stops.first_V[tokenizer.eos_id] = stops.later_V[tokenizer.eos_id] = True
    return stops


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "dtype"))
def prefill(
    model: Llama,
    tokens_BL: Int[Array, "B L"],
    lengths_B: Int[Array, " B"],
    max_new_tokens: int,
    dtype: DTypeLike,
) -> Decoding:
    """Read right-padded prompts and give the state to decode from."""
    B, L = tokens_BL.shape
    columns_BL = jax.lax.broadcasted_iota(
        jnp.int32, (B, L), 1, out_sharding=sharding.ROWS_BL
    )
    layout = Layout((columns_BL < lengths_B[:, None]).astype(jnp.int32), columns_BL)
    hidden_BLD, cache = model.prefill(tokens_BL, layout, L + max_new_tokens, dtype)
    last_BLD = pick(hidden_BLD, jnp.maximum(lengths_B - 1, 0)[:, None])
    empty = functools.partial(jnp.zeros, (B, max_new_tokens))
    return Decoding(
        cache=cache,
        logits_BV=_logits(model, last_BLD),
        positions_B=lengths_B,
        begun_B=lengths_B < 0,
        done_B=lengths_B == 0,
        tokens_BL=empty(jnp.int32, out_sharding=sharding.ROWS_BL),
        log_probabilities_BL=empty(jnp.float32, out_sharding=sharding.ROWS_BL),
        step=jnp.int32(0),
    )


def _logits(model: Llama, hidden_BLD: Array) -> Array:
    """Logits [B, V] of one hidden state per row, whole on the devices of the row."""
    logits_BLV = model.logits(hidden_BLD)
    return reshard(logits_BLV, jax.P(sharding.ROWS, None, None))[:, 0]


@functools.partial(
    jax.jit, static_argnames=("chunk", "sampling"), donate_argnames="state"
)
def decode(
    model: Llama,
    state: Decoding,
    stops: Stops,
    seeds_B: Int[Array, " B"],
    chunk: int,
    sampling: Sampling,
    mixing: Mixing | None = None,
) -> Decoding:
    """Up to ``chunk`` more tokens; fewer once every row has stopped.

    With ``mixing`` the next token is chosen from a mixture of probabilities, and its
    log-probability is the mixture's (REPLUG eq. 6; never a mean of logits).
    """
    limit = jnp.minimum(state.step + chunk, state.tokens_BL.shape[1])

    def unfinished(state: Decoding) -> Array:
        return (state.step < limit) & ~jnp.all(state.done_B)

    def one(state: Decoding) -> Decoding:
        logits_BV = state.logits_BV
        log_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        if mixing is not None:
            logits_BV = log_BV = _mixed(log_BV, mixing)
        chosen_B = _choose(logits_BV, seeds_B, state.step, sampling)
        if mixing is not None:
            # One row decides, so that rounding never tears a question apart.
            leaders_B = jnp.asarray(mixing.leaders_B)
            chosen_B = chosen_B.at[leaders_B].get(out_sharding=sharding.ROWS_B)
        chosen_B = jnp.where(state.done_B, 0, chosen_B)
        chosen_log_B = jax.vmap(lambda log_V, id: log_V[id])(log_BV, chosen_B)
        write = jax.lax.dynamic_update_slice_in_dim
        live_B = ~state.done_B
        tokens_BL = write(state.tokens_BL, chosen_B[:, None], state.step, 1)
        log_probabilities_BL = write(
            state.log_probabilities_BL,
            jnp.where(live_B, chosen_log_B, 0.0)[:, None],
            state.step,
            1,
        )
        layout = Layout(live_B.astype(jnp.int32)[:, None], state.positions_B[:, None])
        slot = state.cache.keys_SBGMK.shape[3] - state.tokens_BL.shape[1] + state.step
        hidden_BLD, cache = model.extend(chosen_B[:, None], layout, state.cache, slot)
        first_B, later_B, blank_B = (
            jnp.asarray(table_V).at[chosen_B].get(out_sharding=sharding.ROWS_B)
            for table_V in stops
        )
        return Decoding(
            cache=cache,
            logits_BV=_logits(model, hidden_BLD),
            positions_B=state.positions_B + 1,
            begun_B=state.begun_B | ~blank_B,
            done_B=state.done_B | jnp.where(state.begun_B, later_B, first_B),
            tokens_BL=tokens_BL,
            log_probabilities_BL=log_probabilities_BL,
            step=state.step + 1,
        )

    return jax.lax.while_loop(unfinished, one, state)


def _mixed(log_BV: Array, mixing: Mixing) -> Array:
    """Log of the weighted mean of the rows' probabilities, [B, V] in float32."""
    whole_BV = reshard(jnp.exp(log_BV), jax.P(None, None))
    mixed_BV = jnp.einsum(
        "BM,MV->BV",
        jnp.asarray(mixing.weights_BB),
        whole_BV,
        precision="highest",
        out_sharding=jax.P(sharding.ROWS, None),
    )
    return jnp.log(mixed_BV)


def _choose(logits_BV: Array, seeds_B: Array, step: Array, sampling: Sampling) -> Array:
    """Next token of each row: the likeliest, or a nucleus sample."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature

    def of_row(logits_V: Array, seed: Array) -> Array:
        if sampling.top_p < 1:
            sorted_V = jnp.sort(logits_V, descending=True)
            mass_V = jnp.cumsum(jax.nn.softmax(sorted_V))
            # The smallest set that reaches top_p: its last member crosses it.
            cut = sorted_V[jnp.sum(mass_V < sampling.top_p)]
            logits_V = jnp.where(logits_V < cut, -jnp.inf, logits_V)
        # Keyed by prompt and step, so that batch mates change nothing.
        key = jax.random.fold_in(
            jax.random.fold_in(jax.random.key(sampling.seed), seed), step
        )
        return jnp.argmax(logits_V + jax.random.gumbel(key, logits_V.shape))

    return jax.vmap(of_row)(logits_BV, seeds_B).astype(jnp.int32)


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    sampling: Sampling = GREEDY,
    batch_tokens: int = 8192,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Continue every prompt until <eos>, a stop string or ``max_new_tokens``.

    Args:
        model: on the current mesh.
        tokenizer: decodes, and names <eos>.
        prompts: token ids of each prompt; none may be empty.
        max_new_tokens: at most this many tokens are generated.
        stop: stop strings; the text ends before the first of them that follows
            anything but white space.
        sampling: greedy by default.
        batch_tokens: rows x (prompt bucket + max_new_tokens) of a batch at most.
        dtype: compute and cache dtype.
        progress: called with the number of prompts just finished.

    Raises:
        ValueError: an empty prompt, or one longer than the model's context leaves
            room for.
    """
    return _generate(
        model,
        tokenizer,
        [[prompt] for prompt in prompts],
        None,
        max_new_tokens=max_new_tokens,
        stop=stop,
        sampling=sampling,
        batch_tokens=batch_tokens,
        dtype=dtype,
        progress=progress,
    )


def generate_mixed(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Sequence[int]]],
    weights: Sequence[Sequence[float]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    sampling: Sampling = GREEDY,
    batch_tokens: int = 8192,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Continue several prompts of each question as one, token by token.

    Every token is drawn from the weighted mean of the distributions that the model has
    after the question's prompts (REPLUG section 3.2): probabilities are mixed, never
    logits. Arguments as of ``generate``, except:

    Args:
        model: as of ``generate``.
        tokenizer: as of ``generate``.
        prompts: of each question, at least one.
        weights: of each question's prompts; they are normalised.
        max_new_tokens: as of ``generate``.
        stop: as of ``generate``.
        sampling: as of ``generate``.
        batch_tokens: as of ``generate``; a question's prompts stay together.
        dtype: as of ``generate``.
        progress: called with the number of questions just finished.

    Returns:
        One result for each question; log-probabilities are the mixture's.

    Raises:
        ValueError: as ``generate``, or weights that do not fit the prompts.
    """
    for i, (group, given) in enumerate(zip(prompts, weights, strict=True)):
        if not group or len(group) != len(given) or not min(given) >= 0 < sum(given):
            raise ValueError(
                f"question {i}: {len(given)} weights {list(given)[:3]} for {len(group)}"
                " prompts; expected one for each, none negative and not all zero"
            )
    return _generate(
        model,
        tokenizer,
        prompts,
        weights,
        max_new_tokens=max_new_tokens,
        stop=stop,
        sampling=sampling,
        batch_tokens=batch_tokens,
        dtype=dtype,
        progress=progress,
    )


def _generate(
    model: Llama,
    tokenizer: Tokenizer,
    groups: Sequence[Sequence[Sequence[int]]],
    weights: Sequence[Sequence[float]] | None,
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    sampling: Sampling,
    batch_tokens: int,
    dtype: DTypeLike,
    progress: Callable[[int], None] | None,
) -> list[Generated]:
    """One result for each group of prompts; without weights each has one."""
    longest = model.config.max_length - max_new_tokens
    for i, group in enumerate(groups):
        for prompt in group:
            if not 0 < len(prompt) <= longest:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens; between 1 and {longest} fit "
                    f"(context of {model.config.max_length} less {max_new_tokens} new "
                    "ones)"
                )
    stops = stop_tokens(tokenizer, stop, model.config.vocab_size)
    results: list[Generated | None] = [None] * len(groups)
    put = sharding.put_rows
    for batch in _batches(groups, max_new_tokens, batch_tokens, longest):
        tokens_BL = np.zeros((batch.rows, batch.bucket), np.int32)
        lengths_B, seeds_B = np.zeros((2, batch.rows), np.int32)
        firsts = []  # row of each group's first prompt
        row = 0
        for i in batch.groups:
            firsts.append(row)
            for prompt in groups[i]:
                tokens_BL[row, : len(prompt)] = prompt
                lengths_B[row], seeds_B[row] = len(prompt), i
                row += 1
        mixing = None
        if weights is not None:
            mixing = _mixing([weights[i] for i in batch.groups], batch.rows)
        state = prefill(model, put(tokens_BL), put(lengths_B), max_new_tokens, dtype)
        found = _finish(
            model, tokenizer, state, stops, put(seeds_B), stop, sampling, mixing
        )
        for i, first in zip(batch.groups, firsts, strict=True):
            results[i] = found[first]
        if progress is not None:
            progress(len(batch.groups))
    return [result for result in results if result is not None]


def _mixing(weights: Sequence[Sequence[float]], rows: int) -> Mixing:
    """Of groups of rows that follow each other; rows beyond them stand alone."""
    weights_BB, leaders_B = (
        np.eye(rows, dtype=np.float32),
        np.arange(rows, dtype=np.int32),
    )
    start = 0
    for group in weights:
        end = start + len(group)
        share = np.asarray(group, np.float64)
        weights_BB[start:end, start:end] = share / share.sum()
        leaders_B[start:end] = start
        start = end
    return Mixing(sharding.put_rows(weights_BB), sharding.put_rows(leaders_B))


class _Batch(NamedTuple):
    """Groups of prompts that are continued together."""

    bucket: int  # tokens of a row
    rows: int
    groups: list[int]  # their numbers


def _rows(bucket: int, max_new_tokens: int, batch_tokens: int, least: int) -> int:
    """Rows of a batch: as many as the budget holds, a multiple of the row shards, and
    at least ``least``."""
    shards = sharding.row_shards()
    room = batch_tokens // (bucket + max_new_tokens) // shards * shards
    return max(room, -(-least // shards) * shards)


def _batches(
    groups: Sequence[Sequence[Sequence[int]]],
    new: int,
    batch_tokens: int,
    longest: int,
) -> list[_Batch]:
    """Batches, long prompts first.

    A batch is filled with shorter prompts before another is begun, so that none but the
    last has empty rows.
    """
    lengths = [max(map(len, group)) for group in groups]
    most = max((len(group) for group in groups), default=1)
    buckets = [*(b for b in BUCKETS if b < longest), longest]
    batches: list[_Batch] = []
    left = 0  # empty rows of the last batch
    for i in sorted(range(len(groups)), key=lambda i: -lengths[i]):
        if len(groups[i]) > left:
            bucket = next(b for b in buckets if lengths[i] <= b)
            left = _rows(bucket, new, batch_tokens, most)
            batches.append(_Batch(bucket, left, []))
        batches[-1].groups.append(i)
        left -= len(groups[i])
    return batches


def _finish(
    model: Llama,
    tokenizer: Tokenizer,
    state: Decoding,
    stops: Stops,
    seeds_B: Array,
    stop: Sequence[str],
    sampling: Sampling,
    mixing: Mixing | None,
) -> list[Generated]:
    """Decode chunk by chunk, looking for stop strings in between."""
    limit = state.tokens_BL.shape[1]
    while True:
        state = decode(model, state, stops, seeds_B, CHUNK, sampling, mixing)
        step, done = int(state.step), sharding.fetch(state.done_B)
        tokens_BL = sharding.fetch(state.tokens_BL)
        log_BL = sharding.fetch(state.log_probabilities_BL)
        found = [
            _cut(tokenizer, tokens_BL[row, :step].tolist(), log_BL[row], stops, stop)
            for row in range(len(done))
        ]
        done = done | np.asarray([result.stopped for result in found])
        if step == limit or done.all():
            return found
        state = state._replace(done_B=sharding.put_rows(done))


def _cut(
    tokenizer: Tokenizer,
    tokens: list[int],
    log_L: np.ndarray,
    stops: Stops,
    stop: Sequence[str],
) -> Generated:
    """End a row at its first stop token or stop string."""
    stopped = begun = False
    for n, token in enumerate(tokens, 1):
        if (stops.later_V if begun else stops.first_V)[token]:
            tokens, stopped = tokens[:n], True
            break
        begun |= not stops.blank_V[token]
    body = tokens[:-1] if stopped and tokens[-1] == tokenizer.eos_id else tokens
    text = tokenizer.decode(body).lstrip()
    places = [text.index(string) for string in stop if string in text]
    if places:
        # Drop what was generated beyond a stop string of several tokens. It goes before
        # a stop token: rows that wait for their mates are filled with some token.
        stopped = True
        text = text[: min(places)]
        n = next(
            n
            for n in range(1, len(body) + 1)
            if any(string in tokenizer.decode(body[:n]).lstrip() for string in stop)
        )
        tokens = body[:n]
    return Generated(text.strip(), tokens, float(log_L[: len(tokens)].sum()), stopped)
