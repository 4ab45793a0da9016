"""A small builder of ONNX graphs, on `onnx_ir`: nodes one by one, constants, whole pieces; and int8."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

OPSET = 20
IR_VERSION = 10  # what onnxruntime 1.20 reads

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
#: What a node gives that does not give what it takes.
_TYPES = {
    **dict.fromkeys(("ArgMax", "ArgMin", "NonZero", "Shape", "Size"), INT64),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual"), BOOL),
}


class Graph:
    """A graph under construction, or one of its branches, whose constants and weights are in the `main` graph. `name`
    is unique in the model."""

    def __init__(self, name: str, main: Graph | None = None) -> None:
        self.body = ir.Graph([], [], nodes=[], name=name)
        self.main = main or self
        if main is None:
            self.body.opset_imports[""] = OPSET

    def op(self, op_type: str, *inputs: ir.Value, outputs: int = 1, **attributes: Any) -> ir.Value:
        """Adds a node, whose first output is returned."""
        value = self.node(op_type, inputs, attributes, outputs)[0]
        kept = inputs[-1] if op_type == "Where" else inputs[0]
        dtype = attributes.get("to", _TYPES.get(op_type, kept.dtype))
        if dtype is not None:
            value.dtype = ir.DataType(dtype)
        return value

    def node(
        self, op_type: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any], outputs: int
    ) -> Sequence[ir.Value]:
        """Adds a node; its outputs have names, and no types yet."""
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs, name=f"{self.body.name}/{len(self.body)}")
        for i, value in enumerate(node.outputs):
            value.name = f"{node.name}/{op_type}{i or ''}"
        self.body.append(node)
        return node.outputs

    def input(self, name: str, dtype: ir.DataType | None, shape: Any) -> ir.Value:
        """One more input of a body; its name is made up from that of the graph."""
        made = ir.val(f"{self.body.name}/{name}", dtype, shape)
        self.body.inputs.append(made)
        return made

    def constant(self, array: np.ndarray) -> ir.Value:
        """An array's value in the graph."""
        made = ir.val(f"constant_{len(self.main.body.initializers)}", const_value=ir.tensor(array))
        self.main.body.register_initializer(made)
        return made

    def floats(self, value: Any) -> ir.Value:
        """A float32 constant."""
        return self.constant(np.asarray(value, dtype=np.float32))

    def ints(self, value: Any) -> ir.Value:
        """An int64 constant."""
        return self.constant(np.asarray(value, dtype=np.int64))

    def empty(self, like: ir.Value) -> ir.Value:
        """A constant of the type and rank of a value, without rows."""
        assert like.shape is not None and like.dtype is not None
        dims = [d if isinstance(d, int) else 0 for d in like.shape]
        return self.constant(np.zeros(dims, dtype=like.dtype.numpy()))

    def shaped(self, value: ir.Value, dims: Any) -> ir.Value:
        """`value`, which from now on says that it has these dimensions; the size of all that are no number is open."""
        value.shape = ir.Shape([d if isinstance(d, int) else None for d in dims])
        return value

    def insert(self, piece: ir.Graph, values: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
        """Puts a copy of a piece in, whose name is new in the model: from values by the names of its inputs to those
        by the names of its outputs."""
        copy = piece.clone()
        bound = {value: values[str(value.name)] for value in copy.inputs}
        made = {str(value.name): bound.get(value, value) for value in copy.outputs}
        copy.outputs.clear()
        for value, here in bound.items():
            value.replace_all_uses_with(here)
        weights, nodes = list(copy.initializers.values()), list(copy)
        copy.initializers.clear()
        copy.remove(nodes)
        made_here = [value for node in nodes for value in node.outputs]
        for value in made_here:
            value.shape = None  # which speaks of the sizes of the piece's own inputs
            value.type = value.type if value in made.values() else None  # or the file would list them all
        named: tuple[ir.Value | ir.Node, ...] = (*weights, *nodes, *made_here)
        for part in named:
            part.name = f"{piece.name}/{part.name}"
        for value in weights:
            self.main.body.register_initializer(value)
        self.main.body.opset_imports.update(copy.opset_imports)
        self.body.extend(nodes)
        return made


def quantize(graph: ir.Graph) -> ir.Graph:
    """`graph` with the weights of its matrix products and embeddings in int8, by onnxruntime's own tool; activations
    are quantized as they come. Each column of a weight has its own scale: as fast, and errors are less than half.
    Weights take 7 bits, so that sums of products overflow on no processor (docs/decisions/int8-weights.md)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    given = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION))
    del given.graph.value_info[:]  # onnxruntime 1.23 turns weights round, and then finds the noted shapes wrong
    add_pre_process_metadata(given)  # the tool would advise a preparation that makes no difference here
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(given, path, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
        return ir.from_proto(onnx.load(path)).graph
