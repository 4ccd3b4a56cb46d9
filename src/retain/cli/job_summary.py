"""Output of `retain measure --github` in a GitHub Actions job: the job summary, and an annotation for each verdict.

Source: https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retain.files import one_line, visible
from retain.report.gate import BEYOND, UNDECIDED, WITHIN

SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"  # environment variable: path of a file that Actions shows as Markdown
LEVELS = {WITHIN: "notice", UNDECIDED: "warning", BEYOND: "error"}


def annotation(level: str, title: str, text: str) -> str:
    """A workflow command that annotates the job; characters that would end it or start another are escaped.

    >>> annotation("error", "retain: out", "100% of it")
    '::error title=retain%3A out::100%25 of it'
    """
    text, title = (visible(part).replace("%", "%25") for part in (text, title))
    return f"::{level} title={title.replace(':', '%3A').replace(',', '%2C')}::{text}"


def append_summary(markdown: str) -> None:
    """Append to the job summary, which all steps of the job share."""
    with Path(os.environ[SUMMARY_VARIABLE]).open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{markdown}\n")


@contextmanager
def errors_annotated() -> Iterator[None]:
    """Annotate the job with an exception, and raise it again."""
    try:
        yield
    except Exception as error:
        print(annotation("error", "retain measure", one_line(error)))
        raise
