"""Dynamic int8 quantisation of one piece, by onnxruntime's own tool."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import onnx
from onnx import helper

from badge_peft.export.graph import IR_VERSION, OPSET, Piece


def quantize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights of matrix products and embeddings in int8; activations are quantised as they come. `model` loses the
    shapes that are noted in it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    del model.graph.value_info[:]  # onnxruntime 1.23 turns weights round, and then finds the noted shapes wrong
    logger = logging.getLogger()
    level = logger.level
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        logger.setLevel(logging.ERROR)  # the tool advises a preparation that makes no difference here
        try:
            quantize_dynamic(model, path, weight_type=QuantType.QInt8)
        finally:
            logger.setLevel(level)
        return onnx.load(path)


def quantize_trunk(model: onnx.ModelProto, piece: Piece) -> tuple[Piece, Piece | None]:
    """A piece with its trunk in int8, and its exit, which stays in float32: there is little to gain and all to lose.

    Args:
        model: The exported model that `piece` is from; it knows the types of inputs.
        piece: With an output `hidden`, or the last one, which is quantised whole.
    """
    if "hidden" not in piece.outputs:
        return _int8(model, piece), None
    trunk, rest = piece.split("hidden")
    return _int8(model, trunk), rest


def _int8(model: onnx.ModelProto, piece: Piece) -> Piece:
    known = {info.name: info for info in [*model.graph.input, *model.graph.output, *model.graph.value_info]}
    inputs = [info for info in model.graph.input if info.name in piece.used]
    values = list(dict.fromkeys(piece.outputs.values()))
    outputs = [known.get(v, helper.make_tensor_value_info(v, onnx.TensorProto.FLOAT, None)) for v in values]
    alone = helper.make_model(
        helper.make_graph(piece.nodes, "piece", inputs, outputs, piece.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    quantized = Piece.of(quantize(alone), values)
    return Piece(quantized.nodes, quantized.initializers, dict(piece.outputs))
