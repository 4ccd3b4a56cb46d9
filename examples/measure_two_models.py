"""Measure any finetuned model against its base: `python examples/measure_two_models.py BASE TUNED wiki.txt report/`."""

import sys
from pathlib import Path

from retain import load_model, load_tokenizer, measure

base, tuned, wiki, out = sys.argv[1:]
report = measure(
    load_model(base),
    load_model(tuned),
    {"wiki": Path(wiki).read_text().split("\n\n")},
    tokenizer=load_tokenizer(base),
    prompts=["The capital of France is"],
    max_length=64,
)
report.write(out)  # report.json, report.md, report.html
print(report)
forgetting = report["wiki"].forgetting
print(f"forgetting {forgetting.value:.3f} nats/token, 95% interval {forgetting.ci}")
