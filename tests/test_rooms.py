"""The folders of the package: what each may import, and that no method is named outside of its own file."""

import ast
import re
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import trl_cancel
from trl_cancel.methods import METHODS


PACKAGE = Path(trl_cancel.__file__).parent
# From the lowest to the highest. A file imports those of its own room and of lower ones.
ROOMS = [
    ("version", "arguments", "texts", "logs", "intervals", "papers", "playground"),
    ("upstream",),
    ("running",),
    ("batch", "knapsack"),
    ("diagnostics",),
    ("methods",),
    ("pipeline",),
    ("config", "configs", "value_rules", "explanation"),
    ("evaluation",),
    ("diagnostics.probing", "diagnostics.reports"),
    ("publishing",),
    ("trainer", "trainers"),
    ("doctor",),
    ("cli", "__main__"),
]
# What shows names of several rooms to users, and is imported by no file of the package.
FACES = {"", "credit", "batching", "diagnostics"}
# What measures a method may name it.
NAME_METHODS = ("methods", "diagnostics")
SETTINGS = {setting for method in METHODS for setting in vars(method.Settings)["__annotations__"]}
OF_METHODS = re.compile(rf"\b({'|'.join(sorted(SETTINGS))})")


def modules():
    """The files of the package by their names without `trl_cancel.`."""
    names = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(part for part in parts if part != "__init__"): path for path, parts in names.items()}


def imports():
    """For each file, the files that it imports anywhere, also within functions and for type checking."""
    known = modules()
    found = {name: set() for name in known}
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("trl_cancel") for alias in node.names), (
                    f"{name}: relative, please"
                )
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if package else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            targets = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
            found[name] |= {target if target in known else base for target in targets}
    return found


def room_of(name):
    fits = [
        (len(room), level)
        for level, rooms in enumerate(ROOMS)
        for room in rooms
        if name == room or name.startswith(f"{room}.")
    ]
    assert fits, f"trl_cancel/{name} is in no room: add it to ROOMS"
    return max(fits)[1]


def test_there_is_no_circle_of_imports():
    TopologicalSorter({name: found - {name} for name, found in imports().items()}).prepare()


def test_lower_rooms_import_no_higher_ones():
    upwards = [
        f"{name} imports {target}"
        for name, found in imports().items()
        if name not in FACES
        for target in found
        if room_of(target) > room_of(name)
    ]
    assert upwards == []


def test_nothing_is_imported_by_way_of_a_face():
    through = [f"{name} imports {face or 'trl_cancel'}" for name, found in imports().items() for face in found & FACES]
    assert through == []


def test_methods_are_named_in_their_files_only():
    """By their settings, and by their modules; apart from what measures a method, and what exports names."""
    naming = {name for name, path in modules().items() if OF_METHODS.search(path.read_text(encoding="utf-8"))}
    files = {type(method).__module__.removeprefix("trl_cancel.") for method in METHODS}
    naming |= {name for name, found in imports().items() if found & files}
    outside = {name for name in naming if not name.startswith(NAME_METHODS)}
    assert outside <= FACES


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.switch)
def test_a_method_is_one_file(method):
    """Its settings, its hooks and its formula; other methods' files do not speak of its settings."""
    own = PACKAGE / "methods" / f"{type(method).__module__.rpartition('.')[-1]}.py"
    settings = list(vars(method.Settings)["__annotations__"])
    pattern = re.compile(rf"args\.({'|'.join(settings)})\b")
    others = [path for path in PACKAGE.rglob("*.py") if path != own and path.name != "__init__.py"]
    assert [path.name for path in others if pattern.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("face", ["trl_cancel", "trl_cancel.credit", "trl_cancel.batching", "trl_cancel.diagnostics"])
def test_public_names_are_there(face):
    """Those that are loaded on first use too, and from this package, not from another copy that is installed."""
    module = import_module(face)
    for name in module.__all__:
        home = getattr(getattr(module, name), "__module__", face)
        assert home.removeprefix("trl_cancel.") in modules() or home == "trl_cancel", f"{face}.{name} is of {home}"
