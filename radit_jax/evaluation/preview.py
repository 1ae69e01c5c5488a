"""Pages that show training and evaluation data as the models will read it."""

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Around what carries loss, where there is no colour.
OPEN, CLOSE = "⟦", "⟧"
BARS = 12
WIDTH = 32  # of the longest bar, in characters


class Shown(NamedTuple):
    """One example as a model reads it."""

    id: str
    query: str  # what is searched for; "" where nothing is
    parts: tuple[tuple[str, bool], ...]  # pieces of text, and whether they carry loss
    tokens: int
    loss_tokens: int
    cut: int  # tokens dropped to make it fit
    answers: tuple[str, ...]


class Lengths(NamedTuple):
    """Prompts of a dataset by their number of tokens."""

    tokens: np.ndarray  # int64 [prompts]
    loss_tokens: np.ndarray  # int64 [prompts]
    cut: np.ndarray  # int64 [prompts], tokens dropped


class Part(NamedTuple):
    """A dataset of a split."""

    split: str
    name: str
    examples: int  # of the dataset
    template: str
    role: str  # of its context
    shown: Sequence[Shown]
    lengths: Lengths


def histogram(values: np.ndarray) -> list[tuple[int, int, int]]:
    """(From, to, count) of up to BARS classes of equal width; both ends included."""
    low, high = int(values.min()), int(values.max())
    width = max(-(-(high - low + 1) // BARS), 1)
    counts = np.bincount((values - low) // width)
    return [
        (low + i * width, low + (i + 1) * width - 1, int(count))
        for i, count in enumerate(counts)
    ]


def summary(part: Part) -> str:
    """The lengths of a dataset's prompts in one line."""
    tokens, loss, cut = part.lengths
    middle, late = np.percentile(tokens, (50, 95))
    return (
        f"{part.examples:,} examples, template {part.template}, context {part.role}; "
        f"of {len(tokens):,} prompts: median {middle:.0f} tokens, 95 % up to "
        f"{late:.0f}, longest {tokens.max()}; {loss.mean():.1f} carry loss on average; "
        f"{(cut > 0).mean():.1%} are cut"
    )


def text_page(parts: Sequence[Part]) -> str:
    """For the terminal: what carries loss stands between brackets."""
    blocks = []
    for part in parts:
        lines = [f"=== {part.split} / {part.name}", summary(part)]
        classes = histogram(part.lengths.tokens)
        most = max(count for _, _, count in classes)
        for low, high, count in classes:
            bar = "█" * round(WIDTH * count / most)
            lines.append(f"{low:>6}-{high:<6} {bar} {count:,}")
        for shown in part.shown:
            marked = "".join(
                f"{OPEN}{text}{CLOSE}" if loss else text for text, loss in shown.parts
            )
            lines += [f"--- {shown.id}: {_sizes(shown)}", *_query(shown), marked]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _sizes(shown: Shown) -> str:
    found = f"{shown.tokens} tokens, {shown.loss_tokens} carry loss"
    return f"{found}, {shown.cut} cut" if shown.cut else found


def _query(shown: Shown) -> list[str]:
    return [f"query: {shown.query}"] if shown.query else ["nothing is retrieved"]


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --loss: #ffd54a66; --soft: #8889; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem;
  padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2.5rem 0 0.3rem; }
nav a { display: inline-block; margin: 0 0.8rem 0.3rem 0; }
p { margin: 0.3rem 0; } .soft { color: GrayText; font-size: 0.9rem; }
pre { border: 1px solid var(--line); border-radius: 6px; overflow-wrap: anywhere;
  padding: 0.7rem; white-space: pre-wrap; font-size: 0.85rem; }
mark { background: var(--loss); color: inherit; border-radius: 3px; }
svg { display: block; margin: 0.5rem 0; max-width: 100%; }
svg text { fill: currentColor; font: 11px system-ui, sans-serif; }
svg rect { fill: #4a90d9; }
"""


def html_page(title: str, parts: Sequence[Part]) -> str:
    """One self-contained page: what carries loss is highlighted."""
    names = [f"{part.split}/{part.name}" for part in parts]
    links = " ".join(
        f'<a href="#{html.escape(name)}">{html.escape(name)}</a>' for name in names
    )
    body = "\n".join(
        _section(name, part) for name, part in zip(names, parts, strict=True)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n<p>What the models read. "
        "<mark>Highlighted</mark> text carries loss.</p>\n"
        f"<nav>{links}</nav>\n{body}\n</body></html>\n"
    )


def _section(name: str, part: Part) -> str:
    examples = "\n".join(
        f'<p class="soft">{html.escape(shown.id)}: {_sizes(shown)}<br>'
        f"{html.escape(_query(shown)[0])}</p>\n<pre>{_marked(shown)}</pre>"
        for shown in part.shown
    )
    return (
        f'<section id="{html.escape(name)}"><h2>{html.escape(name)}</h2>\n'
        f"<p>{html.escape(summary(part))}</p>\n{_bars(part.lengths.tokens)}\n"
        f"{examples}</section>"
    )


def _marked(shown: Shown) -> str:
    return "".join(
        f"<mark>{html.escape(text)}</mark>" if loss else html.escape(text)
        for text, loss in shown.parts
    )


def _bars(tokens: np.ndarray) -> str:
    """A histogram as a picture that scales."""
    classes = histogram(tokens)
    most = max(count for _, _, count in classes)
    step, height = 560 / len(classes), 80
    drawn = []
    for i, (low, _, count) in enumerate(classes):
        size = height * count / most
        drawn.append(
            f'<rect x="{i * step + 1:.1f}" y="{height - size:.1f}" '
            f'width="{step - 2:.1f}" height="{size:.1f}"><title>from {low} tokens: '
            f"{count:,}</title></rect>"
            f'<text x="{i * step + 2:.1f}" y="{height + 13}">{low}</text>'
        )
    return (
        f'<svg viewBox="0 0 560 {height + 18}" width="560" role="img" '
        f'aria-label="Prompts by tokens">{"".join(drawn)}</svg>'
    )
