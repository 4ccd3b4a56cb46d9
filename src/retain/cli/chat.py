"""`retain chat`: the answers of the base and the tuned model to the same prompts."""

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
from retain.measuring.tokens import Options
from retain.models.adapters import adapted_model
from retain.models.description import choose_start_token, default_device
from retain.models.loading import load_model, load_tokenizer, loaded_as, tokenizer_of_tuned
from retain.models.reference import Reference, probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(kw_only=True)
class ChatConfig(ModelLoadSettings):
    """Settings of `retain chat`."""

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
    """A conversation with each model; without a chat template, every prompt stands alone."""

    tuned: PreTrainedModel
    reference: Reference
    options: Options
    sampled: bool = False
    turns: dict[str, list[dict[str, str]]] = field(default_factory=lambda: {"base": [], "model": []})

    def answers(self, text: str) -> Iterator[tuple[str, Written]]:
        """Yield the base's answer, then the tuned model's.

        Raises:
            ValueError: if there is no room for an answer; the conversation is then unchanged.
        """
        text = text.encode("utf-8", "replace").decode()  # a terminal's stray bytes arrive as surrogates
        models = [model for model in (self.reference.ref_model, self.tuned) if model is not None]
        turns = {who: [*earlier, {"role": "user", "content": text}] for who, earlier in self.turns.items()}
        prompts = {who: self.prompt(turns[who]) for who in turns}
        options = options_that_fit(models, prompts.values(), self.options)
        settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "batch_tokens": 1}
        settings["stop"] = stop_tokens(models, options.tokenizer, options.start_id)
        settings["seed"] = options.seed + len(self.turns["base"]) if self.sampled else None
        for who, prompt in prompts.items():
            ids = prompt.tokens(options.tokenizer, options.start_id)
            with self.reference.base(self.tuned) if who == "base" else nullcontext(self.tuned) as model:
                (answer,) = continue_prompts(model, options.tokenizer, [ids], **settings)
            turns[who].append({"role": "assistant", "content": answer.answer})
            yield who, answer
        self.turns = turns

    def prompt(self, turns: list[dict[str, str]]) -> Prompt:
        """The prompt that a model continues."""
        tokenizer = self.options.tokenizer
        if not tokenizer.chat_template:
            return Prompt(turns[-1]["content"])
        return Prompt(rendered(turns, {}, tokenizer, "prompt", add_generation_prompt=True), chat=True)


def run_chat(config: ChatConfig) -> None:
    """Print both answers to `config.prompt`, or to each prompt that the user types."""
    tokenizer = load_tokenizer(config.base, field="base", **config.checkpoint)
    tokenizer = tokenizer_of_tuned(config.model, tokenizer, trust_remote_code=config.trust_remote_code)
    start = choose_start_token(tokenizer, config.start_token)
    options = Options(tokenizer, start.id, max_new_tokens=config.max_new_tokens, seed=config.seed)
    conversation = Conversation(*load_pair(config), options, config.sampled)
    if config.prompt is not None:
        return print_answers(conversation, config.prompt, config)
    turns = "in the chat template" if tokenizer.chat_template else "each continued as it is, without a chat template"
    print(f"Prompts are {turns}. /new begins a new conversation, Ctrl-C stops an answer; /quit or Ctrl-D ends.")
    for text in typed_prompts():
        if text == "/new":
            conversation.turns = {who: [] for who in conversation.turns}
            continue
        try:
            print_answers(conversation, text, config)
        except Terminated:
            raise
        except KeyboardInterrupt:
            print("\n[stopped; the conversation is as before this prompt]")
        except ValueError as error:
            print(f"{visible(one_line(error))}; or start over with /new", file=sys.stderr)


def load_pair(config: ChatConfig) -> tuple[PreTrainedModel, Reference]:
    """The tuned model and its base: an adapter's own model with the adapter off, if that is proven to be the base."""
    options: dict[str, Any] = {"device": default_device(), "field": "base", **config.loading}
    print("loading the models …", flush=True)
    base = load_model(config.base, **options)
    like: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, **loaded_as(base)}
    if adapted_model(config.model) is None:
        return load_model(config.model, **like), Reference(base)
    expected = probe(base)
    del base  # hold one model in memory
    tuned, reference = load_model(config.model, **like), Reference()
    try:
        reference.prove(tuned, expected)
    except ValueError:
        print(f"The model with its adapter off is not {visible(config.base)}: loading both models.", file=sys.stderr)
        return tuned, Reference(load_model(config.base, **options))
    return tuned, reference


def typed_prompts() -> Iterator[str]:
    """The lines that the user types, until /quit or the end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401 (arrow keys and history in `input`; Windows has its own)
    try:
        while (text := input("\n> ").strip()) != "/quit":
            if text:
                yield text
    except EOFError:
        print()


def print_answers(conversation: Conversation, text: str, config: ChatConfig) -> None:
    """Print each answer under the name of its model as soon as it is complete."""
    for who, answer in conversation.answers(text):
        cut = "" if answer.ended else f"\n[cut off after {answer.num_tokens} tokens]"
        answer_text = indent(visible_text(answer.text.strip()) + cut, "  ")
        print(f"\n{who}: {visible(getattr(config, who))}\n{answer_text}", flush=True)


VERB = Verb(
    name="chat",
    example="retain chat --base M --model out/",
    settings=(ChatConfig,),
    run=run_chat,
    resume="start it again",
    groups={"dtype": "How models are loaded"},
)
