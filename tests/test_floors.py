"""Imports point one way, annotations and imports inside of functions included."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "badge_peft"

#: From the ground up. A module belongs to the longest name that it starts with, and imports from its own floor or from
#: those below.
FLOORS = [
    ("utils", "_version"),
    (
        "early_exit.config",
        "early_exit.divergences",
        "early_exit.history",
        "early_exit.policies",
    ),
    ("tuner", "registry", "outputs"),
    ("early_exit", "model_card"),
    ("model",),
    ("compile", "evaluation", "training", "integrations"),
    ("bundle", "hub", "pipelines", "ranking", "integrations.sentence_transformers", "export", "serving"),
    ("workflows", "app", "integrations.ray"),
    ("cli",),
]

#: Libraries that are extras, and where they may be imported.
OPTIONAL = {
    "adapters": ("integrations",),
    "fastapi": ("serving",),
    "bm25s": ("integrations",),
    "gradio": ("app",),
    "matplotlib": ("evaluation.plots", "app", "workflows"),
    "onnx": ("export",),
    "onnx_ir": ("export",),
    "onnxruntime": ("export",),
    "onnxscript": ("export",),
    "optuna": ("training", "workflows"),
    "prometheus_client": ("serving",),
    "pydantic": ("serving",),
    "ray": ("integrations", "serving"),
    "sentence_transformers": ("integrations",),
}


@cache
def modules() -> dict[str, Path]:
    """Names below `badge_peft` -> files; the package itself, which names everything lazily, is left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


@cache
def imports(name: str) -> set[str]:
    """Dotted names that a module imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports hide where they point"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


def own_imports(name: str) -> set[str]:
    """Those of the package. Importing a name from a module counts for the module, not for the packages above it."""
    inside = {target.removeprefix("badge_peft.") for target in imports(name) if target.startswith("badge_peft.")}
    known = inside & modules().keys() - {name}
    return {target for target in known if not any(other.startswith(f"{target}.") for other in known)}


def floor(name: str) -> int:
    """The floor of a module: that of the longest prefix."""
    fitting = [
        (len(prefix), number)
        for number, prefixes in enumerate(FLOORS)
        for prefix in prefixes
        if name == prefix or name.startswith(f"{prefix}.")
    ]
    assert fitting, f"{name} is on no floor: name it in FLOORS"
    return max(fitting)[1]


def test_imports_point_down() -> None:
    packages = {name for name in modules() if "." not in name and (PACKAGE / name).is_dir()}  # hand on what is in them
    wrong = {
        name: upwards
        for name in modules().keys() - packages
        if (upwards := {target for target in own_imports(name) if floor(target) > floor(name)})
    }
    assert not wrong, f"these import from a floor above their own: {wrong}"


def test_there_is_no_circle() -> None:
    try:
        list(TopologicalSorter({name: own_imports(name) for name in modules()}).static_order())
    except CycleError as error:
        pytest.fail(f"modules import one another: {' -> '.join(error.args[1])}")


def test_optional_libraries_stay_in_their_rooms() -> None:
    for name in modules():
        for target in imports(name):
            rooms = OPTIONAL.get(target.split(".")[0])
            if rooms is not None:
                assert any(name == room or name.startswith(f"{room}.") for room in rooms), f"{name} imports {target}"


def test_the_front_door_has_at_most_ten_files() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 10


def test_the_check_sees_what_it_should() -> None:
    assert own_imports("early_exit.exit_pass") >= {"early_exit.row_slice", "tuner.context"}
    assert floor("early_exit.policies.base") < floor("tuner.config") < floor("early_exit.exit_pass") < floor("model")
