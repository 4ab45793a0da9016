"""What exporting needs is said before anything is done; and who may connect to Ray: those who have its token, unless a
cluster that was started otherwise is named."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from badge_peft.export import export_full_depth, export_onnx
from badge_peft.utils.extras import ask_for_token, require_onnx_exporter
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


# ---- Ray


NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    return monkeypatch


def found():
    return [os.environ.get(name) for name in NAMES]


def test_a_ray_of_our_own_asks_for_a_token_of_its_own(environment):
    ask_for_token(None)
    mode, token, path = found()
    assert mode == "token" and len(token) >= 32 and path is None


def test_a_token_that_is_there_is_kept(environment):
    environment.setenv("RAY_AUTH_TOKEN_PATH", "/a/token")
    ask_for_token(None)
    assert found() == ["token", None, "/a/token"]


def test_a_cluster_has_its_own_token(environment):
    ask_for_token("auto")
    assert found() == ["token", None, None]


def test_nobody_is_let_in_without_a_token_but_to_a_cluster_that_is_named(environment):
    environment.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ValueError, match="RAY_AUTH_MODE=disabled is not allowed: .* Unset it"):
        ask_for_token(None)
    ask_for_token("10.0.0.1:6379")
    assert found()[0] == "disabled"
