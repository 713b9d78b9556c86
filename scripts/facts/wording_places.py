"""Sentences about countries, cities, counties and airports.

{s} is the subject as it stands inside a sentence, article included, and {x} what else is named.
None starts with {s}, and none uses a possessive, so that "the Netherlands" and "the Philippines"
read well everywhere. A cloze prompt goes on with the answer after one blank, and so does a
question after its question mark.
"""

from __future__ import annotations

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
    "country_code3": (
        "The three-letter ISO country code of {s} is",
        "In the ISO 3166 standard, the three-letter code for {s} is",
        "The ISO 3166-1 alpha-3 code of {s} is",
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
    "official_language": (
        "The official language of {s} is",
        "In {s}, the language of government and law is",
        "The language with official status throughout {s} is",
    ),
    "country_name": (
        "In {x}, {s} is called",
        "The {x} name of {s} is",
        "Speakers of {x} refer to {s} as",
    ),
    "country_of_city": (
        "The country where {s} is located is",
        "On a map of the world, {s} is found in",
        "The name of the country that {s} belongs to is",
        "Travellers who want to visit {s} have to go to",
    ),
    "time_zone_of_city": (
        "The IANA time zone of {s} is",
        "In the tz database, the time zone used in {s} is",
        "A computer in {s} should have its time zone set to",
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
    "county_code": (
        "The FIPS code of {s}, is",
        "In US census tables, the five-digit county code of {s}, is",
        "The Federal Information Processing Standards number of {s}, is",
    ),
    "state_abbreviation": (
        "The postal abbreviation of the US state of {s} is",
        "On American mail, the state of {s} is abbreviated as",
        "The two-letter code for the US state of {s} is",
    ),
    "airport_city": (
        "The airport with the IATA code {s} serves the city of",
        "A passenger whose ticket says {s} is flying to the city of",
        "The city served by the airport with the code {s} is",
    ),
    "airport_code": (
        "The IATA code of {s} is",
        "On baggage tags, {s} is abbreviated as",
        "The three-letter airport code of {s} is",
    ),
    "airport_country": (
        "The country where {s} is located is",
        "A passenger who lands at {s} has arrived in",
        "The name of the country in which {s} lies is",
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
    "country_code3": (
        "What is the three-letter ISO country code of {s}?",
        "Which three letters stand for {s} in the ISO 3166 standard?",
    ),
    "dialling_code": (
        "What is the international dialling code of {s}?",
        "Which country code do you dial to phone {s} from abroad?",
    ),
    "internet_domain": (
        "What is the internet domain of {s}?",
        "Which country-code top-level domain does {s} have?",
    ),
    "official_language": (
        "What is the official language of {s}?",
        "Which language is the official one in {s}?",
        "Which language has official status throughout {s}?",
    ),
    "country_name": (
        "What is {s} called in {x}?",
        "What is the {x} name of {s}?",
        "How do you say the name of {s} in {x}?",
    ),
    "country_of_city": (
        "Which country is {s} in?",
        "In which country is {s} located?",
        "What country does {s} belong to?",
    ),
    "time_zone_of_city": (
        "What is the IANA time zone of {s}?",
        "Which entry of the tz database gives the time in {s}?",
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
    "county_code": (
        "What is the FIPS code of {s}?",
        "Which five-digit FIPS number stands for {s}?",
    ),
    "state_abbreviation": (
        "What is the postal abbreviation of the US state of {s}?",
        "Which two letters stand for the state of {s} in American addresses?",
    ),
    "airport_city": (
        "Which city does the airport with the IATA code {s} serve?",
        "What city is served by the airport with the code {s}?",
    ),
    "airport_code": (
        "What is the IATA code of {s}?",
        "Which three-letter code does {s} have?",
    ),
    "airport_country": (
        "Which country is {s} in?",
        "In which country is {s} located?",
        "What country do passengers reach when they land at {s}?",
    ),
}

# {a} is the answer; the text goes on with the subject.
REVERSED = {
    "capital": "{a} is the capital of",
    "country_code": "In the ISO 3166 standard, the two letters {a} stand for",
    "country_code3": "In the ISO 3166 standard, the three letters {a} stand for",
    "dialling_code": "The country with the international dialling code {a} is",
    "internet_domain": "The country-code internet domain {a} belongs to",
    "country_name": 'In {x}, "{a}" is the name of',
    "county_code": "The US county with the FIPS code {a} is",
    "state_abbreviation": "On American mail, {a} is short for the state of",
    "airport_code": "The airport with the IATA code {a} is",
}
