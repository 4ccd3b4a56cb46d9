"""Who may import whom, read from the source; and what importing `retain` costs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import forked

SOURCE = Path(__file__).parents[1] / "src" / "retain"
# The rooms, floor by floor: a module may import what lies in its own room, or on a floor below.
FLOORS = (
    {"checks", "files", "losses", "progress", "statistics"},
    {"models"},
    {"data"},
    {"replay", "report"},
    {"laws"},
    {"sampling", "measuring"},
    {"training"},
    {"lab"},
    {"cli"},
    {"__main__"},
)
LEAVES = FLOORS[0]
PURE = {"losses", "statistics", "report.numbers", "report.comparison", "report.metrics", "training.coef_controller"}
LIGHT = {"checks", "files", "training.config", "cli.settings"}

LIBRARIES = {"torch", "numpy", "scipy", "jaxtyping"}
PATHS = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
MODULES = sorted(PATHS)


@cache
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


def room(module: str) -> str:
    return module.split(".")[0]


def floor(module: str) -> int:
    return next(at for at, rooms in enumerate(FLOORS) if room(module) in rooms)


def test_every_room_has_its_floor():
    assert {room(module) for module in MODULES} - {"__init__"} == set().union(*FLOORS)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_imports_go_down(module):
    other = {name for name in ours(module) if room(name) != room(module)} - {"__init__"}
    assert [name for name in other if floor(name) >= floor(module)] == []
    assert not (other and room(module) in LEAVES)


def test_a_name_stands_for_one_thing():
    """Every function, class and constant of a module has a name that no other module's has."""
    places: dict[str, set[str]] = {}
    for module, path in PATHS.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                places.setdefault(node.name, set()).add(module)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    places.setdefault(ast.unparse(target), set()).add(module)
    twice = {name: modules for name, modules in places.items() if len(modules) > 1}
    assert set(twice) <= {"VERB", "logger"}, twice


@pytest.mark.parametrize("module", sorted(PURE))
def test_the_pure_modules_stand_on_torch_numpy_and_scipy(module):
    assert libraries(module) <= LIBRARIES


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_settings_and_files_stand_on_the_standard_library(module):
    assert libraries(module) <= ({"filelock"} if module == "files" else set())


def test_trl_is_imported_where_training_is():
    """Pitfall 29: and only names of `trl` itself, never of `trl.experimental`."""
    users = {module for module in MODULES if "trl" in libraries(module)}
    assert users <= {"training.trainer", "cli.finetune", "cli.finetune_data", "cli.flags", "data.chats"}
    assert "trl" not in libraries("data.chats", on_import=True), "reading asks for it where a row needs it"
    names = {name for module in MODULES for name, _ in imports(module) if name.split(".")[0] == "trl"}
    assert names == {"trl"}


def test_results_are_shown_and_laws_fitted_without_models():
    for module in MODULES:
        if room(module) in ("report", "laws"):
            assert libraries(module).isdisjoint({"torch", "transformers", "peft", "trl", "datasets"})


def test_the_command_line_imports_inside_functions():
    own = {"collections.abc", "retain.cli.flags", "retain.cli.signals", "retain.checks"}
    for module in ("cli.main", "cli.flags", "cli.signals"):
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


@pytest.mark.parametrize(
    ("code", "later"),
    [
        (
            "from retain import ForgettingReport, fit_forgetting_law",
            {"torch", "transformers", "matplotlib", "datasets"},
        ),
        ("import retain.cli.sample, retain.cli.chat, retain.cli.export", {"peft", "transformers.modeling_utils"}),
    ],
)
def test_what_reads_a_file_or_a_flag_waits_for_no_model_and_no_figure(code, later):
    assert loaded_after(code).isdisjoint(later)


NOT_THERE = (
    ["finetune", "--dataset_name", "./no.jsonl"],
    ["measure", "--new-task=held=no/held.txt", "--base", "x"],
    ["sample", "--model", "./no"],
)


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], ["unknown"], *NOT_THERE])
def test_help_and_a_wrong_path_load_nothing_heavy(arguments):
    """Pitfall 34."""
    assert loaded_after(f"import contextlib, io, retain.cli.main\nwith contextlib.redirect_stderr(io.StringIO()):\n"
                        f"    retain.cli.main.main({arguments})").isdisjoint(HEAVY)  # fmt: skip


def test_every_module_imports_on_windows(tmp_path):
    """Where these modules of POSIX are missing."""
    own = [
        name.removesuffix(".__init__")
        for name in MODULES
        if not name.endswith(("__main__", "_engine", "_plugin", "ray_workers"))
    ]
    names = [f"retain.{name}" for name in own if name != "__init__"]  # what needs extras aside

    def import_anew(names: list[str]) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "retain"]:
            del sys.modules[name]
        sys.modules.update(dict.fromkeys(("fcntl", "grp", "pwd", "resource")))
        for name in names:
            importlib.import_module(name)
        with pytest.raises(ImportError):
            importlib.import_module("fcntl")

    process = forked(tmp_path / "said.txt", import_anew, names)
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "said.txt").read_text()


def test_public_names_resolve_and_others_do_not():
    import retain

    for name in retain.__all__:
        assert getattr(retain, name) is not None
    assert retain.kl_divergence.__module__ == "retain.losses"
    with pytest.raises(AttributeError, match="module 'retain' has no attribute 'forget'"):
        _ = retain.forget
