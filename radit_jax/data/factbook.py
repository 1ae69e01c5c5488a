"""The World Factbook as a corpus and question sets: the demo's data.

The files have the format that a user's own would have, since ``read_documents`` and
``read_examples`` read them. The text is in the public domain (CIA World Factbook).
"""

import html
import json
import random
import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from radit_jax.data.corpus import clean
from radit_jax.data.factbook_questions import KINDS, Kind

FILES = ("documents", "train", "dev", "test", "test_heldout")

# Where the published short form is missing, cut short or not a name.
_NAMES = {
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "ee": "European Union",
    "fk": "Falkland Islands",
    "gz": "Gaza Strip",
    "sv": "Svalbard",
    "um": "United States Pacific Island Wildlife Refuges",
    "vt": "Holy See (Vatican City)",
    "xx": "World",
}
_WITH_ARTICLE = re.compile(
    r"United |Central African|Dominican Republic|Democratic Republic|Republic of"
    r"|Federated|Netherlands|Philippines|Maldives|Comoros|Gaza Strip|West Bank|Holy See"
    r"|Isle of Man|European Union|British|.* Islands$"
)


class Country(NamedTuple):
    """One file of the package, as lines of text."""

    code: str
    name: str
    inhabited: bool  # an entry with a number of inhabitants: questions are asked
    # Per section its lines, and per (section, field, subfield) the first value there.
    sections: dict[str, list[str]]
    values: dict[tuple[str, str, str], tuple[str, str]]  # -> (line, value)


class Split(NamedTuple):
    """Codes of the countries of each split; disjoint."""

    train: frozenset[str]
    dev: frozenset[str]
    test: frozenset[str]


