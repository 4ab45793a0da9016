"""Says which extra is missing, before anything else fails."""

from __future__ import annotations

from importlib.util import find_spec

import torch

_EXTRA = "pip install 'badge-peft[onnx]'"
_TORCH = "2.8"  # torch's exporter does not know all of DeBERTa-v2 before, nor ModernBERT before 2.7


def need_onnx() -> None:
    """For exporting.

    Raises:
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is not installed.
        ImportError: torch is older than 2.8.
    """
    _need("onnx", "onnxscript", "onnxruntime")
    if torch.__version__ < f"{_TORCH}.dev0":  # a TorchVersion, which compares as versions do
        raise ImportError(
            f"exporting to ONNX needs torch {_TORCH} or newer, and this is {torch.__version__}: "
            f"pip install 'torch>={_TORCH}'. What has been exported runs without torch."
        )


def need_onnxruntime() -> None:
    """For running what was exported.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
    """
    _need("onnxruntime")


def _need(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"ONNX needs {' and '.join(missing)}, which the extra `onnx` installs: {_EXTRA}", name=missing[0]
        )
