"""Early exits outside of PyTorch: ONNX. Needs the extra `onnx`."""

from __future__ import annotations

from badge_peft.export.onnx import OnnxExportReport, export_onnx, export_tasks_onnx
from badge_peft.export.plain import export_full_depth
from badge_peft.export.ranking import OnnxReranker
from badge_peft.export.runtime import OnnxEarlyExitModel, OnnxOutput, OnnxTasksModel

__all__ = [
    "OnnxEarlyExitModel",
    "OnnxExportReport",
    "OnnxOutput",
    "OnnxReranker",
    "OnnxTasksModel",
    "export_full_depth",
    "export_onnx",
    "export_tasks_onnx",
]