def write_factbook(
    package: str | Path,
    folder: str | Path,
    seed: int = 0,
    train_per_kind: int = 120,
    dev_questions: int = 150,
    test_per_kind: int = 120,
) -> dict[str, int]:
    """Write the corpus and the question files of the demo.

    The countries are split 55 : 10 : 35 into train, dev and test; every country is in
    the corpus. The last wording of a kind is asked in test only, and the held-out
    kinds only in ``test_heldout.jsonl``, about the countries of test. Any prefix of a
    question file is balanced over its kinds. Deterministic for a seed.

    Args:
        package: The folder of ``fetch_factbook``: ``<region>/<code>.json``.
        folder: Where ``documents.jsonl``, ``train.jsonl``, ``dev.jsonl``,
            ``test.jsonl`` and ``test_heldout.jsonl`` go; made if need be.
        seed: Chooses the countries of each split, the order and the wordings.
        train_per_kind: The most training questions of a kind.
        dev_questions: The most dev questions in all.
        test_per_kind: The most questions of a kind in either test file.

    Returns:
        The number of rows per file, keyed by its name without the suffix.

    Raises:
        FileNotFoundError: There is no country file in ``package``.
        ValueError: A country file is not a JSON object of sections.
    """
    folder = Path(folder)
    countries = read_countries(package)
    split = split_countries(countries, seed)
    trained = [kind for kind in KINDS if not kind.held_out]
    heldout = [kind for kind in KINDS if kind.held_out]

    def ask(kinds: list[Kind], codes: frozenset[str], all_wordings: bool, cap: int,
            name: str) -> list[dict[str, Any]]:  # fmt: skip
        asked = [country for country in countries if country.code in codes]
        # A seed of its own for every file: one cap does not change the other files.
        return questions(asked, kinds, all_wordings, cap, f"{seed}/{name}")

    rows: dict[str, Iterable[dict[str, Any]]] = {
        "documents": [row for country in countries for row in documents(country)],
        "train": ask(trained, split.train, False, train_per_kind, "train"),
        "dev": ask(trained, split.dev, False, dev_questions, "dev")[:dev_questions],
        "test": ask(trained, split.test, True, test_per_kind, "test"),
        "test_heldout": ask(heldout, split.test, True, test_per_kind, "test_heldout"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _write(folder / f"{name}.jsonl", rows[name]) for name in FILES}


def read_countries(package: str | Path) -> list[Country]:
    """Read the country files of the package, in the order of their paths.

    Args:
        package: The folder of ``fetch_factbook``: ``<region>/<code>.json``.

    Raises:
        FileNotFoundError: There is no country file in it.
        ValueError: A country file is not a JSON object of sections.
    """
    paths = sorted(Path(package).glob("*/*.json"))
    if not paths:
        raise FileNotFoundError(
            f"{package}: no <region>/<code>.json in it; expected the folder that"
            " fetch_factbook returns"
        )
    return [_read_country(path) for path in paths]


def split_countries(countries: list[Country], seed: int) -> Split:
    """Split the inhabited countries 55 : 10 : 35 into train, dev and test."""
    codes = sorted(country.code for country in countries if country.inhabited)
    random.Random(f"{seed}/countries").shuffle(codes)
    train, dev = round(0.55 * len(codes)), round(0.65 * len(codes))
    return Split(
        frozenset(codes[:train]), frozenset(codes[train:dev]), frozenset(codes[dev:])
    )


def documents(country: Country) -> Iterator[dict[str, Any]]:
    """Rows for ``read_documents``: a document per section, a line per sub-field."""
    for section, lines in country.sections.items():
        if lines:
            yield {
                "id": _document_id(country.code, section),
                "title": country.name,
                "section": section,
                "text": "\n".join(lines),
            }


def questions(
    countries: list[Country],
    kinds: list[Kind],
    all_wordings: bool,
    per_kind: int,
    seed: str,
) -> list[dict[str, Any]]:
    """Rows for ``read_examples``, any prefix of them balanced over the kinds.

    Args:
        countries: Asked about, each at most once per kind.
        kinds: What to ask.
        all_wordings: Whether the last wording of a kind is asked too.
        per_kind: The most questions of a kind.
        seed: Chooses the order and the wordings.
    """
    rng = random.Random(seed)
    by_kind = []
    for kind in kinds:
        wordings = kind.wordings if all_wordings else kind.wordings[:-1]
        asked = [row for country in countries if (row := _ask(country, kind))]
        rng.shuffle(asked)
        offset = rng.randrange(len(wordings))
        for place, row in enumerate(asked[:per_kind], start=offset):
            chosen = place % len(wordings)
            row["question"] = wordings[chosen].format(country=row.pop("country"))
            row["unseen_wording"] = wordings[chosen] == kind.wordings[-1]
        by_kind.append(asked[:per_kind])
    rows = []
    for turn in zip_longest(*by_kind):
        present = [row for row in turn if row is not None]
        rng.shuffle(present)
        rows.extend(present)
    return rows


def _ask(country: Country, kind: Kind) -> dict[str, Any] | None:
    place = (kind.section, kind.field, kind.subfield)
    line, value = country.values.get(place, ("", ""))
    answers = kind.answers(value)
    # "What is Cuba called locally?" "Cuba" says nothing about retrieval.
    if not answers or answers[0].lower() == country.name.lower():
        return None
    assert answers[0] in line, (answers, line)
    assert line in country.sections[kind.section], line
    return {
        "id": f"{country.code}/{kind.name}",
        "question": "",
        "answers": list(answers),
        "kind": kind.name,
        "document": _document_id(country.code, kind.section),
        "evidence": line,
        "country": _in_sentence(country.name),
    }


def _read_country(path: Path) -> Country:
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({error})") from error
    if not isinstance(published, dict) or not all(
        isinstance(fields, dict) for fields in published.values()
    ):
        raise ValueError(f"{path}: expected an object of sections of fields")
    sections: dict[str, list[str]] = {}
    values: dict[tuple[str, str, str], tuple[str, str]] = {}
    seen: set[str] = set()
    for section, fields in published.items():
        lines = sections.setdefault(section, [])
        for field, subfield, text in _texts(fields):
            head = _head(field, subfield)
            found = []
            for value, is_note in _values(text, subfield):
                line = f"{head}: {value}"
                # Environment repeats lines of Geography and of People and Society;
                # kept once, the place of an answer is unambiguous.
                if line in seen:
                    continue
                seen.add(line)
                lines.append(line)
                if not is_note:
                    found.append((line, value))
            # Several paragraphs are several values: metropolitan France, Reunion, ...
            if len(found) == 1:
                values.setdefault((section, field, subfield), found[0])
    # One field is published in two shapes: with a sub-field of its own name, or flat.
    for (section, field, subfield), pair in list(values.items()):
        if field == subfield or not subfield:
            values.setdefault((section, field, "" if subfield else field), pair)
    total = values.get(("People and Society", "Population", "total"), ("", ""))[1]
    return Country(
        code=path.stem,
        name=_country_name(path.stem, values),
        # The world and the European Union are no countries.
        inhabited=total[:1].isdigit() and path.stem not in ("xx", "ee"),
        sections=sections,
        values=values,
    )


def _texts(fields: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(field, sub-field, text) of a section; the sub-field is "" where there is none.

    A text is ``{"text": ...}``, or a string where it is a note.
    """
    for field, content in fields.items():
        field = clean(field)
        if isinstance(content, str):
            yield field, "", content
            continue
        for subfield, leaf in content.items():
            text = leaf.get("text", "") if isinstance(leaf, dict) else leaf
            if isinstance(text, str):
                yield field, "" if subfield == "text" else clean(subfield), text


def _head(field: str, subfield: str) -> str:
    """What a line begins with, so that it makes sense alone: ``Area, total``."""
    if not subfield:
        return field
    subfield = subfield.replace(": ", ", ")
    # "Exchange rates" / "Exchange rates 2024" would say it twice.
    if subfield.lower().startswith(field.lower()):
        return subfield
    return f"{field}, {subfield}"


def _values(text: str, subfield: str) -> Iterator[tuple[str, bool]]:
    """The paragraphs of a text, without HTML and labels, and whether each is a note."""
    label = re.escape(subfield.split(": ")[-1])
    for line in clean(_plain(text)).split("\n"):
        is_note = bool(re.match(r"note\b", line, flags=re.IGNORECASE))
        line = re.sub(rf"^(?:note(?: \d+)?|{label}):\s*", "", line, flags=re.IGNORECASE)
        line = re.sub(r"(?:\s+-|\s*;)$", "", line)
        if subfield == "lyrics/music":
            # "MAMELI/Michele" would be one word to every reader.
            line = line.replace("/", " / ")
        if line:
            yield line, is_note


def _plain(text: str) -> str:
    # Tags before entities: "&lt;1%" must not become a tag.
    text = re.sub(r"<(?:br|/?p|/?li|/?div)\b[^<>]*>", "\n", text, flags=re.IGNORECASE)
    text = re.sub(r"<!--.*?-->|</?[A-Za-z][^<>]*>", "", text, flags=re.DOTALL)
    # Twice, because some entities are escaped twice ("&amp;nbsp;").
    text = html.unescape(html.unescape(text)).replace("\N{NO-BREAK SPACE}", " ")
    return re.sub(r" +([,;.])(?= |$)", r"\1", text)


def _country_name(
    code: str, values: dict[tuple[str, str, str], tuple[str, str]]
) -> str:
    if code in _NAMES:
        return _NAMES[code]
    for form in ("conventional short form", "conventional long form"):
        name = values.get(("Government", "Country name", form), ("", ""))[1]
        if name and name.lower() != "none":
            return name
    return code.upper()


def _in_sentence(name: str) -> str:
    if name.startswith("The "):
        return f"the {name[4:]}"
    return f"the {name}" if _WITH_ARTICLE.match(name) else name


def _document_id(code: str, section: str) -> str:
    return f"{code}/{re.sub('[^a-z0-9]+', '-', section.lower()).strip('-')}"


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    written = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    return written
