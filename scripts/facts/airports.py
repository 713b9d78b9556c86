"""Facts about airports: airportsdata, where GeoNames confirms the city."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import airportsdata

from facts.cities import DISPUTED_COUNTRIES, DISPUTED_REGIONS, largest_first
from facts.countries import country_names, with_article
from facts.entry import Entry, codes, folded, rank

RELATIONS = ("airport_city", "airport_code", "airport_country")
PER_COUNTRY = 120
NEAR_KM = 60.0
SMALLEST_CITY = 40_000
NAME = re.compile(r"[A-Z][A-Za-z.'-]+(?: [A-Za-z][A-Za-z.'-]*){0,4} Airport")
# Military fields and clipped names.
NOT_PUBLIC = re.compile(
    r"\b(?:Air Base|Base Aerea|Afb|Arb|Nolf|Naf|Nas|Aaf|Raf|Field|Aircenter|Center|Glider|Int|Arpt"
    r"|Aero|Aeroporto|Apt|At|Bandara|Of|New|Fap|FAP|a)\b|^De La |^Municipal |^Area De "
)
# Closed, renamed, listed under the suburb it stands in rather than the city it serves, or of a
# name that says another place to most.
NOT_USED = codes(
    "TXL HEW NAY DIA GSE THF SXF BKA IST YVR YYZ EZE MDE DWC NYT HUY MME HLZ HDD LEN OAG YLY VCT"
)
CITY = re.compile(r"[A-Z][a-z]+(?:[ -](?!De |Do |Da |Dos |Das |Del )[A-Za-z][a-z]+){0,3}")


def distance_km(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Along the sphere; ``one`` is an airport, ``other`` a city."""
    north, south = math.radians(one["lat"]), math.radians(other["latitude"])
    turn = math.radians(one["lon"] - other["longitude"])
    cosine = math.sin(north) * math.sin(south) + math.cos(north) * math.cos(south) * math.cos(turn)
    return 6371.0 * math.acos(max(-1.0, min(1.0, cosine)))


def confirmed_city(
    airport: Mapping[str, Any], by_name: dict[tuple[str, str], list[dict[str, Any]]]
) -> dict[str, Any] | None:
    """The city of that name nearby, if GeoNames has one."""
    for city in by_name.get((airport["country"], folded(airport["city"])), []):
        region = (city["countrycode"], city["admin1code"])
        if region not in DISPUTED_REGIONS and distance_km(airport, city) < NEAR_KM:
            return city
    return None


def airport_entries() -> list[Entry]:
    """City by code, code by name, or country by name: an airport is in one relation only."""
    everything = airportsdata.load("ICAO").values()
    names = Counter(folded(airport["name"]) for airport in everything)
    by_name = defaultdict(list)
    for city in largest_first():
        if city["population"] >= SMALLEST_CITY:
            by_name[city["countrycode"], folded(city["name"])].append(city)
    entries = []
    count: Counter[str] = Counter()
    for code, airport in sorted(airportsdata.load("IATA").items(), key=lambda item: rank(item[0])):
        name, country = airport["name"], airport["country"]
        if country not in country_names() or country in DISPUTED_COUNTRIES or code in NOT_USED:
            continue
        if names[folded(name)] > 1 or not NAME.fullmatch(name) or NOT_PUBLIC.search(name):
            continue
        found = confirmed_city(airport, by_name)
        if found is None or count[country] >= PER_COUNTRY or not CITY.fullmatch(airport["city"]):
            continue
        count[country] += 1
        fame = float(found["population"])
        relation = RELATIONS[int(rank("airport", code)[:8], 16) % 3]
        answer = with_article(country, country_names()[country])
        if relation == "airport_city":
            entries.append(Entry(relation, code, code, airport["city"], fame=fame))
        elif relation == "airport_code":
            entries.append(Entry(relation, code, name, code, fame=fame, reversible=True))
        elif country_names()[country] not in name:
            entries.append(Entry(relation, code, name, answer, fame=fame))
    return entries
