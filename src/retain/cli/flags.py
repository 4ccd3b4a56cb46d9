"""Flags and YAML of the verbs, read by `trl.TrlParser` from dataclasses; what only accelerate knows goes to it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from retain.checks import Unchosen, check_type, hints_of

# Flags that take several values and may be given several times.
LISTS = {"retention", "new_task", "choices", "refusals", "harmless", "train_dataset", "pair", "runs"}
# What stands in front of a verb's first flag belongs to this one.
FIRST = {"export": "--replay_dataset", "fit": "--runs", "predict": "--law", "sweep": "--sweep"}


class Launched(Exception):
    """The work was done, or failed, in processes that `accelerate launch` started."""


def types_of(verb: str) -> tuple[Any, ...]:
    """The dataclasses of a verb: its own, and for training those of TRL or transformers before it."""
    from retain.cli import config

    if verb == "finetune":
        from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

        return ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, config.FinetuneConfig
    if verb == "pretrain":
        from retain.lab.pretrain import PretrainArguments, PretrainConfig

        return PretrainArguments, PretrainConfig
    return (getattr(config, f"{verb.capitalize()}Config"),)


def parser_of(verb: str) -> Any:
    """A verb's parser, which raises where argparse would end the process, and names unknown flags before all else."""
    from trl import TrlParser

    class Parser(TrlParser):
        of_config: list[str]

        def error(self, message: str) -> None:
            raise ValueError(message)

        def set_defaults_with_config(self, **values: Any) -> list[str]:
            for name, value in values.items():
                hint = next((hints_of(kind)[name] for kind in types_of(verb) if name in hints_of(kind)), Any)
                if value is not None and not isinstance(value, str) and name != "model_size":  # text: like a flag's
                    check_type(name, value, hint)
            self.of_config = super().set_defaults_with_config(**values)
            return self.of_config

        def parse_args_into_dataclasses(self, args: list[str], **options: Any) -> tuple[Any, ...]:
            refuse_unknown([*self.of_config, *self.parse_known_args(args)[1]], verb)
            return super().parse_args_into_dataclasses(args, **options)

    parser = Parser(types_of(verb), prog=f"retain {verb}", allow_abbrev=False)
    parser.of_config = []
    for action in parser._actions:
        if action.nargs == 0 and action.const is False:  # --no_x, which has the help of --x
            action.help = f"Set {action.dest} false."
    if verb == "finetune":
        set_defaults_for_here(parser)
    return parser


def set_defaults_for_here(parser: Any) -> None:
    """TRL's defaults are for a GPU, and a row of 1024 tokens for a model that has room for it."""
    from retain.models.description import default_device

    parser.set_defaults(max_length=Unchosen(parser.get_default("max_length")))
    if default_device() == "cpu":
        parser.set_defaults(use_cpu=True, bf16=False)


def check(commands: Iterable[list[str]], verb: str) -> None:
    """Refuse flags that the verb does not know, or whose values have another type, without making anything of them.

    Raises:
        ValueError: naming the first.
    """
    parser = parser_of(verb)
    for argv in commands:
        refuse_unknown(parser.parse_known_args(words_of(argv, verb))[1], verb)


def refuse_unknown(unknown: list[str], verb: str) -> None:
    """Refuse flags of which neither the verb nor, in training, accelerate's launcher knows anything.

    Raises:
        ValueError: naming the first.
    """
    if unknown and verb == "finetune":
        launcher_arguments(unknown)
    elif unknown:
        raise ValueError(f"{unknown[0]}: not known here; `retain {verb} --help` lists what is")


def parse(argv: list[str], verb: str) -> tuple[Any, ...]:
    """Read a verb's flags and `--config` into its dataclasses.

    Raises:
        ValueError: for an unknown flag or key, or a value that does not fit.
    """
    import yaml

    parser = parser_of(verb)
    try:
        *configs, of_config, of_flags = parser.parse_args_and_config(
            words_of(argv, verb), return_remaining_strings=True, separate_remaining_strings=True
        )
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"config: not YAML{where}; {getattr(error, 'problem', None) or 'check the file'}") from error
    except IndexError as error:
        raise ValueError("config: --config needs a file") from error
    if unknown := of_config + of_flags:
        launch_if_asked(argv, unknown, of_flags)
    return tuple(configs)


def launcher_arguments(unknown: list[str], rest: Sequence[str] = ()) -> Any:
    """What `accelerate launch` makes of flags that are not ours, before the command line of our module.

    Raises:
        ValueError: for what accelerate does not know either.
    """
    from importlib.resources import files

    from accelerate.commands.launch import launch_command_parser

    parser, launch = launch_command_parser(), list(unknown)
    if "--accelerate_config" in launch:  # a file, or the name of one that TRL ships
        at = launch.index("--accelerate_config")
        shipped = files("trl.accelerate_configs").joinpath(f"{launch[at + 1]}.yaml")
        launch[at : at + 2] = ["--config_file", str(shipped) if shipped.is_file() else launch[at + 1]]

    def fail(message: str) -> None:
        raise ValueError(f"{unknown[0]}: not known here nor to accelerate; `retain finetune --help` lists what is")

    parser.error = fail
    arguments = parser.parse_args([*launch, "-m", "retain", "finetune", *rest])
    if arguments.training_script != "retain":  # a word that belongs to no flag
        raise ValueError(f"{arguments.training_script}: belongs to no flag; `retain finetune --help` lists them")
    return arguments


def launch_if_asked(argv: list[str], unknown: list[str], of_flags: list[str]) -> None:
    """Hand what only accelerate knows (`num_processes`, `accelerate_config`, …) to its launcher, as `trl sft` does.

    In a process that was launched they have done their work.

    Raises:
        ValueError: for what accelerate does not know either.
        Launched: when the launched processes are through.
    """
    from accelerate.commands.launch import launch_command

    rest = iter(of_flags)
    skipped = next(rest, None)
    kept = []
    for flag in argv:
        if flag == skipped:
            skipped = next(rest, None)
        else:
            kept.append(flag)
    arguments = launcher_arguments(unknown, kept)
    if "WORLD_SIZE" not in os.environ and "RETAIN_LAUNCHED" not in os.environ:
        os.environ["RETAIN_LAUNCHED"] = "1"
        try:
            launch_command(arguments)
        finally:
            del os.environ["RETAIN_LAUNCHED"]
        raise Launched


def repeated_lists(argv: list[str]) -> list[str]:
    """Gather `--retention a=x --retention b=y` into `--retention a=x b=y`; argparse would keep only the last."""
    gathered: dict[str, list[str]] = {}
    rest: list[str] = []
    at = 0
    while at < len(argv):
        flag, _, value = argv[at].partition("=")
        at += 1
        if flag == "--config" and value:  # which TrlParser would not see
            rest += [flag, value]
            continue
        if not flag.startswith("--") or flag.replace("-", "_").lstrip("_") not in LISTS:
            rest.append(argv[at - 1])
            continue
        flag = "--" + flag.lstrip("-").replace("-", "_")  # argparse takes either
        values = gathered.setdefault(flag, [])
        if value:
            values.append(value)
            continue
        while at < len(argv) and not argv[at].startswith("--"):
            values.append(argv[at])
            at += 1
    for flag, values in gathered.items():
        rest += [flag, *values]
    return rest


def words_of(argv: list[str], verb: str) -> list[str]:
    """A command line as argparse takes it."""
    unnamed = verb in FIRST and argv and not argv[0].startswith("-")
    return repeated_lists([FIRST[verb], *argv] if unnamed else argv)
