"""`retain measure --github` and action.yml: summary, annotations, one comment, exit codes; with a stand-in for `gh`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from retain.cli.job_summary import annotation
from retain.cli.main import main


def write_pair(folder: Path, changed: int) -> list[str]:
    """Two per-sample files of 100 questions; the tuned model's answers to `changed` of them are others."""
    answers = {"base": ["a"] * 100, "tuned": ["b"] * changed + ["a"] * (100 - changed)}
    for name, given in answers.items():
        rows = ({"doc_id": at, "target": "a", "filtered_resps": [answer], "exact_match": float(answer == "a")}
                for at, answer in enumerate(given))  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / f"{name}.jsonl") for name in answers]


def measured(folder: Path, changed: int, *arguments: str) -> int:
    pair = write_pair(folder, changed)
    return main(["measure", "--pair", *pair, "--output_dir", str(folder / "out"), "--github", *arguments])


@pytest.fixture
def summary(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "summary.md"
    path.write_text("# Of a step before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    return path


@pytest.mark.parametrize(("changed", "code", "level"), [(0, 0, "notice"), (8, 3, "warning"), (40, 2, "error")])
def test_a_job_is_annotated_with_the_verdict_and_shows_the_report(changed, code, level, tmp_path, summary, capsys):
    assert measured(tmp_path, changed, "--min_agreement", "0.9") == code
    lines = capsys.readouterr().out.splitlines()
    verdict = lines[-1]
    assert verdict.startswith("gate: ")
    assert lines[-3] == f"::{level} title={tmp_path.name}::{verdict.replace('%', '%25')}"
    assert summary.read_text() == f"# Of a step before\n{(tmp_path / 'out' / 'report.md').read_text()}\n"


def test_without_a_limit_the_report_is_shown_and_nothing_is_judged(tmp_path, summary, capsys):
    assert measured(tmp_path, 40) == 0
    assert "::" not in capsys.readouterr().out
    assert "exact_match" in summary.read_text()


def test_an_error_is_annotated_too(tmp_path, summary, capsys):
    missing = str(tmp_path / "no.jsonl")
    assert main(["measure", "--pair", missing, missing, "--output_dir", str(tmp_path / "out"), "--github"]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("::error title=retain measure::pair: cannot read ")
    assert said.err.startswith("retain measure: pair: cannot read ")
    assert summary.read_text() == "# Of a step before\n"


def test_outside_of_actions_the_flag_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert measured(tmp_path, 0) == 1
    assert capsys.readouterr().err == (
        "retain measure: github: GITHUB_STEP_SUMMARY is not set, as it is in GitHub Actions; leave github out\n"
    )


def test_names_and_verdicts_begin_no_command_of_their_own():
    assert annotation("notice", "a::b,c\n", "x\n::add-mask::y") == "::notice title=a%3A%3Ab%2Cc\\n::x\\n::add-mask::y"


# The action: its own shell steps, with this retain and a stand-in for `gh`; the runner's part is GitHub's

ACTION = yaml.safe_load((Path(__file__).parents[2] / "action.yml").read_text())
GH = """\
#!/usr/bin/env python3
import json, os, sys
from pathlib import Path
words, kept = sys.argv[1:], Path(os.environ["COMMENTS"])
comments = json.loads(kept.read_text())
if words[:2] == ["api", "--paginate"]:
    assert words[2] == "repos/o/r/issues/7/comments"
    print("[]", json.dumps(comments))  # a page after the other
    sys.exit()
if os.environ.get("READ_ONLY"):
    sys.exit("HTTP 403: Resource not accessible by integration")
assert words[:3] == ["api", "--silent", "--method"] and words[5] == "-F", words
body = Path(words[6].removeprefix("body=@")).read_text()
if words[3:5] == ["POST", "repos/o/r/issues/7/comments"]:
    comments.append({"id": 100 + len(comments), "body": body})
else:
    number = int(words[4].removeprefix("repos/o/r/issues/comments/"))
    assert words[3] == "PATCH"
    next(one for one in comments if one["id"] == number)["body"] = body
kept.write_text(json.dumps(comments))
"""


class Job:
    """A job of a pull request in which the action runs often; `retain` notes its words and ends with CODE."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        for name, text in (("gh", GH), ("retain", '#!/bin/sh\nprintf "%s\\n" "$@" > words\nexit "$CODE"\n')):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (folder / "comments.json").write_text('[{"id": 1, "body": "Looks good."}]')
        files = {"GITHUB_OUTPUT": "output", "COMMENTS": "comments.json", "RUNNER_TEMP": "."}
        self.environment = os.environ | {name: str(folder / of) for name, of in files.items()}
        self.environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "GITHUB_REPOSITORY": "o/r"}

    def step(self, name: str, **inputs: str) -> subprocess.CompletedProcess[str]:
        """Run a step as the runner does: `bash -eo pipefail`, with the expressions of its `env` filled in."""
        step = next(one for one in ACTION["runs"]["steps"] if one.get("name") == name)
        given = {f"inputs.{key}": of.get("default", "") for key, of in ACTION["inputs"].items()}
        given |= {f"inputs.{key}": value for key, value in inputs.items()}
        given |= {"github.event.pull_request.number": "7"}
        environment = {key: given[value.strip("${} ")] for key, value in step["env"].items()}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment | environment, capture_output=True, text=True
        )

    @property
    def comments(self) -> list[str]:
        return [one["body"] for one in json.loads((self.folder / "comments.json").read_text())]


@pytest.fixture
def job(tmp_path) -> Job:
    if not all(map(shutil.which, ("bash", "jq", "awk"))):
        pytest.skip("no bash, jq or awk, as GitHub's runners have")
    return Job(tmp_path)


def test_the_steps_measure_and_keep_one_comment(job, summary, monkeypatch):
    monkeypatch.chdir(job.folder)
    for changed, code in ((0, 0), (40, 2)):
        settings = yaml.safe_dump({"pair": write_pair(job.folder, changed), "min_agreement": 0.9})
        job.environment["CODE"] = str(code)
        done = job.step("Measure", settings=settings)
        assert done.returncode == code, done.stderr
        assert (job.folder / "output").read_text().splitlines()[-1] == f"exit-code={code}"
        assert main((job.folder / "words").read_text().splitlines()) == code, "the words do what they should"
        assert job.step("Comment").returncode == 0
    first, comment = job.comments
    assert first == "Looks good."
    assert comment.startswith("<!-- retain measure retain-report -->\n# Forgetting report: ")
    assert "> gate: beyond (exit code 2)" in comment
    shown, folded = comment.split("<details><summary>More</summary>\n")
    assert "| same answer as the base |" in shown
    assert folded.endswith("</details>\n")
    assert summary.read_text().count("# Forgetting report: ") == 2
    shutil.copytree(job.folder / "retain-report", job.folder / "other")
    assert job.step("Comment", output_dir="other").returncode == 0
    assert len(job.comments) == 3


def test_a_token_that_may_not_write_is_a_warning(job):
    (job.folder / "retain-report").mkdir()
    (job.folder / "retain-report" / "report.md").write_text("# Forgetting report\n")
    job.environment["READ_ONLY"] = "1"
    denied = job.step("Comment")
    assert (denied.returncode, len(job.comments)) == (0, 1)
    assert denied.stdout.startswith("::warning title=retain::The table is not on the pull request: the job needs ")
