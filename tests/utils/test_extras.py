"""What exporting needs is said before anything is done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from badge_peft.export import export_full_depth, export_onnx
from badge_peft.utils.extras import require_onnx_exporter
from tests.models import make_badge


@pytest.mark.parametrize("version", ["2.4.0", "2.7.1+cpu"])
def test_an_older_torch(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    for export in (export_onnx, export_full_depth):
        with pytest.raises(ImportError, match=rf"torch 2\.8 or newer, and this is {version.split('+')[0]}"):
            export(make_badge(), tmp_path / "file")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("version", ["2.8.0", "2.8.0a0+5228986c39", "2.10.1"])
def test_a_torch_that_can(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    require_onnx_exporter()


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("badge_peft.utils.extras.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ModuleNotFoundError, match=r"needs onnxscript, .*badge-peft\[onnx\]"):
        export_onnx(make_badge(), tmp_path / "file")
