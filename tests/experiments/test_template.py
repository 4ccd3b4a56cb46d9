"""The template of a study, which is one file, runs, resumes and reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_experiments import SHORT, TINY, small_texts

from experiments import finetunes, small_base, template


def test_a_study_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = small_texts()
    base = small_base.make_base(tmp_path / "tiny", texts, TINY)

    def bench(settings: finetunes.BenchSettings = SHORT) -> finetunes.Bench:
        return finetunes.open_bench(base, texts, replace(SHORT, seed=settings.seed))

    monkeypatch.setattr(template, "small_bench", bench)
    monkeypatch.setattr(template, "HERE", tmp_path)
    monkeypatch.setattr(template, "SCALES", {"laptop": template.Scale(max_steps=2, seeds=2)})
    (tmp_path / "README.md").write_text("<!-- results: written by run.py -->\n<!-- end of results -->\n")
    with pytest.raises(SystemExit, match="fewer than two seeds"):
        template.main(["--seeds", "0"])
    first = (tmp_path / "results.jsonl").read_text()
    template.main(["--num_workers", "1"])
    rows = (tmp_path / "results.jsonl").read_text()
    assert rows.startswith(first), "finished runs are not made again"
    assert (len(first.splitlines()), len(rows.splitlines())) == (2, 4)
    page = (tmp_path / "README.md").read_text()
    assert "| replay | " in page
    assert "- Replay lowers forgetting: **" in page
    assert (tmp_path / "figure.png").stat().st_size > 2_000
