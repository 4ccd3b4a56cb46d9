"""What the instruct studies train and measure on: packaged texts, and rows that the base wrote."""

from __future__ import annotations

import json
import random
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.demo_data import load_demo_data, read_wheel
from experiments.corpora import CACHE, WHEELS
from experiments.corpora import download as bring
from experiments.finetunes import sampled_once
from experiments.study_04_capabilities.data import download, instructions, social_iqa
from retain import ReplayDataset
from retain.data.rows import Document, token_documents, tokenize_documents
from retain.measuring.choices import Question
from retain.models.description import StartToken
from retain.sampling.starts import chat_prefix, plan_starts

BIGBENCH = "bigbench==1.0.0"
SCIENCE = "subtask047_misc_answering_science_questions/task.json"  # evaluation only: it carries a canary
WEB, DOCUMENTS, OWN_CHATS, CHATS = "web text", "own documents", "own chats", "real chats"


@dataclass(frozen=True)
class Pools:
    """New-task rows, replay rows of real texts, and what is held out of them."""

    train: list[list[int]]
    new_task: list[Document]
    replay: dict[str, ReplayDataset]
    documents: dict[str, list[Document]]
    questions: dict[str, list[Question]]


@dataclass(frozen=True)
class Written:
    """Replay rows that the base wrote, and texts to measure on; no row is both."""

    replay: dict[str, ReplayDataset]
    documents: dict[str, list[Document]]


def sampled(kind: str, model: Any, tokenizer: Any, start: StartToken, scale: Any, seed: int) -> ReplayDataset:
    """Rows that the base wrote from its document start or inside a user's turn; sampled by who asks first.

    The first `pool_rows` are replayed, the rest are held out.
    """
    rows, length = scale.pool_rows + scale.held_out, scale.sampled_length if kind == "chat" else scale.max_length
    folder = CACHE / "instruct" / f"{Path(scale.model).name.replace(':', '-')}-{kind}-{rows}x{length}-{seed}"
    starts = plan_starts(kind, tokenizer, start)
    options: dict[str, Any] = {"start_token": start, "starts": starts, "batch_size": scale.sampled_together}
    options |= {"num_rows": rows, "max_length": length, "seed": seed, "rows_per_shard": 48}
    return sampled_once(model, tokenizer, folder, **options)


def part(rows: ReplayDataset, places: range, length: int) -> ReplayDataset:
    """Some rows, cut: a row sampled longer and cut is a row sampled shorter."""
    cut = [rows[at][:length] for at in places]
    return ReplayDataset.from_rows(cut, rows.source, rows.manifest, rows.prefix_lengths[places.start : places.stop])


