"""Facts about languages, scripts and currencies: Unicode CLDR, as Babel ships it."""

from __future__ import annotations

import unicodedata

from babel.core import get_global

from facts.cldr import calendar_words, languages_with_data, own_data
from facts.entry import Entry, codes, folded, in_order

FAMOUS_LANGUAGES = in_order(
    "en es fr de it ru zh ja pt ar ko nl hi la el he sv pl tr da fi no vi th cs hu fa cy id uk ga"
)
FAMOUS_CURRENCIES = in_order(
    "USD GBP JPY EUR CNY INR CAD AUD CHF RUB MXN BRL SEK KRW ZAR NOK DKK PLN NZD TRY ILS THB HUF"
    " SGD EGP IDR NGN KES ARS VND"
)
FAMOUS_SCRIPTS = in_order(
    "Latn Grek Cyrl Arab Hebr Deva Hang Hira Kana Thai Armn Tibt Goth Runr Mong Taml Egyp Brai"
    " Ethi Geor Copt Phnx Khmr Cher"
)

# Not a language's usual English name, a deprecated code, or one of two codes for one language.
NO_LANGUAGE = codes("sh ii kl ie fy tw fil cu no nb nn za")
LANGUAGE_NAMES = {"bn": "Bengali"}
# Written in Latin letters, with days and months that CLDR's contributors confirmed.
CALENDAR_LANGUAGES = in_order(
    "af sq eu br ca cs da nl et fo fi fr gl de hu is id ga it lv lt lb ms mt no pl pt ro gd sk"
    " sl es sw sv tr vi cy hr so rm oc sc eo ast fur hsb fy mi uz mg az"
)
# Malay and Indonesian each know the other's word for Sunday.
OTHER_WORDS = {"id": ("Ahad",), "ms": ("Minggu",)}
# CLDR's stand-alone forms have a capital that running text does not.
LOWER_CASE = frozenset({"lv", "eo", "uz"})
# Short for "language of ...", another variety's name, or with a variety in brackets.
NO_NATIVE_NAME = codes("az ff id jv ku lu ms om rw so gn")
# Not a script of its own, or named after something else in CLDR.
NO_SCRIPT = codes(
    "Aran Cirt Teng Sara Afak Hanb Hans Hant Hrkt Jamo Jpan Kore Latf Latg Qaag Syre Syrj Syrn"
    " Zinh Zmth Zsye Zsym Zxxx Zyyy Zzzz Moon Visp Inds Geok Cyrs Kpel Loma Maya Wole Roro Blis"
    " Cans Xsux Lisu Orya Beng Mymr Lana Hani Lepc Phlv Dupl Brai Sgnw Egyd Egyh Rohg Plrd Mtei"
    " Hluw Kits Egyp"
)
# Accounting units, metals, funds, and currencies on their way out.
NO_CURRENCY = codes(
    "BGN BOV CHE CHW CLF CNH COU CUC MXV SLL USN UYI UYW VED XAG XAU XBA XBB XBC XBD XDR XPD XPT"
    " XSU XTS XUA XXX ANG ZWL ZWG XCG SLE VES SYP"
)
CURRENCY_NAMES = {
    "AFN": "Afghan afghani",
    "GYD": "Guyanese dollar",
    "KGS": "Kyrgyzstani som",
    "STN": "São Tomé and Príncipe dobra",
    "TTD": "Trinidad and Tobago dollar",
}


def famous(code: str, order: tuple[str, ...]) -> float:
    """The best known highest; all others alike."""
    return -float(order.index(code)) if code in order else -float(len(order))


def is_latin(text: str) -> bool:
    """Whether all letters are Latin ones."""
    return all("LATIN" in unicodedata.name(letter, "") for letter in text if letter.isalpha())


def language_names() -> dict[str, str]:
    """ISO 639-1 code to the language's English name."""
    names = own_data("en")["languages"]
    return {
        code: LANGUAGE_NAMES.get(code, names[code])
        for code in sorted(names)
        if len(code) == 2 and code not in NO_LANGUAGE
    }


def language_entries() -> list[Entry]:
    """The code of a language and what its speakers call it."""
    entries = []
    for code, name in language_names().items():
        fame = famous(code, FAMOUS_LANGUAGES)
        entries.append(Entry("language_code", code, name, code, fame=fame, reversible=True))
        usable = code in languages_with_data() and code not in NO_NATIVE_NAME
        own = own_data(code).get("languages", {}).get(code, "") if usable else ""
        if own and is_latin(own) and folded(own) != folded(name):
            entries.append(Entry("native_name", code, name, own, fame=fame, reversible=True))
    return entries


def calendar_entries() -> list[Entry]:
    """Days of the week and months in other languages, where the word is not the English one."""
    names = own_data("en")["languages"]
    entries = []
    for relation, kind in (("weekday_name", "days"), ("month_name", "months")):
        wanted = calendar_words("en", kind)
        for code in CALENDAR_LANGUAGES:
            words = calendar_words(code, kind)
            for number in sorted(wanted):
                word, name = words[number], wanted[number]
                if code in LOWER_CASE:
                    word = word.lower()
                if folded(word) == folded(name):
                    continue
                entries.append(
                    Entry(
                        relation,
                        f"{code}-{number}",
                        names[code],
                        word,
                        extra=name,
                        fame=famous(code, FAMOUS_LANGUAGES),
                        others=OTHER_WORDS.get(code, ()),
                        reversible=True,
                    )
                )
    return entries


def script_entries() -> list[Entry]:
    """The four-letter code of a script."""
    return [
        Entry(
            "script_code",
            code,
            f"{name} script",
            code,
            fame=famous(code, FAMOUS_SCRIPTS),
            reversible=True,
        )
        for code, name in sorted(own_data("en")["scripts"].items())
        if code not in NO_SCRIPT
    ]


def currency_entries() -> list[Entry]:
    """The three-letter code of a currency that is legal tender today."""
    today = {
        code
        for uses in get_global("territory_currencies").values()
        for code, _, end, tender in uses
        if end is None and tender
    }
    plural = own_data("en")["currency_names_plural"]
    return [
        Entry(
            "currency_code",
            code,
            CURRENCY_NAMES.get(code, plural[code]["one"]),
            code,
            fame=famous(code, FAMOUS_CURRENCIES),
            reversible=True,
        )
        for code in sorted(today - NO_CURRENCY)
    ]
