"""From pieces of a PyTorch model to pieces of ONNX, by torch's own exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, InlinePass
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.node import Node, map_arg

from badge_peft.export.graph import OPSET
from badge_peft.export.pieces import BEFORE, EXAMPLE, FOLLOWING, LEFT, OTHER, ModelPiece, example_inputs, tuple_lengths
from badge_peft.model import BadgeModel
from badge_peft.tuner.decoders import padding_token

#: Of a tensor [B, S, ...].
DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


@dataclass
class ExportedBlocks:
    """A model in pieces."""

    #: Names of the model's inputs.
    inputs: list[str]
    #: By block number; 0 is the embeddings. Inputs and outputs have the names that they have in `ModelPiece`.
    graphs: dict[int, ir.Graph]
    #: Names of the shared tensors that have one row per input.
    per_row: set[str]
    #: Name of what a block takes -> its dimensions that are positions; None where something has one that follows
    #: their number in another way.
    positions: dict[str, list[int]] | None
    #: The token by which a decoder's head knows padding; None: what reads positions goes by the mask.
    padding_token: int | None = None


@torch.no_grad()
def export_blocks(
    badge: BadgeModel, read: Mapping[tuple[str, ...], set[int]], progress: bool = False
) -> ExportedBlocks:
    """Exports the embeddings and the blocks of a model in eval mode, one by one, up to the last of `read`: the numbers
    of the blocks at which an answer of each group of tasks is wanted."""
    from tqdm.auto import tqdm

    inputs, others = (example_inputs(badge.model, size) for size in (EXAMPLE, OTHER))
    lengths = tuple_lengths(badge, inputs)
    depth = max(map(max, read.values()))
    pieces = [ModelPiece(badge, number, lengths, read) for number in range(depth + 1)]
    made, made_of_others = (pieces[0](x) for x in (inputs, others))
    shared = {name: tensor for name, tensor in made.items() if name.startswith("shared_")}
    example: dict[str, Any] = {"inputs": inputs, "hidden": made[FOLLOWING], "shared": shared}
    given, other = ({**x, "hidden": y[FOLLOWING], **y} for x, y in ((inputs, made), (others, made_of_others)))
    sizes = {  # of each dimension, with both inputs
        name: list(zip(given[name].shape, other[name].shape, strict=True)) for name in (*inputs, "hidden", *shared)
    }
    moving = {name: [d for d, (a, b) in enumerate(sizes[name]) if a != b] for name in shared}
    shapes: dict[str, Any] = {
        "inputs": dict.fromkeys(inputs, DYNAMIC),
        "hidden": DYNAMIC,
        "shared": {name: dict.fromkeys(dims, torch.export.Dim.AUTO) for name, dims in moving.items()},
    }
    rows, length = zip(EXAMPLE, OTHER, strict=True)
    result = ExportedBlocks(
        list(inputs),
        {},
        {name for name in shared if len(sizes[name]) > 1 and sizes[name][0] == rows},
        {name: [d for d, pair in enumerate(own) if pair == length] for name, own in sizes.items() if length in own},
        padding_token(badge.model, badge.layout),
    )
    if any(a != b and (a, b) not in (rows, length) for own in sizes.values() for a, b in own):
        result.positions = None
    known: dict[str, Any] = {}
    before: dict[str, Tensor] = {}  # what the exits so far have left for the deeper ones
    for piece in tqdm(pieces, desc="exporting blocks", disable=not progress):
        example["before"] = before
        shapes["before"] = {
            name: dict.fromkeys(range(min(tensor.dim() - 1, 2)), torch.export.Dim.DYNAMIC)
            for name, tensor in before.items()
        }
        taken = ["inputs", "hidden", "shared"] if piece.number else ["inputs"]
        if before and piece.read:
            taken.append("before")
        given = {kind: example[kind] for kind in taken}
        made = piece(**given)
        result.graphs[piece.number] = to_onnx(
            piece,
            given,
            {kind: shapes[kind] for kind in taken},
            [name for kind in taken for name in (["hidden"] if kind == "hidden" else example[kind])],
            list(made),
            known,
        )
        result.graphs[piece.number].name = f"piece{piece.number}"
        before |= {BEFORE + name.removeprefix(LEFT): x for name, x in made.items() if name.startswith(LEFT)}
    if result.positions is not None:
        result.positions |= {name: [1] for name, tensor in before.items() if tensor.dim() > 2}
    return result


def to_onnx(
    module: nn.Module,
    inputs: dict[str, Any],
    dynamic_shapes: dict[str, Any],
    names: Sequence[str],
    output_names: Sequence[str],
    known: dict[str, Any] | None = None,
) -> ir.Graph:
    """`module`, in eval mode, as ONNX, without functions and without the exporter's notes on where everything comes
    from. `names` are those of the tensors in `inputs`, in order; `known` is what was exported before, by its structure
    and names: a module that computes the same with other weights, as most blocks do, is not translated again."""
    with _no_logging():
        exported = torch.export.export(module, (), kwargs=inputs, dynamic_shapes=dynamic_shapes, strict=False)
        structure, weights = structure_of(exported)
        known = {} if known is None else known
        structure = "\n".join([structure, *names, *output_names])  # inputs that are not used among them
        if structure not in known:
            translated = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=output_names,
                optimize=False,  # folds weights into others, which then belong to this module alone
                verbose=False,
            )
            assert translated is not None
            known[structure] = translated, translated.model.clone(), list(weights)
        program, model, own = known[structure]
        program.model = _with_weights(model.clone(), own, weights)
        program.optimize()
    for change in (InlinePass(), ClearMetadataAndDocStringPass()):
        change(program.model)
    return ir.from_proto(ir.to_proto(program.model)).graph  # its weights apart from those of `module`


def structure_of(exported: ExportedProgram) -> tuple[str, dict[str, Tensor]]:
    """What a program computes, apart from its weights, as text, in which a weight goes by its place in the order of
    first use, its shape and its type; and the weights by name, in that order. Two programs of one text compute the
    same: most blocks of a model differ in nothing else."""
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


def _with_weights(model: ir.Model, names: Sequence[str], weights: Mapping[str, Tensor]) -> ir.Model:
    """`model`, not optimized, with `weights` in the place of those with these `names`, in their order."""
    initializers = model.graph.initializers
    found = [initializers.pop(name, None) for name in names]
    for value, (name, tensor) in zip(found, weights.items(), strict=True):
        if value is not None:  # one that the translation did not need
            value.name, value.const_value = name, ir.tensor(tensor.detach().numpy())
            model.graph.register_initializer(value)
    return model


@contextmanager
def _no_logging() -> Iterator[None]:
    """Without the exporter's remarks on itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
