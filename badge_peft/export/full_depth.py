"""The plain ONNX export of the model at full depth, without exits: what early exits are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from badge_peft.utils.extras import require_onnx_exporter


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(return_dict=True, **inputs).logits


@torch.no_grad()
def export_full_depth(model: Any, path: str | Path, *, int8: bool = False) -> None:
    """Writes the full-depth graph: `input_ids`, `attention_mask` (, `token_type_ids`) -> `logits` [B, K].

    Args:
        model: A PEFT model, whose base model is taken, or a transformers model; in eval mode.
        path: The file.
        int8: Quantise dynamically, as `export_onnx` does it.

    Raises:
        ModuleNotFoundError: the extra `onnx` is not installed.
        ImportError: torch is older than 2.8.
    """
    require_onnx_exporter()
    import onnx

    from badge_peft.export.quantize import quantize
    from badge_peft.export.segments import EXAMPLE, example_inputs
    from badge_peft.export.trace import input_names, to_onnx

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = input_names(base)
    inputs = example_inputs(names, EXAMPLE, int(base.config.vocab_size))
    moving = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    graph = to_onnx(_Logits(base), {"inputs": inputs}, {"inputs": dict.fromkeys(inputs, moving)}, list(inputs))
    graph.graph.output[0].name = _rename(graph, graph.graph.output[0].name, "logits")
    onnx.save(quantize(graph) if int8 else graph, str(path))


def _rename(model: Any, old: str, new: str) -> str:
    for node in model.graph.node:
        node.output[:] = [new if name == old else name for name in node.output]
        node.input[:] = [new if name == old else name for name in node.input]
    return new
