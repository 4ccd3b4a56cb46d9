# /// script
# requires-python = ">=3.11"
# dependencies = ["retain-llm"]
# ///
"""Finetune with replay, measure, and keep the results, on a machine that has nothing but `uv`.

    uv run examples/cloud_job.py MODEL DATASET TEXT out/ --push_to OWNER/NAME --max_steps 200
    hf jobs uv run --flavor a10g-small --secrets HF_TOKEN examples/cloud_job.py MODEL DATASET TEXT out/ --push_to …

MODEL, DATASET (rows as for `trl sft`) and TEXT (on which forgetting is measured) are Hub ids or files. Other flags are
those of `retain finetune`. A job's disk goes with it: `--push_to` uploads out/ and the report to a private repository.
"""

import argparse
import sys

from huggingface_hub import HfApi

from retain.cli.main import main

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("model", "dataset", "text", "out"):
    parser.add_argument(name)
parser.add_argument("--push_to")
args, flags = parser.parse_known_args()
if args.push_to:  # first, so that a token that may not write ends the job before it costs
    HfApi().create_repo(args.push_to, private=True, exist_ok=True)

retention = ["--retention", f"text={args.text}"]
finetune = ["finetune", "--model", args.model, "--dataset_name", args.dataset, "--replay_dataset", "self", "--use_peft"]
measure = ["measure", "--base", args.model, "--model", args.out, "--model_card", f"{args.out}/README.md"]
for words in (
    [*finetune, "true", *retention, "--output_dir", args.out, *flags],
    [*measure, *retention, "--output_dir", f"{args.out}/report"],
):
    if code := main(words):
        sys.exit(code)
if args.push_to:
    HfApi().upload_folder(repo_id=args.push_to, folder_path=args.out, ignore_patterns=["checkpoint-*"])
