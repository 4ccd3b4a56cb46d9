"""What the documentation points at is there: links, anchors, commands, flags, tests, functions; nothing is run."""

from __future__ import annotations

import argparse
import ast
import doctest
import functools
import importlib
import json
import pkgutil
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import retain.cli.flags
import retain.cli.main

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "experiments" / "README.md",
    *sorted((ROOT / "experiments").glob("*/README.md")),
]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
FOLDERS = r"(?:src|tests|docs|examples|experiments|benchmarks)"
# Flags in prose that are neither ours nor accelerate's: of pip, lm-eval, torchrun, and of the studies' own programs.
OTHERS = {
    "--no-deps",
    "--log_samples",
    "--nproc_per_node",
    "--only",
    "--seeds",
    "--arms",
    "--scale",
    "--rounds",
    "--report",
}
OTHERS |= {"--batch_sizes", "--rows", "--length"}
OF_EXTRAS = {
    *(f"retain.sampling.{name}" for name in ("ray_workers", "vllm_engine")),
    "retain.training.axolotl_plugin",
}


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Reading a page


def tokens_of(text: str) -> Iterator[Any]:
    for token in MarkdownIt().enable("table").parse(text):
        yield token
        yield from token.children or ()


def links_of(text: str) -> list[str]:
    found = [token.attrGet("href") or token.attrGet("src") for token in tokens_of(text)]
    return [str(target) for target in found if target]


def blocks_of(text: str, language: str) -> list[str]:
    return [
        token.content for token in tokens_of(text) if token.type == "fence" and token.info.split()[:1] == [language]
    ]


def inline_of(text: str) -> list[str]:
    return [token.content for token in tokens_of(text) if token.type == "code_inline"]


def anchors_of(text: str) -> set[str]:
    """As GitHub and MyST make them of headings."""
    found: dict[str, int] = {}
    anchors = set()
    for opened, inside in zip(tokens := list(MarkdownIt().parse(text)), tokens[1:], strict=False):
        if opened.type == "heading_open":
            words = "".join(child.content for child in inside.children)
            slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
            anchors.add(slug if slug not in found else f"{slug}-{found[slug]}")
            found[slug] = found.get(slug, 0) + 1
    return anchors


