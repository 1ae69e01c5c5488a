"""The jitted steps of the stages with abstract inputs, as ``plan`` compiles them.

Every builder takes the stage's own function and the shapes, types and shardings that
the stage would give it; nothing here computes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from radit_jax import sharding
from radit_jax.batch import Candidates, Packed
from radit_jax.inference import generate
from radit_jax.inference.packing import PromptRows
from radit_jax.models.attention import choose_kernel
from radit_jax.models.encoder import Encoder, EncoderConfig
from radit_jax.models.layers import Rope
from radit_jax.models.llama import Llama, LlamaConfig
from radit_jax.planning import aot
from radit_jax.retrieval.index import block_of, exact_search
from radit_jax.stages import index, lm_ft, r_ft, scoring
from radit_jax.stages.training import initial_state, optimizer

PLATFORM = "tpu"
# Of compute there, whatever the recipe's "auto" means on this machine.
DTYPE = jnp.dtype(jnp.bfloat16)

WEIGHTS, OPTIMIZER, BATCH = "weights", "optimizer state", "batch and counters"
INDEX, CACHE = "embeddings of the passages", "keys and values of prompts"
# Sections of the config that a program's settings are in, where they are not its name.
SECTIONS = {
    **{"embed": "index", "search": "retrieve"},
    **{"prefill": "evaluate", "generate": "evaluate"},
}
# Settings that decide a program's size.
SIZES = {
    "lm_ft": ("rows", "row_tokens", "row_targets", "micro_batches", "remat"),
    "lm_score": ("rows", "row_tokens", "row_targets"),
    "r_ft": ("rows",),
    **dict.fromkeys(("prefill", "generate", "embed"), ("batch_tokens",)),
    "search": (),
}


class Program(NamedTuple):
    """A stage's step, ready to be compiled, and what it stands for."""

    function: Callable[..., Any]  # jitted
    arguments: tuple[Any, ...]  # abstract arrays on the mesh
    kinds: Mapping[str, str]  # beginnings of the arguments' names -> kind of memory
    model_flops: float  # of a step on all devices: what no step can do without
    items: float  # of a step: tokens, passages, queries
    unit: str  # what an item is
    steps: float  # of the whole run
    static: Mapping[str, Any] = {}
    loop_trips: int | None = None  # of loops that stop on data

    def kind_of(self, argument: str) -> str:
        """Kind of memory of an argument, by its name."""
        for beginning, kind in self.kinds.items():
            if argument.startswith(beginning):
                return kind
        return BATCH


def llama_config(shape: ConfigDict) -> LlamaConfig:
    """The shape of a named model."""
    fields = {f.name for f in dataclasses.fields(LlamaConfig)} - {"rope"}
    known = {name: value for name, value in shape.items() if name in fields}
    return LlamaConfig(**known, rope=Rope(**shape.rope))


def lm_ft_step(config: ConfigDict, shape: ConfigDict, mesh: Mesh) -> Program:
    """The optimizer step of stage ``lm_ft``."""
    section, model = config.lm_ft, llama_config(shape)
    lm_ft.check_settings(section)
    lm_ft.check_context(section, model)
    key = _key()
    with aot.tracing(mesh):
        parts = section.micro_batches
        rows, part = section.rows, section.rows // parts
        if rows % parts:
            raise ValueError(
                f"lm_ft.rows = {rows} does not divide by lm_ft.micro_batches = {parts}"
            )
        sharding.check_rows(part, f"lm_ft.rows / lm_ft.micro_batches = {part} rows")
        tx, learning_rate = optimizer(section)
        state = _state(lambda key: Llama(model, key), tx, key)
        kernel = choose_kernel(config.attention, PLATFORM, DTYPE, model.head_size)
        stream = sharding.stream_spec(config.mesh.sequence, section.row_tokens)
        step = lm_ft.make_step(tx, learning_rate, DTYPE, section.remat, kernel, stream)

    def of(length: int, dtype: Any = jnp.int32) -> Any:
        return aot.array(mesh, (parts, part, length), dtype, sharding.PARTS_BL)

    L, T = section.row_tokens, section.row_targets
    batch = Packed(of(L), of(L), of(L), of(T), of(T), of(T, jnp.float32))
    return Program(
        step,
        (aot.on(mesh, state), batch),
        {"state.params": WEIGHTS, "state.opt_state": OPTIMIZER},
        rows * L * lm_ft.flops_per_token(model, float(L), T / L),
        rows * L,
        "tokens",
        section.steps,
    )


