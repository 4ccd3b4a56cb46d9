"""What docs/recipes.md and docs/faq.md say was run: neighbours' trainers and settings, on tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import yaml
from conftest import CHATML, make_model, make_texts, make_tokenizer, save_model
from datasets import Dataset
from peft import LoraConfig
from training_runs import LORA, SETTINGS, TOKENIZER, assert_kl_rises_from_zero, difference, logged, rows_of, weights
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig

from retain import ReplayConfig, ReplayMixin, ReplaySFTTrainer, load_model
from retain.cli.main import main
from retain.files import read_jsonl

RECIPES = Path(__file__).parents[2] / "docs" / "recipes.md"
TEXTS = make_texts(24)
COMMON = {**SETTINGS, "max_steps": 3, "lr_scheduler_type": "linear", "seed": 1}


def sft(folder: Path, model: Any, *, rows: Any = None, tokenizer: Any = TOKENIZER, **changes: Any) -> ReplaySFTTrainer:
    return ReplaySFTTrainer(
        model=model,
        args=SFTConfig(str(folder), **{**COMMON, "max_length": 64, **changes}),
        train_dataset=Dataset.from_list(rows or [{"text": text} for text in TEXTS]),
        processing_class=tokenizer,
        replay_config=ReplayConfig(per_device_replay_batch_size=2),
        replay_dataset=rows_of(model),
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    save_model(folder / "model", scale=2.0)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    sample = f"sample --model {folder}/model --output_dir {folder}/replay --num_rows 4 --max_length 24"
    assert main(sample.split()) == 0
    return folder


# trl sft


def test_one_file_for_trl_sft_and_for_us(world, tmp_path, capsys):
    """The YAML of the page, with a tiny model in it, through TRL's own script and through `retain finetune`."""
    from trl.scripts import sft as script

    page = yaml.safe_load(re.search(r"```yaml\n# sft.yaml\n(.*?)```", RECIPES.read_text(), re.DOTALL)[1])
    page |= {"model_name_or_path": str(world / "model"), "max_steps": 2, "max_length": 24, "lora_r": 2}
    page |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    ours, theirs = ({**page, "output_dir": str(tmp_path / name)} for name in ("ours", "theirs"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text((world / "rows.jsonl").read_text())
    config = tmp_path / "sft.yaml"
    config.write_text(yaml.safe_dump({**theirs, "dataset_name": str(tmp_path / "data")}))
    types = (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    script.main(*trl.TrlParser(types).parse_args_and_config(["--config", str(config)]))
    config.write_text(yaml.safe_dump({**ours, "dataset_name": str(world / "rows.jsonl")}))
    assert main(["finetune", "--config", str(config), "--replay_dataset", str(world / "replay")]) == 0
    for name in ("ours", "theirs"):
        assert (tmp_path / name / "adapter_model.safetensors").exists()


def test_a_run_without_protection_says_so(world, tmp_path, capsys):
    command = f"finetune --model {world}/model --dataset_name {world}/rows.jsonl --output_dir {tmp_path}/o"
    plain = "--max_steps 1 --use_cpu true --bf16 false --report_to none --save_strategy no --max_length 24"
    assert main([*command.split(), *plain.split(), "--replay_coef", "0"]) == 0
    assert "protection: none (replay_coef 0)" in capsys.readouterr().out


def test_one_row_at_a_time_in_bfloat16(world, tmp_path, capsys):
    """The commands of the page, with a tiny model and the optimizer that is installed."""
    page = re.search(r"## Full finetuning on one GPU.*?```bash\n(.*?)```", RECIPES.read_text(), re.DOTALL)[1]
    names = {
        "M": f"{world}/model",
        "rows.jsonl": f"{world}/rows.jsonl",
        "replay/": f"{tmp_path}/r",
        "out": f"{tmp_path}/o",
    }
    sampled, tuned = (
        [names.get(word, word) for word in line.split()[1:]]
        for line in page.replace("\\\n", " ").replace("adamw_torch_8bit", "adafactor").strip().splitlines()
    )
    at = tuned.index("--optim_args")  # of torchao's
    del tuned[at : at + 2]
    assert main([*sampled, "--num_rows", "8", "--max_length", "24"]) == 0
    plain = "--max_steps 4 --use_cpu true --bf16 false --report_to none --save_strategy no --max_length 24"
    assert main([*tuned, *plain.split(), "--learning_rate", "1e-2", "--logging_steps", "1"]) == 0
    kl = [row["replay/kl"] for row in read_jsonl(tmp_path / "o" / "metrics.jsonl") if "replay/kl" in row]
    assert abs(kl[0]) < 1e-3 < kl[-1]


# Other trainers


def trainer_of(kind: str, folder: Path, model: Any, replay: ReplayConfig, **changes: Any) -> Any:
    host, settings = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    special: dict[str, Any] = {"max_length": 64}
    extra = {name: changes.pop(name) for name in ("peft_config",) if name in changes}
    rows: list[dict[str, Any]] = [{"prompt": text[:20]} for text in TEXTS]
    if kind in ("GRPO", "RLOO"):
        special = {"num_generations": 2, "max_completion_length": 8}
        extra["reward_funcs"] = changes.pop(
            "reward", lambda completions, **_: [float(len(set(c))) for c in completions]
        )
    elif kind == "DPO":
        extra["peft_config"] = LoraConfig(**LORA)
        rows = [{"prompt": text[:20], "chosen": text[20:60], "rejected": text[60:100]} for text in TEXTS]
    else:
        rows = [{"prompt": text[:20], "completion": text[20:40], "label": at % 2 == 0} for at, text in enumerate(TEXTS)]
    return type("Ours", (ReplayMixin, host), {})(
        model=model,
        args=settings(str(folder), **{**COMMON, **special, **changes}),
        train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER,
        replay_config=replay,
        replay_dataset=rows_of(load_model(model) if isinstance(model, str) else model),
        **extra,
    )


@pytest.mark.filterwarnings("ignore")  # hosts speak of themselves
@pytest.mark.parametrize("kind", ["DPO", "GRPO", "RLOO", "KTO"])
def test_mixin_over_other_trainers(kind, world, tmp_path):
    named = str(world / "model")  # KTO and RLOO load their reference by it
    model = named if kind == "GRPO" else load_model(named)
    trainer = trainer_of(kind, tmp_path, model, ReplayConfig(per_device_replay_batch_size=2))
    trainer.train()
    assert_kl_rises_from_zero(trainer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_accumulation_changes_nothing_in_grpo(lora, world, tmp_path):
    """All rewards are one, so the host's loss is 0 and the weights move by replay alone."""
    found = []
    for batch, steps in ((4, 1), (2, 2)):
        replay = ReplayConfig(replay_objective="ntp", replay_coef=2.0, per_device_replay_batch_size=batch)
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "optim": "sgd"}
        changes |= {"learning_rate": 0.3, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        changes |= {"reward": lambda completions, **_: [1.0] * len(completions)}
        changes |= {"peft_config": LoraConfig(**LORA)} if lora else {}
        torch.manual_seed(0)
        trainer = trainer_of("GRPO", tmp_path / str(batch), make_model(scale=2.0), replay, **changes)
        start = weights(trainer.model)
        trainer.train()
        found.append(weights(trainer.model))
    assert difference(*found) < 2e-6
    assert difference(found[0], start) > 1e-2


# Settings


def test_mixture_of_experts(tmp_path):
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=320, intermediate_size=64, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128, output_router_logits=True,
    )  # fmt: skip
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 3, 2, 4
    torch.manual_seed(0)
    trainer = sft(tmp_path, AutoModelForCausalLM.from_config(config).eval())
    trainer.train()
    assert_kl_rises_from_zero(trainer, risen=1e-6)


MARKED = CHATML.replace(
    "{{ message['content'] }}<|im_end|>",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}",
)


def test_assistant_only_loss_needs_marks_in_the_template(tmp_path):
    chats = [[{"role": "user", "content": t[:20]}, {"role": "assistant", "content": t[20:40]}] for t in TEXTS]
    rows, tokenizer = [{"messages": chat} for chat in chats], make_tokenizer()
    tokenizer.chat_template = MARKED
    trainer = sft(tmp_path / "marked", make_model(), rows=rows, tokenizer=tokenizer, assistant_only_loss=True)
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    assert 0 < int((labels != -100).sum()) < labels.numel() / 2
    trainer.train()
    assert logged(trainer, "replay/kl")[-1] > 1e-6
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match="not training-compatible"):
        sft(tmp_path / "plain", make_model(), rows=rows, tokenizer=tokenizer, assistant_only_loss=True)


def test_trackers_see_replay_and_retention(tmp_path):
    """A tracker of `report_to` is a callback; this one stands for them."""
    seen: dict[str, float] = {}

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.update(logs)

    model = make_model()
    trainer = ReplaySFTTrainer(
        model=model,
        args=SFTConfig(str(tmp_path), **COMMON, max_length=24, eval_strategy="steps", eval_steps=3),
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
        eval_dataset=Dataset.from_list([{"text": text} for text in make_texts(4, seed=8)]),
        processing_class=TOKENIZER,
        replay_dataset=rows_of(model),
        retention_datasets={"wiki": make_texts(4, seed=9)},
        callbacks=[Tracker()],
    )
    trainer.train()
    assert {"loss", "replay/kl", "replay/coef", "eval_loss", "retention/wiki/forgetting"} <= seen.keys()
