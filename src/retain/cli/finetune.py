"""`retain finetune`: what `trl sft` does, with replay. A config written for `trl sft` works unchanged."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from retain.checks import Unchosen, check_number, setting
from retain.cli.flags import Verb
from retain.cli.sample import sample_with_bar
from retain.cli.settings import RETENTION_HELP, StartTokenSettings
from retain.data.rows import is_local_file, load_from_hub, named_sources, read_rows
from retain.files import exclusive, visible
from retain.models.description import choose_start_token, default_device, length_that_fits
from retain.models.loading import load_tokenizer
from retain.replay.dataset import load_texts
from retain.sampling.write import default_store
from retain.training.beta2_half_life import apply_half_life, check_half_life, mean_row_length
from retain.training.config import ReplayConfig, StoppingConfig, check_arguments
from retain.training.protection import check_replay_every
from retain.training.retention import check_best_metric, retention_names
from retain.training.row_checks import check_columns, check_new_rows
from retain.training.stopping import StopAtLoss, check_same_run, check_stopping, checkpoint_to_resume, train
from retain.training.trainer import ReplaySFTTrainer
from retain.training.trainer_checks import check_lora_targets, expected_steps, load_for_training


@dataclass(kw_only=True)
class FinetuneConfig(ReplayConfig, StoppingConfig, StartTokenSettings):
    """What `retain finetune` takes beside the flags of `trl sft`."""

    replay_dataset: str | None = setting(
        None,
        "Replay rows: a folder that `retain sample` wrote, a JSONL, text or Parquet file of real text, or 'self' to "
        "sample from the model first. [required, unless replay_objective is kl_new or replay_coef 0]",
    )
    replay_num_rows: int = setting(256, "Rows to sample before training, with replay_dataset self.", low=1)
    eval_dataset_name: str | None = setting(
        None, "Held-out rows of the new task: a file or Hub id. Default: the dataset's test split."
    )
    retention: list[str] = setting(list, RETENTION_HELP)
    retention_max_documents: int = setting(
        64,
        "Documents of each retention text that are measured during training, the first max_length tokens of each; "
        "`retain measure` reads whole documents unless --max_windows is 1.",
        low=1,
    )
    early_stopping_patience: int | None = setting(
        None,
        "End after this many evaluations without a better metric_for_best_model, e.g. retention/wiki/ref_kl. A resumed "
        "run counts from 0.",
        low=1,
    )


def set_defaults_of_machine(parser: Any) -> None:
    """TRL's defaults are for a GPU, and a row of 1024 tokens for a model that has room for it."""
    parser.set_defaults(max_length=Unchosen(parser.get_default("max_length")))
    if default_device() == "cpu":
        parser.set_defaults(use_cpu=True, bf16=False)


def run_finetune(
    script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, config: FinetuneConfig
) -> None:
    """Finetune and save, alone in the folder; the dataclasses are TRL's, and `config` is ours."""
    with exclusive(Path(training_args.output_dir)) if training_args.process_index == 0 else nullcontext():
        if not model_args.model_name_or_path:
            raise ValueError("model: missing; give --model")
        check_arguments(training_args, config.replay_objective)
        checkpoint = checkpoint_to_resume(training_args)
        speaks = training_args.process_index == 0
        say = (lambda line: print(visible(str(line)))) if speaks else lambda line: None
        trainer = make_sft_trainer(script_args, training_args, model_args, dataset_args, config, say)
        if checkpoint is not None:
            check_same_run(checkpoint, training_args, settings_of_training(trainer))
        watch = None if config.stop_at_loss is None else StopAtLoss(config.stop_at_loss)
        if watch is not None:
            trainer.add_callback(watch)
        if config.early_stopping_patience is not None:
            trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
        if config.adam_beta2_half_life_tokens is not None:  # the optimizer is made when training begins
            length = mean_row_length(trainer.train_dataset, training_args.max_length)
            say(apply_half_life(training_args, config.adam_beta2_half_life_tokens, length))
        for line in trainer.protection():
            say(line)
        if training_args.resume_from_checkpoint and checkpoint is None:
            say(f"no whole checkpoint in {training_args.output_dir}: beginning anew")
        train(trainer, checkpoint)
        trainer.evaluate_retention()
        save_card(trainer, script_args.dataset_name)
        results = [watch, *trainer.retention_lines(), trainer.budget and trainer.budget.verdict()]
        for result in (f"model: {training_args.output_dir}", *filter(None, results)):
            say(result)
        trainer.end()