# Links


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in links_of(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or not file.resolve().is_relative_to(ROOT):
            broken.append(target)
        elif anchor.startswith("retain."):
            broken += [] if resolves(anchor) else [target]
        elif anchor and anchor not in anchors_of(file.read_text() if path else text):
            broken.append(target)
    return broken


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part) and part not in getattr(found, "__dataclass_fields__", {}):
                return False
            found = getattr(found, part, None)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_links_of_notebooks_lead_somewhere(path):
    import json

    cells = json.loads(path.read_text())["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert links_of(text)
    assert broken_links(path, text) == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.*")), ids=ids)
def test_paths_in_examples_are_there(path):
    found = re.findall(rf"\b{FOLDERS}/[\w./]+\.(?:py|yaml|md)\b", path.read_text())
    assert [name for name in found if not (ROOT / name).exists()] == []


def test_llms_txt_lists_pages_with_their_title_and_first_sentence():
    llms_txt = runpy.run_path(str(ROOT / "docs" / "conf.py"))["llms_txt"]
    head, *lines = llms_txt(["docs/measuring", "docs/ci", "CONTRIBUTING"]).split("\n- ")
    assert head.startswith("# retain\n\n> Finetune a language model without it forgetting, and measure how much")
    sentence = "Stop a pull request whose model forgot more than you allow, and show the table where people look."
    assert lines[1:] == [f"[In CI](docs/ci.md): {sentence}\n\n## Optional\n", "[Contributing](CONTRIBUTING.md)\n"]


# Commands


@functools.cache
def parser_of(verb: str) -> argparse.ArgumentParser:
    """The verb's own parser, to which nothing is required."""
    parser = retain.cli.main.load_verb(verb).parser()
    parser.add_argument("--config")
    for action in parser._actions:
        action.required = False
    return parser


@functools.cache
def launcher() -> argparse.ArgumentParser:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return set(parser._option_string_actions)


def wrong_command(words: list[str]) -> str | None:
    """The parsers' complaint about `retain VERB …`, or None."""
    verb, argv = (words[1] if len(words) > 1 else "--help"), words[2:]
    if verb.startswith("-") or verb == "VERB":
        return None
    if verb not in retain.cli.main.VERBS:
        return f"no verb {verb!r}"
    try:
        words = retain.cli.main.load_verb(verb).words(argv)
        unknown = argparse.ArgumentParser.parse_known_args(parser_of(verb), words)[1]
    except ValueError as error:
        return str(error)
    return f"unknown {unknown}" if unknown else None


def commands_of(block: str) -> Iterator[list[str]]:
    """Commands of a shell block as words: continued lines joined, variables filled in, comments and loops left out."""
    for line in block.replace("\\\n", " ").splitlines():
        for part in re.split(r";\s|\s\|\s|&&", line):
            part = re.sub(r"^\s*(do|then)\s", "", part.strip())
            part = re.sub(r"\$\w+", "1", part).replace("…", " ").replace(" ...", " ")
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                yield words


def as_retain(words: list[str]) -> list[str] | None:
    """`retain …`, also behind a launcher that runs it as a module."""
    if words[0] == "retain":
        return words
    if words[0] in ("accelerate", "torchrun") and "-m" in words:
        return words[words.index("-m") + 1 :]
    return None


def wrong_commands(block: str) -> list[str]:
    wrong = []
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands_of(block):
        ours = as_retain(words)
        if ours and ours[0] == "retain" and (complaint := wrong_command(ours)):
            wrong.append(f"{' '.join(words)}: {complaint}")
        if words[0] in ("python", "python3") and len(words) > 1 and words[1].endswith(".py"):
            wrong += [] if (ROOT / words[1]).exists() else [f"no {words[1]}"]
        if words[:3] in (["python", "-m", "experiments"], ["python3", "-m", "experiments"]):
            numbers = ("all", *(study.name[6:8] for study in STUDIES))
            wrong += [f"no study {word}" for word in words[3:4] if word not in numbers]
        if words[0] == "make":
            wanted = [word for word in words[1:] if re.fullmatch(r"[\w-]+", word)]
            wrong += [f"no make {word}" for word in wanted if word not in targets]
        if "--config_file" in words and not (ROOT / words[words.index("--config_file") + 1]).exists():
            wrong.append(f"no {words[words.index('--config_file') + 1]}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_could_be_typed(page):
    text = page.read_text()
    assert [wrong for block in blocks_of(text, "bash") for wrong in wrong_commands(block)] == []
    if page.name == "CHANGELOG.md":  # of its day
        return
    typed = [
        code
        for code in inline_of(text)
        if re.match(r"([A-Z_]+=\S+ )*(retain \w+ -|python \S+\.py|python -m experiments|make \w)", code)
    ]
    assert [wrong for code in typed for wrong in wrong_commands(code)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=ids)
def test_flags_in_prose_exist(page):
    known = OTHERS | flags_of(launcher()).union(*(flags_of(parser_of(verb)) for verb in retain.cli.main.VERBS))
    named = {flag for code in inline_of(page.read_text()) for flag in re.findall(r"(?<![\w-])--[a-z]\w*", code)}
    assert named - known == set()


# Python


def wrong_python(block: str) -> list[str]:
    try:
        tree = ast.parse(block)
    except SyntaxError as error:
        return [f"line {error.lineno}: {error.msg}"]
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "retain":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            wrong += [name for name in names if not resolves(name)]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "retain"]
            wrong += [name for name in names if not resolves(name)]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_python_compiles_and_imports_what_exists(page):
    assert [wrong for block in blocks_of(page.read_text(), "python") for wrong in wrong_python(block)] == []


def test_examples_in_docstrings_are_right(tmp_path, monkeypatch):
    """Every `>>>` of src/retain; what needs an extra has none."""
    monkeypatch.chdir(tmp_path)
    names = {module.name for module in pkgutil.walk_packages(retain.__path__, "retain.")}
    results = [doctest.testmod(importlib.import_module(name)) for name in sorted(names - OF_EXTRAS)]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) > 50


# What prose names


def has_test(file: Path, test: str) -> bool:
    return file.exists() and (not test or f"\ndef {test}(" in file.read_text())


def wrong_names(text: str) -> list[str]:
    wrong = []
    for code in inline_of(text):
        if re.fullmatch(r"retain(\.\w+)+", code) and not resolves(code):
            wrong.append(code)
        file, _, test = code.partition("::")
        if re.fullmatch(rf"{FOLDERS}/[\w./-]*", file) and not has_test(ROOT / file, test):
            wrong.append(code)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_modules_files_and_tests_that_are_named_exist(page):
    assert wrong_names(page.read_text()) == []


