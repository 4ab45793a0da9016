"""Optional libraries: which extra is missing, said before anything else fails; and who may connect to Ray, whose
processes listen at every network of a machine, for a service and for batch scoring."""

from __future__ import annotations

import os
import secrets
import sys
from importlib.util import find_spec

import torch

AUTH = "RAY_AUTH_MODE"
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


def ask_for_token(address: str | None) -> None:
    """Has Ray refuse whoever has not its token: else all who reach the machine run code in it. To be called before Ray
    is imported, which reads the environment then; a Ray that is there already asks by itself, unless told not to."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return
    mode = os.environ.get(AUTH, "token")
    if address is None and mode.lower() != "token":
        raise ValueError(
            f"{AUTH}={mode} is not allowed: all who reach this machine could run code in it. Unset it; a cluster that "
            "was started so is joined by its --address."
        )
    if ray is None:
        os.environ[AUTH] = mode
        if address is None and "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def no_cluster(address: str, error: Exception) -> str:
    """The message, with the remedies."""
    return (
        f"there is no Ray cluster at {address} ({error}): start one (`ray start --head`), or leave --address out. A "
        "cluster that was started with a token is reached with the same token in ~/.ray/auth_token; one that was "
        "started without, which runs the code of everybody who reaches it, with RAY_AUTH_MODE=disabled."
    )