def make_sft_trainer(
    script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, config: FinetuneConfig, say: Any
) -> ReplaySFTTrainer:
    """The trainer with model, rows and texts; what is cheap to check is checked before the model is loaded."""
    if training_args.max_steps == 0:  # of which transformers makes one step
        raise ValueError("max_steps: 0 does not fit; use at least 1, or leave it out to count num_train_epochs")
    if training_args.max_steps < 0:
        check_number("num_train_epochs", training_args.num_train_epochs, low=1e-6)
    if model_args.use_peft:
        check_number("lora_r", model_args.lora_r, low=1, integer=True)
    check_half_life(training_args, config.adam_beta2_half_life_tokens)
    check_stopping(training_args, config.stop_at_loss, config.early_stopping_patience)
    sources = named_sources(config.retention, "retention")
    check_best_metric(training_args, retention_names(sources))
    train_dataset, eval_dataset = new_rows(script_args, dataset_args, training_args, config)
    name = model_args.model_name_or_path
    options = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    tokenizer = load_tokenizer(name, **options)
    retention = {text: load_texts(path, tokenizer, config.retention_max_documents) for text, path in sources.items()}
    if default_device() == "cpu":
        say(f"no accelerator: training on the CPU in {'bfloat16' if training_args.bf16 else 'float32'}")
    say(f"document start: {choose_start_token(tokenizer, config.start_token)}")
    quantization, adapter = get_quantization_config(model_args), get_peft_config(model_args)
    check_replay_every(config, expected_steps(training_args, train_dataset))  # before rows are drawn for it
    of_model = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype}
    training_args.model_init_kwargs = {**options, **of_model, **(training_args.model_init_kwargs or {})}
    model = load_for_training(name, training_args, {"quantization_config": quantization, "processing_class": tokenizer})
    if isinstance(training_args.max_length, Unchosen):  # TRL's default, which the model may have no room for
        training_args.max_length = length_that_fits(model, training_args.max_length)
    if adapter is not None:
        check_lora_targets(model, adapter)
    replay = config.replay_dataset
    if replay == "self":
        with training_args.main_process_first(local=False, desc="sampling replay"):
            replay = _sample_own(model, tokenizer, training_args, config)
    trainer = ReplaySFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=adapter,
        replay_config=config,
        replay_dataset=replay,
        retention_datasets=retention,
        start_token=config.start_token,
    )
    check_new_rows(trainer.train_dataset, trainer.model, packed=training_args.packing or training_args.padding_free)
    check_replay_every(config, expected_steps(training_args, trainer.train_dataset))  # packed
    return trainer


def settings_of_training(trainer: ReplaySFTTrainer) -> dict[str, Any]:
    """The parts of `retain_config.json` on which the steps of a run depend."""
    found, config = trainer.replay.settings(trainer), trainer.replay.config
    free = {field.name for field in fields(FinetuneConfig)} - {field.name for field in fields(ReplayConfig)}
    if config.per_device_replay_batch_size is None:  # it follows the batch, which may have been made smaller
        free.add("per_device_replay_batch_size")
    if rows := found["replay_dataset"]:
        drawn = rows["manifest"] or {}
        drawn = {name: drawn[name] for name in ("model_fingerprint", "seed") if name in drawn}
        rows = {"num_rows": rows["num_rows"], "manifest": drawn}
    return {
        "replay": {name: value for name, value in found["replay"].items() if name not in free},
        "replay_dataset": rows,
        "num_params": found["num_params"],
        "new_rows": found["new_rows"],
    }


