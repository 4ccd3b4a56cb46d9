"""The documentation site: `make docs`. Pages are the repository's own Markdown files, at their own places."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from retain import __version__

ROOT = Path(__file__).resolve().parents[1]

project = "retain"
author = "retain's authors"
project_copyright = "2026, Apache-2.0"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

# The root of the repository is the source, so that links between docs, studies and README mean the same everywhere.
root_doc = "docs/index"
include_patterns = ["docs/**", "experiments/README.md", "experiments/*/*.md", "*.md"]
exclude_patterns = ["README.md", "docs/conf.py"]

myst_heading_anchors = 4
# Results are written by programs and begin a level deeper, which is harmless.
suppress_warnings = ["myst.header"]
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"ArrayLike": "ArrayLike"}
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "retain"
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False


def with_pages(name: str, text: str) -> str:
    """A page whose links to a folder lead to its README; a folder without one has no page: its link is plain text."""
    here = ROOT / f"{name}.md"

    def linked(match: re.Match[str]) -> str:
        text, target = match.groups()
        folder = here.parent / target
        if "://" in target or not folder.is_dir():
            return match.group()
        return f"[{text}]({target.rstrip('/')}/README.md)" if (folder / "README.md").exists() else text

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)\)", linked, text)


def to_pages(app: Any, name: str, source: list[str]) -> None:
    source[0] = with_pages(name, source[0])


def as_written(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep docstrings plain text with code in backticks: escape what would be markup by accident."""
    if lines and lines[0].startswith("Alias for field number"):  # Python's own docstring of a tuple's field
        lines.clear()
    in_example = False
    for at, line in enumerate(lines):
        in_example = bool(line.strip()) and (in_example or line.lstrip().startswith(">>>"))
        if in_example:
            continue
        parts = re.split(r"(`[^`]*`)", line)
        lines[at] = "".join(part if part.startswith("`") else re.sub(r"[*|]", r"\\\g<0>", part) for part in parts)
    if what == "property" and lines:
        lines[0] = f": {lines[0]}"  # an empty type: napoleon takes the words before the first colon for one


def plain_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, annotation: str | None
) -> tuple[str | None, str | None]:
    """Show numbers and type aliases without the classes that mark them."""
    return signature and re.sub(r"(?:Unchosen|TypeAliasForwardRef)\('?(\w+)'?\)", r"\1", signature), annotation


def front_page(app: Any, error: Exception | None) -> None:
    if error is None:
        page = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=docs/index.html">\n'
        (Path(app.outdir) / "index.html").write_text(page)


def llms_txt(names: Iterable[str]) -> str:
    """The list of pages for language models (https://llmstxt.org): titles, and of docs/ first sentences."""
    head = (ROOT / "docs" / "index.md").read_text().split("\n\n")[1].replace("\n", " ")
    sections: dict[str, list[str]] = {"Docs": [], "Optional": []}
    for name in names:
        title, first = (ROOT / f"{name}.md").read_text().split("\n\n")[:2]
        sentence = re.split(r"(?<=[.:])\s", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", first.replace("\n", " ")))[0]
        line = f"- [{title.removeprefix('# ')}]({name}.md)"
        if name.startswith("docs/"):
            sections["Docs"].append(f"{line}: {sentence}")
        else:
            sections["Optional"].append(line)
    lists = [f"## {section}\n\n" + "\n".join(lines) for section, lines in sections.items() if lines]
    return "\n\n".join([f"# {project}", f"> {head}", *lists]) + "\n"


def markdown_pages(app: Any, error: Exception | None) -> None:
    """Beside every page its Markdown, and llms.txt; but for the reference, whose Markdown names functions alone."""
    if error is not None:
        return
    for name in app.env.found_docs:
        if not name.startswith("docs/api/"):
            text = with_pages(name, (ROOT / f"{name}.md").read_text())
            (Path(app.outdir) / f"{name}.md").write_text(text)
    listed = [name for name in app.env.toctree_includes[root_doc] if not name.startswith("docs/api/")]
    (Path(app.outdir) / "llms.txt").write_text(llms_txt(listed))


def setup(app: Any) -> None:
    app.connect("source-read", to_pages)
    app.connect("autodoc-process-docstring", as_written, priority=400)  # before napoleon makes markup of its own
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("build-finished", front_page)
    app.connect("build-finished", markdown_pages)