def test_every_public_name_is_in_the_reference():
    reference = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    of_losses = {"retain.kl_divergence", "retain.next_token_loss"}
    missing = {f"retain.{name}" for name in retain.__all__} - set(re.findall(r"retain\.\w+", reference)) - of_losses
    assert missing == {"retain.__version__"}
    named = re.findall(r":: (retain\S*)", reference)
    assert len(named) > 30
    assert [name for name in named if not resolves(name)] == []


def costs() -> list[dict[str, Any]]:
    """What benchmarks/replay_cost.py measured, at two sizes."""
    return [
        row
        for name in ("", "_5.8m")
        for row in json.loads((ROOT / f"benchmarks/replay_cost{name}.json").read_text())["cells"]
    ]


def beside_vllm() -> dict[str, Any]:
    """How fast the sampling engine was in the environment of `make test-vllm`, relative to others."""
    [row] = json.loads((ROOT / "benchmarks/sampling_vllm.json").read_text())["results"]
    found: dict[str, Any] = row["ours_relative_to"]
    return found


def test_figures_of_choosing_are_those_of_the_studies():
    """Every decimal number in a table of docs/choosing.md stands in the study or benchmark that the table is from."""
    studies = "".join(path.read_text() for path in sorted((ROOT / "experiments").glob("study_0[123]_*/*.md")))
    text = (ROOT / "docs" / "choosing.md").read_text()
    begin, end = text.index("## Share of the batch"), text.index("## Larger models")
    rows = [line for line in text[begin:end].splitlines() if line.startswith("|")]
    numbers = {number for row in rows for number in re.findall(r"\d+\.\d+", re.sub(r"`[^`]*`", "", row))}
    assert len(numbers) > 80
    numbers -= {
        f"{number:.2f}" for row in costs() for number in (row["predicted"], *(kind["value"] for kind in timed(row)))
    }
    assert [
        number for number in sorted(numbers) if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", studies)
    ] == []


