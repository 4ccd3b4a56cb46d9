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
from small_base import CACHE, WHEELS
from small_base import download as bring
from study_data import download, instructions, social_iqa

from retain import ReplayDataset, load_questions, sample_replay
from retain.capabilities.choices import HUB, Question
from retain.data import Document, token_documents, tokenize_documents
from retain.demo_data import load_demo_data, read_wheel
from retain.models import StartToken
from retain.replay import load_self_generated
from retain.starts import chat_prefix, plan_starts

BIGBENCH = "bigbench==1.0.0"
SCIENCE = "subtask047_misc_answering_science_questions/task.json"  # evaluation only: it carries a canary
WEB, DOCUMENTS, OWN_CHATS, CHATS = "web text", "own documents", "own chats", "real chats"


@dataclass(frozen=True)
class Pools:
    """New-task rows, replay rows of every kind, and what is held out of them."""

    train: list[list[int]]
    new_task: list[Document]
    replay: dict[str, ReplayDataset]
    documents: dict[str, list[Document]]
    questions: dict[str, list[Question]]


def sampled(kind: str, model: Any, tokenizer: Any, start: StartToken, scale: Any, seed: int) -> ReplayDataset:
    """Rows that the base wrote from its document start or inside a user's turn; sampled on first use.

    The first `pool_rows` are replayed, the rest are held out.
    """
    rows, length = scale.pool_rows + scale.held_out, scale.sampled_length if kind == "chat" else scale.max_length
    folder = CACHE / "instruct" / f"{Path(scale.model).name.replace(':', '-')}-{kind}-{rows}x{length}-{seed}"
    starts = plan_starts(kind, tokenizer, start)
    options: dict[str, Any] = {"start_token": start, "starts": starts, "batch_size": scale.sampled_together}
    sample_replay(model, tokenizer, folder, num_rows=rows, max_length=length, seed=seed, rows_per_shard=48, **options)
    return load_self_generated(folder)


def part(rows: ReplayDataset, places: range, length: int) -> ReplayDataset:
    """Some rows, cut: a row sampled longer and cut is a row sampled shorter."""
    cut = [rows[at][:length] for at in places]
    return ReplayDataset.from_rows(cut, rows.source, rows.manifest, rows.prefix_lengths[places.start : places.stop])


def mixed(one: ReplayDataset, other: ReplayDataset) -> ReplayDataset:
    """Rows of both in turn, half of each, as `retain sample --start document=0.5,chat=0.5` would draw them."""
    pairs = [(pool[at], pool.prefix_lengths[at]) for at in range(len(one) // 2) for pool in (one, other)]
    rows, given = zip(*pairs, strict=True)
    return ReplayDataset.from_rows(list(rows), f"{one.source} and {other.source}", one.manifest, np.array(given))


def web_rows(tokenizer: Any, start: StartToken, length: int, rng: random.Random) -> list[list[int]]:
    """Openings of OpenWebText documents and Wikipedia articles in turn, whole rows, one of each."""
    sources = []
    for name in ("owt_5", "wikipedia_5"):
        (lines,) = read_wheel(WHEELS, "evals", rf"schelling_point/{name}\.jsonl$")
        texts = [json.loads(line)["0"] for line in lines.splitlines()]
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
    """Questions of packaged sets, or of the Hub's, drawn where there are too many."""
    local = {"Social IQa": social_iqa, "science": science}
    found = {}
    for name in names:
        asked = load_questions(name) if name in HUB else local[name]()
        found[name] = rng.sample(asked, min(most, len(asked)))
    return found


def open_pools(model: Any, tokenizer: Any, start: StartToken, scale: Any, seed: int) -> Pools:
    """Everything of a study at one scale; no row is both replayed and held out."""
    download()
    length, count, away = scale.max_length, scale.pool_rows, scale.held_out
    new_rows = scale.max_steps * scale.batch_size * scale.accumulation
    sizes = {"max_length": length, "num_documents": scale.new_task_rows, "num_rows": new_rows}
    verilog = load_demo_data(WHEELS, tokenizer, start, seed=seed, **sizes)
    web = web_rows(tokenizer, start, length, random.Random(seed))
    chats = chat_rows(tokenizer, length, random.Random(seed))
    own = {kind: sampled(kind, model, tokenizer, start, scale, seed) for kind in ("document", "chat")}
    documents, own_chats = (part(rows, range(count), length) for rows in own.values())
    own_held_out = [part(rows, range(count, count + away), length) for rows in own.values()]
    # The opening of a user's turn is alike in every chat: nobody has to predict it, and no replay holds it.
    opening = [len(chat_prefix(tokenizer, "user")[0])] * away
    written, own_written = (
        token_documents([rows[at].tolist() for at in range(away)], tokenizer, rows.prefix_lengths)
        for rows in own_held_out
    )
    return Pools(
        train=verilog.train,
        new_task=verilog.new_task,
        replay={
            "self": documents,
            "real": ReplayDataset.from_rows(web[away : away + count], "OpenWebText and Wikipedia"),
            "chat": ReplayDataset.from_rows(chats[away : away + count], "Alpaca through the chat template"),
            "self chat": own_chats,
            "mix": mixed(documents, own_chats),
        },
        documents={
            WEB: token_documents(web[:away], tokenizer),
            DOCUMENTS: written,
            OWN_CHATS: own_written,
            CHATS: token_documents(chats[:away], tokenizer, opening),
        },
        questions=questions_of(scale.questions, scale.num_questions, random.Random(seed)),
    )
