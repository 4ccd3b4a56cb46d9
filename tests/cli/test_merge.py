"""`retain merge` from a folder to a folder: what is measured, chosen and written, and what a kill leaves."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_texts, make_tokenizer, moved_model, save_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import BEMACallback, SFTConfig

import retain.cli.merge as merge
from retain import ReplayConfig, ReplaySFTTrainer, load_model, load_tokenizer
from retain.cli.main import main
from retain.files import read_jsonl
from retain.measuring.measure import measure as measure_once
from retain.models.reference import probe
from retain.sampling.write import sample_replay

ANCHOR = ReplayConfig(replay_coef=0.0, anchor_coef=0.01, anchor_lr_ratio=1.0)


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its replay rows, held-out rows, and runs of all weights and of a LoRA, with replay and with an anchor."""
    root = tmp_path_factory.mktemp("world")
    save_model(root / "base")
    write_texts(root / "held.jsonl", make_texts(6, seed=2))
    model = make_model()
    model.name_or_path = str(root / "base")
    sample_replay(model, make_tokenizer(), root / "replay", num_rows=6, max_length=20)
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
    for name, adapter, settings in (
        ("full", None, ReplayConfig(replay_coef=0.01)),
        ("lora", lora, ReplayConfig(replay_coef=0.01)),
        ("full_anchored", None, ANCHOR),
        ("lora_anchored", lora, ANCHOR),
    ):
        args = SFTConfig(
            str(root / name), max_steps=12, learning_rate=1e-2, max_length=32, bf16=False, use_cpu=True, save_steps=4,
            report_to="none", save_only_model=True, disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = ReplaySFTTrainer(
            load_model(str(root / "base"), dtype="float32"), args, processing_class=make_tokenizer(),
            peft_config=adapter, train_dataset=Dataset.from_dict({"text": make_texts(16, seed=1)}),
            replay_dataset=str(root / "replay"), callbacks=[] if adapter else [BEMACallback(update_freq=2)],
            replay_config=settings,
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
    return root


@pytest.fixture(autouse=True, scope="module")
def few_alphas() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "ALPHAS", (0.0, 0.5, 0.9, 1.0))
        yield


def flags(world: Path, out: Path, **changes: Any) -> list[str]:
    given = {
        "model": world / "full",
        "new_task": f"words={world}/held.jsonl",
        "max_length": 32,
        "output_dir": out,
        "num_resamples": 100,
    }
    chosen = {name: value for name, value in (given | changes).items() if value is not None}
    return ["merge", *(word for name, value in chosen.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def merged(world: Path, few_alphas: None) -> tuple[Path, str]:
    """The run of all weights merged by the default rule, and what was said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(flags(world, world / "merged")) == 0
    return world / "merged", said.getvalue()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 1
    *bars, line = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in bar or "retain" in bar for bar in bars)
    return line


def test_a_full_model_is_merged_where_its_gain_is_kept(world, merged, tmp_path, capsys):
    out, said = merged
    summary = json.loads((out / "merge.json").read_text())
    points = summary["points"]
    assert [point["alpha"] for point in points] == list(merge.ALPHAS)
    assert points[0]["ref_kl"]["replay"]["value"] == 0 < points[-1]["ref_kl"]["replay"]["value"]
    kept = [point["kept"]["words"] for point in points]
    assert (
        summary["alpha"] == next(one["alpha"] for one, of in zip(points, kept, strict=True) if of["ci"][0] >= 0.95) < 1
    )
    assert f"alpha {summary['alpha']:g}: the lowest ref_kl that keeps 95% of the gain" in said
    assert len(re.findall(r"^  [01][.\d]* .*%.*\[", said, re.MULTILINE)) == len(merge.ALPHAS), "the table"
    assert "numbers are slightly optimistic: measure other rows with `retain measure`" in said
    assert summary["base"] == str(world / "base"), "the model that wrote the run's replay rows"
    assert summary["settings"]["seed"] == 0
    assert summary["versions"]["torch"]
    card = (out / "README.md").read_text()
    assert all(words in card for words in ("2109.01903", "## Forgetting", "slightly optimistic"))
    assert (out / "figure.png").stat().st_size > 5000
    assert load_tokenizer(str(out)).get_vocab() == make_tokenizer().get_vocab()
    weights = [load_model(str(world / name), dtype="float32").lm_head.weight for name in ("base", "full")]
    expected = torch.lerp(*weights, summary["alpha"])
    assert torch.equal(load_model(str(out), dtype="float32").lm_head.weight, expected)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    again = flags(world, out, model=out, base=world / "base", replay_dataset=world / "replay")
    assert "holds a model (model.safetensors), which would be lost" in refused(capsys, *again)
    measure = ["measure", "--base", str(world / "base"), "--model", str(out), "--retention", f"r={world}/replay"]
    assert (
        main([*measure, "--max_length", "32", "--max_new_tokens", "0", "--output_dir", str(tmp_path / "report")]) == 0
    )
    found = json.loads((tmp_path / "report" / "report.json").read_text())["retention"]["r"]["ref_kl"]["value"]
    at = merge.ALPHAS.index(summary["alpha"])
    assert found == pytest.approx(points[at]["ref_kl"]["replay"]["value"], rel=1e-4), "what was measured was written"


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_a_lora_stays_one(world, tmp_path, alpha):
    """And its base is the one that it names; without rows nothing is measured."""
    out = tmp_path / "out"
    assert main(flags(world, out, model=world / "lora", new_task=None, alpha=alpha)) == 0
    names = {path.name for path in out.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "merge.json"} <= names
    assert not {"alphas.jsonl", "figure.png", "model.safetensors"} & names
    tuned, merged = (load_model(str(path), dtype="float32") for path in (world / "lora", out))
    full, base = tuned.merge_and_unload(), load_model(str(world / "base"), dtype="float32")
    for name, value in merged.merge_and_unload().named_parameters():
        ends = (dict(model.named_parameters())[name] for model in (base, full))
        torch.testing.assert_close(value, torch.lerp(*ends, alpha), rtol=1e-5, atol=1e-6)


def test_a_lora_becomes_a_whole_model(world, tmp_path):
    halves = {}
    for whole in ("true", "false"):
        change = {"model": world / "lora", "new_task": None, "alpha": 0.5, "whole": whole}
        assert main(flags(world, tmp_path / whole, **change)) == 0
        halves[whole] = probe(load_model(str(tmp_path / whole), dtype="float32"))
    assert not (tmp_path / "true" / "adapter_config.json").exists()
    assert torch.allclose(halves["true"], halves["false"], atol=1e-4)
    assert "library_name: transformers" in (tmp_path / "true" / "README.md").read_text()


def test_weights_are_written_in_the_dtype_of_the_base(world, tmp_path):
    base = make_model().to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    moved_model().save_pretrained(tmp_path / "tuned")
    change = {"model": tmp_path / "tuned", "base": tmp_path / "base", "replay_dataset": world / "replay"}
    assert main(flags(world, tmp_path / "out", **change, new_task=None, alpha=0.5)) == 0
    found = load_model(str(tmp_path / "out"), dtype="auto")
    stored = torch.lerp(base.lm_head.weight.float(), moved_model().lm_head.weight, 0.5).bfloat16()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(found.lm_head.weight.float(), stored.float())


@pytest.mark.parametrize("run", ["full", "full_anchored"])
def test_an_average_of_weights_goes_through(world, tmp_path, run):
    """TRL's BEMACallback writes one beside a run of full finetuning, with an anchor, too."""
    model = world / run / "bema"
    change = {"model": model, "base": world / "base", "replay_dataset": world / "replay", "alpha": 1, "new_task": None}
    assert main(flags(world, tmp_path / "out", **change)) == 0
    ends = [probe(load_model(str(path), dtype="float32")) for path in (tmp_path / "out", model, world / run)]
    assert torch.equal(*ends[:2])
    assert (ends[1] - ends[2]).abs().max() > 0.01, "an average is not the last step"


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    model: Any = load_model(str(path), dtype="float32").double()
    return (model.merge_and_unload() if hasattr(model, "peft_config") else model).state_dict()


RUNS = ["full", "lora", "full_anchored", "lora_anchored"]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("alpha", [0.5, 1])
def test_the_mean_of_the_last_checkpoints_is_the_one_computed_by_hand(world, tmp_path, run, alpha):
    """Of merged weights; without rows nothing is measured."""
    out = tmp_path / "out"
    change = {"model": world / run, "new_task": None, "alpha": alpha, "average_checkpoints": 2}
    assert main(flags(world, out, **change)) == 0
    checkpoints = [world / run / f"checkpoint-{step}" for step in (8, 12)]
    one, two = map(weights_of, checkpoints)
    found, base = weights_of(out), weights_of(world / "base")
    for name, value in found.items():
        expected = torch.lerp(base[name], (one[name] + two[name]) / 2, float(alpha))
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    assert max((found[name] - two[name]).abs().max() for name in found) > 1e-3, "not the last one"
    summary = json.loads((out / "merge.json").read_text())
    assert (summary["end"], summary["checkpoints"]) == ("mean of 2 checkpoints", list(map(str, checkpoints)))
    assert "the mean of `checkpoint-8`, `checkpoint-12` of `" in (out / "README.md").read_text()
    assert (out / "adapter_config.json").exists() == run.startswith("lora")
    assert not [path.name for path in out.iterdir() if path.name.startswith(".") or path.is_dir()]
    assert str(tmp_path) not in "".join(path.read_text() for path in out.glob("*config.json")), "no temporary place"


@pytest.mark.parametrize("run", RUNS)
def test_the_mean_of_checkpoints_is_a_candidate_by_the_same_rule(world, tmp_path, run, capsys, monkeypatch):
    out = tmp_path / "out"
    asked = measured_alphas(monkeypatch, die_at=0.9, end="mean of 3 checkpoints, ")
    change = {"model": world / run, "average_checkpoints": 3, "keep_gain": 0.5}
    assert main(flags(world, out, **change)) == 130
    assert [path.name for path in out.iterdir()] == ["alphas.jsonl"], "a mean that is a copy of the model goes"
    before, asked = len(asked), measured_alphas(monkeypatch)
    assert main(flags(world, out, **change)) == 0
    assert (before, asked) == (7, [f"mean of 3 checkpoints, alpha {alpha:g}" for alpha in (0.9, 1)])
    summary = json.loads((out / "merge.json").read_text())
    points = summary["points"]
    assert [(one["end"], one["alpha"]) for one in points] == [
        (end, alpha) for end in ("model", "mean of 3 checkpoints") for alpha in merge.ALPHAS
    ]
    keeping = [one for one in points if one["alpha"] and one["kept"]["words"]["ci"][0] >= 0.5]
    best = min(keeping, key=lambda one: one["ref_kl"]["replay"]["value"])
    assert (summary["end"], summary["alpha"]) == (best["end"], best["alpha"])
    assert len({one["end"] for one in keeping}) == 2, "there was a choice"
    steps = [4, 8, 12] if best["end"] != "model" else []
    assert summary["checkpoints"] == [str(world / run / f"checkpoint-{step}") for step in steps]
    ends = {"model": weights_of(world / run)}
    weights = [weights_of(world / run / f"checkpoint-{step}") for step in (4, 8, 12)]
    ends["mean of 3 checkpoints"] = {name: sum(one[name] for one in weights) / 3 for name in weights[0]}
    base = weights_of(world / "base")
    for name, value in weights_of(out).items():
        expected = torch.lerp(base[name], ends[best["end"]][name], best["alpha"])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert "mean of 3 checkpoints" in capsys.readouterr().out
    limit = {**change, "keep_gain": None, "max_ref_kl": points[1]["ref_kl"]["replay"]["ci"][1] * 1.01}
    asked.clear()
    assert main(flags(world, out, **limit)) == 0
    assert asked == [], "another choice measures nothing again"
    within = [one for one in points if one["alpha"] and one["ref_kl"]["replay"]["ci"][1] <= limit["max_ref_kl"]]
    best = min(within, key=lambda one: one["loss"]["words"]["value"])
    summary = json.loads((out / "merge.json").read_text())
    assert (summary["end"], summary["alpha"]) == (best["end"], best["alpha"])


def measured_alphas(monkeypatch: pytest.MonkeyPatch, die_at: float | None = None, end: str = "") -> list[str]:
    """The names of what is measured from now on; at one of them the process is interrupted."""
    asked: list[str] = []

    def measure(*args: Any, name: str, **options: Any) -> Any:
        asked.append(name)
        if name == f"{end}alpha {die_at}":
            raise KeyboardInterrupt
        return measure_once(*args, name=name, **options)

    monkeypatch.setattr(merge, "measure", measure)
    return asked


def test_a_killed_merge_resumes_and_another_choice_measures_nothing_again(world, merged, tmp_path, capsys, monkeypatch):
    out, (undisturbed, _) = tmp_path / "out", merged
    asked = measured_alphas(monkeypatch, die_at=0.9)
    assert main(flags(world, out)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "retain merge: interrupted; run the same command again to resume"
    )
    assert len(read_jsonl(out / "alphas.jsonl")) == len(asked) - 1 == 2
    with open(out / "alphas.jsonl", "a") as file:
        file.write('{"key": "to')  # as a kill within a line leaves it
    (out / ".model.retain-part").mkdir()
    asked = measured_alphas(monkeypatch)
    assert main(flags(world, out)) == 0
    assert asked == [f"alpha {alpha:g}" for alpha in merge.ALPHAS[2:]]
    for name in ("model.safetensors", "figure.png"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()
    one, two = (json.loads((folder / "merge.json").read_text()) for folder in (out, undisturbed))
    assert one | {"created": 0} == two | {"created": 0}
    asked.clear()
    assert main(flags(world, out, alpha=0.5)) == 0
    assert asked == []
    assert json.loads((out / "merge.json").read_text())["alpha"] == 0.5
    assert main(flags(world, out, alpha=0.5, max_documents=3)) == 0
    assert asked == ["alpha 0.5", "alpha 1"], "of other documents"


def test_a_kill_while_the_model_is_written_leaves_none_and_is_resumed(world, tmp_path, monkeypatch):
    out, replace = tmp_path / "out", Path.replace

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == "config.json":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    assert main(flags(world, out, new_task=None, alpha=0.2)) == 130
    assert (out / "model.safetensors").exists()
    assert not (out / "config.json").exists()
    monkeypatch.undo()
    assert main(flags(world, out, new_task=None, alpha=0.2)) == 0
    assert load_model(str(out))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"new_task": None}, "new_task: missing; give held-out rows as --new_task name=file, or --alpha"),
        ({"new_task": "held.jsonl"}, "new_task: 'held.jsonl' is not name=file"),
        ({"alpha": 0.5, "keep_gain": 0.9}, "keep_gain: 0.9 does not go with alpha; leave one out"),
        ({"max_ref_kl": 0.1, "keep_gain": 0.9}, "keep_gain: 0.9 does not go with max_ref_kl; leave one out"),
        ({"alpha": 1.5}, "alpha: 1.5 does not fit; use a number from 0 to 1"),
        ({"max_ref_kl": 1e-9}, "max_ref_kl: 1e-09 is already exceeded at alpha 0.5"),
        ({"average_checkpoints": 1}, "average_checkpoints: 1 does not fit; use a whole number of at least 2"),
        ({"average_checkpoints": 4}, "average_checkpoints: 4, but '{w}/full' holds 3 whole checkpoints; give a run's"),
        ({"model": "{w}/base"}, "base: '{w}/base' does not name its base; give --base"),
        ({"model": "{w}/base", "base": "{w}/base"}, "replay_dataset: missing, and '{w}/base' names none; give"),
        ({"model": "{w}/base", "base": "{w}/base", "replay_dataset": "{w}/replay"}, "'words' shows no gain to keep"),
        ({"base": "{t}/large"}, "model: the tokenizer in '{w}/full'"),
        ({"base": "{t}/deep"}, "base: model.layers.2.input_layernorm.weight is [32] in it and missing in the model"),
        ({"output_dir": "{w}/full"}, "output_dir: '{w}/full' already holds a training run (retain_config.json)"),
        ({"base": "{t}/no"}, "base: no folder or file '{t}/no'"),
        ({"replay_dataset": "{t}/no.txt"}, "no.txt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(world, tmp_path, capsys, changes, expected):
    save_model(tmp_path / "deep", num_hidden_layers=3)
    save_model(tmp_path / "large", vocab_size=321)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "large")
    given = {name: value and str(value).format(w=world, t=tmp_path) for name, value in changes.items()}
    line = refused(capsys, *flags(world, tmp_path / "out", **given))
    assert expected.format(w=world, t=tmp_path) in line
    left = {path.name for path in (tmp_path / "out").glob("*")}
    assert left <= {"alphas.jsonl"}, "what was measured stays"


@pytest.mark.parametrize(
    ("by", "what"),
    [("replay_dataset", "the model that wrote the run's replay rows"), ("base", "the model that the run in .*")],
)
def test_a_base_that_was_changed_since_is_refused(world, tmp_path, capsys, by, what):
    """Run files of before hold the base of their rows alone."""
    settings = json.loads((world / "full" / "retain_config.json").read_text())
    save_model(tmp_path / "other", seed=5)
    if by == "base":
        settings["base"]["model"] = str(tmp_path / "other")
    else:
        settings["replay_dataset"]["manifest"]["model"] = str(tmp_path / "other")
        del settings["base"]
    make_model().save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "retain_config.json").write_text(json.dumps(settings))
    line = refused(capsys, *flags(world, tmp_path / "out", model=tmp_path / "tuned"))
    assert re.search(f"is no longer {what}; give --base", line)


def test_an_adapter_of_another_base_is_refused(world, tmp_path, capsys):
    save_model(tmp_path / "other", seed=5)
    line = refused(capsys, *flags(world, tmp_path / "out", model=world / "lora", base=tmp_path / "other"))
    assert "it was finetuned from another base" in line
    dora = get_peft_model(load_model(str(world / "base")), LoraConfig(r=2, use_dora=True, task_type="CAUSAL_LM"))
    dora.save_pretrained(tmp_path / "dora")
    line = refused(capsys, *flags(world, tmp_path / "out", model=tmp_path / "dora", new_task=None, alpha=0.5))
    assert "lora_magnitude_vector" in line
