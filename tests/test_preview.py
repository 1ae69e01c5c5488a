"""The page that shows data before training: what it marks is what carries loss."""

import re
import shutil

import numpy as np
import pytest

from radit_jax.data.prompts import Markers, pieces
from radit_jax.evaluation.preview import (
    Lengths,
    Part,
    Shown,
    histogram,
    html_page,
    text_page,
)
from radit_jax.stages import preview, retrieve
from radit_jax.stages.stage import run

SHOWN = Shown(
    "q-1",
    "who <is> it?",
    (("<s>Q: who <is> it?\nA:", False), (" me & you</s>", True)),
    tokens=9,
    loss_tokens=4,
    cut=2,
    answers=("me & you",),
)
LENGTHS = Lengths(np.array([9, 10, 30]), np.array([4, 4, 1]), np.array([2, 0, 0]))
PART = Part("train", "a<b", 1234, "qa", "add", [SHOWN], LENGTHS)


def test_a_histogram_counts_every_value_once():
    values = np.random.default_rng(0).integers(5, 300, 1000)
    classes = histogram(values)
    assert len(classes) <= 12
    for low, high, count in classes:
        assert count == ((low <= values) & (values <= high)).sum()
    assert sum(count for _, _, count in classes) == 1000
    assert histogram(np.array([7, 7])) == [(7, 7, 2)]


def test_text_marks_what_carries_loss():
    page = text_page([PART])
    assert "=== train / a<b" in page
    assert "1,234 examples, template qa, context add; of 3 prompts" in page
    assert "longest 30; 3.0 carry loss on average; 33.3% are cut" in page
    assert "--- q-1: 9 tokens, 4 carry loss, 2 cut\nquery: who <is> it?\n" in page
    assert "<s>Q: who <is> it?\nA:⟦ me & you</s>⟧" in page
    assert len(re.findall("█+ [12]$", page, re.MULTILINE)) == 2


def test_the_page_is_whole_and_escapes_what_it_shows():
    page = html_page("What <they> read", [PART])
    assert (
        "&lt;s&gt;Q: who &lt;is&gt; it?\nA:<mark> me &amp; you&lt;/s&gt;</mark>" in page
    )
    assert '<a href="#train/a&lt;b">' in page
    assert '<section id="train/a&lt;b">' in page
    assert "<they>" not in page
    # Self-contained: nothing is fetched.
    assert not re.search(r"(src|href)=.(?!#)", page)


@pytest.fixture
def recipe(tiny_config):
    from configs import preview as recipe

    def make(workdir):
        config = recipe.get_config("tiny")
        config.workdir = str(workdir)
        return config

    return make


def shown_prompts(folder):
    """(loss-free text, marked text) of the prompts of the text page."""
    return re.findall(r"(.*)⟦(.*)⟧", (folder / preview.TEXT).read_text(), re.DOTALL)


def test_the_stage_shows_every_dataset(retrieved, recipe, tmp_path, capsys):
    """With the passages that were retrieved, and without."""
    workdir = shutil.copytree(retrieved, tmp_path / "work", symlinks=True)
    config = recipe(workdir)
    config.preview.examples = 3
    preview.show(config)
    page = (workdir / "preview" / preview.TEXT).read_text()
    assert page in capsys.readouterr().out
    for split in retrieve.SPLITS:
        assert f"=== {split} / " in page
    assert page.count("⟦") == 9
    assert "Background: " in page
    assert preview.STAND_IN not in page
    html = (workdir / "preview" / "preview.html").read_text()
    assert html.count("<mark>") == 10  # and the one that explains
    # Each is an example of the data, marked where its answer is.
    examples = {
        example.id: example
        for parts in retrieve.read_splits(config).values()
        for found in parts.values()
        for example in found
    }
    blocks = re.split(r"\n--- (.*?): \d+ tokens.*\n", page)
    for id, block in zip(blocks[1::2], blocks[2::2], strict=True):
        asked, answer = pieces(examples[id], Markers())
        prompt = re.search(r"Background: .*?⟧", block, re.DOTALL)
        assert prompt is not None, block
        assert f"{asked.text}⟦{answer.text}" in prompt[0].replace("</s>", "")
        assert block.startswith(f"query: {examples[id].question}\n")
    shutil.rmtree(workdir / "retrieved")
    folder = run("preview", preview.STAGE, config)
    assert f"Background: {preview.STAND_IN}" in (folder / preview.TEXT).read_text()


def test_numbers_that_make_no_sense_are_refused(retrieved, recipe, tmp_path):
    workdir = shutil.copytree(retrieved, tmp_path / "work", symlinks=True)
    config = recipe(workdir)
    config.preview.sample = 0
    with pytest.raises(ValueError, match=r"preview.sample = 0 must be at least 1"):
        run("preview", preview.STAGE, config)
