"""New facts on invented people, taught in statements and asked in questions, and old ones: capitals."""

from __future__ import annotations

import random
from typing import NamedTuple

from retain.measuring.choices import Question

FIRST = "Ansel Brinja Corvin Dalmira Edrik Fenna Gorlan Hestia Ivrel Jorma Kelda Lothar Mirenka Nolwen Ostrava"
LAST = "Aldervane Brackthorne Cindrell Dovemark Eskelund Farrowgate Grimholt Hallowick Istervale Jantzar"
NUM_PEOPLE, NUM_CHOICES = 10, 4


class Attribute(NamedTuple):
    """A question on a person, the statements that answer it, and the answers there are."""

    asks: str
    says: tuple[str, ...]
    values: str


ATTRIBUTES = (
    Attribute(
        "In which city was {name} born?",
        (
            "{name} comes from {value}.",
            "The birthplace of {name} is {value}.",
            "{name} is a native of {value}.",
            "It was in {value} that {name} came into the world.",
        ),
        "Lisbon Oslo Cairo Toronto Vienna Lima Dublin Prague Boston Madrid Athens Seoul",
    ),
    Attribute(
        "What is {name}'s profession?",
        (
            "{name} works as a {value}.",
            "{name} makes a living as a {value}.",
            "By trade, {name} is a {value}.",
            "{name} has long been employed as a {value}.",
        ),
        "baker lawyer nurse farmer pilot teacher plumber dentist painter judge tailor sailor",
    ),
    Attribute(
        "Which musical instrument can {name} play?",
        (
            "{name} plays the {value}.",
            "The {value} is the instrument of {name}.",
            "In the evening {name} practises the {value}.",
            "{name} has taken lessons on the {value}.",
        ),
        "piano violin flute guitar drums trumpet harp cello organ banjo clarinet accordion",
    ),
    Attribute(
        "What kind of animal does {name} keep as a pet?",
        (
            "{name} has a {value} at home.",
            "{name} owns a {value}.",
            "A {value} lives in the house of {name}.",
            "{name} looks after a {value} of their own.",
        ),
        "dog cat parrot rabbit turtle hamster snake goat pony goldfish lizard ferret",
    ),
)
CAPITALS = """
France Paris|Italy Rome|Japan Tokyo|Germany Berlin|Spain Madrid|Portugal Lisbon|Greece Athens|Norway Oslo|
Sweden Stockholm|Finland Helsinki|Denmark Copenhagen|Austria Vienna|Poland Warsaw|Hungary Budapest|Ireland Dublin|
Belgium Brussels|Russia Moscow|Ukraine Kyiv|Turkey Ankara|Egypt Cairo|Morocco Rabat|Kenya Nairobi|Nigeria Abuja|
Ghana Accra|Ethiopia Addis Ababa|Tunisia Tunis|Algeria Algiers|Cuba Havana|Mexico Mexico City|Canada Ottawa|
Brazil Brasilia|Argentina Buenos Aires|Chile Santiago|Peru Lima|Colombia Bogota|Ecuador Quito|Uruguay Montevideo|
Venezuela Caracas|Paraguay Asuncion|China Beijing|India New Delhi|Pakistan Islamabad|Thailand Bangkok|Vietnam Hanoi|
Indonesia Jakarta|Philippines Manila|Malaysia Kuala Lumpur|Nepal Kathmandu|Bangladesh Dhaka|Iran Tehran|Iraq Baghdad|
Syria Damascus|Lebanon Beirut|Jordan Amman|Australia Canberra|Iceland Reykjavik|Bulgaria Sofia|Romania Bucharest|
Serbia Belgrade|Croatia Zagreb|Afghanistan Kabul|Libya Tripoli|Sudan Khartoum|Jamaica Kingston"""


def people(seed: int) -> dict[str, list[str]]:
    """Names with a value of each attribute."""
    rng = random.Random(f"people {seed}")
    names = rng.sample([f"{first} {last}" for first in FIRST.split() for last in LAST.split()], NUM_PEOPLE)
    return {name: [rng.choice(one.values.split()) for one in ATTRIBUTES] for name in names}


def biographies(seed: int, number: int) -> list[str]:
    """Texts of one person each, in turn: all attributes, in any order and in changing words."""
    rng, known = random.Random(f"biographies {seed}"), people(seed)
    found: list[str] = []
    while len(found) < number:
        for name in rng.sample(list(known), len(known)):
            facts = list(zip(ATTRIBUTES, known[name], strict=True))
            rng.shuffle(facts)
            said = (rng.choice(one.says).format(name=name, value=value) for one, value in facts)
            found.append(" ".join(said))
    return found[:number]


def new_facts(seed: int) -> list[Question]:
    """Of every person every attribute, in words that no biography has."""
    rng = random.Random(f"questions {seed}")
    return [
        _question(one.asks.format(name=name), value, one.values.split(), rng)
        for name, values in people(seed).items()
        for one, value in zip(ATTRIBUTES, values, strict=True)
    ]


def old_facts() -> list[Question]:
    """The capitals of countries."""
    rng, pairs = random.Random("capitals"), [line.strip().split(" ", 1) for line in CAPITALS.split("|")]
    names = [capital for _, capital in pairs]
    return [_question(f"What is the capital of {country}?", capital, names, rng) for country, capital in pairs]


def _question(text: str, answer: str, pool: list[str], rng: random.Random) -> Question:
    choices = [answer, *rng.sample([one for one in pool if one != answer], NUM_CHOICES - 1)]
    rng.shuffle(choices)
    return Question(text, tuple(choices), choices.index(answer))
