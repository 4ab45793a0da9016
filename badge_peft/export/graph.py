"""A small builder of ONNX graphs: nodes one by one, constants, branches of an `If`, and pieces under new names."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 20
IR_VERSION = 10  # what onnxruntime 1.20 reads

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
_NUMPY: dict[int, type[np.generic]] = {FLOAT: np.float32, INT64: np.int64, BOOL: np.bool_}


class Graph:
    """A graph under construction. Values are named by strings.

    Args:
        name: Prefix of the names that are made up here; unique in the model.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._count = 0
        self._constants: dict[tuple[int, tuple[int, ...], bytes], str] = {}

    def fresh(self, hint: str) -> str:
        """A name that nothing has yet."""
        self._count += 1
        return f"{self.name}/{hint}_{self._count}"

    def op(self, op_type: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any) -> str:
        """Adds a node with one output, whose name is returned."""
        output = output or self.fresh(op_type)
        self.ops(op_type, inputs, [output], domain, **attributes)
        return output

    def ops(
        self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> None:
        """Adds a node with the named outputs."""
        name = f"{outputs[0]}:node"
        self.nodes.append(
            helper.make_node(op_type, list(inputs), list(outputs), name=name, domain=domain, **attributes)
        )

    def constant(self, value: Any, dtype: int) -> str:
        """The name of a constant; equal ones are one."""
        array: np.ndarray = np.asarray(value, dtype=_NUMPY[dtype])
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = self.fresh("constant")
            self.initializers.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def floats(self, value: Any) -> str:
        """A float32 constant."""
        return self.constant(value, FLOAT)

    def ints(self, value: Any) -> str:
        """An int64 constant."""
        return self.constant(value, INT64)

    def branch(self, outputs: Sequence[tuple[str, int]]) -> onnx.GraphProto:
        """This graph as a branch of an `If`, with (name, type) outputs."""
        infos = [helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs]
        return helper.make_graph(self.nodes, self.name, [], infos, self.initializers)

    def choose(
        self, condition: str, then: onnx.GraphProto, otherwise: onnx.GraphProto, outputs: Sequence[str]
    ) -> None:
        """Adds an `If` with the named outputs."""
        self.ops("If", [condition], outputs, then_branch=then, else_branch=otherwise)

    def insert(self, piece: Subgraph, inputs: dict[str, str]) -> dict[str, str]:
        """Puts a piece in, its inputs bound to values that are there already.

        Args:
            piece: Its names get this graph's prefix.
            inputs: Name in the piece -> name here, for each of its inputs.

        Returns:
            Name of an output in the piece -> its name here.
        """
        names = dict(inputs)
        prefix = self.fresh("piece")

        def renamed(name: str) -> str:
            return names.setdefault(name, f"{prefix}/{name}") if name else name

        for tensor in piece.initializers:
            copy = TensorProto()
            copy.CopyFrom(tensor)
            copy.name = renamed(tensor.name)
            self.initializers.append(copy)
        for node in piece.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"{prefix}/{node.name or node.output[0]}"
            copy.input[:] = [renamed(name) for name in node.input]
            copy.output[:] = [renamed(name) for name in node.output]
            self.nodes.append(copy)
        return {name: renamed(inner) for name, inner in piece.outputs.items()}


class Subgraph:
    """A part of a model as ONNX nodes.

    Args:
        nodes: In an order in which they can run.
        initializers: Their weights and constants.
        outputs: What each output is called -> the value that it is.

    Attributes:
        used: Names of the inputs that the nodes read.
    """

    def __init__(
        self, nodes: Sequence[onnx.NodeProto], initializers: Sequence[TensorProto], outputs: dict[str, str]
    ) -> None:
        nodes, used = _living(nodes, set(outputs.values()))
        self.nodes = nodes
        self.initializers = [tensor for tensor in initializers if tensor.name in used]
        self.outputs = outputs
        made = {name for node in nodes for name in node.output} | {tensor.name for tensor in self.initializers}
        self.used = used - made

    @classmethod
    def of(cls, model: onnx.ModelProto, names: Sequence[str]) -> Subgraph:
        """What a model with these outputs consists of."""
        outputs = dict(zip(names, (output.name for output in model.graph.output), strict=True))
        return cls(list(model.graph.node), list(model.graph.initializer), outputs)

    def split(self, trunk: str) -> tuple[Subgraph, Subgraph]:
        """What leads to the output `trunk`, and the rest, which reads values of the first part.

        The first part has those values as further outputs, under their own names.
        """
        inner, _ = _living(self.nodes, {self.outputs[trunk]})
        mine = {id(node) for node in inner}
        rest = [node for node in self.nodes if id(node) not in mine]
        made = {name for node in inner for name in node.output}
        others = {name: value for name, value in self.outputs.items() if name != trunk}
        read = {name for node in rest for name in node.input} | set(others.values())
        shared = {name: name for name in sorted(read & made)}
        return (
            Subgraph(inner, self.initializers, {trunk: self.outputs[trunk], **shared}),
            Subgraph(rest, self.initializers, others),
        )


def _living(nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that the `wanted` values need, in their order, and every name that is read."""
    used, living = set(wanted), []
    for node in reversed(nodes):
        if used & set(node.output):
            living.append(node)
            used.update(name for name in node.input if name)
    return living[::-1], used


def quantize(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with the weights of its matrix products and embeddings in int8, by onnxruntime's own tool; activations
    are quantized as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    given = onnx.ModelProto()
    given.CopyFrom(model)
    del given.graph.value_info[:]  # onnxruntime 1.23 turns weights round, and then finds the noted shapes wrong
    add_pre_process_metadata(given)  # the tool would advise a preparation that makes no difference here
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(given, path, weight_type=QuantType.QInt8)
        return onnx.load(path)


def quantize_trunk(model: onnx.ModelProto, piece: Subgraph) -> list[Subgraph]:
    """A subgraph with what leads to its states in int8, and its exit in float32, where int8 would save little and
    change decisions.

    Args:
        model: The exported model that `piece` is from; it knows the types of inputs.
        piece: With an output `hidden`, or the last one, which is quantized whole.
    """
    if "hidden" not in piece.outputs:
        return [_int8(model, piece)]
    trunk, rest = piece.split("hidden")
    return [_int8(model, trunk), rest]


def _int8(model: onnx.ModelProto, piece: Subgraph) -> Subgraph:
    known = {info.name: info for info in [*model.graph.input, *model.graph.output, *model.graph.value_info]}
    inputs = [info for info in model.graph.input if info.name in piece.used]
    values = list(dict.fromkeys(piece.outputs.values()))
    outputs = [known.get(v, helper.make_tensor_value_info(v, FLOAT, None)) for v in values]
    alone = helper.make_model(
        helper.make_graph(piece.nodes, "piece", inputs, outputs, piece.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    quantized = Subgraph.of(quantize(alone), values)
    return Subgraph(quantized.nodes, quantized.initializers, dict(piece.outputs))
