"""`retain export`: replay rows as JSONL for other trainers, as text, chats or tokens.

Other trainers train on these rows by next-token prediction, without a base and without a KL term.
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
    """Settings of `retain export`; the folder comes first, without a flag."""

    replay_dataset: str = setting("", "Folder written by `retain sample`.", required=True)
    output: str = setting("", "File for the rows (.jsonl).", required=True)
    format: Literal["text", "messages", "tokens"] = setting(
        "text",
        "text: everything after the start token. messages: the complete turns of rows sampled with --start chat. "
        "tokens: input_ids, attention_mask and labels, exactly as drawn.",
    )
    model: str | None = setting(None, "Model whose tokenizer to use. Default: the one that wrote the rows.")


def run_export(config: ExportConfig) -> None:
    """Write the rows of a replay dataset in `config.format`, and print how many."""
    folder, output = Path(config.replay_dataset).expanduser(), Path(config.output)
    check_writable(output, "output")
    if output.resolve().parent == folder.resolve():
        raise ValueError(f"output: {str(output)!r} is in the folder of replay_dataset; choose another folder")
    rows = load_self_generated(folder)
    assert rows.manifest is not None
    name = config.model or rows.manifest["model"]
    tokenizer = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    if tokenizer_fingerprint(tokenizer) != rows.manifest["tokenizer_fingerprint"]:
        raise ValueError(f"model: {name!r} has another tokenizer than the model that wrote these rows; give that model")
    written: Sequence[dict[str, Any]]
    if config.format == "tokens":
        written, note = list(map(token_row, rows, rows.prefix_lengths.tolist())), "the tokens as sampled"
    elif config.format == "text":
        written, note = text_rows(rows, tokenizer)
    else:
        written, note = message_rows(rows, tokenizer)
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written))
    print(f"{len(written)} of {len(rows)} rows as {config.format} in {output}: {note}")


def token_row(row: np.ndarray, prefix_length: int) -> dict[str, list[int]]:
    """`input_ids`, `attention_mask` and `labels` of a row; labels are −100 on the prefix, which was not sampled."""
    ids = row.tolist()
    labels = [-100] * prefix_length + ids[prefix_length:]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def text_rows(rows: ReplayDataset, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, str]], str]:
    """Each row's text after its start token, with special tokens; and a note on how many keep their tokens."""
    assert rows.manifest is not None
    start, num_same = rows.manifest["start_token"]["id"], 0
    texts = []
    for row in rows:
        ids = row.tolist()
        ids = ids[1:] if ids[0] == start else ids  # a tokenizer that adds BOS would repeat it
        text = decoded(tokenizer, ids)
        num_same += tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        texts.append({"text": text})
    return texts, f"{num_same} of them give the same tokens again"


def message_rows(rows: ReplayDataset, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, Any]], str]:
    """The complete turns of each row that starts with a user's turn and has an answer; other rows are left out."""
    frame = chat_frame(tokenizer)
    chats = [read_chat(decoded(tokenizer, row.tolist()), frame) for row in rows]
    messages = [{"messages": chat} for chat in chats if chat]
    if not messages:
        raise ValueError(
            f"format: 'messages', but no row of {rows.source!r} holds a question with a complete answer; sample longer "
            "rows with --start chat, or use text"
        )
    return messages, f"{len(rows) - len(messages)} hold no question with a complete answer"


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, with special tokens and without clean-up."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str, str]:
    """What the chat template writes before the first question, before its answer, after it, and before the next one."""
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
    """The complete turns of a row; empty if a question or the end of its answer is missing."""
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
