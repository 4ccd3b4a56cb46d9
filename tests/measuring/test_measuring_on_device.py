"""`measure` on a device that is not the CPU: the CPU's report."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import CHATML, make_model, make_texts, make_tokenizer, moved_model
from simulated_device import assert_as_on_cpu, on_device

from retain.measuring.choices import Question
from retain.measuring.measure import measure
from retain.measuring.refusals import Judge
from retain.models.base_predictions import MeasuredBase

TOKENIZER = make_tokenizer(template=CHATML)


@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.program)])
@on_device
def test_a_report_is_that_of_the_cpu(kept, tmp_path):
    def work(device: str) -> dict[str, Any]:
        base = make_model().to(device)
        report = measure(
            MeasuredBase(base) if kept else base,
            moved_model().to(device),
            {"words": make_texts(4, seed=1)},
            new_task={"rows": make_texts(3, seed=2)},
            tokenizer=TOKENIZER,
            choices={"q": [Question("a fox?", ("dog", "lazy bird"), 1)]},
            refusals={"r": ["rain", "stone"]},
            judge=Judge(make_model(seed=2).to(device), TOKENIZER),
            prompts=["the quick", "old towns sing"],
            sampled=True,
            max_length=24,
            batch_tokens=60,
            max_new_tokens=3,
            num_resamples=50,
        ).data
        assert report["settings"].pop("device").startswith(device)
        return {name: value for name, value in report.items() if name != "created"}

    assert_as_on_cpu(work, tolerance=1e-3)
