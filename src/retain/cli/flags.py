"""A verb of the command line: parsing of flags and YAML into its settings, by `trl.TrlParser`, and its help."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from retain.checks import check_type, hints_of, kinds_of

CONFIG_HELP = "YAML file with any of these settings; flags win."
METAVARS = {bool: "BOOL", int: "INT", float: "FLOAT", str: "TEXT"}
# Settings whose values are data, models, and data as name=file.
DATA = ("dataset_name", "eval_dataset_name", "replay_dataset", "train_dataset", "prompts")
MODELS = ("model", "model_name_or_path", "base", "judge")
NAMED_DATA = ("retention", "new_task", "choices", "refusals", "harmless", "behaviors")
FILES = ("config", "finetune_config", "sweep", "law")  # files to read that are never on the Hub
# argparse's error for a value of the wrong type, and what to ask for instead.
WRONG_TYPE = re.compile(r"argument --(\w+)\S*: invalid (int|float) value: (.*)")
NUMBERS = {"int": "a whole number", "float": "a number"}
HELP_WIDTH = 26  # columns for the flags, left of their help


@dataclasses.dataclass(frozen=True)
class Verb:
    """What `retain NAME` takes and does."""

    name: str
    example: str
    settings: tuple[Any, ...]
    """Dataclasses of flags: those of TRL or transformers first, retain's own last."""
    run: Callable[..., int | None]
    """Takes an instance of each of `settings`; returns the exit code, or None for 0.

    Raises a one-line `ValueError` for invalid input before it writes anything.
    """
    resume: str | Callable[..., str] = "nothing was written; run it again"
    """What to do after an interruption, or a function of the instances of `settings` that returns it."""
    positional: str = ""
    """The setting that takes words before the first flag."""
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Titles in the help: first setting of a group -> title."""
    borrowed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Flags of TRL or transformers that the help shows among retain's own -> help."""
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other accepted name -> setting."""
    set_defaults: Callable[[Any], None] = lambda parser: None
    """Adapts the parser's defaults to this machine."""

    def __call__(self, argv: list[str]) -> int | None:
        """Parse and run; an interruption carries `resume` as its argument."""
        configs = self.parse(argv)
        silence_libraries()
        try:
            return self.run(*configs)
        except KeyboardInterrupt as interruption:
            interruption.args = (self.resume if isinstance(self.resume, str) else self.resume(*configs),)
            raise

    def parse(self, argv: list[str]) -> tuple[Any, ...]:
        """Parse flags and `--config` into instances of `settings`."""
        import yaml

        try:
            configs: tuple[Any, ...] = self.parser().parse_args_and_config(self.words(argv))
        except yaml.YAMLError as error:
            mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
            where = f" at line {mark.line + 1}" if mark else ""
            raise ValueError(f"config: not YAML{where}; {problem or 'check the file'}") from error
        except IndexError as error:
            raise ValueError("config: --config needs a file") from error
        for name, value in itertools.chain.from_iterable(vars(config).items() for config in configs):
            check_paths(name, value if isinstance(value, list) else [value])
            if isinstance(value, float) and math.isnan(value):  # the libraries do not check for it
                raise ValueError(f"{name}: nan does not fit; use a number")
        return configs

    def check(self, commands: Iterable[list[str]]) -> None:
        """Refuse unknown flags and values of the wrong type without building the settings.

        Raises:
            ValueError: for the first of them.
        """
        parser = self.parser()
        for argv in commands:
            self.refuse_unknown(parser.parse_known_args(self.words(argv))[1])

    def refuse_unknown(self, unknown: list[str]) -> None:
        """Refuse flags that the verb does not know; suggest the name that was probably meant."""
        if not unknown:
            return
        flag, has_library_flags = unknown[0], len(self.settings) > 1
        known = [field.name for kind in self.settings for field, _ in fields_of(kind)]
        close = get_close_matches(flag.removeprefix("--"), [*known, *self.aliases], n=1, cutoff=0.7)
        remedy = f"`retain {self.name} --help{'_all' if has_library_flags else ''}` lists every flag"
        if close:
            remedy = f"did you mean --{close[0]}? {remedy}"
        elif has_library_flags:
            remedy += ", and `accelerate launch` takes its own flags"
        raise ValueError(f"{flag}: unknown argument; {remedy}")

    def known_name(self, name: str) -> str:
        """The setting that a name stands for."""
        return self.aliases.get(name, name)

    def parser(self) -> Any:
        """A parser that raises where argparse would exit, and that reports unknown flags first."""
        from trl import TrlParser

        verb = self

        class Parser(TrlParser):
            unknown_in_config: list[str]

            def error(self, message: str) -> None:
                if match := WRONG_TYPE.fullmatch(message):
                    message = f"{match[1]}: {match[3]} does not fit; use {NUMBERS[match[2]]}"
                raise ValueError(message)

            def set_defaults_with_config(self, **values: Any) -> list[str]:
                values = {verb.known_name(name): value for name, value in values.items()}
                hints = {name: hint for kind in reversed(verb.settings) for name, hint in hints_of(kind).items()}
                for name, value in values.items():
                    if name in verb.lists and isinstance(value, str):
                        values[name] = [value]
                    if (
                        value is not None and not isinstance(value, str) and name != "model_size"
                    ):  # text: as from a flag
                        check_type(name, value, hints.get(name, Any))
                self.unknown_in_config = super().set_defaults_with_config(**values)
                return self.unknown_in_config

            def parse_args_into_dataclasses(self, args: list[str], **options: Any) -> tuple[Any, ...]:
                verb.refuse_unknown([*self.unknown_in_config, *self.parse_known_args(args)[1]])
                return super().parse_args_into_dataclasses(args, **options)

        parser = Parser(self.settings, prog=f"retain {self.name}", allow_abbrev=False, add_help=False)
        parser.unknown_in_config = []
        self.set_defaults(parser)
        return parser

    @property
    def lists(self) -> set[str]:
        """retain's settings that are lists of texts: their flags are repeatable, and YAML may hold a single text."""
        return {name for name, hint in hints_of(self.settings[-1]).items() if list[str] in kinds_of(hint)}

    def words(self, argv: list[str]) -> list[str]:
        """A command line for argparse: positional words under their flag, the values of a repeated flag under one.

        Of `--retention a=x --retention b=y`, argparse would keep only the last.
        """
        gathered: dict[str, list[str]] = {}
        rest: list[str] = []
        starts_positional = self.positional and argv and argv[0][:1] != "-"
        values = rest
        for word in [f"--{self.positional}", *argv] if starts_positional else argv:
            if not word.startswith("--"):
                values.append(word)
                continue
            flag, equals, value = word.partition("=")
            name = self.known_name(flag.removeprefix("--").replace("-", "_"))
            if name in self.lists:
                values = gathered.setdefault(name, [])
            else:
                values = rest
                rest.append(f"--{name}")
                if name != "config" and equals:
                    rest[-1] += f"={value}"
                    continue
            values += [value] if equals else []
        if rest.count("--config") > 1:
            raise ValueError("config: given twice; put all settings into one file, or give some as flags")
        return rest + [word for name, values in gathered.items() for word in (f"--{name}", *values)]

    @property
    def required(self) -> list[str]:
        """Names of the settings that must be given."""
        helps = {**self.borrowed} | {field.name: help_of(field) for field, _ in fields_of(self.settings[-1])}
        return [name for name, text in helps.items() if "[required" in text]

    def missing(self) -> str:
        """The error for an empty command line: the required flags and an example."""
        flags = [f"--{name}" for name in self.required]
        return f"give {', '.join(flags)}; for example `{self.example}`; see `retain {self.name} --help`"

    def help(self, sentence: str, *, everything: bool = False) -> str:
        """The help: a sentence, an example, and the flags in groups; `everything` adds those of TRL or transformers."""
        parser = argparse.ArgumentParser(
            usage=argparse.SUPPRESS, add_help=False, description=f"{sentence}\n\n  {self.example}",
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=HELP_WIDTH),
        )  # fmt: skip
        group = parser.add_argument_group("Flags")
        group.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
        *theirs, ours = self.settings
        hints = {name: hint for kind in theirs for name, hint in hints_of(kind).items()}
        for name, text in self.borrowed.items():
            group.add_argument(f"--{name}", metavar=metavar_of(hints[self.known_name(name)]), help=text)
        for field, hint in fields_of(ours):
            if field.name in self.groups:
                group = parser.add_argument_group(self.groups[field.name])
            group.add_argument(f"--{field.name}", metavar=metavar_of(hint), help=help_of(field))
        for kind in theirs if everything else ():
            group = parser.add_argument_group(f"{kind.__module__.split('.')[0]}'s {kind.__name__}")
            for field, hint in fields_of(kind):
                if field.name not in self.borrowed:
                    group.add_argument(f"--{field.name}", metavar=metavar_of(hint), help=help_of(field))
        if len(self.settings) > 1 and not everything:
            parser.epilog = f"`retain {self.name} --help_all` also lists the flags of the libraries behind it."
        return parser.format_help()


