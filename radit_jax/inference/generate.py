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
from radit_jax.inference import packing
from radit_jax.models.attention import XLA, Kernel, Layout
from radit_jax.models.layers import pick
from radit_jax.models.llama import Cache, Llama

# Decoding steps between two looks at the text for stop strings of several tokens, and
# at how many prompts are not done.
CHUNK = 4


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
    """Prompts that say one thing together: a question after each of its passages.

    N counts the places of a batch for prompts, rows x Q, row by row.
    """

    # Of every prompt's next-token distribution in that of each.
    weights_NN: Float[np.ndarray, "N N"] | Float[Array, "N N"]
    leaders_N: Int[np.ndarray, " N"] | Int[Array, " N"]  # the prompt that decides


class Decoding(NamedTuple):
    """State of a batch between decoding steps."""

    cache: Cache
    slot: Int[Array, ""]  # of the cache, where the next tokens go
    logits_BQV: Float[Array, "B Q V"]  # of the next token
    segments_BQ: Int[Array, "B Q"]  # of each prompt in its row
    prefixes_BQ: Int[Array, "B Q"]  # the segment that it goes on from; 0: none
    positions_BQ: Int[Array, "B Q"]  # of the next token
    seeds_BQ: Int[Array, "B Q"]
    begun_BQ: Bool[Array, "B Q"]  # something but white space was said
    done_BQ: Bool[Array, "B Q"]
    tokens_BQL: Int[Array, "B Q L"]  # generated so far
    log_probabilities_BQL: Float[Array, "B Q L"]
    step: Int[Array, ""]  # tokens generated so far


class Seen(NamedTuple):
    """What the host looks at between decoding steps; whole on every device."""

    step: Int[Array, ""]
    done_BQ: Bool[Array, "B Q"]
    tokens_BQL: Int[Array, "B Q L"]
    log_probabilities_BQL: Float[Array, "B Q L"]


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


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "dtype", "kernel"))
def prefill(
    model: Llama,
    rows: packing.PromptRows,
    seeds_BQ: Int[Array, "B Q"],
    max_new_tokens: int,
    dtype: DTypeLike,
    kernel: Kernel = XLA,
) -> Decoding:
    """Read packed prompts and give the state to decode from.

    Args:
        model: on the current mesh.
        rows: on the mesh.
        seeds_BQ: what the samples of a prompt depend on.
        max_new_tokens: room for each prompt.
        dtype: of compute and cache.
        kernel: of attention.
    """
    B, L = rows.tokens_BL.shape
    Q = rows.sites_BQ.shape[1]
    layout = Layout(rows.segment_ids_BL, rows.positions_BL, rows.prefix_ids_BL)
    hidden_BLD, cache = model.prefill(
        rows.tokens_BL, layout, L + Q * max_new_tokens, dtype, kernel
    )
    empty = functools.partial(
        jnp.zeros, (B, Q, max_new_tokens), out_sharding=sharding.rows_spec(3)
    )
    return Decoding(
        cache=cache,
        slot=jnp.int32(L),
        logits_BQV=_logits(model, pick(hidden_BLD, rows.sites_BQ)),
        segments_BQ=rows.segments_BQ,
        prefixes_BQ=rows.prefixes_BQ,
        positions_BQ=rows.lengths_BQ,
        seeds_BQ=seeds_BQ,
        begun_BQ=rows.owners_BQ < -1,
        done_BQ=rows.owners_BQ < 0,
        tokens_BQL=empty(jnp.int32),
        log_probabilities_BQL=empty(jnp.float32),
        step=jnp.int32(0),
    )


def _logits(model: Llama, hidden_BQD: Array) -> Array:
    """Logits [B, Q, V], whole on the devices of the row."""
    return reshard(model.logits(hidden_BQD), sharding.rows_spec(3))


