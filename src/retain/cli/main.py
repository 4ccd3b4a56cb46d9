"""The command line: one verb each for sampling, finetuning, measuring, reporting and the laws.

Flags and YAML are read by `trl.TrlParser` from the dataclasses in `retain.cli.config`, beside TRL's own for `finetune`.
Bad input ends in one line and exit code 1; set RETAIN_DEBUG=1 for the traceback.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from retain.cli.flags import Launched, check, parse
from retain.cli.signals import Terminated, heard

HELP = """usage: retain VERB [--config file.yaml] [--flag value ...]

Finetune a language model without it forgetting, and say how much it forgets.

  sample     draw replay rows from a model's own distribution
             retain sample --model_name_or_path M --output_dir replay/
  export     replay rows as JSONL for Axolotl, LLaMA-Factory and others
             retain export replay/ --output replay.jsonl
  finetune   TRL's SFT with replay; takes every flag of `trl sft`
             retain finetune --config sft.yaml --replay_dataset replay/
  measure    a tuned model against its base, with intervals
             retain measure --base M --model out/ --retention wiki=wiki.txt --output_dir report/
             (--budget 0.02 makes it a gate: exit code 0 within, 2 beyond, 3 not enough evidence, 1 error)
  report     one page for several measured runs, the plain one first
             retain report --runs report-plain/ report-replay/ --output_dir both/
  fit        a law of forgetting from measured runs
             retain fit runs/*/metrics.jsonl --form joint --output law.json
  predict    what a law says of a run not yet made, with intervals
             retain predict law.json --num_params 5e6 --num_steps 260
  plan       short pilot runs, their law, and the finetune that stays within a budget of forgetting
             retain plan --model M --dataset_name new.jsonl --retention wiki=wiki.txt --budget 0.02 --output_dir plan/
  sweep      many runs of one verb: a grid of flags, each run made once, whatever kills it
             retain sweep sweep.yaml --output_dir sweep/
  pretrain   a small model from nothing: on text, a language of known entropy, or a digit task
             retain pretrain --corpus texts.jsonl --model_size 430k --tokens_per_param 10 --output_dir base/

`retain VERB --help` lists a verb's flags; `retain --version` prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; return the exit code: 0, or what `measure --budget` found.

    1 for an error, 130 when interrupted (SIGINT), 143 when terminated (SIGTERM).
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if args else 1
    if args[0] == "--version":
        from retain import __version__

        print(__version__)
        return 0
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        print(f"retain: no verb {verb!r}; use one of {', '.join(VERBS)}", file=sys.stderr)
        return 1
    # Idle threads that spin at barriers are ruinous on a shared machine; must be set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|torch|peft")
    try:
        with heard():
            return VERBS[verb](rest) or 0
    except Launched:
        return 0
    except subprocess.CalledProcessError:
        return 1  # a launched process failed, and said why
    except KeyboardInterrupt as stop:
        word, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        _complain(f"retain {verb}: {word}; {RESUME[verb]}")
        return code
    except Exception as error:
        if os.environ.get("RETAIN_DEBUG"):
            raise
        from retain.files import one_line

        _complain(f"retain {verb}: {one_line(error)}")
        return 1


def _complain(line: str) -> None:
    from tqdm import tqdm

    from retain.text import visible

    tqdm.write(visible(line), file=sys.stderr)  # on a line of its own, also where a progress bar stands


def quiet_libraries() -> None:
    """Keep what neighbours say about themselves out of the way of what the user asked for."""
    import warnings

    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", "Could not find a config file in")  # PEFT, of an adapter whose base is a package


def sample(argv: list[str]) -> None:
    """`retain sample`: a model → a replay dataset with provenance."""
    (config,) = parse(argv, "sample")
    quiet_libraries()
    from retain.cli.sample import run_sample

    run_sample(config)


def export(argv: list[str]) -> None:
    """`retain export`: a replay dataset → JSONL for other trainers."""
    (config,) = parse(argv, "export")
    quiet_libraries()
    from retain.cli.export import run_export

    print(run_export(config))


def finetune(argv: list[str]) -> None:
    """`retain finetune`: TRL's SFT with replay and retention metrics → a model or adapter."""
    script_args, training_args, model_args, dataset_args, config = parse(argv, "finetune")
    quiet_libraries()
    from retain.cli.finetune import run_finetune
    from retain.files import exclusive

    with exclusive(Path(training_args.output_dir)) if training_args.process_index == 0 else nullcontext():
        run_finetune(script_args, training_args, model_args, dataset_args, config)


def measure(argv: list[str]) -> int:
    """`retain measure`: base and tuned model → report.json, report.md, report.html; with a limit, its exit code."""
    (config,) = parse(argv, "measure")
    quiet_libraries()
    from dataclasses import asdict

    from retain.cli.measure import run_measure
    from retain.files import exclusive
    from retain.measuring.lm_eval import paired_report
    from retain.report.gate import judge
    from retain.report.model_card import check_card
    from retain.report.report import ForgettingReport
    from retain.text import visible

    if config.model_card:
        check_card(config.model_card)
    with exclusive(Path(config.output_dir)):  # made before long work, so that one that cannot be made is known
        if config.pair:
            data = paired_report(config.pair)
            result = ForgettingReport(data)
        else:
            result = run_measure(config, say=lambda stage: print(f"{visible(stage)} …", flush=True))
        limits = {"max_forgetting": config.budget, "min_agreement": config.min_agreement}
        if set(limits.values()) != {None}:
            result.data["gate"] = asdict(judge(result.results, **limits))
        _finish(result.write, config.output_dir, result.summary())
        if config.model_card:
            result.to_model_card(config.model_card)
    if "gate" not in result.data:
        return 0
    gate = result.data["gate"]
    checks = gate["checks"] if len(gate["checks"]) > 1 else []
    print(*map(visible, ["", *checks, gate["verdict"]]), sep="\n")
    return gate["code"]


def _finish(write: Callable[[str], object], output_dir: str, summary: str) -> None:
    write(output_dir)
    print(f"{summary}\n\nreport: {Path(output_dir) / 'report.html'}")


def report(argv: list[str]) -> None:
    """`retain report`: several measured runs → one page, compared at matched new-task loss."""
    (config,) = parse(argv, "report")
    from retain.files import short_names
    from retain.report.page import comparison_summary
    from retain.report.report import ForgettingReport, write_comparison

    paths = [Path(folder) / "report.json" if Path(folder).is_dir() else Path(folder) for folder in config.runs]
    reports = [ForgettingReport.from_json(path) for path in paths]
    if len({one.data["name"] for one in reports}) < len(reports):  # as of two folders that are called out/
        for one, name in zip(reports, short_names([Path(given) for given in config.runs]), strict=True):
            one.data["name"] = name
    write = partial(write_comparison, reports=reports, title=config.title, interactive=config.interactive)
    _finish(write, config.output_dir, comparison_summary([one.results for one in reports]))


def fit(argv: list[str]) -> None:
    """`retain fit`: measured runs → a law of forgetting."""
    (config,) = parse(argv, "fit")
    from retain.cli.laws import run_fit

    print(run_fit(config))


def predict(argv: list[str]) -> None:
    """`retain predict`: a law → the losses of a run not yet made, or the most steps within a limit."""
    (config,) = parse(argv, "predict")
    from retain.cli.laws import run_predict

    print(run_predict(config))


def plan(argv: list[str]) -> None:
    """`retain plan`: pilot runs → a law, and the setting that keeps a budget of forgetting."""
    (config,) = parse(argv, "plan")
    quiet_libraries()
    from retain.cli.plan import run_plan
    from retain.files import exclusive

    with exclusive(Path(str(config.output_dir))):
        print(run_plan(config, finetune, say=partial(print, flush=True)))


def sweep(argv: list[str]) -> None:
    """`retain sweep`: a YAML file of runs → a row of results for each."""
    (config,) = parse(argv, "sweep")
    from retain.lab.sweep import run_sweep

    options: dict[str, Any] = {"check": partial(check_runs, config.sweep)}
    options |= {"engine": config.engine, "num_workers": config.num_workers, "cores_per_run": config.cores_per_run}
    rows = run_sweep(config.sweep, config.output_dir, **options)
    from retain.report.numbers import quantity

    print(f"{quantity(len(rows), 'run')}: {Path(config.output_dir) / 'results.jsonl'}")


def check_runs(path: str, runs: Sequence[Any]) -> None:
    """Refuse a sweep before its first run where a run's own command line would be refused.

    Raises:
        ValueError: naming the run's flag.
    """
    verb = runs[0].verb  # of all
    if verb not in VERBS or verb == "sweep":
        raise ValueError(f"sweep: {path} has verb {verb!r}; name another of retain's, say finetune")
    try:
        check((run.arguments(Path("run"))[1:] for run in runs), verb)
    except ValueError as error:
        raise ValueError(f"sweep: {path}: {error}") from error


def pretrain(argv: list[str]) -> None:
    """`retain pretrain`: a corpus → a small model, by steps, tokens, tokens per parameter, or to a target loss."""
    args, config = parse(argv, "pretrain")
    quiet_libraries()
    from retain.files import exclusive
    from retain.lab.pretrain import run_pretrain

    with exclusive(Path(args.output_dir)) if args.process_index == 0 else nullcontext():
        run_pretrain(args, config)


VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "sample": sample,
    "export": export,
    "finetune": finetune,
    "measure": measure,
    "report": report,
    "fit": fit,
    "predict": predict,
    "plan": plan,
    "sweep": sweep,
    "pretrain": pretrain,
}
RESUME = {
    "sample": "the same command goes on where it stopped",
    "export": "nothing was written; run it again",
    "finetune": "the same command with --resume_from_checkpoint true goes on from the last checkpoint",
    "measure": "nothing was written; run it again",
    "report": "nothing was written; run it again",
    "fit": "nothing was written; run it again",
    "predict": "run it again",
    "plan": "finished pilots are kept; run it again",
    "sweep": "finished runs are kept, others go on from their last checkpoint; run it again",
    "pretrain": "the same command with --resume_from_checkpoint true goes on from the last checkpoint",
}
