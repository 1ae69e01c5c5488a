"""Every stage's program lowers for CUDA, on a machine without a GPU.

What cannot be seen this way: whether cuDNN has an engine for these shapes on a given
GPU, what it costs, and numbers. See docs/gpu.md.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from radit_jax import optim, sharding
from radit_jax.batch import Candidates, Packed
from radit_jax.inference import generate
from radit_jax.inference.packing import PromptRows
from radit_jax.inference.score import target_log_probabilities
from radit_jax.loop import TrainState
from radit_jax.models.attention import XLA, Kernel
from radit_jax.models.encoder import Encoder, EncoderConfig
from radit_jax.models.llama import Llama, LlamaConfig
from radit_jax.retrieval import index
from radit_jax.stages import lm_ft, r_ft
from radit_jax.stages.index import make_encode

BF16 = jnp.dtype(jnp.bfloat16)
CUDNN = Kernel("cudnn")
ROWS, L, T, C, Q = 8, 32, 8, 4, 2
LLAMA = LlamaConfig(
    vocab_size=64,
    width=32,
    layers=2,
    heads=8,
    kv_heads=2,
    head_size=8,
    mlp_width=48,
    max_length=64,
)
ENCODER = EncoderConfig(
    vocab_size=60, width=64, layers=2, heads=8, mlp_width=48, max_length=64
)


@pytest.fixture(params=[(1, 1, 1), (2, 2, 2)], ids=str, autouse=True)
def mesh(request):
    with jax.set_mesh(sharding.make_mesh(*request.param)) as mesh:
        yield mesh


@pytest.fixture
def cudnn_is_there(monkeypatch):
    """Only a GPU's plugin knows the version; lowering asks for it and nothing else."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)


def spec(*shape, dtype=jnp.int32, axes=sharding.ROWS):
    """An array whose first axis is spread over the rows' devices."""
    placement = jax.NamedSharding(
        jax.sharding.get_mesh(), jax.P(axes, *(None,) * (len(shape) - 1))
    )
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placement)


def llama():
    return jax.eval_shape(lambda: Llama(LLAMA, jax.random.key(0)))


def encoder():
    return jax.eval_shape(lambda: Encoder(ENCODER, jax.random.key(0)))


def packed(*micro_batches, length=L):
    """Shapes of a packed batch."""
    axes = (None,) * len(micro_batches)
    placement = jax.NamedSharding(
        jax.sharding.get_mesh(), jax.P(*axes, sharding.ROWS, None)
    )
    rows, sites = ((*micro_batches, ROWS, n) for n in (length, T))
    return Packed(
        *(
            jax.ShapeDtypeStruct(shape, dtype, sharding=placement)
            for shape, dtype in (
                *((rows, jnp.int32),) * 3,
                *((sites, jnp.int32),) * 2,
                (sites, jnp.float32),
            )
        )
    )


def step_calls(make_step, params, batch):
    """``custom_calls`` of an optimizer step."""
    rate = optim.schedule(1e-3, 1e-4, 1, 4)
    tx = optim.optimizer(rate, 0.9, 0.95, 1e-8, 0.1, 1.0)
    step = make_step(tx, rate)

    def on_arrays(params, opt_state, batch):
        zero, rng = jnp.int32(0), jnp.zeros(2, jnp.uint32)
        return step(TrainState(zero, params, opt_state, rng), batch)

    return custom_calls(on_arrays, params, jax.eval_shape(tx.init, params), batch)


def custom_calls(function, *arguments, **options):
    """Names of what a program for CUDA calls beyond XLA, after lowering it."""
    allowed = [
        export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaScaleBiasSoftmax{end}")
        for end in ("", "Backward")
    ]
    leaves, tree = jax.tree.flatten(arguments)

    # Of plain arrays: the export of a tree would put other things than arrays into it.
    @jax.jit
    def program(*leaves):
        return jax.tree.leaves(function(*tree.unflatten(leaves), **options))

    lowered = export.export(program, platforms=["cuda"], disabled_checks=allowed)
    found = lowered(*leaves)
    assert found.platforms == ("cuda",)
    return set(re.findall(r"custom_call @(__cudnn\$\w+)", found.mlir_module()))


