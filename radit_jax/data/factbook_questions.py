"""Kinds of questions about the World Factbook: where an answer stands, how to ask.

A kind reads one sub-field. Its ``answers`` function turns the text of that sub-field
into accepted answers, the literal one first, and returns none wherever the text is
not one short, unambiguous value: several values, qualifications, "none".
"""

import re
from collections.abc import Callable
from typing import NamedTuple

Answers = Callable[[str], tuple[str, ...]]

_MONTHS = (
    "January|February|March|April|May|June|July|August|September|October|November"
    "|December"
)
_ALIASES = {
    "USA": ("United States", "US"),
    "US": ("United States", "USA"),
    "UK": ("United Kingdom", "Britain", "Great Britain"),
    "UAE": ("United Arab Emirates",),
    "DRC": ("Democratic Republic of the Congo",),
    "S. Korea": ("South Korea",),
    "N. Korea": ("North Korea",),
    "Soviet Union": ("USSR",),
    "NZ": ("New Zealand",),
}
_TITLES = (
    "Acting|Interim|Transitional|Caretaker|Federal|State|President|Vice President|King"
    "|Queen|Emperor|Sultan|Amir|Emir|Prince|Grand Duke|Prime Minister|Premier"
    "|Chancellor|Governor|Governor-General|Chief Minister|Mayor|Supreme Leader|Captain"
    r"|Administrator|Sr\.|Brig\.|Lt\.|Maj\.|Gen\.|Col\.|Capt\.|Dr\.|Sir|Dame|General"
    "|Field Marshal|Ambassador|Taoiseach|Sheikh"
)


class Kind(NamedTuple):
    """One kind of question."""

    name: str
    section: str
    field: str
    subfield: str  # "" for the text of the field itself
    answers: Answers
    # With {country}; the last wording is asked in test only.
    wordings: tuple[str, ...]
    held_out: bool = False  # asked in test_heldout only


def _unique(*answers: str | None) -> tuple[str, ...]:
    stripped = (answer.strip() for answer in answers if answer)
    return tuple(dict.fromkeys(answer for answer in stripped if answer))


def _short(name: str, words: int = 5) -> bool:
    """Whether a name is one short value and no alternative, list or negation."""
    vague = r"\b(or|and|none|unnamed|note|unknown|NA|various|same as)\b|[;/\[\]:\d]"
    return 0 < len(name.split()) <= words and not re.search(vague, name)


def _name(text: str) -> tuple[str, ...]:
    """``Tripoli (Tarabulus)``: the name, and the one in brackets as an alias."""
    match = re.fullmatch(r"([^();,]+?)(?: \(([^();]+)\))?(?:; note\b.*)?", text)
    if match is None or not _short(match[1]):
        return ()
    inside = match[2] or ""
    if re.search(r"capital|de facto|claimed|seat", inside):
        return ()
    alias = inside if _short(inside) else None
    return _unique(match[1], alias, *_ALIASES.get(match[1], ()))


def _capital(text: str) -> tuple[str, ...]:
    if text == "Washington, DC":
        return (text, "Washington", "Washington, D.C.")
    return _name(text)


def _plain_name(text: str) -> tuple[str, ...]:
    return _unique(text) if _short(text, 8) and not re.search("[(),]", text) else ()


def _quantity(unit: str, *spelled: str) -> Answers:
    """``643,801 sq km``: the number with its unit, without, and with a spelling."""
    pattern = re.compile(rf"(-?\d[\d,.]*) {re.escape(unit)}(?!\w)")

    def answers(text: str) -> tuple[str, ...]:
        match = pattern.match(text)
        if match is None or float(match[1].replace(",", "")) == 0:
            return ()
        return _unique(match[0], match[1], *(f"{match[1]} {word}" for word in spelled))

    return answers


def _number(text: str) -> tuple[str, ...]:
    match = re.match(r"(\d[\d,.]*(?: million| billion)?)(?= \(|$)", text)
    return _unique(match[1]) if match and match[1] != "0" else ()


