"""The plugin for Axolotl: against its own package where it is installed, else against a stand-in for what it uses.

With axolotl 0.19.0 (`pip install --no-deps`) the tests are the same; its settings are then checked by its own classes.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import transformers
from conftest import make_model, make_tokenizer, save_model
from peft import LoraConfig, get_peft_model
from training_runs import LORA, SETTINGS, TOKENS, assert_kl_rises_from_zero, difference, logged, points, train, weights

from retain import ReplayConfig, ReplayTrainer
from retain.sampling.write import sample_replay


class PlainTrainer(transformers.Trainer):
    """As Axolotl's: it takes more than transformers' does, and divides the loss by the micro-batches itself."""

    def __init__(self, *args: Any, eval_data_collator: Any = None, dataset_tags: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


STAND_IN = {
    "integrations.base": {"BasePlugin": type("BasePlugin", (), {})},
    "utils.logging": {"get_logger": logging.getLogger},
    "core.trainers": {"AxolotlTrainer": PlainTrainer},
}
if is_stand_in := find_spec("axolotl") is None:
    for path, content in STAND_IN.items():
        for name in ("axolotl", f"axolotl.{path.split('.')[0]}", f"axolotl.{path}"):
            sys.modules.setdefault(name, ModuleType(name))
        vars(sys.modules[f"axolotl.{path}"]).update(content)

from retain.training.axolotl_plugin import AxolotlReplayConfig, RetainArgs, RetainPlugin  # noqa: E402

TEXTS = [f"seven birds sing of rain {at} times in the old town by the stone" for at in range(8)]


class Settings(dict[str, Any]):
    """As Axolotl's: what is not there is None."""

    def __missing__(self, name: str) -> None:
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("axolotl")
    model = make_model()
    sample_replay(model, make_tokenizer(), folder / "replay", num_rows=12, max_length=16)
    (folder / "wiki.txt").write_text("\n\n".join(TEXTS))
    save_model(folder / "base")
    return folder


def arguments(folder: Path, **changes: Any) -> Any:
    if is_stand_in:
        kind: Any = transformers.TrainingArguments
    else:
        from axolotl.core.training_args import AxolotlTrainingArguments as kind
    return kind(output_dir=str(folder), **{**SETTINGS, **changes})


def trained(folder: Path, where: Path, model: Any = None, args: Any = None, **settings: Any) -> Any:
    given = {
        "replay_dataset": str(folder / "replay"),
        "replay_coef": 2.0,
        "per_device_replay_batch_size": 4,
        **settings,
    }
    plugin = RetainPlugin()
    kind = plugin.get_trainer_cls(Settings(retain=given | settings))
    trainer = kind(
        model=model or make_model(), train_dataset=TOKENS, eval_dataset=TOKENS.select(range(4)), callbacks=[],
        args=arguments(where, **(args or {})), processing_class=make_tokenizer(), dataset_tags=["new.jsonl"],
        data_collator=transformers.default_data_collator, eval_data_collator=transformers.default_data_collator,
    )  # fmt: skip
    plugin.post_trainer_create(Settings(), trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("lora", [False, True])
def test_it_protects_as_the_mixin_does(folder, tmp_path, caplog, lora):
    base = lambda: get_peft_model(make_model(), LoraConfig(**LORA)) if lora else make_model()  # noqa: E731
    with caplog.at_level(logging.INFO, logger="axolotl.retain"):
        trainer = trained(folder, tmp_path / "plugin", base())
    assert_kl_rises_from_zero(trainer)
    assert any(record.message.startswith("protection: kl, coefficient 2, reference") for record in caplog.records)
    own = ReplayConfig(replay_coef=2.0, per_device_replay_batch_size=4)
    same = train(tmp_path / "own", str(folder / "replay"), base(), ReplayTrainer, own, train_dataset=TOKENS)
    assert difference(weights(trainer.model), weights(same.model)) < 1e-6


def test_micro_batches_change_nothing_though_its_trainer_divides_the_loss_itself(folder, tmp_path):
    whole = trained(folder, tmp_path / "whole")
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    parts = trained(folder, tmp_path / "split", args=split, per_device_replay_batch_size=2)
    assert logged(parts, "replay/kl") == pytest.approx(logged(whole, "replay/kl"), rel=0.02, abs=1e-6)
    assert difference(weights(whole.model), weights(parts.model)) < 2e-4


def test_texts_are_measured_at_every_evaluation(folder, tmp_path):
    args = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
    trained(folder, tmp_path, args=args, retention=[f"wiki={folder / 'wiki.txt'}"], replay_max_length=16)
    measured = points(tmp_path, "retention/wiki/ref_kl")
    assert measured[0] == pytest.approx(0, abs=1e-6)
    assert measured[2] > 1e-4


def test_its_settings_are_those_of_replay_config():
    assert RetainPlugin().get_input_args() == "retain.training.axolotl_plugin.RetainArgs"
    given = {"replay_dataset": "replay/", "replay_coef": 3, "retention": ["wiki=wiki.txt"]}
    assert RetainArgs(retain=given).model_dump() == {"retain": given}
    assert AxolotlReplayConfig.of(given).objective.name == "kl"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"retain": {"replay_coeff": 1}}, "retain: 'replay_coeff' is no setting; use one of replay_objective, "),
        ({"retain": {"replay_coef": -1}}, "replay_coef: -1 does not fit"),
        ({"retain": {"retention": ["wiki.txt"]}}, "retention: 'wiki.txt'"),
        ({}, "Field required"),
    ],
)
def test_wrong_settings_end_before_a_model_is_loaded(given, words):
    with pytest.raises(ValueError, match=words):
        RetainArgs(**given)


@pytest.mark.parametrize("name", ["rl", "reward_model"])
def test_a_trainer_of_another_kind_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: 'dpo' brings another trainer; put ReplayMixin before it"):
        RetainPlugin().get_trainer_cls(Settings({name: "dpo", "retain": {}}))


def test_a_run_that_another_plugin_leaves_without_protection_is_stopped():
    with pytest.raises(ValueError, match="plugins: another one chose SimpleNamespace; name RetainPlugin first"):
        RetainPlugin().post_trainer_create(Settings(), SimpleNamespace())


@pytest.mark.skipif(is_stand_in, reason="axolotl is not installed")
def test_axolotl_itself_finds_the_plugin_and_checks_its_settings(folder, tmp_path):
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    given = {
        "base_model": str(folder / "base"), "datasets": [{"path": "new.jsonl", "type": "completion"}],
        "micro_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "sequence_len": 32,
        "plugins": ["retain.training.axolotl_plugin.RetainPlugin"], "retain": {"replay_coef": 2},
    }  # fmt: skip
    prepare_plugins(DictDefault(given))
    checked = validate_config(DictDefault(given))
    kind = PluginManager.get_instance().get_trainer_cls(checked)
    assert kind.__name__ == "ReplayAxolotlTrainer"
    with pytest.raises(ValueError, match="'replay_coeff' is no setting"):
        validate_config(DictDefault(given | {"retain": {"replay_coeff": 2}}))
