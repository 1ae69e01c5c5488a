"""The text of a document: cleaned, and cut into passages of about equal size."""

import re
from bisect import bisect_left, bisect_right
from itertools import accumulate, pairwise

from radit_jax.data.documents import Document

# Control characters, lone surrogates (no tokenizer accepts them) and three invisible
# marks. Zero-width joiners stay: Persian and Hindi spell words with them. So does
# U+FFFD: it stands for a character that was lost before, and a gap would hide that.
_DROPPED = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b\ufeff\ud800-\udfff]"
)


def clean(text: str) -> str:
    """Collapse white space within lines, drop blank lines and control characters.

    Line breaks stay, since they often mark units of meaning: paragraphs, list items,
    rows of a table.
    """
    return "\n".join(line for line, _ in _lines(text))


def one_line(text: str) -> str:
    """``clean``, with line breaks as spaces."""
    return " ".join(line for line, _ in _lines(text))


def split_passages(
    document: Document, max_words: int, keep_lines: bool = True
) -> list[str]:
    """Cut a document's text into chunks of about equal size.

    The rule of RA-DIT (section 4, after Atlas): a text of W words becomes
    ceil(W / max_words) chunks that are as equal as possible. If the text has lines,
    every border moves to the line break nearest to it, and there may be a chunk more,
    where the lines do not fit otherwise; only a line of more than ``max_words`` words
    is itself cut, into equal parts. Linear in the length of the text.

    Args:
        document: Its text is cleaned first (see ``clean``).
        max_words: The most words, separated by white space, in a chunk.
        keep_lines: Whether borders respect line breaks and the chunks keep them. If
            not, the text counts as one line.

    Returns:
        The chunks in order; none for a text without words.

    Raises:
        ValueError: ``max_words`` is not positive.
    """
    return [chunk for chunk, _ in cut_text(document.text, max_words, keep_lines)]


def cut_text(text: str, max_words: int, keep_lines: bool) -> list[tuple[str, int]]:
    """The chunks of ``split_passages`` with the number of words in each."""
    if max_words < 1:
        raise ValueError(f"max_words is {max_words}, expected at least 1")
    lines = _lines(text)
    if len(lines) > 1:
        words = sum(count for _, count in lines)
        if not keep_lines:
            lines = [(" ".join(line for line, _ in lines), words)]
        elif words <= max_words:
            return [("\n".join(line for line, _ in lines), words)]
    units = []
    for line in lines:
        units += [line] if line[1] <= max_words else _cut_line(line[0], max_words)
    if len(lines) < 2:
        return units
    ends = list(accumulate(count for _, count in units))
    chunks = []
    first = start = 0  # the next unit, and the words before it
    while first < len(units):
        left = ends[-1] - start
        target = start + left / _ceil_divide(left, max_words)
        # Units up to `last` fit; each has at most max_words, so at least one does.
        last = bisect_right(ends, start + max_words, lo=first)
        after = bisect_left(ends, target, lo=first, hi=last)
        near = [at for at in (after - 1, after) if first <= at < last]
        border = min(near, key=lambda at: abs(ends[at] - target)) + 1
        chunk = "\n".join(part for part, _ in units[first:border])
        chunks.append((chunk, ends[border - 1] - start))
        first, start = border, ends[border - 1]
    return chunks


def _lines(text: str) -> list[tuple[str, int]]:
    """Every line that has words, cleaned, and how many it has."""
    lines = []
    for line in text.splitlines():
        # All that is dropped is unprintable, and so is all white space but the space.
        if not line.isprintable():
            line = " ".join(_DROPPED.sub("", line).split())
        elif "  " in line:
            line = " ".join(line.split())
        else:
            line = line.strip(" ")
        if line:
            lines.append((line, line.count(" ") + 1))
    return lines


def _cut_line(line: str, max_words: int) -> list[tuple[str, int]]:
    words = line.split(" ")
    parts = _ceil_divide(len(words), max_words)
    borders = [len(words) * at // parts for at in range(parts + 1)]
    return [
        (" ".join(words[start:stop]), stop - start) for start, stop in pairwise(borders)
    ]


def _ceil_divide(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