def _rate(text: str) -> tuple[str, ...]:
    """``1.9 children born/woman``: the bare number."""
    match = re.match(r"\d[\d.]*(?= [a-z])", text)
    return _unique(match[0]) if match else ()


def _percent(text: str) -> tuple[str, ...]:
    match = re.match(r"(-?\d[\d.]*)%", text)
    return _unique(match[0], match[1], f"{match[1]} percent") if match else ()


def _dollars(text: str) -> tuple[str, ...]:
    match = re.match(r"\$([\d.,]+ (?:million|billion|trillion))", text)
    return _unique(match[0], match[1], f"{match[1]} dollars") if match else ()


def _both_orders(day: str, month: str, year: str = "") -> tuple[str, ...]:
    if year:
        return (f"{day} {month} {year}", f"{month} {day}, {year}")
    return (f"{day} {month}", f"{month} {day}")


def _date(text: str) -> tuple[str, ...]:
    match = re.match(rf"(\d{{1,2}}) ({_MONTHS}) (\d{{4}})\b", text)
    return () if match is None or ";" in text else _both_orders(*match.groups())


def _freed_from(text: str) -> tuple[str, ...]:
    match = re.fullmatch(r"\d[^();]*\d{4} \(from (?:the )?([^();,]+)\)", text)
    if match is None or not _short(match[1], 4):
        return ()
    return _unique(match[1], *_ALIASES.get(match[1], ()))


def _holiday(text: str) -> tuple[str, ...]:
    dates = re.findall(rf"(?<![\d-])(\d{{1,2}}) ({_MONTHS})\b", text)
    return () if len(dates) != 1 or ";" in text else _both_orders(*dates[0])


def _currency(text: str) -> tuple[str, ...]:
    match = re.match(r"([^();/]+) \(([A-Z]{3})\) per US dollar", text)
    if match is None or re.search(r"\bor\b", match[1]):
        return ()
    name, code = match.groups()
    last = name.split()[-1]
    one = re.sub(r"(?<=[^s])s$", "", name)
    return _unique(name, one, last, one.split()[-1], code)


def _official_language(text: str) -> tuple[str, ...]:
    share = r"(?:\d[\d.]*% )?"
    found = re.findall(
        rf"(?:^|[,;] )([A-Z][A-Za-z' -]+?) {share}\(official(?: only)?\)", text
    )
    # A second mention of "official" is a second language, or a qualification.
    return _unique(*found) if len(found) == 1 and text.count("official") == 1 else ()


def _point(text: str) -> tuple[str, ...]:
    """``Loma Mansa (Bintimani) 1,948 m``: the name of a point with its elevation."""
    match = re.fullmatch(r"(.+?) -?\d[\d,.]*(?: m)?", text)
    if match is None or "," in match[1]:
        return ()
    answers = _name(match[1])
    if answers and " on " in answers[0]:
        answers = _unique(*answers, answers[0].split(" on ")[0])
    return answers


def _symbol(text: str) -> tuple[str, ...]:
    answers = _name(text)
    return answers[:1]  # what stands in brackets describes: "garuda (mythical bird)"


def _title(text: str) -> tuple[str, ...]:
    match = re.fullmatch(r'"([^"]+)"(?: \(([^()"]+)\))?', text)
    return _unique(*match.groups()) if match else ()


def _surname(name: str) -> str | None:
    """The Factbook prints the family name in capitals."""
    upper = [word for word in name.split() if len(word) > 1 and word.isupper()]
    return " ".join(upper) or None


def _lyricist(text: str) -> tuple[str, ...]:
    match = re.fullmatch(r"([^/;\[\](),]+) / [^/;]+", text)
    if match is None or not _short(match[1], 6) or not _surname(match[1]):
        return ()
    return _unique(match[1], _surname(match[1]))


