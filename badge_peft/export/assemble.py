"""Puts the pieces of a model together into one early-exit graph."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from onnx_ir.passes.common import DeduplicateHashedInitializersPass, LiftSubgraphInitializersToMainGraphPass

from badge_peft.export.chain import Chain, Insert, Stage
from badge_peft.export.graph import FLOAT, INT64, IR_VERSION, OPSET, Graph, Subgraph, quantize_trunk
from badge_peft.export.policies import Decision
from badge_peft.export.trace import ExportedBlocks


def assemble(
    pieces: ExportedBlocks, decision: Decision, hidden_size: int, *, int8: bool, compact: bool
) -> onnx.ModelProto:
    """The graph, from `input_ids`, `attention_mask` (, `token_type_ids`), `threshold` and `patience` to the answers.

    The answers are `logits` and `exit_layer`. `threshold` and `patience` may be left out: the config's own are in the
    file.

    Args:
        pieces: Of the model.
        decision: The policy.
        hidden_size: d.
        int8: Quantize the blocks; exits and decisions stay in float32.
        compact: Take rows that have answered out of the batch.
    """
    main = Graph("main")
    threshold, unit = decision.threshold()
    limit = main.op("Mul", "threshold", main.floats(unit)) if unit != 1 else "threshold"
    embeddings = _insert(pieces, 0, int8)
    made = embeddings(main, {name: name for name in pieces.inputs})
    outer = {name: name for name in pieces.inputs} | {n: v for n, v in made.items() if n.startswith("shared_")}
    chain = Chain(
        main,
        decision,
        outer,
        {*pieces.inputs, *pieces.per_row},
        compact=compact,
        batch=main.op("Squeeze", main.op("Shape", "input_ids", start=0, end=1)),
        hidden_size=hidden_size,
        threshold=limit,
        patience="patience",
    )
    exits = decision.exits
    index = exits.index(0) if 0 in exits else None
    chain.start(
        made["hidden"],
        made.get("logits"),
        made.get("uncertainty"),
        index,
        index is not None and decision.is_last(index),
    )
    for m in sorted(set(pieces.models) - {0}):
        place = exits.index(m) if m in exits and decision.reads(exits.index(m)) else None
        reads = [*pieces.shared[m], *pieces.inputs]
        chain.add(Stage(m, _insert(pieces, m, int8), reads, place, place is not None and decision.is_last(place)))
    main.op("Identity", chain.answer, output="logits")
    main.op("Identity", chain.exit_layer, output="exit_layer")
    return _model(pieces, decision, main, threshold)


def _insert(pieces: ExportedBlocks, block: int, int8: bool) -> Insert:
    """Adds the nodes of a piece, in float32 or with its trunk in int8."""
    model = pieces.models[block]
    names = [info.name for info in model.graph.input]
    piece = Subgraph.of(model, pieces.returned[block])
    parts = quantize_trunk(model, piece) if int8 else [piece]
    arguments = pieces.arguments(block)

    def insert(graph: Graph, values: dict[str, str]) -> dict[str, str]:
        bound = {name: values[argument] for name, argument in zip(names, arguments, strict=True)}
        made: dict[str, str] = {}
        for part in parts:
            made |= graph.insert(part, bound)
            bound |= {inner: made[name] for name, inner in part.outputs.items()}
        return made

    return insert


def _model(pieces: ExportedBlocks, decision: Decision, main: Graph, threshold: float) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info(name, INT64, ["batch", "sequence"]) for name in pieces.inputs]
    inputs.append(helper.make_tensor_value_info("threshold", FLOAT, []))
    inputs.append(helper.make_tensor_value_info("patience", INT64, []))
    outputs = [
        helper.make_tensor_value_info("logits", FLOAT, ["batch", decision.num_labels]),
        helper.make_tensor_value_info("exit_layer", INT64, ["batch"]),
    ]
    graph = helper.make_graph(main.nodes, "badge", inputs, outputs, main.initializers)
    domains = {node.domain for node in graph.node} | {
        node.domain for top in graph.node for a in top.attribute if a.HasField("g") for node in a.g.node
    }
    opsets = [helper.make_opsetid(domain, OPSET if domain == "" else 1) for domain in sorted(domains | {""})]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="badge_peft")
    made = _stored_once(made)
    made.graph.initializer.extend(
        [
            numpy_helper.from_array(np.asarray(threshold, dtype=np.float32), "threshold"),
            numpy_helper.from_array(np.asarray(decision.patience, dtype=np.int64), "patience"),
        ]
    )
    return made


def _stored_once(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with all weights in the main graph, equal ones once (ALBERT runs one block M times). onnxruntime packs
    them when it loads the file, wherever they are."""
    made = ir.from_proto(model)
    LiftSubgraphInitializersToMainGraphPass()(made)
    DeduplicateHashedInitializersPass()(made)
    return ir.to_proto(made)
