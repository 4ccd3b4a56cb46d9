"""Every verb of an installed `retain`, from an empty folder: `python wheel_verbs.py BIN`, where BIN holds its programs.

Run by `make test-wheel` in an environment that has the wheel and nothing else; the standard library is enough here.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PRETRAIN = "--corpus synthetic --num_states 16 --vocab_size 16 --branching 3 --max_length 64 --model_size 20000"
TRAIN = "--max_length 24 --bf16 false --use_cpu true --report_to none --per_device_train_batch_size 4"
RUN = "--model base --dataset_name new.jsonl --replay_dataset replay --eval_dataset_name held.jsonl "
RUN += f"--retention old=old.txt --eval_strategy steps --eval_steps 4 --use_peft true {TRAIN}"
VERBS = {
    "pretrain": f"{PRETRAIN} --max_steps 30 --output_dir base",
    "sample": "--model base --num_rows 32 --max_length 24 --output_dir replay",
    "export": "replay --output replay.jsonl",
    "finetune": f"{RUN} --lora_r 2 --max_steps 24 --output_dir runs/two",
    "measure": "--base base --model runs/two --retention old=old.txt --new_task new=held.jsonl "
    "--max_length 32 --max_new_tokens 16 --output_dir report",
    "chat": "--base base --model runs/two --prompt w1 --max_new_tokens 8",
    "merge": "--model runs/two --new_task new=held.jsonl --max_ref_kl 10 --max_length 32 --output_dir merged",
    "report": "--runs report --output_dir page",
    "sweep": "sweep.yaml --output_dir sweep",
    "fit": "runs/two/metrics.jsonl sweep/runs/*/metrics.jsonl --form linear --output law.json --num_resamples 50",
    "predict": "law.json --finetuning_loss 2.5",
    "plan": "--model base --dataset_name new.jsonl --eval_dataset_name held.jsonl --retention old=old.txt "
    "--replay_dataset replay --max_ref_kl 0.5 --pilot_steps 12 --max_length 24 --per_device_train_batch_size 4 "
    "--output_dir plan",
}  # fmt: skip


def retain(programs: Path, folder: Path, *arguments: str) -> str:
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [str(programs / "retain"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def words(number: int, step: int) -> list[str]:
    return [" ".join(f"w{1 + (step * at + at * at // 3 + row) % 15}" for at in range(20)) for row in range(number)]


def main(programs: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, rows in (("new.jsonl", words(48, 7)), ("held.jsonl", words(12, 11))):
            (folder / file).write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        (folder / "old.txt").write_text("\n\n".join(words(12, 5)))
        grid = {"verb": "finetune", "common": dict(zip(*[iter(RUN.replace("--", "").split())] * 2, strict=True)),
                "grid": {"lora_r": [1, 4], "max_steps": [24]}}  # fmt: skip
        (folder / "sweep.yaml").write_text(json.dumps(grid))  # JSON is YAML
        listed = [line.split()[0] for line in retain(programs, folder, "--help").splitlines()
                  if line.startswith("  ") and not line.startswith("   ")]  # fmt: skip
        missing = set(listed) - set(VERBS)
        assert not missing, f"verbs without a command here: {missing}"
        for verb, flags in VERBS.items():
            given = [sorted(folder.glob(part)) if "*" in part else [part] for part in flags.split()]
            assert all(given), f"{verb}: nothing is found by one of {flags}"
            retain(programs, folder, verb, *(str(part) for parts in given for part in parts))
            print(f"{verb}: ok", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