def _person(text: str) -> tuple[str, ...]:
    """``President Emmanuel MACRON (since 14 May 2017)``: the name, the surname."""
    match = re.fullmatch(r"([^();,]+) \(since [^()]+\)", text)
    if match is None:
        return ()
    name = re.sub(rf"^(?:(?:{_TITLES}) )+", "", match[1])
    surname = _surname(name)
    office = rf"\b(?:of|the|Commission|Council|Leader|Chair|Minister|{_TITLES})(?!\w)"
    if surname is None or not _short(name, 6) or re.search(office, name):
        return ()
    return _unique(name, surname, match[1])


def _largest_share(text: str) -> tuple[str, ...]:
    """``Muslim 54%, Christian 40%, ...``: the name with the largest percentage."""
    match = re.match(r"([^\d,;:%(]+?) (\d[\d.]*)%", text)
    # Groups in brackets are parts of the one before, not rivals of it.
    outer = re.sub(r"\([^()]*\)", "", text)
    shares = [float(share) for share in re.findall(r"(\d+(?:\.\d+)?)%", outer)]
    if match is None or not _short(match[1], 4) or "predominantly" in text:
        return ()
    top = float(match[2])
    if (
        re.match("other|none|unspecified", match[1])
        or max(shares[1:], default=0) >= top
    ):
        return ()
    return _unique(match[1], *_ALIASES.get(match[1], ()))


def _first_item(text: str) -> tuple[str, ...]:
    # Only lists with a year are ranked, by value or by weight.
    match = re.match(r"([^,;()]+),.*\(\d{4}\)$", text)
    if match is None or not re.fullmatch(r"[A-Za-z' /-]+", match[1]):
        return ()
    return _unique(match[1]) if len(match[1].split()) <= 4 else ()


def _largest_city(text: str) -> tuple[str, ...]:
    size = r"\d[\d.,]*(?: million)?"
    match = re.match(rf"{size} ([^\d(,]+?)(?: \(capital\))?(?:, {size} |$| \(\d)", text)
    # Where only the capital is listed, a larger city may not be.
    if match is None or len(re.findall(rf"{size} [A-Z]", text)) < 2:
        return ()
    return _unique(match[1], match[1].title())


def _colors(text: str) -> tuple[str, ...]:
    if not re.fullmatch(r"[a-z -]+(?:, [a-z -]+){1,4}", text):
        return ()
    *others, last = text.split(", ")
    return _unique(text, f"{', '.join(others)} and {last}")


def _domain(text: str) -> tuple[str, ...]:
    match = re.fullmatch(r"\.([a-z]{2})", text)
    return (match[0], match[1]) if match else ()


def _time_zone(text: str) -> tuple[str, ...]:
    match = re.match(r"UTC ?[+-]?\d[\d.:]*(?= \()", text)
    return _unique(match[0], match[0].replace("UTC", "GMT")) if match else ()


def _prefix(text: str) -> tuple[str, ...]:
    return (text,) if re.fullmatch(r"[A-Z0-9]{1,3}(?:-[A-Z])?", text) else ()


_GEO, _PEOPLE, _GOV = "Geography", "People and Society", "Government"
_ECO, _COM, _TRANS = "Economy", "Communications", "Transportation"