@functools.partial(
    jax.jit, static_argnames=("chunk", "sampling"), donate_argnames="state"
)
def decode(
    model: Llama,
    state: Decoding,
    stops: Stops,
    chunk: int,
    sampling: Sampling,
    mixing: Mixing | None = None,
) -> tuple[Decoding, Seen]:
    """Up to ``chunk`` more tokens; fewer once every prompt has stopped.

    With ``mixing`` the next token is chosen from a mixture of probabilities, and its
    log-probability is the mixture's (REPLUG eq. 6; never a mean of logits).
    """
    B, Q, new = state.tokens_BQL.shape
    limit = jnp.minimum(state.step + chunk, new)
    rows = sharding.ROWS_BL

    def unfinished(state: Decoding) -> Array:
        return (state.step < limit) & ~jnp.all(state.done_BQ)

    def one(state: Decoding) -> Decoding:
        logits_BQV = state.logits_BQV
        log_BQV = jax.nn.log_softmax(logits_BQV, axis=-1)
        if mixing is not None:
            logits_BQV = log_BQV = _mixed(log_BQV, mixing)
        chosen_BQ = _choose(logits_BQV, state.seeds_BQ, state.step, sampling)
        if mixing is not None:
            # One prompt decides, so that rounding never tears a question apart.
            leaders_N = jnp.asarray(mixing.leaders_N)
            flat_N = jnp.reshape(chosen_BQ, B * Q, out_sharding=sharding.ROWS_B)
            chosen_N = flat_N.at[leaders_N].get(out_sharding=sharding.ROWS_B)
            chosen_BQ = jnp.reshape(chosen_N, (B, Q), out_sharding=rows)
        chosen_BQ = jnp.where(state.done_BQ, 0, chosen_BQ)
        take = jax.vmap(jax.vmap(lambda log_V, id: log_V[id]))
        live_BQ = ~state.done_BQ
        log_BQ = jnp.where(live_BQ, take(log_BQV, chosen_BQ), 0.0)
        write = functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=state.step, axis=2
        )
        layout = Layout(
            jnp.where(live_BQ, state.segments_BQ, 0),
            state.positions_BQ,
            state.prefixes_BQ,
        )
        hidden_BQD, cache = model.extend(chosen_BQ, layout, state.cache, state.slot)
        first_BQ, later_BQ, blank_BQ = (
            jnp.asarray(table_V).at[chosen_BQ].get(out_sharding=rows)
            for table_V in stops
        )
        return state._replace(
            cache=cache,
            slot=state.slot + Q,
            logits_BQV=_logits(model, hidden_BQD),
            positions_BQ=state.positions_BQ + 1,
            begun_BQ=state.begun_BQ | ~blank_BQ,
            done_BQ=state.done_BQ | jnp.where(state.begun_BQ, later_BQ, first_BQ),
            tokens_BQL=write(state.tokens_BQL, chosen_BQ[..., None]),
            log_probabilities_BQL=write(state.log_probabilities_BQL, log_BQ[..., None]),
            step=state.step + 1,
        )

    state = jax.lax.while_loop(unfinished, one, state)
    seen = (state.step, state.done_BQ, state.tokens_BQL, state.log_probabilities_BQL)
    return state, Seen(*(reshard(array, jax.P()) for array in seen))


@jax.jit
def _taken(arrays: dict[str, Array], order_BQ: Int[Array, "B Q"]) -> dict[str, Array]:
    """Some of each row's prompts."""
    take = jax.vmap(lambda array_Q, order_Q: array_Q.at[order_Q].get(mode="clip"))
    return {name: take(array, order_BQ) for name, array in arrays.items()}


def narrow(
    state: Decoding, order_BQ: Int[Array, "B Q"], done_BQ: Bool[Array, "B Q"]
) -> Decoding:
    """Go on with some of each row's prompts.

    Args:
        state: with more prompts to a row.
        order_BQ: which are kept.
        done_BQ: of those that are kept.
    """
    # What was read stays where it is.
    whole = ("cache", "slot", "step")
    arrays = {name: x for name, x in state._asdict().items() if name not in whole}
    return state._replace(**_taken(arrays, order_BQ))._replace(done_BQ=done_BQ)


def _mixed(log_BQV: Array, mixing: Mixing) -> Array:
    """Log of the weighted mean of the prompts' probabilities, [B, Q, V] in float32."""
    B, Q, V = log_BQV.shape
    log_NV = jnp.reshape(log_BQV, (B * Q, V), out_sharding=sharding.ROWS_BL)
    mixed_NV = jnp.einsum(
        "NM,MV->NV",
        jnp.asarray(mixing.weights_NN),
        reshard(jnp.exp(log_NV), jax.P(None, None)),
        precision="highest",
        out_sharding=sharding.ROWS_BL,
    )
    return jnp.reshape(jnp.log(mixed_NV), (B, Q, V), out_sharding=sharding.rows_spec(3))


