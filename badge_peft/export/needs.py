"""Says which extra is missing, before anything else fails."""

from __future__ import annotations

from importlib.util import find_spec

_EXTRA = "pip install 'badge-peft[onnx]'"


def need_onnx() -> None:
    """For exporting.

    Raises:
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is not installed.
    """
    _need("onnx", "onnxscript", "onnxruntime")


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