def mixed(one: ReplayDataset, other: ReplayDataset) -> ReplayDataset:
    """Rows of both in turn, half of each, as `retain sample --start document=0.5,chat=0.5` would draw them."""
    pairs = [(pool[at], pool.prefix_lengths[at]) for at in range(len(one) // 2) for pool in (one, other)]
    rows, given = zip(*pairs, strict=True)
    return ReplayDataset.from_rows(list(rows), f"{one.source} and {other.source}", one.manifest, np.array(given))


def web_texts() -> list[list[str]]:
    """OpenWebText documents and Wikipedia articles (short ones, from a package)."""
    found = []
    for name in ("owt_5", "wikipedia_5"):
        (lines,) = read_wheel(WHEELS, "evals", rf"schelling_point/{name}\.jsonl$")
        found.append([json.loads(line)["0"] for line in lines.splitlines()])
    return found


def web_rows(tokenizer: Any, start: StartToken, length: int, rng: random.Random) -> list[list[int]]:
    """Openings of documents of each source in turn, whole rows, one of each document."""
    sources = []
    for texts in web_texts():
        rng.shuffle(texts)
        cut = tokenize_documents(texts, tokenizer, start.id, length, max_windows=1)
        sources.append([one.windows[0] for one in cut if one.num_tokens == length - 1])
    return [row for pair in zip(*sources, strict=False) for row in pair]


def chat_rows(tokenizer: Any, length: int, rng: random.Random) -> list[list[int]]:
    """Alpaca's instructions and answers through the chat template, cut; those that fill less than half are left out."""
    rows = []
    for asks, says in instructions():
        turns = [{"role": "user", "content": asks}, {"role": "assistant", "content": says}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"][:length])
    rng.shuffle(rows)
    return [row for row in rows if len(row) > length // 2]


def science() -> list[Question]:
    """251 elementary science questions in ARC's manner, from BIG-bench; its archive (358 MB) is read once."""
    path = CACHE / "instruct" / "science.json"
    if not path.exists():
        bring(BIGBENCH, "--no-binary", ":all:", "--no-build-isolation")
        with tarfile.open(next(WHEELS.glob("bigbench-*.tar.gz"))) as archive:
            file = archive.extractfile(next(one for one in archive if one.name.endswith(SCIENCE)))
            assert file is not None
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read())
    found = []
    for row in json.loads(path.read_text(encoding="utf-8"))["examples"]:
        asks, *choices = re.split(r"\s*\([A-E]\)\s*", row["input"].removeprefix("Question: ").rstrip("?"))
        answer = "ABCDE".index(row["target"][0][0])
        if len(choices) > answer and all(choices):
            found.append(Question(asks, tuple(choices), answer))
    return found


def questions_of(names: tuple[str, ...], most: int, rng: random.Random) -> dict[str, list[Question]]:
    """Questions of packaged sets, drawn where there are too many."""
    found = {}
    for name in names:
        questions = {"Social IQa": social_iqa, "science": science}[name]()
        found[name] = rng.sample(questions, min(most, len(questions)))
    return found


def open_pools(tokenizer: Any, start: StartToken, scale: Any, seed: int) -> Pools:
    """Everything of a study that needs no sampling; no row is both replayed and held out."""
    download()
    length, count, away = scale.max_length, scale.pool_rows, scale.held_out
    new_rows = scale.max_steps * scale.batch_size * scale.accumulation
    sizes = {"max_length": length, "num_documents": scale.new_task_rows, "num_rows": new_rows}
    verilog = load_demo_data(WHEELS, tokenizer, start, seed=seed, **sizes)
    web = web_rows(tokenizer, start, length, random.Random(seed))
    chats = chat_rows(tokenizer, length, random.Random(seed))
    for name, rows in {"texts": web, "chats": chats}.items():
        if len(rows) < 2 * away:
            raise ValueError(
                f"{name}: {len(rows)} fill a row of {length} tokens, {away} are held out; lower max_length or held_out"
            )
    return Pools(
        train=verilog.train,
        new_task=verilog.new_task,
        replay={
            "real": ReplayDataset.from_rows(web[away : away + count], "OpenWebText and Wikipedia"),
            "chat": ReplayDataset.from_rows(chats[away : away + count], "Alpaca"),
        },
        documents={WEB: token_documents(web[:away], tokenizer)},
        questions=questions_of(scale.questions, scale.num_questions, random.Random(seed)),
    )


def halves(
    kind: str, model: Any, tokenizer: Any, start: StartToken, scale: Any, seed: int
) -> tuple[ReplayDataset, list[Document]]:
    """Rows that the base wrote: those to replay, and those held out, as documents."""
    rows, count, away = sampled(kind, model, tokenizer, start, scale, seed), scale.pool_rows, scale.held_out
    held_out = part(rows, range(count, count + away), scale.max_length)
    written = [held_out[at].tolist() for at in range(away)]
    return part(rows, range(count), scale.max_length), token_documents(written, tokenizer, held_out.prefix_lengths)


def open_own(model: Any, tokenizer: Any, start: StartToken, scale: Any, seed: int) -> Written:
    """Documents that the base wrote."""
    own, written = halves("document", model, tokenizer, start, scale, seed)
    return Written({"self": own}, {DOCUMENTS: written})


def open_chats(
    model: Any, tokenizer: Any, start: StartToken, scale: Any, seed: int, own_rows: ReplayDataset
) -> Written:
    """What study 12 needs beside: chats that the base wrote, alone and mixed with its own documents."""
    own, written = halves("chat", model, tokenizer, start, scale, seed)
    rows = chat_rows(tokenizer, scale.max_length, random.Random(seed))
    held_out = rows[: scale.held_out]
    # The opening of a user's turn is alike in every chat: nobody has to predict it, and no replay holds it.
    opening = [len(chat_prefix(tokenizer, "user")[0])] * len(held_out)
    return Written(
        replay={"self chat": own, "mix": mixed(own_rows, own)},
        documents={OWN_CHATS: written, CHATS: token_documents(held_out, tokenizer, opening)},
    )
