"""`retain chat`: one prompt, and what base and tuned model answer, one under the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from textwrap import indent
from typing import TYPE_CHECKING, Any

from retain.checks import Unchosen, setting
from retain.cli.flags import Verb
from retain.cli.settings import ModelLoadSettings
from retain.cli.signals import Terminated
from retain.data.chats import rendered
from retain.files import one_line, visible, visible_text
from retain.measuring.generations import Prompt, Written, continue_prompts, options_that_fit, stop_tokens
from retain.measuring.measure_options import Options
from retain.models.adapters import adapted_model
from retain.models.description import choose_start_token, default_device
from retain.models.loading import load_model, load_tokenizer, loaded_as, tokenizer_of_tuned
from retain.models.reference import Reference, probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(kw_only=True)
class ChatConfig(ModelLoadSettings):
    """`retain chat`: what base and tuned model answer to one prompt."""

    base: str = setting("", "Model before finetuning: a Hub id or folder.", required=True)
    model: str = setting("", "Model after finetuning: a model or an adapter folder.", required=True)
    prompt: str | None = setting(None, "Answer this prompt and exit. Default: ask for prompts until /quit or Ctrl-D.")
    max_new_tokens: int = setting(
        Unchosen(256), "Maximum tokens per answer; the default is lowered to what the models have room for.", low=1
    )
    sampled: bool = setting(
        False, "Sample the answers at temperature 1, with the seed, instead of taking the most likely tokens."
    )


@dataclass
class Conversation:
    """Both models' turns, each with its own answers; without a chat template every prompt stands alone."""

    tuned: PreTrainedModel
    reference: Reference
    options: Options
    sampled: bool = False
    turns: dict[str, list[dict[str, str]]] = field(default_factory=lambda: {"base": [], "model": []})

    def answers(self, text: str) -> Iterator[tuple[str, Written]]:
        """The base's answer, then the tuned model's.

        Raises:
            ValueError: if there is no room for an answer; the conversation is as it was.
        """
        text = text.encode("utf-8", "replace").decode()  # a terminal's stray bytes are surrogates, and no text
        options, models = self.options, [one for one in (self.reference.ref_model, self.tuned) if one is not None]
        asked = {who: [*turns, {"role": "user", "content": text}] for who, turns in self.turns.items()}
        prompts = {who: self.prompt(turns) for who, turns in asked.items()}
        options = options_that_fit(models, prompts.values(), options)
        how: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "batch_tokens": 1}
        how["stop"] = stop_tokens(models, options.tokenizer, options.start_id)
        how["seed"] = options.seed + len(self.turns["base"]) if self.sampled else None
        for who, prompt in prompts.items():
            ids = prompt.tokens(options.tokenizer, options.start_id)
            with self.reference.base(self.tuned) if who == "base" else nullcontext(self.tuned) as model:
                (answer,) = continue_prompts(model, options.tokenizer, [ids], **how)
            asked[who].append({"role": "assistant", "content": answer.answer})
            yield who, answer
        self.turns = asked

    def prompt(self, turns: list[dict[str, str]]) -> Prompt:
        """What a model continues."""
        tokenizer = self.options.tokenizer
        if not tokenizer.chat_template:
            return Prompt(turns[-1]["content"])
        return Prompt(rendered(turns, {}, tokenizer, "prompt", add_generation_prompt=True), chat=True)


def run_chat(config: ChatConfig) -> None:
    """Print both answers to one prompt, or to each that is typed."""
    tokenizer = load_tokenizer(config.base, field="base", **config.checkpoint)
    tokenizer = tokenizer_of_tuned(config.model, tokenizer, trust_remote_code=config.trust_remote_code)
    start = choose_start_token(tokenizer, config.start_token)
    options = Options(tokenizer, start.id, max_new_tokens=config.max_new_tokens, seed=config.seed)
    talk = Conversation(*load_pair(config), options, config.sampled)
    if config.prompt is not None:
        return print_answers(talk, config.prompt, config)
    turns = "in the chat template" if tokenizer.chat_template else "each continued as it is, without a chat template"
    print(f"Prompts are {turns}. /new begins a new conversation, Ctrl-C stops an answer; /quit or Ctrl-D ends.")
    for text in typed_prompts():
        if text == "/new":
            talk.turns = {who: [] for who in talk.turns}
            continue
        try:
            print_answers(talk, text, config)
        except Terminated:
            raise
        except KeyboardInterrupt:
            print("\n[stopped; the conversation is as before this prompt]")
        except ValueError as error:
            print(f"{visible(one_line(error))}; or begin anew with /new", file=sys.stderr)


def load_pair(config: ChatConfig) -> tuple[PreTrainedModel, Reference]:
    """The tuned model and its base; that of an adapter is the model with the adapter off, where this is shown."""
    how: dict[str, Any] = {"device": default_device(), "field": "base", **config.loading}
    print("loading the models …", flush=True)
    base = load_model(config.base, **how)
    like: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, **loaded_as(base)}
    if adapted_model(config.model) is None:
        return load_model(config.model, **like), Reference(base)
    expected = probe(base)
    del base  # one model in memory
    tuned, switched_off = load_model(config.model, **like), Reference()
    try:
        switched_off.prove(tuned, expected)
    except ValueError:
        print(f"The adapter switched off is not {visible(config.base)}: both models are loaded.", file=sys.stderr)
        return tuned, Reference(load_model(config.base, **how))
    return tuned, switched_off


def typed_prompts() -> Iterator[str]:
    """What the user types, line by line, up to /quit or the end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401 (arrow keys and history in `input`; Windows has its own)
    try:
        while (text := input("\n> ").strip()) != "/quit":
            if text:
                yield text
    except EOFError:
        print()


def print_answers(talk: Conversation, text: str, config: ChatConfig) -> None:
    """Each answer as soon as it is written, under the name of its model."""
    for who, answer in talk.answers(text):
        cut = "" if answer.ended else f"\n[cut off after {answer.num_tokens} tokens]"
        words = indent(visible_text(answer.text.strip()) + cut, "  ")
        print(f"\n{who}: {visible(getattr(config, who))}\n{words}", flush=True)


VERB = Verb(
    name="chat",
    example="retain chat --base M --model out/",
    settings=(ChatConfig,),
    run=run_chat,
    resume="start it again",
    groups={"dtype": "How models are loaded"},
)
