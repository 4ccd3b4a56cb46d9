"""Memory of a long sampling job: 10 million tokens of a small model by `retain sample`, watched from outside.

    python benchmarks/sampling_memory.py [--tokens 10_000_000] [--output benchmarks/sampling_memory.json]

Rows go to shards as they are drawn, so resident memory must not grow with their number. It is read every second; the
share of the job that was done then is read from the shards on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH = 512
ROWS_PER_SHARD = 256


def make_model(folder: Path) -> int:
    """A Llama of two layers of width 64 with a byte-level tokenizer, as an ordinary folder; its parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from retain.models.description import num_parameters

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=len(vocabulary),
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return num_parameters(model)


def memory(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), None)


def watch(command: list[str], output: Path, shards: int) -> tuple[list[tuple[float, int]], str]:
    """(share of shards on disk, resident bytes) every second while the command runs, and what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = []
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            resident = memory(process.pid)
            if resident is not None:
                found.append((len(list(output.glob("shard-*.parquet"))) / shards, resident))
            time.sleep(1)
        log.seek(0)
        printed = log.read()
    if process.returncode != 0:
        raise SystemExit(printed[-2000:])
    return found, printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    from retain import versions

    rows = -(-arguments.tokens // LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        num_params = make_model(Path(folder) / "model")
        rows_to = Path(folder) / "rows"
        command = [sys.executable, "-m", "retain", "sample", "--model", f"{folder}/model"]
        command += ["--output_dir", str(rows_to), "--num_rows", str(rows), "--max_length", str(LENGTH)]
        command += ["--rows_per_shard", str(ROWS_PER_SHARD)]
        begin = time.perf_counter()
        seen, printed = watch(command, rows_to, -(-rows // ROWS_PER_SHARD))
        seconds = time.perf_counter() - begin
        on_disk = sum(path.stat().st_size for path in rows_to.iterdir())
    quarters: dict[str, Any] = {}
    for name, low, high in (("first", 0.05, 0.25), ("last", 0.75, 1.0)):
        values = [resident for share, resident in seen if low <= share < high]
        quarters[f"{name}_quarter_peak_megabytes"] = round(max(values) / 2**20, 1)
    after = [resident for share, resident in seen if share == 1.0]
    whole = {
        "device": f"cpu, {platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "versions": versions(),
        "num_params": num_params,
        "num_tokens": rows * LENGTH,
        "seed": 0,
        "seconds": round(seconds, 1),
        "megabytes_on_disk": round(on_disk / 2**20, 1),
        **quarters,
        "statistics_peak_megabytes": round(max(after) / 2**20, 1) if after else None,
        "printed": [line for line in printed.splitlines() if line and "|" not in line][-20:],
    }
    arguments.output.write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps(whole, indent=1))


if __name__ == "__main__":
    main()
