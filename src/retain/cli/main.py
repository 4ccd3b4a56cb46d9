"""The command line. Bad input ends in one line and exit code 1; set RETAIN_DEBUG=1 for the traceback."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from retain.cli.flags import Verb, check_words
from retain.cli.signals import Terminated, lasting_output, signals_as_exceptions

# Each verb is a module of this package with the same name.
VERBS = {
    "sample": "Sample replay rows from a model's own distribution.",
    "export": "Write replay rows as JSONL for Axolotl, LLaMA-Factory and other trainers.",
    "finetune": "Finetune like `trl sft`, with replay; takes all of its flags.",
    "measure": "Measure a tuned model against its base, with intervals; a limit makes it a gate.",
    "chat": "Type a prompt and read the answers of the base and the tuned model.",
    "merge": "Interpolate between a tuned model and its base, and measure how far to go.",
    "report": "Compare several measured runs on one page, the unprotected one first.",
    "fit": "Fit a law of forgetting to measured runs.",
    "predict": "Predict a run before making it, from a fitted law, with intervals.",
    "plan": "Run short pilots and recommend a finetune that stays within a limit on forgetting.",
    "sweep": "Run one verb over a grid of flags, making each run once.",
    "pretrain": "Pretrain a small model on text, a language of known entropy, or a digit task.",
}
HELP = """usage: retain VERB [--config file.yaml] [--flag value ...]

Finetune a language model without it forgetting, and measure and predict how much it forgets.

{verbs}

For example:
    retain sample --model M --output_dir replay/
    retain finetune --config sft.yaml --replay_dataset replay/
    retain measure --base M --model out/ --retention wiki=wiki.txt --output_dir report/

`retain VERB --help` explains a verb's flags; `retain --version` prints the version.
"""


def load_verb(name: str) -> Verb:
    """Import a verb, with the libraries that it needs."""
    return importlib.import_module(f"retain.cli.{name}").VERB


@lasting_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code: 0, or the code of `measure`'s gate.

    1 is an error, 130 an interruption (SIGINT), 143 a termination (SIGTERM).
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if name in ("", "-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {verb:<11}{sentence}" for verb, sentence in VERBS.items())), end="")
        return 0 if name else 1
    if name == "--version":
        from retain import __version__

        print(__version__)
        return 0
    if name not in VERBS:
        print(f"retain: no verb {name!r}; use one of {', '.join(VERBS)}", file=sys.stderr)
        return 1
    # Threads that spin at barriers slow a shared machine down; must be set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|torch|peft|accelerate")
    try:
        with signals_as_exceptions():
            asks_for_help = bool({"-h", "--help", "--help_all"} & set(rest))
            if not asks_for_help:
                check_words(rest)
            verb = load_verb(name)
            if asks_for_help:
                print(verb.help(VERBS[name], everything="--help_all" in rest), end="")
                return 0
            if not rest and verb.required:
                raise ValueError(verb.missing())
            return verb(rest) or 0
    except KeyboardInterrupt as stop:
        word, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        _print_error(f"retain {name}: {word}; {stop.args[0] if stop.args else 'run it again'}")
        return code
    except Exception as error:
        if os.environ.get("RETAIN_DEBUG"):
            raise
        from retain.files import one_line

        _print_error(f"retain {name}: {one_line(error)}")
        return 1


def _print_error(line: str) -> None:
    from retain.files import visible

    print(visible(line), file=sys.stderr)
