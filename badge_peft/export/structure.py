"""What an exported program computes, apart from its weights: most blocks of a model differ in nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from uuid import uuid4

import onnx_ir as ir
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.node import Node, map_arg


def structure_of(exported: ExportedProgram) -> tuple[str, dict[str, Tensor]]:
    """The nodes of a program's graph as text, in which a weight goes by its place in the order of first use, its shape
    and its type; and the weights by name, in that order. Two programs of one text compute the same."""
    targets = {spec.arg.name: spec.target for spec in exported.graph_signature.input_specs if spec.target is not None}
    tensors = {**exported.state_dict, **exported.constants}
    weights: dict[str, Tensor] = {}
    names: dict[Node, str] = {}
    lines: list[str] = []

    def name_of(node: Node) -> str:
        if node not in names:
            target = targets[node.name]
            weights[target] = tensors[target]
            names[node] = f"weight_{len(weights)}{list(tensors[target].shape)}{tensors[target].dtype}"
        return names[node]

    for number, node in enumerate(exported.graph.nodes):
        if node.op == "placeholder":
            if node.name not in targets:
                names[node] = node.name
            continue
        if node.op == "get_attr":  # a graph in the graph, which would have to be compared as well
            lines.append(f"like no other: {uuid4()}")
        arguments = map_arg((node.args, node.kwargs), name_of)
        names[node] = f"value_{number}"
        lines.append(f"{names[node]} = {node.op} {node.target} {arguments}")
    return "\n".join(lines), weights


def with_weights(model: ir.Model, names: Sequence[str], weights: Mapping[str, Tensor]) -> ir.Model:
    """`model`, not optimized, with `weights` in the place of those with these `names`, in their order."""
    initializers = model.graph.initializers
    found = [initializers.pop(name, None) for name in names]
    for value, (name, tensor) in zip(found, weights.items(), strict=True):
        if value is not None:  # one that the translation did not need
            value.name, value.const_value = name, ir.tensor(tensor.detach().numpy())
            model.graph.register_initializer(value)
    return model
