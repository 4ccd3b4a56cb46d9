"""Who may import whom, read from the source; and what importing `retain` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "retain"
PURE = {"config", "value_types", "files", "text", "losses", "statistics", "cells", "comparison", "budget"}
ROOMS = PURE | {"models", "loading", "chats", "data", "reference"}
# Module: what it may import of ours. A name outside the table is a new room: put it where it belongs.
MAY_IMPORT = {
    "__init__": set(),
    "__main__": {"cli"},
    "value_types": set(),
    "config": {"value_types"},
    "files": set(),
    "text": {"files"},
    "losses": set(),
    "statistics": set(),
    "cells": set(),
    "comparison": {"statistics", "cells"},
    "budget": {"config"},
    "models": PURE,
    "loading": PURE | {"models"},
    "tokenizer_identity": {"loading", "models"},
    "row_files": PURE,
    "chats": PURE,
    "data": PURE | {"chats", "row_files"},
    "reference": PURE,
    "pool": PURE,
    "preview": PURE | {"pool"},
    "overlap": PURE,
    "heads": ROOMS,
    "remembered": ROOMS | {"heads"},
    "reference_cache": PURE,
    "replay": PURE | {"data", "reference_cache"},
    "objective": ROOMS | {"heads", "metrics", "replay"},
    "protection": ROOMS | {"replay", "overlap"},
    "verdicts": {"cells", "comparison"},
    "pareto": {"cells", "verdicts"},
    "panels": {"comparison", "pareto"},
    "plots": {"cells", "panels", "text"},
    "tables": {"cells"},
    "behaviour": {"cells"},
    "maps": {"cells", "text"},
    "interactive": {"plots"},
    "laws": set(),
    "projection": {"laws"},
    "law_runs": {"laws", "files", "text"},
    "law_problem": {"laws", "projection", "law_runs"},
    "doubts": {"laws", "law_problem", "forgetting_law"},
    "forgetting_law": {"laws", "law_problem", "law_runs", "law_solving", "law_text", "law_file", "law_plots", "doubts"},
    "law_solving": {"laws", "forgetting_law"},
    "law_text": {"law_runs", "forgetting_law"},
    "law_file": {"laws", "law_problem", "law_runs", "forgetting_law", "files"},
    "law_plots": {"laws", "plots", "forgetting_law"},
    "fitting": {"laws", "law_problem", "law_runs", "forgetting_law", "doubts", "__init__"},
    "law_verbs": {"config", "files", "text", "laws", "law_runs", "forgetting_law", "fitting", "plots", "loading"},
    "plan": {"laws", "fitting", "forgetting_law"},
    "plan_text": {"plan", "plots"},
    "plan_verb": ROOMS | {"law_runs", "plan", "plan_text", "replay", "sample", "__init__"},
    "capabilities.__init__": set(),
    "capabilities.answers": {"statistics", "cells"},
    "capabilities.gate": {"capabilities.answers", "cells"},
    "capabilities.samples": {"capabilities.answers", "__init__"},
    "capabilities.harness": ROOMS | {"capabilities.samples"},
    "base_cache": ROOMS | {"heads", "metrics", "__init__"},
    "measured_texts": ROOMS | {"base_cache", "metrics"},
    "capabilities.choices": ROOMS | {"base_cache", "metrics", "capabilities.answers", "capabilities.reasoning"},
    "capabilities.drift": {"statistics", "capabilities.answers"},
    "capabilities.phrases": {"capabilities.reasoning"},
    "capabilities.reasoning": {"data"},
    "capabilities.generations": ROOMS | {"base_cache", "metrics", "capabilities.drift", "capabilities.reasoning"},
    "capabilities.refusals": ROOMS
    | {"base_cache", "metrics"}
    | {f"capabilities.{name}" for name in ("answers", "choices", "generations", "phrases", "reasoning")},
    "report": {"comparison", "verdicts", "pareto", "panels", "plots", "interactive", "tables", "behaviour", "maps"}
    | {"cells", "files", "text", "model_card", "capabilities.answers", "__init__"},
    "model_card": {"report", "tables", "cells", "text", "capabilities.answers", "__init__"},
    "demo_data": ROOMS,
    "own_rows": ROOMS | {"replay"},
    "engine": ROOMS | {"heads", "own_rows"},
    "starts": ROOMS,
    "sampling": ROOMS | {"replay", "reference_cache", "engine", "starts", "__init__"},
    "ray_engine": ROOMS | {"engine"},
    "vllm_engine": ROOMS | {"engine"},
    "sample": ROOMS
    | {"replay", "engine", "starts", "sampling", "pool", "preview", "ray_engine", "vllm_engine"}
    | {"objective", "reference_cache"},
    "metrics": ROOMS,
    "measuring": ROOMS
    | {"base_cache", "measured_texts", "report", "__init__"}
    | {f"capabilities.{name}" for name in ("choices", "generations", "refusals")},
    "measure_verb": ROOMS
    | {"tokenizer_identity", "measuring", "callbacks", "overlap", "replay", "report"}
    | {f"capabilities.{name}" for name in ("choices", "generations", "refusals", "harness")},
    "callbacks": {"replay", "files"},
    "trajectory": ROOMS | {"metrics", "callbacks"},
    "forgetting_callback": ROOMS
    | {"metrics", "callbacks", "trajectory", "heads", "remembered", "protection", "capabilities.choices", "__init__"},
    "retention": ROOMS
    | {"trajectory", "replay", "report", "sampling", "metrics", "measuring", "callbacks", "__init__"},
}
MAY_IMPORT["inputs"] = MAY_IMPORT["retention"] | {"retention", "protection", "heads", "objective", "remembered"}
MAY_IMPORT["inputs"] |= {"own_rows"}
MAY_IMPORT["trainer"] = MAY_IMPORT["inputs"] | {"inputs", "budget"}
MAY_IMPORT["finetune"] = MAY_IMPORT["trainer"] | {"trainer", "sample", "half_life", "stop_at_loss"}
MAY_IMPORT["demo"] = MAY_IMPORT["finetune"] | {"finetune", "demo_data"}
MAY_IMPORT["cli"] = MAY_IMPORT["demo"] | {
    "demo",
    "measure_verb",
    "capabilities.gate",
    "capabilities.samples",
    "law_verbs",
    "plan_verb",
    "lab.config",
    "lab.pretrain",
}
MAY_IMPORT |= {"half_life": set(), "stop_at_loss": set()}
MAY_IMPORT |= {
    "lab.__init__": set(),
    "lab.models": set(),
    "lab.tokenizers": set(),
    "lab.config": {"config", "value_types"},
}
MAY_IMPORT |= {"lab.tasks": {"engine"}, "lab.corpora": {"engine", "replay", "text"}}
MAY_IMPORT["lab.pretrain"] = MAY_IMPORT["finetune"] | {"finetune", "demo_data"}
MAY_IMPORT["lab.pretrain"] |= {f"lab.{name}" for name in ("config", "corpora", "models", "tasks", "tokenizers")}

MAY_IMPORT["lab.sweep_file"] = set()
MAY_IMPORT["lab.sweep"] = {"cells", "files", "__init__", "lab.ray_sweep", "lab.sweep_file"}
MAY_IMPORT["lab.ray_sweep"] = {"lab.sweep", "lab.sweep_file", "lab.__init__", "ray_engine", "text"}
MAY_IMPORT["cli"] |= {"lab.sweep", "export", "signals", "flags", "model_card"}
MAY_IMPORT |= {"signals": set(), "flags": MAY_IMPORT["lab.pretrain"] | {"lab.pretrain"}}
MAY_IMPORT["export"] = ROOMS | {"replay"}

LIBRARIES = {"torch", "numpy", "scipy", "jaxtyping"}
PATHS = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
MODULES = sorted(PATHS)


def imports(module: str) -> list[tuple[str, bool]]:
    """Every imported module, and whether it is imported when `module` is, rather than inside a function."""
    tree = ast.parse(PATHS[module].read_text())
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    type_checking = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for child in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        now = id(node) not in inside | type_checking
        if isinstance(node, ast.Import):
            found += [(alias.name, now) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide edges"
            package = f"{node.module}.".removeprefix("retain.")
            if f"{package}__init__" in PATHS and node.module and node.module.startswith("retain"):
                names = [package + alias.name for alias in node.names]
                found += [(f"retain.{name if name in PATHS else package + '__init__'}", now) for name in names]
            else:
                found.append((node.module or "", now))
    return found


def ours(module: str) -> set[str]:
    return {name.removeprefix("retain.") for name, _ in imports(module) if name.startswith("retain.")}


def libraries(module: str, *, on_import: bool = False) -> set[str]:
    names = {name.split(".")[0] for name, now in imports(module) if now or not on_import}
    return names - {"retain"} - sys.stdlib_module_names


def test_every_module_has_its_place_in_the_table():
    assert set(MODULES) == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    assert ours(module) <= MAY_IMPORT[module]


@pytest.mark.parametrize("module", sorted(PURE))
def test_the_pure_modules_stand_on_torch_numpy_and_scipy(module):
    assert libraries(module) <= LIBRARIES


def test_config_and_files_stand_on_the_standard_library():
    assert libraries("config") == libraries("files") == set()


def test_trl_is_imported_where_training_is():
    """Pitfall 29: and only names of `trl` itself, never of `trl.experimental`."""
    users = {module for module in MODULES if "trl" in libraries(module)}
    assert users <= {"trainer", "finetune", "demo", "flags", "chats"}
    assert "trl" not in libraries("chats", on_import=True), "reading asks for it where a row needs it"
    names = {name for module in MODULES for name, _ in imports(module) if name.split(".")[0] == "trl"}
    assert names == {"trl"}


def test_results_are_shown_without_models():
    shown = (
        "report",
        "plots",
        "interactive",
        "comparison",
        "behaviour",
        "capabilities.answers",
        "capabilities.gate",
        "capabilities.samples",
    )
    for module in shown:
        assert libraries(module).isdisjoint({"torch", "transformers", "peft", "trl", "datasets"})


def test_the_command_line_imports_inside_functions():
    own = {"collections.abc", "retain.flags", "retain.signals", "retain.value_types"}
    for module in ("cli", "flags", "signals"):
        assert {name for name, now in imports(module) if now} <= set(sys.stdlib_module_names) | own
    assert libraries("__init__") == set()


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys; print('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split("LOADED", 1)[1].split())


HEAVY = {"torch", "trl", "transformers", "peft", "datasets", "numpy", "scipy", "matplotlib", "pyarrow", "yaml"}


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_after("import retain; retain.__version__; dir(retain); retain.versions()")
    assert loaded.isdisjoint(HEAVY)
    assert "retain.config" not in loaded


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], ["unknown"]])
def test_help_loads_nothing_heavy(arguments):
    """Pitfall 34."""
    assert loaded_after(f"import contextlib, io, retain.cli\nwith contextlib.redirect_stderr(io.StringIO()):\n"
                        f"    retain.cli.main({arguments})").isdisjoint(HEAVY)  # fmt: skip


def test_public_names_resolve_and_others_do_not():
    import retain

    for name in retain.__all__:
        assert getattr(retain, name) is not None
    assert retain.kl_divergence.__module__ == "retain.losses"
    with pytest.raises(AttributeError, match="module 'retain' has no attribute 'forget'"):
        _ = retain.forget
