"""`import badge_peft` is light: what answers early is there at once, the rest when it is named."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import badge_peft

HEAVY = (
    "adapters",
    "cyclopts",
    "datasets",
    "gradio",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "optuna",
    "pandas",
    "scipy",
    "sklearn",
    "transformers.pipelines",
    "transformers.trainer",
    "typer",
)
LATE = ("badge_peft.compile", "badge_peft.evaluation", "badge_peft.pipelines", "badge_peft.training")
SCRIPT = """
import json, sys
import torch, transformers, peft
before = set(sys.modules)
import badge_peft
light = sorted(set(sys.modules) - before)
named = sorted(set(badge_peft.__all__) - set(dir(badge_peft)))
badge_peft.training.MultiExitTrainer
import badge_peft.integrations
print(json.dumps({"light": light, "not in dir": named, "named": sorted(set(sys.modules) - before)}))
"""


def inside(modules: list[str], packages: tuple[str, ...]) -> list[str]:
    return [m for m in modules if m.startswith(packages) and any(f"{m}.".startswith(f"{p}.") for p in packages)]


@pytest.fixture(scope="module")
def found(fresh: Callable[[str], Any]) -> dict[str, Any]:
    return fresh(SCRIPT)


def test_the_import_brings_no_heavy_library(found: dict[str, Any]) -> None:
    assert inside(found["light"], HEAVY) == []
    assert inside(found["light"], LATE) == []
    # the same question has another answer once a late name has been asked for: so the lists above can fail
    assert inside(found["named"], ("adapters",)) == []  # not even by badge_peft.integrations
    assert {"transformers.trainer", "badge_peft.evaluation", "badge_peft.training"} <= set(found["named"])


def test_dir_lists_late_names_too(found: dict[str, Any]) -> None:
    assert found["not in dir"] == []


def test_late_names_are_those_of_their_modules() -> None:
    for module, names in badge_peft._LAZY.items():
        for name in names:
            assert getattr(badge_peft, name) is getattr(importlib.import_module(f"badge_peft.{module}"), name)
        assert getattr(badge_peft, module) is importlib.import_module(f"badge_peft.{module}")
    with pytest.raises(AttributeError, match="module 'badge_peft' has no attribute 'calibrated'"):
        badge_peft.calibrated  # type: ignore[attr-defined]  # noqa: B018  # the access is the test


def test_type_checkers_are_told_the_same_names() -> None:
    tree = ast.parse(Path(badge_peft.__file__).read_text(encoding="utf-8"))
    told: dict[str, tuple[str, ...]] = {}
    for block in tree.body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for line in block.body:
                assert isinstance(line, ast.ImportFrom) and line.module is not None
                told[line.module.removeprefix("badge_peft.")] = tuple(name.name for name in line.names)
    assert told == badge_peft._LAZY
    assert {name for names in told.values() for name in names} <= set(badge_peft.__all__)
