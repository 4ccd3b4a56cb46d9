"""`retain chat`: both models' own greedy answers, turn after turn; an adapter's base is proven, and held once."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from conftest import CHATML, make_model, make_tokenizer, save_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from retain.cli import chat
from retain.cli.main import main
from retain.cli.signals import Terminated
from retain.files import visible_text
from retain.measuring.generations import Written


def save_adapter(folder: Path, base: Path, init: Any = True) -> Path:
    """A LoRA that changes what its base says."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=init, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    tuned.save_pretrained(folder)
    return folder


def greedy(folder: Path, prompt: str, max_new_tokens: int = 6, opened: bool = True) -> str:
    """What transformers' own `generate` writes after a prompt."""
    tokenizer, model = make_tokenizer(), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = [3] * opened + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    how = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": [2, 3], "pad_token_id": 4}
    written = model.generate(torch.tensor([ids]), **how)[0, len(ids) :]
    return str(tokenizer.decode(written, skip_special_tokens=True))


def shown(folder: Path, prompt: str) -> str:
    """The same, as it is printed."""
    return visible_text(greedy(folder, prompt).strip())


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """The user's input; then the end of it."""
    typed = iter(lines)

    def answer(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)


def spoken(output: str) -> list[tuple[str, str]]:
    """(who, answer) in the order in which they were printed."""
    blocks = [block.partition("\n") for block in output.strip().split("\n\n")]
    found = [(head.partition(":")[0], body.partition("\n  [cut off")[0]) for head, _, body in blocks]
    return [(who, dedent(body).strip()) for who, body in found if who in ("base", "model")]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were loaded."""
    names: list[str] = []

    def load(name: str, **options: Any) -> Any:
        names.append(Path(name).name)
        return load_model(name, **options)

    load_model = chat.load_model
    monkeypatch.setattr(chat, "load_model", load)
    return names


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    save_model(root / "base")
    save_model(root / "full", seed=1)
    save_adapter(root / "lora", root / "base")
    save_adapter(root / "pissa", root / "base", "pissa")
    return root


def command(world: Path, model: str, *more: str) -> list[str]:
    return ["chat", "--base", str(world / "base"), "--model", str(world / model), "--max_new_tokens", "6", *more]


@pytest.mark.parametrize("model", ["full", "lora"])
def test_one_prompt_gets_both_greedy_answers(world, capsys, model, loaded):
    assert main(command(world, model, "--prompt", "the fox")) == 0
    answers = dict(spoken(capsys.readouterr().out))
    assert answers == {"base": shown(world / "base", "the fox"), "model": shown(world / model, "the fox")}
    assert answers["base"] != answers["model"]
    assert loaded == ["base", model]


def test_by_default_an_answer_is_as_long_as_the_models_have_room_for(world, capsys):
    argv = ["chat", "--base", str(world / "base"), "--model", str(world / "full"), "--prompt", "the fox"]
    assert main(argv) == 0
    room = 128 - len([3, *make_tokenizer()("the fox", add_special_tokens=False)["input_ids"]])
    assert f"[cut off after {room} tokens]" in capsys.readouterr().out
    assert main([*argv, "--max_new_tokens", "256"]) == 1
    assert "max_new_tokens: 256 after a prompt of " in capsys.readouterr().err


@pytest.mark.parametrize(("model", "held"), [("full", "base"), ("lora", None), ("pissa", "base")])
def test_the_base_of_an_adapter_is_held_once_where_it_is_shown_to_be_the_base(world, capsys, model, held):
    config = chat.ChatConfig(base=str(world / "base"), model=str(world / model))
    tuned, reference = chat.load_pair(config)
    assert (reference.ref_model is None) == (held is None)
    assert ("is not" in capsys.readouterr().err) == (model == "pissa")
    ids = torch.tensor([[3, 7, 9]])
    with reference.base(tuned) as base:
        assert torch.allclose(base(input_ids=ids).logits, make_model()(input_ids=ids).logits, atol=1e-4)


def test_several_turns_in_the_chat_template_each_model_with_its_own_answers(world, tmp_path, capsys, monkeypatch):
    for name in ("base", "full"):
        folder = tmp_path / name
        AutoModelForCausalLM.from_pretrained(world / name).save_pretrained(folder)
        make_tokenizer(template=CHATML).save_pretrained(folder)
    say(monkeypatch, "a fox", "", "rain", "/new", "rain", "/quit", "never")
    assert main(command(tmp_path, "full")) == 0
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    expected = []
    for second in (True, False):
        histories = dict.fromkeys(("base", "full"), "")
        for prompt in ("a fox", "rain") if second else ("rain",):
            for name in histories:
                histories[name] += turn.format(prompt)
                answer = greedy(tmp_path / name, histories[name], opened=False)
                expected.append(("base" if name == "base" else "model", visible_text(answer.strip())))
                histories[name] += f"{answer}<|im_end|>\n"
    assert spoken(capsys.readouterr().out) == expected


def test_a_prompt_without_room_ends_nothing(world, capsys, monkeypatch):
    say(monkeypatch, "rain " * 140, "rain")
    assert main(command(world, "full")) == 0
    output = capsys.readouterr()
    assert output.err.startswith("max_new_tokens: 6 after a prompt of ")
    assert len(output.err.splitlines()) == 1
    assert dict(spoken(output.out))["base"] == shown(world / "base", "rain")
    assert main(command(world, "full", "--prompt", "rain " * 140)) == 1


def test_a_prompt_that_the_chat_template_refuses_is_named_as_the_prompt(tmp_path, capsys):
    save_model(tmp_path / "base")
    make_tokenizer(template="{{ raise_exception('no') }}").save_pretrained(tmp_path / "base")
    assert main(command(tmp_path, "base", "--prompt", "fox")) == 1
    assert "retain chat: prompt: the chat template refuses a chat of user (no); give" in capsys.readouterr().err


@pytest.mark.parametrize(("signal", "code"), [(KeyboardInterrupt, 0), (Terminated, 143)])
def test_ctrl_c_stops_an_answer_and_not_the_conversation(world, capsys, monkeypatch, signal, code):
    def stopped(*given: Any, **how: Any) -> Any:
        monkeypatch.setattr(chat, "continue_prompts", continue_prompts)
        raise signal

    continue_prompts = chat.continue_prompts
    monkeypatch.setattr(chat, "continue_prompts", stopped)
    say(monkeypatch, "the fox", "rain")
    assert main(command(world, "lora")) == code
    output = capsys.readouterr().out
    assert ("[stopped; " in output) == (code == 0)
    assert spoken(output.partition("prompt]")[2]) == ([] if code else [
        ("base", shown(world / "base", "rain")), ("model", shown(world / "lora", "rain"))
    ])  # fmt: skip


def test_bytes_that_are_no_text_end_nothing(world, capsys):
    assert main(command(world, "full", "--prompt", "rain \udce9")) == 0
    assert dict(spoken(capsys.readouterr().out))["base"] == shown(world / "base", "rain ?")


def test_an_answer_cannot_act_on_the_terminal_and_says_that_it_was_cut(world, capsys, monkeypatch):
    evil = Written("\x1b[2Jred\nblue", 6, False, False, "", "")
    monkeypatch.setattr(chat, "continue_prompts", lambda *_, **__: [evil])
    assert main(command(world, "full", "--prompt", "x")) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "  \\x1b[2Jred\n  blue\n  [cut off after 6 tokens]\n" in output


def test_sampled_answers_follow_the_seed(world, capsys):
    def answers(seed: str) -> str:
        assert main(command(world, "full", "--prompt", "rain", "--sampled", "true", "--seed", seed)) == 0
        return capsys.readouterr().out

    assert answers("1") == answers("1") != answers("2")
