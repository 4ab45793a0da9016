"""One small model and its export, which most tests of exports look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from badge_peft.export.onnx import OnnxExporter
from tests.models import make_badge
from tests.texts import make_tokenizer


@pytest.fixture(autouse=True, scope="session")
def _alike(one_translation: None) -> None:
    """Every export here."""


@pytest.fixture(scope="session")
def model() -> Any:
    return make_badge("bert", exit_layers=[0, 1, 2, 3])


@pytest.fixture(scope="session")
def exporter(model: Any) -> OnnxExporter:
    """One cut of `model`, of which many files are made."""
    return OnnxExporter(model, {"threshold": 1.0})


@pytest.fixture(scope="session")
def folder(exporter: OnnxExporter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `exporter` writes. Do not change it."""
    path = tmp_path_factory.mktemp("onnx")
    report = exporter.write(path, tokenizer=make_tokenizer())
    assert report.max_difference is not None and report.max_difference < 1e-4
    assert report.exit_layers == [0, 1, 2, 3]
    assert report.size_bytes == (path / "model.onnx").stat().st_size
    return path
