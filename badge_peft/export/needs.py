"""Under its name of before: `badge_peft.utils.extras` has it."""

from __future__ import annotations

from badge_peft.utils.extras import require_onnx_exporter as need_onnx

__all__ = ["need_onnx"]
