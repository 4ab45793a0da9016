"""The plain ONNX export of the model at full depth, without exits: what early exits are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from badge_peft.utils.extras import require_onnx_exporter
from badge_peft.utils.files import replacing


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(return_dict=True, **inputs).logits


def export_full_depth(model: Any, path: str | Path, *, int8: bool = False) -> None:
    """Writes the full-depth graph: `input_ids`, `attention_mask` (, `token_type_ids`) -> `logits` [B, K].

    Args:
        model: A PEFT model, whose base model is taken, or a transformers model; in eval mode.
        path: The file.
        int8: Quantize dynamically, as `export_onnx` does it.

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
        ImportError: torch is older than 2.8.
    """
    FullDepthExporter(model).write(path, int8=int8)


class FullDepthExporter:
    """A model as a graph, which `write` stores, in float32 and in int8 from the same one. Arguments and errors are
    those of `export_full_depth`."""

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        require_onnx_exporter()
        from badge_peft.export.pieces import EXAMPLE, example_inputs
        from badge_peft.export.trace import DYNAMIC, to_onnx

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        inputs = example_inputs(base, EXAMPLE)
        shapes = {"inputs": dict.fromkeys(inputs, DYNAMIC)}
        self.graph = to_onnx(_Logits(base), {"inputs": inputs}, shapes, list(inputs), ["logits"])

    def write(self, path: str | Path, *, int8: bool = False) -> None:
        """Writes the file, whole or not at all."""
        import onnx_ir as ir

        from badge_peft.export.graph import IR_VERSION, quantize

        model = ir.Model(quantize(self.graph) if int8 else self.graph, ir_version=IR_VERSION)
        with replacing(path) as temporary:
            ir.save(model, temporary)
