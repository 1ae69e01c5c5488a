import json

import pytest

from radit_jax.data.corpus import Document, PassageStore, read_documents, write_passages
from radit_jax.data.factbook import (
    FILES,
    documents,
    read_countries,
    split_countries,
    write_factbook,
)
from radit_jax.data.factbook_questions import KINDS
from radit_jax.data.tasks import gold_passages, read_examples

KIND = {kind.name: kind for kind in KINDS}


def _leaf(text):
    return {"text": text}


def _country(number):
    """A country file in the published layout; some lack fields."""
    name = f"Land{chr(ord('A') + number)}"
    country = {
        "Introduction": {"Background": _leaf(f"<p>{name} is&nbsp;old.</p><p>End.</p>")},
        "Geography": {
            "Area": {
                "total ": _leaf(f"{1000 + number:,} sq km ; 5 sq km (islands)"),
                "note": "<strong>note:</strong> with the <em>islands</em>",
            },
            "Coastline": _leaf(f"{20 + number} km"),
            "Climate": _leaf("mild"),
            "Land use": {
                "agricultural land: arable land": _leaf("arable land: 31.4%"),
            },
        },
        "People and Society": {
            "Population": {"total": _leaf(f"{100 + number},000 (2025 est.)")},
            "Languages": {"Languages": _leaf(f"{name}ish (official) &lt;99%, French")},
        },
        "Environment": {"Climate": _leaf("mild")},
        "Government": {
            "Country name": {
                "conventional long form": _leaf(f"Republic of {name}"),
                "conventional short form": _leaf(name),
            },
            "Capital": {"name": _leaf(f"<b>Port {name}</b> (Old {name})")},
            "National color(s)": _leaf("red, white"),
        },
        "Economy": {"Exports": {"Exports 2024": _leaf("$5 billion")}},
        "Transportation": {"Airports": _leaf(f"{number + 3} (2025)")},
    }
    if number % 2:
        del country["Geography"]["Coastline"]
    return country


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("factbook")
    files = {f"region/{chr(ord('a') + at)}a": _country(at) for at in range(20)}
    rock = _country(20)
    rock["People and Society"]["Population"]["total"] = _leaf("no inhabitants")
    rock["Transportation"] = {}
    files["sea/zz"] = rock
    for name, country in files.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(country))
    return folder


@pytest.fixture(scope="module")
def written(package, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    return folder, write_factbook(package, folder)


def test_documents_are_plain_lines_that_make_sense_alone(package):
    country = read_countries(package)[0]
    rows = {row["id"]: row for row in documents(country)}
    assert rows["aa/geography"] == {
        "id": "aa/geography",
        "title": "LandA",
        "section": "Geography",
        "text": "Area, total: 1,000 sq km; 5 sq km (islands)\n"
        "Area, note: with the islands\n"
        "Coastline: 20 km\n"
        "Climate: mild\n"
        "Land use, agricultural land, arable land: 31.4%",
    }
    assert rows["aa/introduction"]["text"] == (
        "Background: LandA is old.\nBackground: End."
    )
    assert rows["aa/economy"]["text"] == "Exports 2024: $5 billion"
    assert rows["aa/people-and-society"]["text"].endswith(
        "Languages: LandAish (official) <99%, French"
    )


def test_a_repeated_line_and_an_empty_section_are_left_out(package):
    countries = {country.code: country for country in read_countries(package)}
    ids = [row["id"] for row in documents(countries["zz"])]
    assert "zz/environment" not in ids
    assert "zz/transportation" not in ids


def test_the_files_are_read_by_the_door_of_the_user(written):
    folder, counts = written
    read = list(read_documents(folder / "documents.jsonl"))
    assert len(read) == counts["documents"] == 20 * 6 + 5
    assert isinstance(read[0], Document)
    assert list(counts) == list(FILES)
    for name in FILES[1:]:
        assert len(read_examples(folder / f"{name}.jsonl")) == counts[name] > 0


def test_every_answer_stands_in_its_evidence_and_document(written):
    folder, _ = written
    texts = {
        document.id: document.text
        for document in read_documents(folder / "documents.jsonl")
    }
    for name in FILES[1:]:
        for example in read_examples(folder / f"{name}.jsonl"):
            assert example.answers[0] in example.evidence
            assert example.evidence in texts[example.document].split("\n")


def test_every_question_has_a_gold_passage(written, tmp_path):
    folder, _ = written
    write_passages(read_documents(folder / "documents.jsonl"), tmp_path, max_words=6)
    store = PassageStore(tmp_path)
    for name in FILES[1:]:
        for example in read_examples(folder / f"{name}.jsonl"):
            assert gold_passages(example, store)


def test_splits_share_no_country_and_leave_the_uninhabited_out(package, written):
    folder, _ = written
    split = split_countries(read_countries(package), seed=0)
    assert [len(codes) for codes in split] == [11, 2, 7]
    assert len(split.train | split.dev | split.test) == 20
    assert "zz" not in split.train | split.dev | split.test
    allowed = {**split._asdict(), "test_heldout": split.test}
    for name in FILES[1:]:
        examples = read_examples(folder / f"{name}.jsonl")
        assert {example.id.split("/")[0] for example in examples} <= allowed[name]


def test_held_out_kinds_and_wordings_are_asked_in_test_only(written):
    folder, _ = written
    asked = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()]
        for name in FILES[1:]
    }
    held = {kind.name for kind in KINDS if kind.held_out}
    assert {row["kind"] for row in asked["test_heldout"]} == {
        "airports",
        "national_colors",
    }
    for name in ("train", "dev", "test"):
        assert not held & {row["kind"] for row in asked[name]}
    for name in ("train", "dev"):
        assert not any(row["unseen_wording"] for row in asked[name])
    for name in ("test", "test_heldout"):
        unseen = [row for row in asked[name] if row["unseen_wording"]]
        assert 0 < len(unseen) < len(asked[name])
    for row in asked["test"]:
        last = KIND[row["kind"]].wordings[-1].split("{country}")[0]
        assert row["question"].startswith(last) or not row["unseen_wording"]


