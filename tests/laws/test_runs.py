"""Runs of a law: hostile rows, tables, folders of finetunes, and the verbs that read them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import save_model
from published_laws import BOTH, paper_design, quiet_fit

from retain import fit_forgetting_law
from retain.cli.main import main
from retain.laws.law import ForgettingLaw
from retain.laws.run_tables import as_runs, read_runs, recipe_differences
from retain.models.loading import lora_num_params


def changed(**columns) -> dict:
    table = {name: list(column) for name, column in paper_design(steps=4).items()}
    for name, value in columns.items():
        table[name][2] = value
    return table


BAD_RUNS = {
    "NaN": (
        changed(forgetting_loss=math.nan),
        "forgetting_loss: nan in run 'r8' is not a finite number; correct or drop",
    ),
    "infinite": (
        changed(finetuning_loss=math.inf),
        "finetuning_loss: inf in run 'r8' is not a finite number of at least 0",
    ),
    "missing value": (changed(forgetting_loss=None), "forgetting_loss: None in run 'r8' is not a finite number"),
    "negative steps": (changed(num_steps=-5), "num_steps: -5 in run 'r8' is not a finite number above 0"),
    "no steps": (changed(num_steps=0), "num_steps: 0 in run 'r8' is not a finite number above 0"),
    "no parameters": (changed(num_params=0), "num_params: 0 in run 'r8' is not a finite number above 0"),
    "negative loss": (
        changed(finetuning_loss=-0.1),
        "finetuning_loss: -0.1 in run 'r8' is not a finite number of at least 0",
    ),
    "text": (changed(num_steps="fifty"), "num_steps: 'fifty' in run 'r8' is not a finite number above 0"),
    "two sizes": (changed(num_params=7), "num_params: run 'r8' has several values; name every run differently"),
    "step twice": (changed(num_steps=50), "run: 'r8' has the same step or row twice"),
    "no column": (
        [{"run": 1, "loss": 2}],
        "runs: no column 'num_params'; needs run, num_params, num_steps, finetuning",
    ),
    "nothing": ([], "runs: no column 'run'"),
    "a number": (3, "runs: int is not a table; give a list of rows"),
    "one row": (
        {name: column[:1] for name, column in paper_design().items()},
        "runs: 1 rows for the 11 free parameters",
    ),
    "no rows": ({name: [] for name in paper_design()}, "runs: columns of 0 rows"),
    "uneven": (paper_design() | {"num_steps": [1, 2]}, "runs: columns of 2, 132 rows; give the same number in each"),
    "no name": (changed(run=None), "run: missing in row 3; name it in every row"),
    "an empty name": (changed(run=""), "run: missing in row 3; name it in every row"),
    "NaN for a name": (changed(run=math.nan), "run: missing in row 3; name it in every row"),
    "no data set in a row": (
        changed() | {"dataset": ["a", "b", *[None] * 22]},
        "dataset: missing in row 3; name it in every row",
    ),
    "constant": (paper_design() | {"forgetting_loss": [0.5] * 132}, "forgetting_loss: the same in every row"),
}


@pytest.mark.parametrize("kind", BAD_RUNS)
def test_bad_runs_are_refused_in_one_line(kind):
    runs, message = BAD_RUNS[kind]
    with pytest.raises(ValueError, match=".+") as caught:
        fit_forgetting_law(runs, num_resamples=0)
    assert str(caught.value).startswith(message), caught.value
    assert "\n" not in str(caught.value)


def test_a_run_given_twice_under_two_names_is_refused():
    table = paper_design(steps=4)
    twice = {name: np.concatenate([column, column[:4]]) for name, column in table.items()}
    twice["run"] = [*table["run"], *["copy"] * 4]
    with pytest.raises(ValueError, match="run: 'copy' is a copy of 'r8', which makes .*; give it once"):
        fit_forgetting_law(twice)


# Runs from files, and the command line


def write_finetune(folder: Path, name: str, shift: float) -> Path:
    """What `retain finetune` leaves: logs of an evaluation in two rows, and its settings."""
    run = folder / name
    run.mkdir()
    (run / "retain_config.json").write_text(json.dumps({"num_params": lora(int(name[1:]))}))
    rows = [{"step": 0, "eval_loss": 6.0}, {"step": 0, "retention/wiki/ref_kl": 0.0}]
    for step in range(10, 60, 5):
        ref_kl = 0.01 * math.log(step) + shift * math.sin(step)
        rows += [{"step": step, "loss": 5.5}, {"step": step, "eval_loss": 6 - 20 * ref_kl + 0.3 * shift * step}]
        rows += [{"step": step, "retention/wiki/ref_kl": ref_kl, "retention/wiki/forgetting": ref_kl / 2}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run / "metrics.jsonl"


def test_runs_of_finetunes_are_read_with_the_size_of_what_was_tuned(tmp_path):
    files = [write_finetune(tmp_path, name, shift) for name, shift in (("r2", 1e-4), ("r4", 2e-4))]
    columns = ("num_params", "num_steps", *BOTH)
    runs = read_runs(files, columns)
    assert runs.names == ["r2", "r4"]
    assert runs.columns["num_steps"].min() == 10
    assert runs.columns["forgetting_loss"][0] == pytest.approx(0.01 * math.log(10) + 1e-4 * math.sin(10))
    assert sorted(set(runs.columns["num_params"])) == [lora(2), lora(4)]
    assert runs.left_out == ("runs: 2 rows at step 0 left out; nothing was trained there",)
    half = read_runs(files, columns, metric="forgetting", min_steps=30)
    assert half.columns["num_steps"].min() == 30
    assert half.columns["forgetting_loss"][-1] == pytest.approx(runs.columns["forgetting_loss"][-1] / 2)
    (tmp_path / "start").mkdir()
    start = tmp_path / "start" / "metrics.jsonl"
    start.write_text("".join(files[0].read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match="has no evaluation with .* after step 0; finetune with --eval_strategy"):
        read_runs([start], columns)
    (files[0].parent / "retain_config.json").unlink()
    with pytest.raises(ValueError, match="num_params: missing from .*r2/retain_config.json'; restore it, or give a ta"):
        read_runs(files, columns)
    with pytest.raises(ValueError, match="has no evaluation with 'retention/books/ref_kl'"):
        read_runs(files, columns, retention="books")


def test_runs_of_several_recipes_are_told_apart(tmp_path, capsys):
    """One law over runs with and without replay, and of two rates, was fitted without a word."""
    files = [write_finetune(tmp_path, name, shift) for name, shift in (("r2", 1e-4), ("r4", 2e-4), ("r8", 3e-4))]
    recipes = [(0.0, 1e-4), (1.0, 1e-4), (1.0, 2e-4)]
    for file, (coef, rate) in zip(files, recipes, strict=True):
        training = {"learning_rate": rate, "lr_scheduler_type": "linear", "per_device_train_batch_size": 8}
        settings = {"replay": {"replay_coef": coef}, "training_arguments": training, "num_params": 9}
        (file.parent / "retain_config.json").write_text(json.dumps(settings))
    options = ["--form", "linear", "--output", str(tmp_path / "law.json"), "--num_resamples", "9", "--num_starts", "1"]
    assert main(["fit", *(str(file.parent) for file in files), *options]) == 0  # folders mean their metrics.jsonl
    output = capsys.readouterr().out
    assert "! replay_coef: the runs have 0.0, 1.0; a law is of one recipe: fit runs of one value" in output
    assert "! learning_rate: the runs have 0.0001, 0.0002; " in output
    assert "lr_scheduler_type: the" not in output
    (files[2].parent / "retain_config.json").unlink()
    assert main(["fit", *map(str, files), *options]) == 0
    assert "learning_rate: the" not in capsys.readouterr().out


def test_runs_of_other_rows_losses_and_bases_are_told_apart(tmp_path):
    """Two data sets, losses of other tokens, and LoRAs of two models were one law without a word."""
    files = [write_finetune(tmp_path, name, shift) for name, shift in (("r2", 1e-4), ("r4", 2e-4))]
    settings = [
        {"new_rows": "ab", "loss_tokens": "all", "retention_windows": 1, "retention": {"wiki": 8, "code": 4}},
        {"new_rows": "cd", "loss_tokens": "completions", "retention_windows": 1, "retention": {"wiki": 9}},
    ]
    bases = ("one", "two")
    for file, of, base in zip(files, settings, bases, strict=True):
        (file.parent / "retain_config.json").write_text(json.dumps({"num_params": 9, **of}))
        adapter = {
            "base_model_name_or_path": base,
            "peft_type": "LORA",
            "target_modules": ["a", "b"][:: 1 - 2 * (base == "two")],
        }
        (file.parent / "adapter_config.json").write_text(json.dumps(adapter))
    found = recipe_differences([str(file) for file in files])
    assert [note.partition(";")[0] for note in found] == [
        "new_rows: the runs have ab, cd",
        "loss_tokens: the runs have all, completions",
        "base_model_name_or_path: the runs have one, two",
        "documents of wiki: the runs have 8, 9",
    ]
    assert recipe_differences([str(files[0]), str(files[0])]) == []


def lora(rank: int) -> int:
    """Of the tiny Llama: two layers, q_proj 32 → 32 and v_proj 32 → 16."""
    return 2 * rank * (32 + 32 + 32 + 16)


def test_the_size_of_a_lora_is_that_of_the_real_one(tmp_path):
    folder = save_model(tmp_path / "llama")
    assert lora_num_params(str(folder), 4, ["q_proj", "v_proj"]) == lora(4)
    (folder / "model.safetensors").unlink()  # no weights are read
    assert lora_num_params(str(folder), 8) == lora(8)  # PEFT's default for Llama
    assert lora_num_params(str(folder), 1, ["all-linear"]) == 2 * (64 + 48 + 48 + 64 + 3 * 96)
    with pytest.raises(ValueError, match="lora_target_modules: .'nothing'. does not fit"):
        lora_num_params(str(folder), 4, ["nothing"])


def write_table(path: Path, table: dict) -> Path:
    from pyarrow import Table, csv, parquet

    rows = Table.from_pydict(table)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.to_pylist()))
    else:
        (parquet.write_table if path.suffix == ".parquet" else csv.write_csv)(rows, path)
    return path


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_tables_of_every_kind_give_the_same_runs(tmp_path, ending):
    table = paper_design(steps=4)
    path = write_table(tmp_path / f"runs.{ending}", table)
    runs, exact = read_runs([path], list(table)[1:]), as_runs(table, list(table)[1:])
    assert runs.run == exact.run
    for name, column in exact.columns.items():
        assert runs.columns[name] == pytest.approx(column)


@pytest.mark.parametrize("ending", ["csv", "CSV", "jsonl", "parquet"])
@pytest.mark.parametrize("scale", [1e-3, 1e-5])
def test_tables_keep_rows_below_one_step_and_say_what_was_left_out(tmp_path, ending, scale):
    """Epochs, or thousands of steps: rows with `num_steps` below 1 were dropped without a word."""
    table = paper_design(steps=6)
    table["num_steps"] = np.where(table["num_steps"] == 50, 0, table["num_steps"] * scale)
    path = write_table(tmp_path / f"runs.{ending}", table)
    runs = read_runs([path], list(table)[1:])
    assert len(runs) == 30
    assert runs.left_out == ("runs: 6 rows at step 0 left out; nothing was trained there",)
    if ending == "csv":
        assert quiet_fit(runs, num_resamples=0, num_starts=2).warnings[:1] == list(runs.left_out)
    with pytest.raises(ValueError, match="runs: 30 rows before step 200 left out, .*; no row remains"):
        read_runs([path], list(table)[1:], min_steps=200)
    late = read_runs([path], list(table)[1:], min_steps=170 * scale)
    assert len(late) == 18
    assert late.left_out[1] == f"runs: 12 rows before step {170 * scale:g} left out, by min_steps"


def test_a_step_below_0_is_refused_and_not_left_out(tmp_path):
    rows = [f"r{run},1e{run},{step},3,1" for run in (3, 4) for step in (10, -20)]
    (tmp_path / "runs.csv").write_text("\n".join(["run,num_params,num_steps,finetuning_loss,forgetting_loss", *rows]))
    with pytest.raises(
        ValueError, match="^num_steps: -20.* in run 'r3' is not a finite number above 0; correct or drop"
    ):
        read_runs([tmp_path / "runs.csv"], ("num_params", "num_steps", "finetuning_loss", "forgetting_loss"))


@pytest.mark.parametrize(
    ("names", "sets"),
    [(("01", "1", "001"), None), (("1e1", "10", "10.0"), None), (("NA", "null", "NaN"), None),
     (("true", "True", "TRUE"), None), (("r", "r", "r"), ("1", "01", "001"))],
)  # fmt: skip
def test_names_of_runs_in_a_csv_stay_text(tmp_path, names, sets):
    """`01` and `1` became one run."""
    lines = ["run,num_steps,forgetting_loss" + ",dataset" * bool(sets)]
    for at, name in enumerate(names):
        lines += [f"{name},{step},{0.1 * at + 0.01 * step}" + (f",{sets[at]}" if sets else "") for step in (3, 5)]
    (tmp_path / "runs.csv").write_text("\n".join(lines) + "\n")
    runs = read_runs([tmp_path / "runs.csv"], ["num_steps", "forgetting_loss"])
    assert len(runs.names) == 3
    assert runs.names == ([f"{data}/r" for data in sets] if sets else list(names))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run,num_steps,forgetting_loss\na,5,1\n,6,2\n", "run: missing in row 2; name it in every row"),
        ('run,num_steps,forgetting_loss\na,"1,000",1\n', "num_steps: '1,000' in run 'a' is not a finite number"),
        ("run,num_steps,forgetting_loss\na,5,nan\n", "forgetting_loss: None in run 'a' is not a finite number"),
        ("run,num_steps,forgetting_loss\na,5,\n", "forgetting_loss: None in run 'a' is not a finite number"),
    ],
)
def test_rows_of_a_table_that_cannot_be_read_are_refused_not_dropped(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=".+") as caught:
        read_runs([tmp_path / "t.csv"], ["num_steps", "forgetting_loss"])
    assert str(caught.value).startswith(message), caught.value


def test_runs_of_one_name_in_two_tables_and_columns_of_one_name_are_refused(tmp_path):
    for name, step in (("a", 5), ("b", 6)):
        (tmp_path / f"{name}.csv").write_text(f"run,num_steps,forgetting_loss\n1,{step},1\n")
    with pytest.raises(ValueError, match="run: '1' is in 'b.csv' and in an earlier file; name every run differently"):
        read_runs([tmp_path / "a.csv", tmp_path / "b.csv"], ["num_steps", "forgetting_loss"])
    (tmp_path / "t.csv").write_text("run,num_steps,num_steps,forgetting_loss\na,5,6,1\n")
    with pytest.raises(ValueError, match="runs: .*t.csv' has several columns 'num_steps'; keep one"):
        read_runs([tmp_path / "t.csv"], ["num_steps", "forgetting_loss"])


def test_fit_and_predict_on_the_command_line(tmp_path, capsys):
    files = [write_finetune(tmp_path, f"r{rank}", 1e-4 * rank) for rank in (1, 2, 4, 8, 16, 32)]
    law = str(tmp_path / "law.json")
    options = ["--form", "joint", "--output", law, "--num_resamples", "20", "--plot", str(tmp_path / "law.png")]
    assert main(["fit", *map(str, files), *options]) == 0
    assert "Law of forgetting" in capsys.readouterr().out
    assert (tmp_path / "law.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["predict", law, "--num_params", str(lora(8)), "--num_steps", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in BOTH:
        assert found[name]["ci"][0] < found[name]["value"] < found[name]["ci"][1]
    assert found["extrapolates"] is False
    folder = str(save_model(tmp_path / "llama"))
    assert main(["predict", law, "--model", folder, "--lora_r", "8", "--num_steps", "400", "--json"]) == 0
    by_rank = json.loads(capsys.readouterr().out)
    assert by_rank["inputs"]["num_params"] == lora(8)
    assert by_rank["extrapolates"] is True
    limit = ["predict", law, "--num_params", str(lora(8)), "--json"]
    assert main([*limit, "--max_forgetting", "0.03"]) == 1
    assert "max_forgetting: 0.03 does not fit a law of ref_kl; give --max_ref_kl" in capsys.readouterr().err
    assert main([*limit, "--max_ref_kl", "0.03"]) == 0
    most = json.loads(capsys.readouterr().out)["num_steps"]["value"]
    at = ForgettingLaw.from_json(law).predict(num_params=lora(8), num_steps=most)
    assert at.value["forgetting_loss"] == pytest.approx(0.03, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fit --output {t}/law.json", "runs: missing; name the files first"),
        ("fit {t}/none.csv --output {t}/law.json", "runs: no file"),
        ("fit {t}/none.csv", "output: missing; give --output"),
        ("fit {t}/a.csv --output {t}/no/law.json", "output: no folder"),
        ("fit {t}/a.csv --output {t}/law.json --form best", "form: 'best' is not known"),
        ("fit {t}/a.csv --output {t}/law.json", "runs: 'a.csv' has no column 'run'; needs run, num_params"),
        ("fit {t}/b.csv --output {t}/law.json", "runs: cannot read '{t}/b.csv'"),
        ("fit {t}/c.jsonl --output {t}/law.json", "runs: '{t}/c.jsonl' line 1 is not JSON"),
        ("fit {t}/d.txt --output {t}/law.json", "runs: 'd.txt' has an unknown ending"),
        (
            "fit {t}/a.csv --output {t}/law.json --forgetting_metric x",
            "argument --forgetting_metric/--forgetting-metric: invalid choice: 'x'",
        ),
        ("predict", "give --law; for example `retain predict law.json"),
        ("predict --level 0.9", "law: missing; give --law"),
        ("predict {t}/a.csv --max_forgetting 0.1 --max_ref_kl 0.1", "max_forgetting: 0.1 does not go with max_ref_kl"),
        ("predict {t}/a.csv --num_steps 3", "law: cannot read"),
        ("predict {t}/a.csv --model M", "lora_r: missing; --model and --lora_r go together"),
        ("predict {t}/a.csv --model M --lora_r 4 --num_params 5", "num_params: 5 does not go with lora_r"),
        ("predict {t}/a.csv --max_forgetting 0.1 --num_steps 5", "num_steps: 5 does not go with max_forgetting"),
    ],
)
def test_bad_commands_end_in_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "b.csv").write_text("a,b\n1\n")
    (tmp_path / "c.jsonl").write_text("{")
    (tmp_path / "d.txt").write_text("x")
    assert main(arguments.format(t=tmp_path).split()) == 1
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert error.split(": ", 1)[1].startswith(message.format(t=tmp_path)), error