def _choose(
    logits_BQV: Array, seeds_BQ: Array, step: Array, sampling: Sampling
) -> Array:
    """Next token of each prompt: the likeliest, or a nucleus sample."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BQV, axis=-1).astype(jnp.int32)
    logits_BQV = logits_BQV / sampling.temperature

    def of_prompt(logits_V: Array, seed: Array) -> Array:
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

    return jax.vmap(jax.vmap(of_prompt))(logits_BQV, seeds_BQ).astype(jnp.int32)


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
    kernel: Kernel = XLA,
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
        batch_tokens: of the rows of a batch, with room for new ones, at most.
        dtype: compute and cache dtype.
        kernel: of attention over prompts; decoding steps have XLA's.
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
        kernel=kernel,
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
    kernel: Kernel = XLA,
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
        kernel: as of ``generate``.
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
        kernel=kernel,
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
    kernel: Kernel,
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
    if not groups:
        return []
    prompts = [prompt for group in groups for prompt in group]
    firsts = np.cumsum([0, *map(len, groups)])
    together = [] if weights is None else list(map(range, firsts[:-1], firsts[1:]))
    # Of a prompt, the number of its group; the group's results are those of its first.
    numbers = np.repeat(np.arange(len(groups)), np.diff(firsts))
    stops = stop_tokens(tokenizer, stop, model.config.vocab_size)
    generator = _Generator(
        model=model,
        tokenizer=tokenizer,
        stops=stops,
        stop=stop,
        sampling=sampling,
        groups=numbers,
        weights=weights,
    )
    results: dict[int, Generated] = {}
    for rows in packing.pack(prompts, together, max_new_tokens, batch_tokens):
        found = generator.run(rows, max_new_tokens, dtype, kernel)
        results |= found
        if progress is not None:
            progress(len({int(numbers[place]) for place in found}))
    return [results[first] for first in firsts[:-1].tolist()]


class _Generator(NamedTuple):
    """How rows of prompts are continued."""

    model: Llama
    tokenizer: Tokenizer
    stops: Stops
    stop: Sequence[str]
    sampling: Sampling
    groups: np.ndarray  # int [prompts], of which group a prompt is
    weights: Sequence[Sequence[float]] | None  # of each group's prompts

    def run(
        self,
        rows: packing.PromptRows,
        max_new_tokens: int,
        dtype: DTypeLike,
        kernel: Kernel,
    ) -> dict[int, Generated]:
        """What each prompt of the rows yields, by its place."""
        put = sharding.put_rows
        owners_BQ = rows.owners_BQ
        seeds_BQ = np.where(owners_BQ >= 0, self.groups[owners_BQ], 0).astype(np.int32)
        on_mesh = packing.PromptRows(*map(put, rows))
        state = prefill(
            self.model, on_mesh, put(seeds_BQ), max_new_tokens, dtype, kernel
        )
        mixing = self._mixing(owners_BQ)
        results: dict[int, Generated] = {}
        while True:
            state, seen = decode(
                self.model, state, self.stops, CHUNK, self.sampling, mixing
            )
            step, done_BQ = int(seen.step), np.array(seen.done_BQ)
            tokens_BQL = np.asarray(seen.tokens_BQL)
            log_BQL = np.asarray(seen.log_probabilities_BQL)
            for row, column in np.argwhere(owners_BQ >= 0):
                tokens = tokens_BQL[row, column, :step].tolist()
                found = self._cut(tokens, log_BQL[row, column])
                results[int(owners_BQ[row, column])] = found
                done_BQ[row, column] |= found.stopped
            if step == max_new_tokens or done_BQ.all():
                return results
            # Those that are not done go first, in half as many places if they fit; no
            # narrower, so that few programs are compiled.
            width = done_BQ.shape[1]
            while 2 * (~done_BQ).sum(axis=1).max() <= width and width > 1:
                width = -(-width // 2)
            if width == done_BQ.shape[1]:
                state = state._replace(done_BQ=put(done_BQ))
                continue
            order_BQ = np.argsort(done_BQ, axis=1, kind="stable").astype(np.int32)
            order_BQ = order_BQ[:, :width]
            done_BQ, owners_BQ = (
                np.take_along_axis(array_BQ, order_BQ, axis=1)
                for array_BQ in (done_BQ, owners_BQ)
            )
            state = narrow(state, put(order_BQ), put(done_BQ))
            mixing = self._mixing(owners_BQ)

    def _mixing(self, owners_BQ: np.ndarray) -> Mixing | None:
        """Of the groups whose prompts stand there; empty places stand alone."""
        if self.weights is None:
            return None
        owners_N = owners_BQ.reshape(-1)
        weights_NN = np.eye(owners_N.size, dtype=np.float32)
        leaders_N = np.arange(owners_N.size, dtype=np.int32)
        used = np.flatnonzero(owners_N >= 0)
        groups = self.groups[owners_N[used]]
        for group in np.unique(groups):
            at = used[groups == group]
            at = at[np.argsort(owners_N[at])]
            share = np.asarray(self.weights[group], np.float64)
            weights_NN[np.ix_(at, at)] = share / share.sum()
            leaders_N[at] = at[0]
        return Mixing(sharding.put_rows(weights_NN), sharding.put_rows(leaders_N))

    def _cut(self, tokens: list[int], log_L: np.ndarray) -> Generated:
        """End a prompt's tokens at their first stop token or stop string."""
        stopped = begun = False
        for n, token in enumerate(tokens, 1):
            if (self.stops.later_V if begun else self.stops.first_V)[token]:
                tokens, stopped = tokens[:n], True
                break
            begun |= not self.stops.blank_V[token]
        body = (
            tokens[:-1] if stopped and tokens[-1] == self.tokenizer.eos_id else tokens
        )
        text = self.tokenizer.decode(body).lstrip()
        places = [text.index(string) for string in self.stop if string in text]
        if places:
            # Drop what was generated beyond a stop string of several tokens. It goes
            # before a stop token: prompts that wait for their mates are filled with
            # some token.
            stopped = True
            text = text[: min(places)]
            n = next(
                n
                for n in range(1, len(body) + 1)
                if any(
                    string in self.tokenizer.decode(body[:n]).lstrip()
                    for string in self.stop
                )
            )
            tokens = body[:n]
        return Generated(
            text.strip(), tokens, float(log_L[: len(tokens)].sum()), stopped
        )