def save_card(trainer: ReplaySFTTrainer, dataset_name: str | None) -> None:
    """Write the model card, and push to the Hub where the arguments say so; a file has no page on the Hub to name."""
    named = {"dataset_name": None if is_local_file(dataset_name or "") else dataset_name}
    trainer.create_model_card(model_name=Path(trainer.args.output_dir).name, **named)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**named)


def new_rows(script_args: Any, dataset_args: Any, training_args: Any, config: FinetuneConfig) -> tuple[Any, Any]:
    """Training and evaluation rows of the new task: as `trl sft` reads them, or from a local file."""
    name, evaluate = script_args.dataset_name, training_args.eval_strategy != "no"
    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    elif not name:
        raise ValueError("dataset_name: missing; give --dataset_name FILE or a Hub id")
    elif is_local_file(name):
        dataset = {script_args.dataset_train_split: read_rows(name)}
    else:
        options = {"configuration": script_args.dataset_config, "streaming": script_args.dataset_streaming}
        dataset = load_from_hub(name, "dataset_name", **options)
    split = script_args.dataset_train_split
    if split not in dataset:
        raise ValueError(f"dataset_train_split: {split!r} is not in {name!r}, which has {', '.join(dataset)}")
    check_columns(name, dataset[split], training_args.dataset_text_field)
    if config.eval_dataset_name:
        return dataset[split], read_rows(config.eval_dataset_name, split=script_args.dataset_test_split)
    if evaluate and script_args.dataset_test_split not in dataset:
        raise ValueError(
            f"eval_strategy: {str(training_args.eval_strategy.value)!r}, but {name!r} has no split "
            f"{script_args.dataset_test_split!r}; give --eval_dataset_name FILE, or eval_strategy no"
        )
    return dataset[split], dataset[script_args.dataset_test_split] if evaluate else None


def _sample_own(model: Any, tokenizer: Any, training_args: Any, config: FinetuneConfig) -> str:
    """Rows of the model that will be trained, drawn on the device of training; the model moves back afterwards."""
    folder = Path(training_args.output_dir) / "replay"
    if training_args.process_index == 0:
        found = model.device
        if not (getattr(model, "is_quantized", False) or hasattr(model, "hf_device_map")):  # these stay where they are
            model.to(training_args.device)
        length = config.replay_max_length or training_args.max_length or Unchosen(512)
        wanted = config.objective.takes_stored and config.replay_reference in ("auto", "cache")
        sample_with_bar(
            model,
            tokenizer,
            str(folder),
            config.replay_num_rows,
            max_length=length,
            seed=training_args.seed,
            start_token=choose_start_token(tokenizer, config.start_token),
            store_reference=default_store(model, folder, config.replay_num_rows, length, wanted=wanted),
        )
        if model.device != found:
            model.to(found)
    return str(folder)


VERB = Verb(
    name="finetune",
    example="retain finetune --config sft.yaml --replay_dataset replay/",
    settings=(ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, FinetuneConfig),
    run=run_finetune,
    resume="run the same command with --resume_from_checkpoint true to resume from the last checkpoint",
    groups={
        "eval_dataset_name": "What is measured, and when the run ends",
        "replay_objective": "How replay protects",
        "adam_beta2_half_life_tokens": "Further settings",
    },
    borrowed={
        "model": "Hub id or folder of the model to finetune, TRL's --model_name_or_path. [required]",
        "dataset_name": "Rows of the new task: a file or Hub id. [required]",
        "output_dir": "Folder for the model or adapter, metrics.jsonl and retain_config.json.",
        "use_peft": "Train a LoRA (true) in place of all weights; --lora_r sets its rank.",
        "learning_rate": "Peak learning rate.",
        "max_steps": "Optimizer steps; --num_train_epochs counts passes over the rows instead.",
    },
    aliases={"model": "model_name_or_path"},
    set_defaults=set_defaults_of_machine,
)
