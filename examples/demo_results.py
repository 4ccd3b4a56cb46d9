"""The numbers of finished demos, a JSON line each: what docs/results.md tells.

python examples/demo_results.py FOLDER ... > docs/demo.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def results_of(folder: Path) -> dict[str, Any]:
    """Of one demo: what was reached at the same new-task loss, by text and run, with intervals; and the gains."""
    report = json.loads((folder / "report.json").read_text())
    compared, runs = report["comparison"], report["runs"]
    made = json.loads((folder / "plain" / "demo.json").read_text())
    texts = {
        text: {
            row["name"]: {
                name: [round(value, 7) for value in (row[name], *row[f"{name}_ci"])]
                for name in ("ref_kl", "prevented")
                if row[name] is not None
            }
            for row in rows
        }
        for text, rows in compared["matched"].items()
    }
    return {
        "seed": made["seed"],
        "device": made["device"],
        "matched_loss": round(compared["matched_loss"], 7),
        "num_documents": {rows[0]["num_documents"] for rows in compared["matched"].values()}.pop(),
        "texts": texts,
        "gain": {run["name"]: round(run["new_task"]["Verilog"]["gain"]["value"], 4) for run in runs},
        "size": made["size"],
        "versions": runs[0]["versions"],
    }


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(json.dumps(results_of(Path(folder))))