def timed(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The ratios of one of the benchmark's cells."""
    return [kind for kind in row.values() if isinstance(kind, dict)]


def strangers(row: str) -> list[str]:
    """Numbers of a finding's own results that do not stand in its study."""
    *_, ours, _, link = row.strip("| ").split(" | ")
    found = re.search(r"\(([^)]+)\)", link)
    assert found, row
    study = "".join(path.read_text() for path in sorted((ROOT / "experiments" / found[1]).glob("*.md")))
    numbers = re.findall(r"\d+\.\d+|\d+ of \d+|\d+(?=%)", ours)
    return [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", study)]


def turned(row: str) -> list[str]:
    """Intervals of a finding that its study's results do not hold, not even as the negative ("more" for "less")."""
    *_, ours, _, link = row.strip("| ").split(" | ")
    written = intervals_of(results_of(ROOT / "experiments" / re.search(r"\(([^)]+)\)", link)[1])).values()
    known = [[float(number) for number in numbers] for numbers in written]
    known += [[-value, -high, -low] for value, low, high in known]
    stated = {interval: numbers for interval, numbers in intervals_of(ours).items() if interval not in EARLIER}
    return [interval for interval, numbers in stated.items() if not any(rounds_to(numbers, one) for one in known)]


def results_of(study: Path) -> str:
    """What the code of a study wrote into its pages."""
    text = "".join(path.read_text() for path in sorted(study.glob("*.md")))
    return "".join(re.findall(r"<!-- results.*?<!-- end", text, re.DOTALL))


def is_the_studys(row: str) -> bool:
    """Whether the study's own code says this verdict of this finding, in the list that it writes."""
    finding, *_, verdict, link = row.strip("| ").split(" | ")
    page = (ROOT / "experiments" / re.search(r"\(([^)]+)\)", link)[1] / "README.md").read_text()
    results = page.partition("<!-- results")[2].partition("<!-- end")[0]
    return f"\n- {finding}: **{verdict}** (" in results


def test_findings_are_those_of_the_studies():
    """Words and numbers."""
    rows = [line for line in (ROOT / "experiments" / "README.md").read_text().splitlines() if line.startswith("| ")]
    findings = [row for row in rows if row.count(" | ") == 4 and "](" in row and not row.startswith("| [")]
    assert len(findings) > 15
    assert [(row, wrong) for row in findings if (wrong := strangers(row))] == []
    assert [(row, wrong) for row in findings if (wrong := turned(row))] == []
    assert [row for row in findings if not is_the_studys(row)] == []
    assert [
        row for row in findings if row.split(" | ")[1].startswith("–") and "reproduced" in row.split(" | ")[3]
    ] == [], "no paper says it, so it is yes or no"
    assert not is_the_studys(findings[0].replace("reproduced", "eliminated"))
    assert turned("| a | b | 0.201 [-0.215, -0.186] nats | c | [09](study_09_learning_rate) |")
    assert strangers("| a | b | 0.384 and 77.123 of 12 | c | [02](study_02_baselines) |") == ["77.123"]


INTERVAL = re.compile(r"(?<!\d of )(?<![\d.,])([-+]?\d[\d,.]*)(%?) \[([-+]?\d[\d,.]*)%?, ([-+]?\d[\d,.]*)%?\]")
ELSEWHERE = {"0.0335 [0.02412, 0.04549]", "1.9 [1.1, 2.8]"}  # in no study: samples of output, a published table fitted
EARLIER = {  # of draws and of fewer seeds before those in the results, and described as such
    "0.099 [-0.044, 0.241]", "0.085 [-0.038, 0.208]", "0.520 [-0.263, 1.303]", "-0.059 [-0.069, -0.049]",
    "-0.031 [-0.035, -0.026]", "+0.015 [+0.010, +0.023]", "-0.004 [-0.007, -0.002]",
}  # fmt: skip


def intervals_of(text: str) -> dict[str, list[str]]:
    """`value [low, high]` as it stands, by its three numbers."""
    found = INTERVAL.finditer(re.sub(r"\s+", " ", text))
    return {one[0]: [number.replace(",", "") for number in one.group(1, 3, 4)] for one in found}


def rounds_to(numbers: list[str], exact: list[float]) -> bool:
    places = [len(number.partition(".")[2]) for number in numbers]
    return all(abs(float(number) - one) <= 0.5 * 10**-place + 1e-9
               for number, one, place in zip(numbers, exact, places, strict=True))  # fmt: skip


def demos() -> list[dict[str, Any]]:
    """What `make demo` measured with seeds 0, 1 and 2."""
    return [json.loads(line) for line in (ROOT / "docs" / "demo.jsonl").read_text().splitlines()]


def test_the_demo_is_told_as_it_was_measured():
    """The table of docs/results.md, row by row; the ends of what was prevented; and the gains."""
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    found = demos()
    assert [demo["seed"] for demo in found] == [0, 1, 2]
    for text in found[0]["texts"]:
        for demo in found:
            plain, replay = (demo["texts"][text][name] for name in ("plain", "KL replay"))
            kl, kept = (
                f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in (plain["ref_kl"], replay["ref_kl"])
            )
            value, low, high = (100 * number for number in replay["prevented"])
            first = text if demo["seed"] == 0 else ""
            row = f"| {first} | {demo['seed']} | {kl} | {kept} | {value:.1f}% [{low:.1f}%, {high:.1f}%] |"
            assert " ".join(row.split()) in page
    shares = [run["prevented"][0] for demo in found for runs in demo["texts"].values() if (run := runs["KL replay"])]
    assert f"Replay prevents {100 * min(shares):.0f} to {100 * max(shares):.0f}% of it" in page
    gains = [f"{demo['gain']['KL replay'] / demo['gain']['plain']:.0%}" for demo in found]
    assert f"{gains[0]}, {gains[1]} and {gains[2]}" in page
    losses = [f"{demo['matched_loss']:.3f}" for demo in found]
    assert f"{losses[0]}, {losses[1]} and {losses[2]} nats" in page
    assert f"{100 * min(shares):.0f} to {100 * max(shares):.0f}%" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=ids)
def test_intervals_are_those_of_the_studies(page):
    """Each stands in the results of a study, rounded perhaps; or its share of what is left does."""
    pages = [path.read_text() for path in sorted((ROOT / "experiments").glob("*/*.md"))]
    results = "".join(part for text in pages for part in re.findall(r"<!-- results.*?<!-- end", text, re.DOTALL))
    known = [[float(number) for number in numbers] for numbers in intervals_of(results).values()]
    known += [[100 - value, 100 - high, 100 - low] for value, low, high in known]
    known += [
        [100 * number for number in found] if name == "prevented" else found
        for demo in demos()
        for runs in demo["texts"].values()
        for run in runs.values()
        for name, found in run.items()
    ]
    known += [[kind["value"], *kind["ci"]] for row in (*costs(), beside_vllm()) for kind in timed(row) if "ci" in kind]
    assert len(known) > 500
    asked = {told: numbers for told, numbers in intervals_of(page.read_text()).items() if told not in ELSEWHERE}
    assert [told for told, numbers in asked.items() if not any(rounds_to(numbers, one) for one in known)] == []
    assert not any(rounds_to(["12.3", "11.1", "14.9"], one) for one in known), "it can fail"


STUDIES = sorted(path.parent for path in (ROOT / "experiments").glob("*/run.py"))


@pytest.mark.parametrize("study", STUDIES, ids=ids)
def test_intervals_in_the_prose_of_a_study_are_its_own(study):
    results = results_of(study)
    known = [[float(number) for number in numbers] for numbers in intervals_of(results).values()]
    pages = "".join(path.read_text() for path in sorted(study.glob("*.md")))
    prose = intervals_of(re.sub(r"<!-- results.*?<!-- end", "", pages, flags=re.DOTALL))
    asked = {told: numbers for told, numbers in prose.items() if told not in EARLIER}
    assert [told for told, numbers in asked.items() if not any(rounds_to(numbers, one) for one in known)] == []


# The checks can fail


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("[a](docs/nowhere.md)", ["docs/nowhere.md"]),
        ("[a](docs/replay.md#the-loss) [b](docs/replay.md#the-los)", ["docs/replay.md#the-los"]),
        ("# Here\n\n## Here\n\n[a](#here) [a](#here-1) [b](#here-2)", ["#here-2"]),
        ("![a](docs/images/no.png)", ["docs/images/no.png"]),
        ("[a](#retain.losses.kl_divergence) [b](#retain.losses.kl)", ["#retain.losses.kl"]),
        ("[a](../elsewhere.md)", ["../elsewhere.md"]),
        ("[a](https://example.org/nowhere) `[b](nowhere.md)`", []),
        ("| a |\n| --- |\n| [b](nowhere.md) |", ["nowhere.md"]),
    ],
)
def test_a_broken_link_is_found(text, broken):
    assert broken_links(ROOT / "README.md", text) == broken


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("retain sample --model M --out replay/", "unknown ['--out', 'replay/']"),
        ("retain sampel --output_dir replay/", "no verb 'sampel'"),
        ("retain sample --num_rows many", "num_rows: 'many' does not fit; use a whole number"),
        (
            "for r in 1 2; do\n  retain finetune --config x.yaml --lora_rank $r\ndone",
            "--lora_rank",
        ),
        ("RAY_ADDRESS=1 retain sample \\\n  --engin ray", "--engin"),
        ("retain finetune --config x.yaml --num_processes 2", "--num_processes"),
        ("accelerate launch --config_file examples/accelerate/ddp.yaml -m retain finetune --config x --no 1", "--no"),
        ("accelerate launch --config_file examples/no.yaml -m retain finetune --config x", "examples/no.yaml"),
        ("OMP_NUM_THREADS=1 python experiments/no.py", "experiments/no.py"),
        ("OMP_NUM_THREADS=1 python -m experiments 00 --report", "no study 00"),
        ("make everything", "no make everything"),
    ],
)
def test_a_wrong_command_is_found(command, words):
    assert words in "".join(wrong_commands(command))


@pytest.mark.parametrize(
    "command",
    [
        "retain predict law.json --num_params 4e6 --num_steps 400   # a comment",
        "retain measure --base M --model out/ --retention a=b --retention c=d e=f --output_dir report/",
        "accelerate launch --num_processes 2 -m retain finetune --config sft.yaml",
        "torchrun --nproc_per_node 8 -m retain sample --model M --output_dir replay/ …",
        "make demo SIZE=medium",
    ],
)
def test_a_good_command_is_not_complained_of(command):
    assert wrong_commands(command) == []


def test_wrong_python_and_names_are_found():
    assert wrong_python("from retain import ReplayConfig, Replay\nimport retain.nothing") == [
        "retain.Replay",
        "retain.nothing",
    ]
    assert wrong_python("class A(B: ...") != []
    text = "`retain.losses.kl` `retain.losses.shifted` `tests/test_docs.py::test_nothing` `docs/no.md` `docs/faq.md`"
    assert wrong_names(text) == ["retain.losses.kl", "tests/test_docs.py::test_nothing", "docs/no.md"]
