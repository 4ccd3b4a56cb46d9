"""Separate a model's reasoning from its answer, by the markers that models on the Hub use."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from retain.data.rows import user_turn_text

# DeepSeek-R1 and Qwen3, and names like theirs; Magistral; Command A; Kimi; Seed-OSS.
_NAMES = r"think|thinking|thought|reasoning|analysis|seed:think"
_OPEN = rf"<(?:{_NAMES})>|\[THINK\]|<\|START_THINKING\|>|◁think▷"
_CLOSE = rf"</(?:{_NAMES})>|\[/THINK\]|<\|END_THINKING\|>|◁/think▷"
_CLOSED = re.compile(rf"\A.*(?:{_CLOSE})", re.DOTALL)  # an opening marker may be in the prompt
_OPENED = re.compile(rf"(?:{_OPEN}).*\Z", re.DOTALL)
_OPENED_LAST = re.compile(rf"(?:{_OPEN})\s*\Z")
# gpt-oss writes channels; `final` is the answer.
_FINAL = "<|channel|>final<|message|>"
_CHANNEL = "<|channel|>"
_MARKS = re.compile(rf"{_OPEN}|{_CLOSE}|<\|(?:start|end)\|>(?:assistant)?|<\|channel\|>\w*|<\|message\|>")


def without_reasoning(text: str, prompt: str = "") -> str:
    """The answer in a model's text: everything after its reasoning, or nothing if that did not end.

    Args:
        text: with special tokens, which may be the markers.
        prompt: the text before it, which may end in the opening marker if a model always reasons.

    >>> without_reasoning("<think>It may rain.</think>No.")
    'No.'
    """
    if _CHANNEL in text:
        return text.partition(_FINAL)[2]
    if _OPENED_LAST.search(prompt) and not _CLOSED.match(text):
        return ""
    return _OPENED.sub("", _CLOSED.sub("", text))


def reasoning_of(text: str, prompt: str = "") -> str:
    """The reasoning before a model's answer, finished or not; empty if there is none.

    Args:
        text, prompt: see `without_reasoning`.

    >>> reasoning_of("<think>It may rain.</think>No."), reasoning_of("<think></think>No."), reasoning_of("No.")
    ('It may rain.', '', '')
    """
    answer = without_reasoning(text, prompt)
    thought = text if not answer else "".join(text.rpartition(answer)[::2])
    return "" if answer == text else _MARKS.sub(" ", thought).strip()


def answer_turn(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text as a user turn, with the generation prompt up to the answer itself, so with empty reasoning."""
    template = str(tokenizer.chat_template)
    switch = {"enable_thinking": False} if "enable_thinking" in template else {}
    prompt = user_turn_text(text, tokenizer, **switch)
    if opened := _OPENED_LAST.search(prompt):
        marker = opened[0].strip()
        ends = {"[THINK]": "[/THINK]", "<|START_THINKING|>": "<|END_THINKING|>", "◁think▷": "◁/think▷"}
        return f"{prompt}\n{ends.get(marker, marker.replace('<', '</'))}\n\n"
    return prompt + _FINAL if _FINAL in template else prompt
