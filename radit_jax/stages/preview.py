"""Stage ``preview``: what the models will read, before anything is trained -> preview/.

Every dataset of the recipe as rendered prompts with the tokens that carry loss marked,
the retrieval query, and token lengths. Where ``retrieved/`` is there, prompts have the
top passage; before that, their own context or a stand-in for one.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from radit_jax import processes
from radit_jax.artifacts import MANIFEST
from radit_jax.batch import Example
from radit_jax.data import prompts
from radit_jax.data.corpus import PassageStore
from radit_jax.data.registry import searched
from radit_jax.data.tokenize import Tokenizer, load_tokenizer
from radit_jax.evaluation.preview import Lengths, Part, Shown, html_page, text_page
from radit_jax.stages import prepare, retrieve
from radit_jax.stages.lm_ft import context_roles
from radit_jax.stages.stage import (
    Stage,
    check_counts,
    field_fingerprint,
    lm_folder,
    run,
    section,
)

TEXT = "preview.txt"
STAND_IN = "[the passage that is retrieved]"


def settings(config: ConfigDict) -> Mapping[str, Any]:
    """The preview section, what decides the prompts, and the data's content."""
    return section(config.preview) | {
        "lm": field_fingerprint(config, "lm"),
        "lm_ft": section(config.lm_ft),
        **retrieve.data_settings(config),
    }


def inputs(config: ConfigDict) -> tuple[str, ...]:
    """What was retrieved, if it was."""
    there = (Path(config.workdir) / "retrieved" / MANIFEST).is_file()
    return ("passages", "retrieved") if there else ()


class Source(NamedTuple):
    """A dataset of a split, and what its examples are read with."""

    split: str
    name: str
    examples: Sequence[Example]
    ids: np.ndarray | None  # of their passages, int64 [examples, k]; None: not known


def sources(config: ConfigDict) -> list[Source]:
    """What was retrieved for, or what the files hold.

    Raises:
        ValueError: there is no dataset.
    """
    if inputs(config):
        workdir = Path(config.workdir)
        found = [
            Source(split, name, examples, retrieved.ids)
            for split in (*retrieve.SPLITS, retrieve.SHOTS)
            for name, (examples, retrieved) in retrieve.read_retrieved(
                workdir, split
            ).items()
        ]
    else:
        found = [
            Source(split, name, examples, None)
            for split, datasets in retrieve.read_splits(config).items()
            for name, examples in datasets.items()
        ]
    if not found:
        raise ValueError("no dataset: set data.train, data.dev or data.test")
    return found


def background(source: Source, i: int, context: str, store: PassageStore | None) -> str:
    """Text for ``Background:`` of an example; "" for none."""
    if context:
        return context
    if store is None or source.ids is None:
        return STAND_IN if searched(source.name) else ""
    id = int(source.ids[i, 0])
    return store[id].display if id >= 0 else ""


def build(config: ConfigDict, folder: Path) -> Mapping[str, Any]:
    """Render, print and write."""
    check_counts("preview", config.preview, ("examples", "sample"))
    tokenizer = load_tokenizer(lm_folder(config))
    shown = sources(config)
    roles = context_roles(config, list(dict.fromkeys(source.name for source in shown)))
    store = None
    if inputs(config):
        store = PassageStore(Path(config.workdir) / "passages")
    parts = [
        _part(config, tokenizer, store, source, roles[source.name]) for source in shown
    ]
    (folder / TEXT).write_text(text_page(parts))
    (folder / "preview.html").write_text(html_page("What the models read", parts))
    return {f"{part.split}/{part.name}": part.examples for part in parts}


def _part(
    config: ConfigDict,
    tokenizer: Tokenizer,
    store: PassageStore | None,
    source: Source,
    role: str,
) -> Part:
    preview, examples = config.preview, source.examples
    rng = np.random.default_rng(config.seed)
    places = np.sort(rng.permutation(len(examples))[: preview.sample])
    shown = set(rng.permutation(places)[: preview.examples].tolist())
    rendered = []
    kept = []
    for i in places.tolist():
        example = examples[i]
        # Evaluation reads a given context only where the template lays it out.
        context = example.context if role != "none" and source.split != "test" else ""
        prompt = prompts.render(
            tokenizer,
            prompts.pieces(example, every_turn=config.lm_ft.every_turn),
            config.lm_ft.row_tokens,
            passage=background(source, i, context, store),
            bos=config.lm_ft.bos,
        )
        rendered.append(prompt)
        if i in shown:
            kept.append(_shown(tokenizer, example, prompt, searched(source.name)))
    lengths = Lengths(
        *np.array(
            [
                (len(p.tokens), _loss(p), p.passage_cut + p.question_cut)
                for p in rendered
            ],
            np.int64,
        ).T
    )
    templates = dict.fromkeys(example.template for example in examples)
    return Part(
        source.split,
        source.name,
        len(examples),
        ", ".join(templates),
        role,
        kept,
        lengths,
    )


def _loss(prompt: prompts.Prompt) -> int:
    return sum(end - start for start, end in prompt.spans)


def _shown(
    tokenizer: Tokenizer, example: Example, prompt: prompts.Prompt, query: bool
) -> Shown:
    borders = [0, *(at for span in prompt.spans for at in span), len(prompt.tokens)]
    parts = []
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        if end > start:
            parts.append(
                (
                    tokenizer.decode(prompt.tokens[start:end], special=True),
                    number % 2 == 1,
                )
            )
    return Shown(
        example.id,
        example.search_text if query else "",
        tuple(parts),
        len(prompt.tokens),
        _loss(prompt),
        prompt.passage_cut + prompt.question_cut,
        example.answers,
    )


def show(config: ConfigDict) -> None:
    """Run the stage, after ``prepare`` where that makes its inputs, and print it."""
    if "prepare" in config:
        run("prepare", prepare.STAGE, config)
    folder = run("preview", STAGE, config)
    if processes.first():
        print((folder / TEXT).read_text())
        print(f"The same to look at in a browser: {folder.resolve() / 'preview.html'}")


STAGE = Stage("preview", inputs, ("lm",), settings, build, alone=True)