KINDS = (
    Kind("capital", _GOV, "Capital", "name", _capital, (
        "What is the capital of {country}?",
        "Which city is the capital of {country}?",
        "Name the capital city of {country}.",
        "Where does the government of {country} have its seat?",
    )),
    Kind("currency", _ECO, "Exchange rates", "Currency", _currency, (
        "What is the currency of {country}?",
        "Which currency is used in {country}?",
        "What money is exchanged against the US dollar in {country}?",
        "What do people pay with in {country}?",
    )),
    Kind("official_language", _PEOPLE, "Languages", "Languages", _official_language, (
        "What is the official language of {country}?",
        "Which language is official in {country}?",
        "Name the official language of {country}.",
        "In which language does the state of {country} officially communicate?",
    )),
    Kind("area", _GEO, "Area", "total", _quantity("sq km", "square kilometers"), (
        "What is the total area of {country}?",
        "How large is {country} in square kilometers?",
        "How many square kilometers does {country} cover?",
        "How big is {country}?",
    )),
    Kind("coastline", _GEO, "Coastline", "", _quantity("km", "kilometers"), (
        "How long is the coastline of {country}?",
        "What is the length of the coast of {country}?",
        "How many kilometers of coastline does {country} have?",
        "How many kilometers of shore does {country} have along the sea?",
    )),
    Kind("land_borders", _GEO, "Land boundaries", "total",
         _quantity("km", "kilometers"), (
        "How long are the land borders of {country} in total?",
        "What is the total length of the land boundaries of {country}?",
        "How many kilometers of land border does {country} have?",
        "How long is the frontier of {country} with all its neighbors on land?",
    )),
    Kind("highest_point", _GEO, "Elevation", "highest point", _point, (
        "What is the highest point of {country}?",
        "Which is the highest place in {country}?",
        "Name the highest elevation in {country}.",
        "What is the top elevation of {country} called?",
    )),
    Kind("lowest_point", _GEO, "Elevation", "lowest point", _point, (
        "What is the lowest point of {country}?",
        "Which is the lowest place in {country}?",
        "Where is the lowest elevation of {country}?",
        "Where does the land of {country} lie deepest?",
    )),
    Kind("mean_elevation", _GEO, "Elevation", "mean elevation",
         _quantity("m", "meters"), (
        "What is the mean elevation of {country}?",
        "How high above the sea is {country} on average?",
        "What is the average elevation of {country} in meters?",
        "How many meters above sea level does {country} lie on average?",
    )),
    Kind("population", _PEOPLE, "Population", "total", _number, (
        "What is the population of {country}?",
        "How many people live in {country}?",
        "How many inhabitants does {country} have?",
        "What is the number of residents of {country}?",
    )),
    Kind("median_age", _PEOPLE, "Median age", "total", _quantity("years"), (
        "What is the median age in {country}?",
        "What is the median age of the people of {country}?",
        "At what age is half of the population of {country} younger?",
        "How old is the middle person of {country} when all are ranked by age?",
    )),
    Kind("life_expectancy", _PEOPLE, "Life expectancy at birth", "total population",
         _quantity("years"), (
        "What is the life expectancy at birth in {country}?",
        "How long can a newborn expect to live in {country}?",
        "What is the average life expectancy in {country}?",
        "To what age do people live on average in {country}?",
    )),
    Kind("fertility", _PEOPLE, "Total fertility rate", "", _rate, (
        "What is the total fertility rate of {country}?",
        "How many children are born per woman in {country}?",
        "How many children does a woman in {country} have on average?",
        "What is the average number of births over the life of a woman in {country}?",
    )),
    Kind("literacy", _PEOPLE, "Literacy", "total population", _percent, (
        "What is the literacy rate of {country}?",
        "What share of the population of {country} is literate?",
        "What percentage of people in {country} can read and write?",
        "Which part of the people of {country} is able to read?",
    )),
    Kind("adjective", _PEOPLE, "Nationality", "adjective", _plain_name, (
        "What is the adjective for the nationality of {country}?",
        "Which adjective describes something from {country}?",
        "What adjective denotes a person from {country}?",
        "How does one call a product that comes from {country}, in one word?",
    )),
    Kind("religion", _PEOPLE, "Religions", "", _largest_share, (
        "What is the largest religious group in {country}?",
        "Which religion has the most followers in {country}?",
        "What is the main religion of {country}?",
        "Which faith do most believers in {country} belong to?",
    )),
    Kind("ethnic_group", _PEOPLE, "Ethnic groups", "", _largest_share, (
        "What is the largest ethnic group in {country}?",
        "Which ethnic group makes up the largest share of the people of {country}?",
        "Name the most numerous ethnic group of {country}.",
        "What ethnicity do most people in {country} have?",
    )),
    Kind("independence_date", _GOV, "Independence", "", _date, (
        "When did {country} become independent?",
        "On what date did {country} gain independence?",
        "What is the date of independence of {country}?",
        "On which day did {country} become a sovereign state?",
    )),
    Kind("independence_from", _GOV, "Independence", "", _freed_from, (
        "From which country did {country} gain independence?",
        "From whom did {country} become independent?",
        "Which power did {country} become independent of?",
        "Who ruled {country} until it became sovereign?",
    )),
    Kind("national_holiday", _GOV, "National holiday", "", _holiday, (
        "On which date is the national holiday of {country}?",
        "When does {country} celebrate its national holiday?",
        "On what day of the year is the national day of {country}?",
        "Which date do the people of {country} celebrate as their national day?",
    )),
    Kind("national_symbol", _GOV, "National symbol(s)", "", _symbol, (
        "What is the national symbol of {country}?",
        "Which symbol stands for {country}?",
        "Name the national symbol of {country}.",
        "What is the national emblem that represents {country}?",
    )),
    Kind("anthem", _GOV, "National anthem(s)", "title", _title, (
        "What is the title of the national anthem of {country}?",
        "What is the national anthem of {country} called?",
        "Name the national anthem of {country}.",
        "Which song is played as the anthem of {country}?",
    )),
    Kind("lyricist", _GOV, "National anthem(s)", "lyrics/music", _lyricist, (
        "Who wrote the lyrics of the national anthem of {country}?",
        "Who is the author of the words of the anthem of {country}?",
        "Which poet wrote the text of the national anthem of {country}?",
        "By whom are the words that are sung to the anthem of {country}?",
    )),
    Kind("government_type", _GOV, "Government type", "", _plain_name, (
        "What type of government does {country} have?",
        "What is the form of government of {country}?",
        "How is {country} governed?",
        "What kind of state is {country}?",
    )),
    Kind("internet_domain", _COM, "Internet country code", "", _domain, (
        "What is the internet country code of {country}?",
        "What is the top-level domain of {country}?",
        "With which code do internet addresses of {country} end?",
        "How do the web addresses of {country} end?",
    )),
    Kind("internet_users", _COM, "Internet users", "percent of population", _percent, (
        "What percentage of the population of {country} uses the internet?",
        "What share of people in {country} are internet users?",
        "What percentage of the inhabitants of {country} go online?",
        "How widespread is internet use in {country}?",
    )),
    Kind("legislature", _GOV, "Legislative branch", "legislature name", _name, (
        "What is the legislature of {country} called?",
        "What is the name of the legislative body of {country}?",
        "Name the legislature of {country}.",
        "What is the name of the body that makes the laws of {country}?",
    )),
    Kind("chief_of_state", _GOV, "Executive branch", "chief of state", _person, (
        "Who is the chief of state of {country}?",
        "Who is the head of state of {country}?",
        "Name the chief of state of {country}.",
        "Who represents {country} as its highest officeholder?",
    )),
    Kind("head_of_government", _GOV, "Executive branch", "head of government",
         _person, (
        "Who is the head of government of {country}?",
        "Who leads the government of {country}?",
        "Name the head of government of {country}.",
        "Who is in charge of the cabinet of {country}?",
    )),
    Kind("time_zone", _GOV, "Capital", "time difference", _time_zone, (
        "What is the time difference between the capital of {country} and UTC?",
        "In which time zone is the capital of {country}?",
        "Which UTC offset applies in the capital of {country}?",
        "How do clocks in the capital of {country} differ from universal time?",
    )),
    Kind("full_name", _GOV, "Country name", "conventional long form", _plain_name, (
        "What is the conventional long form of the name of {country}?",
        "What is the full official name of {country}?",
        "What is {country} officially called?",
        "Under which formal name is {country} known?",
    )),
    Kind("local_name", _GOV, "Country name", "local short form", _plain_name, (
        "What is the local short form of the name of {country}?",
        "What is {country} called locally?",
        "What do its own people call {country}?",
        "What is the name of {country} in its own language?",
    )),
    Kind("export_partner", _ECO, "Exports - partners", "", _largest_share, (
        "Which country is the largest export partner of {country}?",
        "Where do most exports of {country} go?",
        "Which country buys the largest share of the exports of {country}?",
        "Who is the best customer of goods from {country}?",
    )),
    Kind("import_partner", _ECO, "Imports - partners", "", _largest_share, (
        "Which country is the largest import partner of {country}?",
        "From which country does {country} import the most?",
        "Where do most imports of {country} come from?",
        "Who is the main supplier of foreign goods to {country}?",
    )),
    Kind("export_product", _ECO, "Exports - commodities", "", _first_item, (
        "What is the top export commodity of {country}?",
        "Which product does {country} export the most?",
        "What is the most valuable export of {country}?",
        "Which good does {country} sell abroad for the most money?",
    )),
    Kind("farm_product", _ECO, "Agricultural products", "", _first_item, (
        "What is the top agricultural product of {country}?",
        "Which agricultural product does {country} produce the most of?",
        "What do farmers in {country} produce the most by weight?",
        "What is the biggest harvest of {country}?",
    )),
    Kind("gdp", _ECO, "GDP (official exchange rate)", "", _dollars, (
        "What is the GDP of {country} at the official exchange rate?",
        "How large is the gross domestic product of {country} at exchange rates?",
        "What is the GDP of {country} in US dollars at the official exchange rate?",
        "How many dollars is the yearly output of {country} worth at exchange rates?",
    )),
    Kind("largest_city", _PEOPLE, "Major urban areas - population", "", _largest_city, (
        "What is the largest city of {country}?",
        "Which urban area of {country} has the most inhabitants?",
        "In which city of {country} do the most people live?",
    ), held_out=True),
    Kind("ambassador", _GOV, "Diplomatic representation in the US",
         "chief of mission", _person, (
        "Who is the ambassador of {country} to the United States?",
        "Who heads the diplomatic mission of {country} in the US?",
        "Who represents {country} in Washington?",
    ), held_out=True),
    Kind("national_colors", _GOV, "National color(s)", "", _colors, (
        "What are the national colors of {country}?",
        "Which colors are the national colors of {country}?",
        "Which colors stand for {country}?",
    ), held_out=True),
    Kind("former_name", _GOV, "Country name", "former", _plain_name, (
        "What was the former name of {country}?",
        "What was {country} called before?",
        "Under which name was {country} once known?",
    ), held_out=True),
    Kind("heritage_sites", _GOV, "National heritage", "total World Heritage Sites",
         _number, (
        "How many World Heritage Sites are there in {country}?",
        "What is the number of World Heritage Sites in {country}?",
        "How many places of {country} are on the World Heritage list?",
    ), held_out=True),
    Kind("airports", _TRANS, "Airports", "", _number, (
        "How many airports are there in {country}?",
        "What is the number of airports in {country}?",
        "In how many places can planes land in {country}?",
    ), held_out=True),
    Kind("aircraft_prefix", _TRANS, "Civil aircraft registration country code prefix",
         "", _prefix, (
        "What is the registration prefix of civil aircraft of {country}?",
        "With which letters do aircraft registrations of {country} begin?",
        "Which code is painted on airplanes from {country}?",
    ), held_out=True),
    Kind("unemployment", _ECO, "Unemployment rate", "Unemployment rate 2024",
         _percent, (
        "What was the unemployment rate of {country} in 2024?",
        "What percentage of the labor force of {country} was unemployed in 2024?",
        "What percentage of workers in {country} had no job in 2024?",
    ), held_out=True),
    Kind("alcohol", _PEOPLE, "Alcohol consumption per capita", "total", _rate, (
        "How many liters of pure alcohol are consumed per person in {country}?",
        "What is the alcohol consumption per capita in {country}, in liters?",
        "How much pure alcohol does a person in {country} drink?",
    ), held_out=True),
)  # fmt: skip
