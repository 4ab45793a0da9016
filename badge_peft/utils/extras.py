"""Says which extra is missing, before anything else fails."""

from __future__ import annotations

from importlib.util import find_spec

import torch

_EXPORTER = "2.8"  # torch's exporter does not know all of DeBERTa-v2 before, nor ModernBERT before 2.7


def require(extra: str, *packages: str) -> None:
    """For what needs optional packages; nothing is imported."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"this needs {' and '.join(missing)}, which the extra `{extra}` installs: "
            f"pip install 'badge-peft[{extra}]'",
            name=missing[0],
        )


def require_onnx_exporter() -> None:
    """For exporting to ONNX. (What has been exported runs with `onnxruntime` alone.)"""
    require("onnx", "onnx", "onnxscript", "onnxruntime")
    if torch.__version__ < f"{_EXPORTER}.dev0":  # a TorchVersion, which compares as versions do
        raise ImportError(
            f"exporting to ONNX needs torch {_EXPORTER} or newer, and this is {torch.__version__}: "
            f"pip install 'torch>={_EXPORTER}'. What has been exported runs without torch."
        )
