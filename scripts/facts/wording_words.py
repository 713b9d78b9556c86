"""Sentences about elements, languages, scripts and currencies; see wording_places.py."""

from __future__ import annotations

CLOZE = {
    "element_symbol": (
        "The chemical symbol of {s} is",
        "In chemical formulas, {s} is written as",
        "In the periodic table, the symbol for {s} is",
    ),
    "atomic_number": (
        "The atomic number of {s} is",
        "In the periodic table, {s} has the number",
        "The number of protons in an atom of {s} is",
    ),
    "element_group": (
        "In the periodic table, {s} belongs to group",
        "The group number of the element {s} is",
        "Counting the columns of the periodic table from 1 to 18, {s} is in column",
    ),
    "element_period": (
        "In the periodic table, {s} belongs to period",
        "The period number of the element {s} is",
        "Counting the rows of the periodic table from the top, {s} is in row",
    ),
    "element_block": (
        "In the periodic table, {s} belongs to the block with the letter",
        "The letter of the periodic table block that contains {s} is",
        "Chemists name the block of the element {s} with the letter",
    ),
    "language_code": (
        "The two-letter ISO 639 code of the {s} language is",
        "In the ISO 639-1 standard, the code for {s} is",
        "Web pages written in {s} are marked with the language code",
    ),
    "native_name": (
        "Speakers of {s} call their language",
        "The {s} language calls itself",
        "In the {s} language, the name of the language is",
    ),
    "weekday_name": (
        "The {s} word for {x} is",
        "In {s}, the day called {x} in English is",
        "On a calendar printed in {s}, {x} appears as",
    ),
    "month_name": (
        "The {s} word for the month of {x} is",
        "In {s}, the month of {x} is called",
        "On a calendar printed in {s}, the month of {x} appears as",
    ),
    "script_code": (
        "The four-letter ISO 15924 code of the {s} is",
        "In the ISO 15924 standard, the code for the {s} is",
        "In language tags, the {s} is abbreviated as",
    ),
    "currency_code": (
        "The ISO 4217 code of the {s} is",
        "On currency markets, the {s} is abbreviated as",
        "The three-letter currency code of the {s} is",
    ),
}

QUESTIONS = {
    "element_symbol": (
        "What is the chemical symbol of {s}?",
        "Which symbol stands for {s} in the periodic table?",
    ),
    "atomic_number": (
        "What is the atomic number of {s}?",
        "How many protons does an atom of {s} have?",
    ),
    "element_group": (
        "Which group of the periodic table does {s} belong to?",
        "What is the group number of the element {s}?",
    ),
    "element_period": (
        "Which period of the periodic table does {s} belong to?",
        "What is the period number of the element {s}?",
    ),
    "element_block": (
        "Which block of the periodic table does {s} belong to?",
        "What is the letter of the periodic table block that contains {s}?",
    ),
    "language_code": (
        "What is the two-letter ISO 639 code of the {s} language?",
        "Which two letters stand for {s} in the ISO 639-1 standard?",
    ),
    "native_name": (
        "What do speakers of {s} call their language?",
        "What is the {s} language called by its own speakers?",
    ),
    "weekday_name": (
        "What is the {s} word for {x}?",
        "How do you say {x} in {s}?",
        "What is {x} called in {s}?",
    ),
    "month_name": (
        "What is the {s} word for the month of {x}?",
        "What do speakers of {s} call the month of {x}?",
        "What is the month of {x} called in {s}?",
    ),
    "script_code": (
        "What is the four-letter ISO 15924 code of the {s}?",
        "Which four letters stand for the {s} in the ISO 15924 standard?",
    ),
    "currency_code": (
        "What is the ISO 4217 code of the {s}?",
        "Which three letters stand for the {s} on currency markets?",
    ),
}

# {a} is the answer; the text goes on with the subject, or with the day or month in English.
REVERSED = {
    "element_symbol": "The element with the chemical symbol {a} is",
    "atomic_number": "The element with the atomic number {a} is",
    "language_code": "The language with the ISO 639-1 code {a} is",
    "native_name": 'The language whose own name is "{a}" is called in English',
    "weekday_name": 'In {s}, "{a}" means',
    "month_name": 'In {s}, "{a}" is the month of',
    "script_code": "In the ISO 15924 standard, the code {a} stands for the",
    "currency_code": "The currency with the ISO 4217 code {a} is the",
}
# The reversed prompt of these is answered by what the prompt names besides the subject.
REVERSED_TO_EXTRA = frozenset({"weekday_name", "month_name"})