def fields_of(kind: Any) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a dataclass with their types, its own before inherited ones."""
    names = dict.fromkeys(name for base in kind.__mro__ for name in inspect.get_annotations(base))
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    yield from ((fields[name], hints_of(kind)[name]) for name in names if name in fields)


def metavar_of(hint: Any) -> str:
    """The placeholder for a value of this type in the help."""
    kind = kinds_of(hint)[0]
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return f"{metavar_of(get_args(kind)[0])} ..."
    return METAVARS.get(kind, "VALUE")


def help_of(field: dataclasses.Field[Any]) -> str:
    """A field's help with its default or `[required]`."""
    text = str(field.metadata.get("help", ""))
    value = field.default_factory() if callable(field.default_factory) else field.default
    if value in (None, "", [], dataclasses.MISSING):
        return f"{text} [required]" if getattr(field.metadata.get("help"), "remedy", "") else text
    words = map(str, value) if isinstance(value, list) else [str(value).lower() if value in (True, False) else value]
    return f"{text} [default: {' '.join(map(str, words))}]".replace("%", "%%")


def check_paths(setting: str, values: Iterable[Any]) -> None:
    """Refuse files and models that do not exist, without loading them."""
    from retain.data.row_files import check_path
    from retain.files import check_file, check_model_path

    for value in values if setting in DATA + NAMED_DATA + MODELS + FILES else ():
        if isinstance(value, str) and value:
            check = check_model_path if setting in MODELS else check_file if setting in FILES else check_path
            check(value.partition("=")[2] if setting in NAMED_DATA else value, setting)


def check_words(words: Sequence[str]) -> None:
    """`check_paths` for a command line, before the libraries that parse it are loaded, which takes seconds."""
    setting = ""
    for word in words:
        if word.startswith("--"):
            setting, _, word = word.removeprefix("--").partition("=")
        check_paths(setting.replace("-", "_"), [word])


def silence_libraries() -> None:
    """Turn off the progress bars and notices of other libraries."""
    import warnings

    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", "Could not find a config file in")  # PEFT, for an adapter whose base is a package
