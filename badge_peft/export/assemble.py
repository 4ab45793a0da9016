"""From the pieces of a model and its policies to one graph."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from badge_peft.export.chain import Chain, in_int8
from badge_peft.export.graph import INT64
from badge_peft.export.pieces import ALONE
from badge_peft.export.policies import Decision
from badge_peft.export.sliced import SlicedChain
from badge_peft.export.trace import ExportedBlocks


def assemble(pieces: ExportedBlocks, decisions: Decision | Mapping[str, Decision], *, int8: bool) -> onnx.ModelProto:
    """The graph, whose inputs and outputs are those of `export_onnx`; of many tasks, of `export_tasks_onnx`.

    Args:
        pieces: Of the model, with the exits of all tasks.
        decisions: The policy, or that of each task; with one that looks at a query, blocks run for a few of its rows
            at a time, and `scores`, the logits of the candidates as [N], come beside the answers.
        int8: Quantize the blocks; exits and decisions stay in float32.
    """
    each = {ALONE: decisions} if isinstance(decisions, Decision) else decisions
    inputs = [ir.val(name, INT64, ["batch", "sequence"]) for name in pieces.inputs]
    by_group = any(own.policy.by_group for own in each.values())
    chain = (SlicedChain if by_group else Chain)(each, inputs, {*pieces.inputs, *pieces.per_row})
    if isinstance(chain, SlicedChain):
        chain.positions, chain.padding_token = pieces.positions, pieces.padding_token
    for number, piece in pieces.graphs.items():
        chain.add(number, in_int8(piece) if int8 else [piece])
    return chain.model()
