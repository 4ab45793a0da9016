"""From pieces of a PyTorch model to pieces of ONNX, by torch's own exporter."""

from __future__ import annotations

import inspect
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx.inliner import inline_local_functions
from torch import Tensor, nn

from badge_peft.export.graph import OPSET
from badge_peft.export.pieces import EXAMPLE, OTHER, ModelPiece, example_inputs, result_lengths, shared_tensors
from badge_peft.model import BadgeModel

#: Of a tensor [B, S, ...].
DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


@dataclass
class ExportedBlocks:
    """A model in pieces, by block number; 0 is the embeddings.

    Args:
        inputs: Names of the model's inputs.
        models: The pieces, up to the last block that is wanted.
        shared: Names of the shared tensors that each block takes, in the order of its arguments.
        per_row: Names of the shared tensors that have one row per input.
        returned: Names of what each piece gives.
    """

    inputs: list[str]
    models: dict[int, onnx.ModelProto]
    shared: dict[int, list[str]]
    per_row: set[str]
    returned: dict[int, list[str]]

    def arguments(self, number: int) -> list[str]:
        """Names of what piece `number` takes, in order."""
        return [*self.inputs, "hidden", *self.shared[number]] if number else self.inputs


@torch.no_grad()
def export_blocks(badge: BadgeModel, read: set[int], depth: int, progress: bool = False) -> ExportedBlocks:
    """Exports the embeddings and the blocks 1..depth, one by one.

    Args:
        badge: In eval mode.
        read: Block numbers at which an answer is wanted.
        depth: The last block that is wanted.
        progress: Show a progress bar.

    Raises:
        ValueError: the model's blocks get arguments that depend on the blocks before them.
    """
    from tqdm.auto import tqdm

    names = input_names(badge.model)
    vocabulary = int(badge.model.config.vocab_size)
    a, b = (example_inputs(names, size, vocabulary) for size in (EXAMPLE, OTHER))
    lengths = result_lengths(badge, a)
    embeddings = ModelPiece(badge, 0, lengths, 0 in read)
    (tensors, places), (others, _) = (shared_tensors(embeddings.run(x).arguments) for x in (a, b))
    inputs_moving = dict.fromkeys(a, DYNAMIC)
    shapes = [_moving(x, y) for x, y in zip(tensors, others, strict=True)]

    made = embeddings.named(a)
    result = ExportedBlocks(
        list(a),
        {0: to_onnx(embeddings, {"inputs": a}, {"inputs": inputs_moving}, list(a))},
        {m: [f"shared_{i}" for i in indices] for m, indices in enumerate(places, start=1)},
        {f"shared_{i}" for i, (x, y) in enumerate(zip(tensors, others, strict=True)) if _has_rows(x, y)},
        {0: list(made)},
    )
    hidden = made["hidden"]
    for m in tqdm(range(1, depth + 1), desc="exporting blocks", disable=not progress):
        block = ModelPiece(badge, m, lengths, m in read)
        taken = [tensors[i] for i in places[m - 1]]
        example: dict[str, Any] = {"inputs": a, "hidden": hidden, "tensors": taken}
        shape = {"inputs": inputs_moving, "hidden": DYNAMIC, "tensors": [shapes[i] for i in places[m - 1]]}
        result.models[m] = to_onnx(block, example, shape, result.arguments(m))
        made = block.named(**example)
        result.returned[m] = list(made)
        hidden = made.get("hidden", hidden)
    return result


def input_names(model: nn.Module) -> list[str]:
    """The inputs that an exported graph takes: those that the tokenizer makes for this model."""
    known = inspect.signature(model.forward).parameters
    config: Any = model.config
    wanted = ["input_ids", "attention_mask"]
    if "token_type_ids" in known and getattr(config, "type_vocab_size", 0) > 1:
        wanted.append("token_type_ids")
    return wanted


def to_onnx(
    module: nn.Module,
    inputs: dict[str, Any],
    dynamic_shapes: dict[str, Any],
    names: Sequence[str],
    output_names: Sequence[str] | None = None,
) -> onnx.ModelProto:
    """`module` as ONNX, without functions and without the exporter's notes on where everything comes from.

    Args:
        module: In eval mode, without gradients.
        inputs: Keyword arguments; lists and dicts of tensors among them.
        dynamic_shapes: As `torch.export.export` takes it.
        names: Names of the tensors in `inputs`, in order. One that occurs twice is told apart by its place.
        output_names: Names of what it returns; None leaves them to the exporter.

    Raises:
        RuntimeError: torch cannot export it.
    """
    with tempfile.TemporaryDirectory() as folder, _no_logging():
        path = Path(folder) / "piece.onnx"
        exported = torch.export.export(module, (), kwargs=inputs, dynamic_shapes=dynamic_shapes, strict=False)
        torch.onnx.export(
            exported,
            (),
            str(path),
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            input_names=_distinct(names),
            output_names=output_names,
            verbose=False,
        )
        return _bare(onnx.load(path))


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    if model.functions:
        model = inline_local_functions(model)
    for part in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    return model


def _distinct(names: Sequence[str]) -> list[str]:
    return [name if names.index(name) == i else f"{name}__{i}" for i, name in enumerate(names)]


def _moving(tensor: Tensor, other: Tensor) -> dict[int, Any]:
    """The dimensions that follow the sizes of the input."""
    return {d: torch.export.Dim.AUTO for d in range(tensor.dim()) if tensor.shape[d] != other.shape[d]}


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
