"""What each study's code says of its committed results is what its committed page says, word for word."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from experiments import program
from experiments.__main__ import STUDIES
from experiments.pages import BEGIN, END

SLOW = ("01", "02", "05", "10")  # bootstraps and fits of seconds


@pytest.mark.parametrize(
    "number", [pytest.param(one, marks=[pytest.mark.slow] if one in SLOW else []) for one in STUDIES]
)
def test_a_report_is_the_committed_page(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a word or number that was changed by hand, in the page and in the table, is found."""
    found: dict[Path, str] = {}

    def keep(folder: Path, scale: str, report: program.Report, page: str = "README.md", figure: str = "") -> None:
        found[folder / page] = report[0]

    monkeypatch.setattr(program, "write_report", keep)
    import_module(f"experiments.{STUDIES[number].name}.run").main(["--report"])
    assert len(found) == (2 if number == "01" else 1)
    for page, text in found.items():
        assert page.read_text().partition(BEGIN)[2].partition(END)[0].strip() == text.strip()
