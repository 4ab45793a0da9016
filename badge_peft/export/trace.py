"""From pieces of a PyTorch model to pieces of ONNX, by torch's own exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, InlinePass
from torch import Tensor, nn

from badge_peft.export.graph import OPSET
from badge_peft.export.pieces import (
    ALONE,
    BEFORE,
    EXAMPLE,
    FOLLOWING,
    LEFT,
    OTHER,
    ModelPiece,
    example_inputs,
    tuple_lengths,
)
from badge_peft.export.structure import structure_of, with_weights
from badge_peft.model import BadgeModel
from badge_peft.tuner.decoders import padding_token

#: Of a tensor [B, S, ...].
DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


@dataclass
class ExportedBlocks:
    """A model in pieces.

    Args:
        inputs: Names of the model's inputs.
        graphs: The pieces by block number, up to the last block that is wanted; 0 is the embeddings. Inputs and
            outputs have the names that they have in `ModelPiece`.
        per_row: Names of the shared tensors that have one row per input.
        positions: Name of what a block takes -> its dimensions that are positions; None where something has one that
            follows their number in another way.
        padding_token: The token by which a decoder's head knows padding; None: what reads positions goes by the mask.
    """

    inputs: list[str]
    graphs: dict[int, ir.Graph]
    per_row: set[str]
    positions: dict[str, list[int]] | None
    padding_token: int | None = None


@torch.no_grad()
def export_blocks(
    badge: BadgeModel, read: set[int] | dict[tuple[str, ...], set[int]], depth: int, progress: bool = False
) -> ExportedBlocks:
    """Exports the embeddings and the blocks 1..depth of a model in eval mode, one by one. `read` are the numbers of
    the blocks at which an answer of the active adapter is wanted; for many tasks, those of each group."""
    from tqdm.auto import tqdm

    inputs, others = (example_inputs(badge.model, size) for size in (EXAMPLE, OTHER))
    lengths = tuple_lengths(badge, inputs)
    groups: dict[tuple[str, ...], set[int]] = read if isinstance(read, dict) else {(ALONE,): read}
    pieces = [ModelPiece(badge, number, lengths, groups) for number in range(depth + 1)]
    made, made_of_others = (pieces[0](x) for x in (inputs, others))
    shared = {name: tensor for name, tensor in made.items() if name.startswith("shared_")}
    example: dict[str, Any] = {"inputs": inputs, "hidden": made[FOLLOWING], "shared": shared}
    shapes: dict[str, Any] = {
        "inputs": dict.fromkeys(inputs, DYNAMIC),
        "hidden": DYNAMIC,
        "shared": {name: _moving(tensor, made_of_others[name]) for name, tensor in shared.items()},
    }
    result = ExportedBlocks(
        list(inputs),
        {},
        {name for name, tensor in shared.items() if _has_rows(tensor, made_of_others[name])},
        _positions(
            {**inputs, "hidden": made[FOLLOWING], **shared},
            {**others, "hidden": made_of_others[FOLLOWING], **made_of_others},
        ),
        padding_token(badge.model, badge.layout),
    )
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
        program.model = with_weights(model.clone(), own, weights)
        program.optimize()
    for change in (InlinePass(), ClearMetadataAndDocStringPass()):
        change(program.model)
    return ir.from_proto(ir.to_proto(program.model)).graph  # its weights apart from those of `module`


def _moving(tensor: Tensor, other: Tensor) -> dict[int, Any]:
    """The dimensions that follow the sizes of the input."""
    return {d: torch.export.Dim.AUTO for d in range(tensor.dim()) if tensor.shape[d] != other.shape[d]}


def _positions(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, list[int]] | None:
    """By name the dimensions that are as long as the input; None where one follows the sizes in another way."""
    found: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        sizes = list(zip(tensor.shape, others[name].shape, strict=True))
        if any(a != b and (a, b) not in ((EXAMPLE[0], OTHER[0]), (EXAMPLE[1], OTHER[1])) for a, b in sizes):
            return None
        if axes := [d for d, pair in enumerate(sizes) if pair == (EXAMPLE[1], OTHER[1])]:
            found[name] = axes
    return found


def _has_rows(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dim() > 1 and (tensor.shape[0], other.shape[0]) == (EXAMPLE[0], OTHER[0])


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