def lm_score_step(config: ConfigDict, shape: ConfigDict, mesh: Mesh) -> Program:
    """A batch of stage ``lm_score``: packed rows, answers after their passages."""
    section, model = config.lm_score, llama_config(shape)
    B, L, T = section.rows, section.row_tokens, section.row_targets
    kernel = choose_kernel(config.attention, PLATFORM, DTYPE, model.head_size)
    with aot.tracing(mesh):
        scoring.check_rows("lm_score", section)

    def of(length: int, dtype: Any = jnp.int32) -> Any:
        return aot.array(mesh, (B, length), dtype, sharding.ROWS_BL)

    batch = Packed(of(L), of(L), of(L), of(T), of(T), of(T, jnp.float32))
    return Program(
        scoring.make_score(DTYPE, kernel),
        (_weights(model, mesh), batch, of(L)),
        {"model": WEIGHTS},
        B * L * lm_ft.flops_per_token(model, float(L), T / L) / 3,
        B * L,
        "tokens",
        shape.pairs * shape.pair_tokens / (B * L),
    )


def _prompts(config: ConfigDict, shape: ConfigDict, mesh: Mesh) -> tuple[Any, ...]:
    """What ``generate.prefill`` reads: the model, packed rows, and seeds."""
    L, Q, new = shape.row_tokens, shape.prompts, shape.new
    with aot.tracing(mesh):
        shards = sharding.row_shards()
        B = config.evaluate.batch_tokens // (L + Q * new) // shards * shards
        if not B:
            raise ValueError(
                f"evaluate.batch_tokens = {config.evaluate.batch_tokens} holds no row "
                f"of {L} tokens and {Q} x {new} new ones on each of {shards} devices"
            )
    rows, prompts = ([jax.ShapeDtypeStruct((B, n), jnp.int32)] for n in (L, Q))
    packed = aot.on(mesh, PromptRows(*rows * 4, *prompts * 5), default=sharding.ROWS_BL)
    return _weights(llama_config(shape), mesh), packed, packed.sites_BQ


def prefill_step(config: ConfigDict, shape: ConfigDict, mesh: Mesh) -> Program:
    """The reading of a batch of packed prompts of stage ``evaluate``."""
    model, L, Q = llama_config(shape), shape.row_tokens, shape.prompts
    kernel = choose_kernel(config.attention, PLATFORM, DTYPE, model.head_size)
    arguments = _prompts(config, shape, mesh)
    B = arguments[1].tokens_BL.shape[0]
    return Program(
        generate.prefill,
        arguments,
        {"model": WEIGHTS},
        B * L * lm_ft.flops_per_token(model, float(L), Q / L) / 3,
        B * L,
        "tokens",
        shape.answers / (B * Q),
        {"max_new_tokens": shape.new, "dtype": DTYPE, "kernel": kernel},
    )


def generate_step(config: ConfigDict, shape: ConfigDict, mesh: Mesh) -> Program:
    """A chunk of decoding steps of stage ``evaluate``, no prompt having stopped yet.

    The state is what ``prefill`` makes of packed prompts.
    """
    model, L, Q, new = llama_config(shape), shape.row_tokens, shape.prompts, shape.new
    arguments = _prompts(config, shape, mesh)
    B = arguments[1].tokens_BL.shape[0]
    with aot.tracing(mesh):
        state = jax.eval_shape(
            functools.partial(generate.prefill, max_new_tokens=new, dtype=DTYPE),
            *jax.tree.map(_abstract, arguments),
        )
    table = aot.array(mesh, (model.vocab_size,), jnp.bool_, jax.P())
    return Program(
        generate.decode,
        (
            arguments[0],
            aot.on(mesh, state),
            generate.Stops(table, table, table),
        ),
        {"model": WEIGHTS, "state.cache": CACHE},
        B * Q * generate.CHUNK * lm_ft.flops_per_token(model, float(L), 1.0) / 3,
        B * Q * generate.CHUNK,
        "tokens",
        shape.answers * new / (B * Q * generate.CHUNK),
        {"chunk": generate.CHUNK, "sampling": generate.GREEDY},
        loop_trips=generate.CHUNK,
    )