FORWARD = "__cudnn$fmhaScaleBiasSoftmax"
BACKWARD = "__cudnn$fmhaScaleBiasSoftmaxBackward"


@pytest.mark.usefixtures("cudnn_is_there")
@pytest.mark.parametrize(
    ("kernel", "calls"),
    [(XLA, set()), (CUDNN, {FORWARD, BACKWARD})],
    ids=["xla", "cudnn"],
)
def test_the_step_of_lm_ft(kernel, calls):
    step = functools.partial(lm_ft.make_step, dtype=BF16, remat="dots", kernel=kernel)
    assert step_calls(step, llama(), packed(2)) == calls


@pytest.mark.usefixtures("cudnn_is_there")
@pytest.mark.parametrize(
    ("kernel", "calls"), [(XLA, set()), (CUDNN, {FORWARD})], ids=["xla", "cudnn"]
)
def test_log_likelihoods_after_shared_beginnings(kernel, calls):
    score = functools.partial(target_log_probabilities, dtype=BF16, kernel=kernel)
    assert custom_calls(jax.jit(score), llama(), packed(), spec(ROWS, L)) == calls


@pytest.mark.usefixtures("cudnn_is_there")
def test_rows_of_odd_length_are_filled_up():
    """cuDNN has no gradient of an odd number of tokens, and JAX says so."""

    def loss(model, batch):
        return target_log_probabilities(model, batch, dtype=BF16, kernel=CUDNN).sum()

    found = custom_calls(jax.grad(loss), llama(), packed(length=33))
    assert found == {FORWARD, BACKWARD}


@pytest.mark.usefixtures("cudnn_is_there")
def test_generation_reads_prompts_and_decodes():
    rows = PromptRows(*[spec(ROWS, L)] * 4, *[spec(ROWS, Q)] * 5)
    prompts = (llama(), rows, spec(ROWS, Q))
    options = {"max_new_tokens": 4, "dtype": BF16, "kernel": CUDNN}
    assert custom_calls(generate.prefill, *prompts, **options) == {FORWARD}
    state = jax.eval_shape(functools.partial(generate.prefill, **options), *prompts)
    table = spec(LLAMA.vocab_size, dtype=bool, axes=None)
    arguments = (llama(), state, generate.Stops(table, table, table))
    for sampling in (generate.GREEDY, generate.Sampling(0.7, 0.9)):
        options = {"chunk": 4, "sampling": sampling}
        assert custom_calls(generate.decode, *arguments, **options) == set()


def test_a_kernel_of_another_platform_does_not_lower():
    step = functools.partial(target_log_probabilities, kernel=Kernel("splash"))
    # JAX words it in one of two ways, by which of its GPU kernels were imported.
    words = "Cannot lower pallas_call on platform: gpu|cannot be used for gpu lowering"
    with pytest.raises(ValueError, match=words):
        custom_calls(jax.jit(step), llama(), packed())


def test_the_step_of_r_ft():
    batch = Candidates(
        tokens_BL=spec(ROWS, L),
        mask_BL=spec(ROWS, L, dtype=bool),
        ids_BC=spec(ROWS, C),
        log_targets_BC=spec(ROWS, C, dtype=jnp.float32),
        passages_BCE=spec(ROWS, C, ENCODER.width, dtype=jnp.float32),
    )
    step = functools.partial(
        r_ft.make_step, dtype=BF16, loss_name="kl", temperature=1.0
    )
    assert step_calls(step, r_ft.Towers(encoder()), batch) == set()


def test_embeddings():
    tokens, mask = spec(ROWS, L), spec(ROWS, L, dtype=bool)
    assert custom_calls(make_encode(BF16), encoder(), tokens, mask) == set()


@pytest.mark.parametrize("recall_target", [None, 0.95])
def test_exact_search(recall_target):
    search = functools.partial(
        index.exact_search, k=C, size=61, recall_target=recall_target
    )
    queries = spec(ROWS, ENCODER.width, dtype=jnp.float32, axes=None)
    passages = spec(64, ENCODER.width, dtype=jnp.float32, axes=sharding.AXES)
    assert custom_calls(jax.jit(search), queries, passages) == set()
