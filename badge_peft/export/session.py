"""An onnxruntime session, with the settings that serving and measuring want."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def open_session(
    path: Path,
    threads: int | None = None,
    spinning: bool = False,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> Any:
    """Loads the graph in `path`; the rest is as `OnnxEarlyExitModel.from_pretrained` has it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of inputs that have defaults, which is what we want
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