def _abstract(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The same on the mesh that is traced for."""
    mesh = jax.sharding.get_abstract_mesh()
    assert x.sharding is not None
    return jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)
    )


def encoder_config(shape: ConfigDict) -> EncoderConfig:
    """The shape of a named encoder."""
    fields = {f.name for f in dataclasses.fields(EncoderConfig)}
    return EncoderConfig(**{n: value for n, value in shape.items() if n in fields})


def encoder_flops(model: EncoderConfig, length: int) -> float:
    """FLOPs of a token's forward pass: 2 per weight used, and attention to the row."""
    D, F = model.width, model.mlp_width
    return 2.0 * model.layers * (4 * D * D + 2 * D * F + 2 * length * D)


def r_ft_step(config: ConfigDict, shape: ConfigDict, mesh: Mesh) -> Program:
    """The optimizer step of stage ``r_ft``, of questions as long as they may be."""
    section, model = config.r_ft, encoder_config(shape)
    B, L, C = section.rows, shape.question_tokens, shape.candidates
    key = _key()
    with aot.tracing(mesh):
        r_ft.check_settings(config)
        tx, learning_rate = optimizer(section)
        state = _state(lambda key: r_ft.Towers(Encoder(model, key)), tx, key)
        step = r_ft.make_step(
            tx, learning_rate, DTYPE, section.loss, section.score_temperature or 1.0
        )

    def of(*shape: int, dtype: Any = jnp.int32) -> Any:
        return aot.array(mesh, shape, dtype, sharding.rows_spec(len(shape)))

    batch = Candidates(
        of(B, L),
        of(B, L, dtype=jnp.bool_),
        of(B, C),
        of(B, C, dtype=jnp.float32),
        of(B, C, model.width, dtype=jnp.float32),
    )
    return Program(
        step,
        (aot.on(mesh, state), batch),
        {"state.params": WEIGHTS, "state.opt_state": OPTIMIZER},
        3 * B * L * encoder_flops(model, L),
        B,
        "questions",
        section.steps,
    )


def embed_step(config: ConfigDict, shape: ConfigDict, mesh: Mesh) -> Program:
    """A batch of stage ``index``, of passages of one length."""
    model, L = encoder_config(shape), shape.passage_tokens
    B = config.index.batch_tokens // L
    key = _key()
    with aot.tracing(mesh):
        sharding.check_rows(B, f"index.batch_tokens / {L} = {B} passages")
        encoder = jax.eval_shape(lambda key: Encoder(model, key), key)
    tokens, mask = (
        aot.array(mesh, (B, L), dtype, sharding.ROWS_BL)
        for dtype in (jnp.int32, jnp.bool_)
    )
    return Program(
        index.make_encode(DTYPE),
        (aot.on(mesh, encoder), tokens, mask),
        {"encoder": WEIGHTS},
        B * L * encoder_flops(model, L),
        B,
        "passages",
        shape.passages / B,
    )


def search_step(config: ConfigDict, shape: ConfigDict, mesh: Mesh) -> Program:
    """A block of queries against every passage (``retrieval.index.ExactIndex``)."""
    rows = -(-shape.passages // mesh.size)
    B, k = block_of(shape.queries, rows, fused=True), config.retrieve.k
    queries = aot.array(mesh, (B, shape.width), jnp.float32, sharding.REPLICATED)
    passages = aot.array(
        mesh, (rows * mesh.size, shape.width), jnp.bfloat16, sharding.INDEX_NE
    )
    return Program(
        exact_search,
        (queries, passages),
        {"embeddings_NE": INDEX},
        2.0 * B * shape.passages * shape.width,
        B,
        "queries",
        config.retrieve.corpus_examples / B,
        {"k": k, "size": shape.passages, "recall_target": shape.recall_target},
    )


def _weights(model: LlamaConfig, mesh: Mesh) -> Any:
    """Of a language model that is not trained: held in the type of compute."""
    key = _key()
    with aot.tracing(mesh):
        weights = jax.eval_shape(lambda key: Llama(model, key), key)
    return aot.on(mesh, jax.tree.map(lambda x: x.update(dtype=DTYPE), weights))


def _state(build: Callable[[Any], Any], tx: Any, key: jax.ShapeDtypeStruct) -> Any:
    """What training of a model starts from."""
    return jax.eval_shape(
        lambda key, step, data: initial_state(build(key), tx, step, data),
        key,
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.eval_shape(jax.random.key_data, key),
    )


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


BUILDERS: dict[str, Callable[[ConfigDict, ConfigDict, Mesh], Program]] = {
    "lm_ft": lm_ft_step,
    "lm_score": lm_score_step,
    "prefill": prefill_step,
    "generate": generate_step,
    "r_ft": r_ft_step,
    "embed": embed_step,
    "search": search_step,
}
