"""What does a run of 200 steps learn and lose in skills, facts and answers, plain and with replay?

python -m experiments 21 [--parts full-plain-0 ...] [--report]

SmolLM2-135M-Instruct learns Verilog (a quarter of the rows: a processor's sources), small modules behind a sentence
that specifies them (a quarter), and biographies of ten people who do not exist (half): 200 steps of four rows of 64
tokens at a linear schedule, full finetuning or LoRA of rank 16.

Rule, fixed before the runs:

- Learned: the fall of the loss on held-out Verilog; of 80 modules with names and widths that were not taught (24 of
  kinds that were not), the share that pass their test bench in Icarus Verilog when written greedily; of 40 questions on
  the invented people, in words that were not taught, the share answered rightly.
- Lost: on 1,000 questions of Social IQa accuracy, and agreement with the base's own answers; of 64 capitals the share
  known; ref_kl on prose and on documents that the base wrote.
- Choices are told apart by the log-likelihood of each, whole for facts (`acc`), per character for Social IQa
  (`acc_norm`). Chance is a quarter for facts and a third for Social IQa.
- The claims, each for full finetuning and for LoRA, on differences to plain paired by seed, three seeds, the whole
  interval (Student's t, corrected for two looks): with KL, coefficient 0.5, on a row that the base wrote in each step,
  agreement is higher, more capitals are known, and ref_kl on prose is lower. Learning less is not forgetting less:
  where a run with replay has less than 90% of plain's fall of the Verilog loss in some seed, nothing is claimed.
- It learns as much: the shares of modules and of new facts are equivalent to plain's within 10 points each.
- Equal accuracy hides forgetting: plain's accuracy on Social IQa is equivalent to the base's within 3 points (over
  seeds), while it agrees with the base on fewer than 90% of the questions.
- Coefficient 2 is shown beside these, and nothing is claimed of it.

A first look, at seed 0 of full finetuning: with coefficient 2, the rule's until then, replay learned 87% of what plain
did. It became 0.5, for both methods and every seed, before any other run had ended.

Refusals were to be a fourth thing to lose. The base refuses one of AdvBench's 520 requests, seen before the first run
had ended: nothing is claimed of them.

Rates, the number of people and the shares of the rows were chosen by three plain runs of seed 9.

Read again after LoRA's runs: a right answer on new facts was always taught of somebody, a wrong one often of nobody, so
that knowing which values occur, and not whose, makes 47% right, not a quarter; the report says so beside the claim. Of
the names of modules, those of ports were not taught, but for `clk`; `adder` in `adder_3` was.

Later arms, by a rule committed before their runs. They had been planned as arms of which nothing is claimed, at
coefficient 2 and with an anchor that is no longer the default; none of them had been run. Now they have the coefficient
of the claimed arm, 0.5: KL and next-token loss (NTP) on web text, KL on chats that the base wrote; and the default of
`--replay_dataset self` as it was on 2026-12-01. LoRA first, a seed at a time; full finetuning if time is left. Claimed,
once a method has all three seeds of both arms, on paired differences by the whole 95% interval, one look:

- The default, against plain: agreement is higher, more capitals are known, ref_kl on prose is lower.
- KL on web text, against NTP on it: agreement is higher, ref_kl on prose is lower.
- KL on own rows, against NTP on web text: agreement is higher.
- KL on own rows, against KL on web text, and against KL on own chats: agreement is equivalent within 3 points.

As above, nothing is claimed where an arm that is to keep more has less than 90% of plain's fall of the Verilog loss in
some seed.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from experiments.corpora import CACHE
from experiments.finetunes import Bench, Run, StudyResults, compact, make_trainer, sampled_once, scratch, smollm2_bench
from experiments.program import LAPTOP, Report, conduct
from experiments.small_base import Rows
from experiments.study_04_capabilities.data import advbench, download, social_iqa
from experiments.study_10_instruct.data import web_rows
from experiments.study_21_real_run.facts import biographies, new_facts, old_facts
from experiments.study_21_real_run.modules import asked, simulate, taught
from experiments.study_21_real_run.report import report_of
from experiments.study_21_real_run.settings import (
    ARMS,
    CLAIMED,
    FEW_QUESTIONS,
    LENGTH,
    LOOKS,
    NEW_TOKENS,
    NUM_QUESTIONS,
    RATES,
    SEEDS,
    STEPS,
    TOGETHER,
    run_of,
)
from retain import ReplayDataset, choose_start_token
from retain.data.rows import packed_rows
from retain.measuring.choices import Question, context_and_answers, encode_pair, likeliest_choices
from retain.measuring.generations import continue_prompts, stop_tokens
from retain.measuring.refusal_phrases import is_refusal
from retain.measuring.refusals import as_turns
from retain.sampling.starts import plan_starts
from retain.training.run_files import read_run

HERE = Path(__file__).parent


def place() -> Bench:
    """The base, its Verilog, what is held out, and rows that the base wrote with what an anchor needs."""
    return smollm2_bench()


def replay_rows(kind: str, bench: Bench) -> ReplayDataset:
    """256 rows: from the base's document start, from its user's turns, or openings of web pages."""
    if kind == "own":
        return bench.replay
    start = choose_start_token(bench.tokenizer)
    if kind == "web":
        download()
        rows = web_rows(bench.tokenizer, start, LENGTH, random.Random(0))[: len(bench.replay)]
        return ReplayDataset.from_rows(rows, "OpenWebText and Wikipedia")
    starts, folder = plan_starts("chat", bench.tokenizer, start), CACHE / "smollm2" / f"chats-256x{LENGTH}"
    how: dict[str, Any] = {"num_rows": 256, "max_length": LENGTH, "seed": 0, "batch_size": 64, "starts": starts}
    return sampled_once(bench.base(), bench.tokenizer, folder, **how)


def training_rows(bench: Bench, seed: int) -> Rows:
    """As many rows as the run takes: a quarter Verilog, a quarter modules, half biographies."""
    start, number = choose_start_token(bench.tokenizer), STEPS * 4
    texts = [module.text for module in taught()]
    random.Random(seed).shuffle(texts)
    modules = packed_rows(texts, bench.tokenizer, start, LENGTH)[: number // 4]
    people = packed_rows(biographies(seed, number), bench.tokenizer, start, LENGTH)[: number // 2]
    verilog = random.Random(seed).sample(bench.train.rows.tolist(), number - len(modules) - len(people))
    return Rows([*verilog, *modules, *people])


def questions() -> list[Question]:
    download()
    return random.Random(0).sample(social_iqa(), NUM_QUESTIONS)


@torch.no_grad()
def chosen(model: Any, tokenizer: Any, asks: Sequence[Question], rule: str) -> str:
    """The choice for each question, a digit each, by the scores of `retain.measuring.choices`."""
    pairs, lengths = [], []
    for question in asks:
        context, answers = context_and_answers(question, "text")
        both = [encode_pair(tokenizer, context, f" {answer}") for answer in answers]
        pairs.append((both[0][0], [wanted for _, wanted in both]))
        lengths.append(np.array([len(answer) for answer in answers], float))
    scores = [np.zeros(len(wanted)) for _, wanted in pairs]
    alike: dict[tuple[int, int], list[int]] = {}  # contexts of one length with as many choices
    for at, (start, wanted) in enumerate(pairs):
        alike.setdefault((len(start), len(wanted)), []).append(at)
    for (_, number), places in alike.items():
        for first in range(0, len(places), TOGETHER):
            some = places[first : first + TOGETHER]
            rows = [own for at in some for own in pairs[at][1]]
            longest = max(map(len, rows))
            read = model(torch.tensor([pairs[at][0] for at in some]), use_cache=True, logits_to_keep=1)
            logits = read.logits.repeat_interleave(number, 0)
            if longest > 1:
                read.past_key_values.batch_repeat_interleave(number)
                padded = torch.tensor([(own + [0] * longest)[: longest - 1] for own in rows])
                more = model(padded, past_key_values=read.past_key_values).logits
                logits = torch.cat([logits, more], 1)
            found = logits.double().log_softmax(-1)
            for row, own in enumerate(rows):
                scores[some[row // number]][row % number] = float(found[row, range(len(own)), own].sum())
    return "".join(map(str, likeliest_choices(scores, lengths, rule)))


def written(model: Any, bench: Bench, prompts: Sequence[Sequence[int]], what: str) -> list[Any]:
    start = choose_start_token(bench.tokenizer).id
    stop = stop_tokens([model], bench.tokenizer, start)
    how: dict[str, Any] = {"max_new_tokens": NEW_TOKENS[what], "batch_tokens": 8192, "stop": stop}
    return continue_prompts(model, bench.tokenizer, prompts, **how)


def answers(model: Any, bench: Bench, seed: int, number: int) -> dict[str, str]:
    """What the model chooses of each set of questions."""
    given = {"new facts": new_facts(seed), "old facts": old_facts(), "Social IQa": questions()[:number]}
    return {
        name: chosen(model, bench.tokenizer, asks, "acc_norm" if name == "Social IQa" else "acc")
        for name, asks in given.items()
    }


def modules_written(model: Any, bench: Bench) -> str:
    """Of each module that is asked for, whether what the model writes passes (p), compiles (c) or is broken (b)."""
    start, asks = choose_start_token(bench.tokenizer).id, asked()
    prompts = [[start, *bench.tokenizer(one.prompt, add_special_tokens=False)["input_ids"]] for one in asks]
    texts = written(model, bench, prompts, "modules")
    return "".join(simulate(one, text.text)[0] for one, text in zip(asks, texts, strict=True))


def refused(model: Any, bench: Bench, requests: Sequence[str]) -> list[bool]:
    start = choose_start_token(bench.tokenizer).id
    prompts = [turn.tokens(bench.tokenizer, start) for turn in as_turns(requests, bench.tokenizer)]
    return [is_refusal(one.answer) for one in written(model, bench, prompts, "refusals")]


class Asking(TrainerCallback):
    """Puts questions to the model in the middle of training."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.seed = bench, seed
        self.found: dict[int, dict[str, str]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in LOOKS:
            model.eval()
            self.found[state.global_step] = answers(model, self.bench, self.seed, FEW_QUESTIONS)
            model.train()


def of_base(bench: Bench) -> dict[str, Any]:
    """What the base answers, writes, and which requests it refuses."""
    base = bench.base().eval()
    new = {f"new facts, seed {seed}": chosen(base, bench.tokenizer, new_facts(seed), "acc") for seed in SEEDS}
    flags = refused(base, bench, advbench())
    return {
        "answers": answers(base, bench, SEEDS[0], NUM_QUESTIONS) | new,
        "right": "".join(str(question.answer) for question in questions()),
        "modules": modules_written(base, bench),
        "refused": [at for at, flag in enumerate(flags) if flag],
    }


def finetuned(run: Run, arm: str, bench: Bench, requests: Sequence[str]) -> dict[str, Any]:
    """Train, ask on the way, and ask and measure at the end."""
    bench = replace(bench, train=training_rows(bench, run.seed), replay=replay_rows(ARMS[arm][0], bench))
    asking = Asking(bench, run.seed)
    with scratch() as folder:
        trainer = make_trainer(run, bench, folder)
        trainer.add_callback(asking)
        trainer.train()
        trajectory = [compact(row) for row in read_run(folder)["trajectory"] if "eval_loss" in row]
        seconds = round(statistics.median(cpu for _, cpu in trainer.clock.seconds), 3)  # questions are asked in two
    model = trainer.model.merge_and_unload() if run.method == "lora" else trainer.model
    model.eval()
    asking.found[STEPS] = answers(model, bench, run.seed, NUM_QUESTIONS)
    return {
        "trajectory": trajectory,
        "step_seconds": seconds,
        "answers": asking.found,
        "modules": modules_written(model, bench),
        "refused": refused(model, bench, requests),
    }


def results() -> StudyResults:
    """Of what is asked as it is now."""
    asks = [question.text for question in [*old_facts(), *(one for seed in SEEDS for one in new_facts(seed))]]
    given = [[module.prompt for module in asked()], asks, NUM_QUESTIONS, LOOKS, NEW_TOKENS]
    return StudyResults(HERE / "results.jsonl", hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16])


def parts_of(scale: Any) -> list[str]:
    """What is claimed first, a seed at a time."""
    arms = [arm for arm in ARMS if arm not in CLAIMED]
    return ["base"] + [f"{method}-{arm}-{seed}" for group in (CLAIMED, arms) for seed in SEEDS
                       for method in RATES for arm in group]  # fmt: skip


def make(name: str, part: str) -> None:
    bench, kept = place(), results()
    base = kept.make({"arm": "base"}, lambda: of_base(bench))
    if part == "base":
        return
    method, arm, seed = part.split("-")
    run, requests = run_of(method, arm, int(seed)), advbench()
    asks = [requests[at] for at in base["refused"]]
    kept.make({"arm": arm, **run.settings()}, lambda: finetuned(run, arm, bench, asks))


def report(name: str) -> Report:
    return report_of(results().rows_with())


def main(arguments: Sequence[str] | None = None) -> None:
    conduct(__doc__, HERE, LAPTOP, parts=parts_of, make=make, report=report, only="parts", arguments=arguments)
