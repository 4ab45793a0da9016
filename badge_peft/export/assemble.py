"""From the pieces of a model and a policy to one graph."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from badge_peft.export.chain import Chain, in_int8
from badge_peft.export.graph import INT64
from badge_peft.export.policies import Decision
from badge_peft.export.sliced import SlicedChain
from badge_peft.export.tokens import TokenChain
from badge_peft.export.trace import ExportedBlocks


def assemble(pieces: ExportedBlocks, decision: Decision, *, int8: bool) -> onnx.ModelProto:
    """The graph, from `input_ids`, `attention_mask` (, `token_type_ids`), `threshold` (a scalar, or [E] where each
    exit has its own) and `patience` to the answers.

    The answers are `logits` and `exit_layer`, of a decision for tokens those of each token. `threshold` and `patience`
    may be left out: the config's own are in the file. A decision for a query has `top_k` in place of `patience`, and
    `scores`, the logits of the candidates as [N], beside the answers.

    Args:
        pieces: Of the model.
        decision: The policy; with one that looks at a query, blocks run for a few of its rows at a time.
        int8: Quantize the blocks; exits and decisions stay in float32.
    """
    inputs = [ir.val(name, INT64, ["batch", "sequence"]) for name in pieces.inputs]
    kind = SlicedChain if decision.policy.by_group else TokenChain if decision.reads_tokens else Chain
    chain = kind(decision, inputs, {*pieces.inputs, *pieces.per_row})
    if isinstance(chain, SlicedChain):
        chain.positions, chain.padding_token = pieces.positions, pieces.padding_token
    for number, piece in pieces.graphs.items():
        chain.add(number, in_int8(piece) if int8 else [piece])
    return chain.model()