def test_any_prefix_is_balanced_over_the_kinds(written):
    folder, _ = written
    rows = [json.loads(line) for line in (folder / "test.jsonl").open()]
    kinds = {row["kind"] for row in rows}
    for turn in range(2):
        start = turn * len(kinds)
        assert {row["kind"] for row in rows[start : start + len(kinds)]} == kinds


def test_caps_and_seeds(package, tmp_path):
    def write(name, **settings):
        write_factbook(package, tmp_path / name, **settings)
        return [(tmp_path / name / f"{file}.jsonl").read_text() for file in FILES]

    first = write("a", seed=1)
    assert write("b", seed=1) == first
    other = write("c", seed=2)
    assert other[0] == first[0]
    assert other[1:] != first[1:]
    capped = write("d", seed=1, train_per_kind=2, dev_questions=3)
    assert len(capped[1].splitlines()) < len(first[1].splitlines())
    assert len(capped[2].splitlines()) == 3
    assert capped[3:] == first[3:]


def test_a_folder_without_countries_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the folder that"):
        read_countries(tmp_path)
    (tmp_path / "region").mkdir()
    (tmp_path / "region" / "xy.json").write_text("[]")
    with pytest.raises(ValueError, match=r"xy\.json: expected an object"):
        read_countries(tmp_path)


@pytest.mark.parametrize(
    ("kind", "text", "answers"),
    [
        ("capital", "Tripoli (Tarabulus)", ("Tripoli", "Tarabulus")),
        ("capital", "Santiago; note - Valparaiso is the seat", ("Santiago",)),
        ("capital", "La Paz (administrative capital); Sucre", ()),
        ("currency", "euros (EUR) per US dollar", ("euros", "euro", "EUR")),
        ("official_language", "French (official) 100%", ("French",)),
        ("official_language", "French (official), English (official)", ()),
        ("area", "643,801 sq km; 5", ("643,801 sq km", "643,801")),
        ("coastline", "0 km (landlocked)", ()),
        ("mean_elevation", "375 m", ("375 m", "375")),
        ("highest_point", "Mont Blanc 4,810", ("Mont Blanc",)),
        ("highest_point", "unnamed elevation 805 m", ()),
        ("lowest_point", "Rhone River delta -2 m", ("Rhone River delta",)),
        ("fertility", "1.9 children born/woman", ("1.9",)),
        ("literacy", "98.5% (2018 est.)", ("98.5%", "98.5")),
        ("adjective", "Saudi or Saudi Arabian", ()),
        ("religion", "Muslim 54%, Christian 40%", ("Muslim",)),
        ("religion", "Hindu 30%, Christian 40%", ()),
        ("religion", "Christian 40% (Catholic 45%), none 2%", ("Christian",)),
        ("ethnic_group", "other 60%, Greek 40%", ()),
        (
            "independence_date",
            "2 May 1945 (from France)",
            ("2 May 1945", "May 2, 1945"),
        ),
        ("independence_date", "2 May 1945 (from A); 3 May 1950 (from B)", ()),
        ("independence_from", "26 July 1965 (from the UK)", ("UK", "United Kingdom")),
        ("national_holiday", "National Day, 5 July (1962)", ("5 July", "July 5")),
        ("national_holiday", "National Day, 28-29 July (1821)", ()),
        ("national_symbol", "garuda (mythical bird)", ("garuda",)),
        ("national_symbol", "lion, elephant", ()),
        ("anthem", '"La Marcha" (The March)', ("La Marcha", "The March")),
        ("lyricist", "Juan Leon MERA / Antonio NEUMANE", ("Juan Leon MERA", "MERA")),
        ("lyricist", "collective / Enoch SONTONGA", ()),
        (
            "chief_of_state",
            "President Emil BIT (since 2 May 2017)",
            ("Emil BIT", "BIT"),
        ),
        ("chief_of_state", "King ED (since 2022); represented by X", ()),
        ("internet_domain", ".fr", (".fr", "fr")),
        ("time_zone", "UTC-3 (2 hours ahead)", ("UTC-3", "GMT-3")),
        ("export_partner", "USA 28%, China 7%", ("USA", "United States")),
        ("export_partner", "USA 28%, China 28%", ()),
        ("export_product", "fish, ships (2023)", ("fish",)),
        ("export_product", "fish, ships", ()),
        ("gdp", "$74.316 billion (2024 est.)", ("$74.316 billion", "74.316 billion")),
        ("largest_city", "2 million A, 1.5 million BO (capital) (2023)", ("A",)),
        ("largest_city", "9,000 BO (capital) (2018)", ()),
        ("national_colors", "red, white, blue", ("red, white, blue",)),
        ("airports", "5,297 (2025)", ("5,297",)),
        ("aircraft_prefix", "TZ, TT", ()),
    ],
)
def test_answers_are_short_and_unambiguous(kind, text, answers):
    found = KIND[kind].answers(text)
    assert found[: len(answers)] == answers
    assert bool(found) == bool(answers)


def test_the_kinds():
    assert len(KIND) == len(KINDS) >= 30
    assert sum(kind.held_out for kind in KINDS) >= 5
    for kind in KINDS:
        assert 3 <= len(set(kind.wordings)) <= 5
        assert all("{country}" in wording for wording in kind.wordings)
