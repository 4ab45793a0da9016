"""Exports in less time."""

from __future__ import annotations

import functools

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_registry() -> None:
    """torch lists its translations to ONNX anew at each export, and a model is exported block by block: here once."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # another torch has it in another place, and takes longer
        return
    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
