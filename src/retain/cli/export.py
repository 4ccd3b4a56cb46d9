"""`retain export`: replay rows as JSONL for trainers that are not ours: text, chats, or the tokens.

What such a trainer does with them is next-token training beside its own rows: there is no base and no KL in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from retain.checks import setting
from retain.cli.flags import Verb
from retain.cli.settings import RemoteCodeSettings
from retain.data.chats import template_frame
from retain.files import check_writable, write_text
from retain.models.description import tokenizer_fingerprint
from retain.models.loading import load_tokenizer
from retain.replay.dataset import ReplayDataset, load_self_generated


@dataclass(kw_only=True)
class ExportConfig(RemoteCodeSettings):
    """`retain export`: replay rows as JSONL for other trainers; the folder comes first, without a flag."""

    replay_dataset: str = setting("", "Folder written by `retain sample`.", required=True)
    output: str = setting("", "File for the rows (.jsonl).", required=True)
    format: Literal["text", "messages", "tokens"] = setting(
        "text",
        "text: everything after the start token. messages: the complete turns of rows sampled with --start chat. "
        "tokens: input_ids, attention_mask and labels, exactly as drawn.",
    )
    model: str | None = setting(None, "Model whose tokenizer to use. Default: the one that wrote the rows.")


def run_export(config: ExportConfig) -> None:
    """Write the rows of a replay dataset as `config.format`, and print how many."""
    folder, output = Path(config.replay_dataset).expanduser(), Path(config.output)
    check_writable(output, "output")
    if output.resolve().parent == folder.resolve():
        raise ValueError(f"output: {str(output)!r} would lie among the files of replay_dataset; choose another folder")
    rows = load_self_generated(folder)
    assert rows.manifest is not None
    name = config.model or rows.manifest["model"]
    tokenizer = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    if tokenizer_fingerprint(tokenizer) != rows.manifest["tokenizer_fingerprint"]:
        raise ValueError(f"model: {name!r} has another tokenizer than the one that wrote these rows")
    written: Sequence[dict[str, Any]]
    if config.format == "tokens":
        written, note = list(map(token_row, rows, rows.prefix_lengths.tolist())), "the tokens as drawn"
    elif config.format == "text":
        written, note = text_rows(rows, tokenizer)
    else:
        written, note = message_rows(rows, tokenizer)
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written))
    print(f"{len(written)} of {len(rows)} rows as {config.format} in {output}: {note}")


def token_row(row: np.ndarray, given: int) -> dict[str, list[int]]:
    """A row as it was drawn: `input_ids`, `attention_mask`, and `labels` of −100 on tokens that were given."""
    ids = row.tolist()
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * given + ids[given:]}


def text_rows(rows: ReplayDataset, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, str]], str]:
    """Each row as the text behind its start token, special tokens written out; and how many survive a round trip."""
    assert rows.manifest is not None
    start, same = rows.manifest["start_token"]["id"], 0
    found = []
    for row in rows:
        ids = row.tolist()
        ids = ids[1:] if ids[0] == start else ids  # a tokenizer that adds its own BOS would double it
        text = decoded(tokenizer, ids)
        same += tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        found.append({"text": text})
    return found, f"{same} of them are cut into the same tokens again"


def message_rows(rows: ReplayDataset, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, Any]], str]:
    """The whole turns of rows that begin in a user's turn and were answered; other rows are left out."""
    frame = chat_frame(tokenizer)
    chats = [read_chat(decoded(tokenizer, row.tolist()), frame) for row in rows]
    found = [{"messages": chat} for chat in chats if chat]
    if not found:
        raise ValueError(
            f"format: 'messages', but no row of {rows.source!r} holds a question and a whole answer; sample longer "
            "rows with --start chat, or use text"
        )
    return found, f"{len(rows) - len(found)} hold no question with a whole answer"


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text with nothing left out and nothing tidied."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str, str]:
    """What the chat template writes before a first question, before its answer, behind it, and before the next one."""
    roles = ("user", "assistant", "user")
    try:
        before, answer, question, _ = template_frame(tokenizer, roles)
        end = template_frame(tokenizer, roles[:2])[-1].strip()
    except ValueError as error:
        raise ValueError(f"format: 'messages': {error}; use text") from error
    if not (answer.strip() and end):
        raise ValueError("format: the chat template marks no turns; use text")
    return before, answer, end, question


def read_chat(text: str, frame: tuple[str, str, str, str]) -> list[dict[str, str]]:
    """The whole turns of a row, or nothing where a question or the end of its answer is missing."""
    before, answer, end, question = frame
    if not text.startswith(before):
        return []
    return list(_turns(text[len(before) :], answer, end, question))


def _turns(text: str, answer: str, end: str, question: str) -> Iterator[dict[str, str]]:
    while True:
        request, answered, text = text.partition(answer)
        reply, ended, rest = text.partition(end)
        if not (answered and ended and request.strip() and reply.strip()) or end in request:
            return
        yield {"role": "user", "content": request}
        yield {"role": "assistant", "content": reply}
        if not (end + rest).startswith(question):
            return
        text = (end + rest)[len(question) :]


VERB = Verb(
    name="export",
    example="retain export replay/ --output replay.jsonl",
    settings=(ExportConfig,),
    run=run_export,
    positional="replay_dataset",
    aliases={"model_name_or_path": "model"},
)
