"""From pieces of a PyTorch model to pieces of ONNX, by torch's own exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from badge_peft.export.graph import OPSET
from badge_peft.export.segments import EXAMPLE, OTHER, Block, Embeddings, example_inputs, result_lengths
from badge_peft.model import BadgeModel


@dataclass
class Cut:
    """A model, cut into pieces.

    Args:
        inputs: Names of the model's inputs.
        embeddings: The piece before block 1.
        blocks: Block number -> its piece, up to the last one that is wanted.
        shared: Block number -> names of the shared tensors that it reads, in the order of its arguments.
        per_row: Names of the shared tensors that have one row per input.
        returned: Names of what each piece gives, by block number (0: the embeddings).
    """

    inputs: list[str]
    embeddings: onnx.ModelProto
    blocks: dict[int, onnx.ModelProto]
    shared: dict[int, list[str]]
    per_row: set[str]
    returned: dict[int, list[str]]


@torch.no_grad()
def cut(badge: BadgeModel, read: set[int], depth: int, progress: bool = False) -> Cut:
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
    embed = Embeddings(badge, lengths, 0 in read)
    run, other = embed.run(a), embed.run(b)
    assert run.embeddings is not None and other.embeddings is not None
    shapes = [_moving(x, y) for x, y in zip(run.shared.tensors, other.shared.tensors, strict=True)]
    moving = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    inputs_moving = dict.fromkeys(a, moving)

    made = embed.named(a)
    result = Cut(
        list(a),
        to_onnx(embed, {"inputs": a}, {"inputs": inputs_moving}, list(a)),
        {},
        {m: [f"shared_{i}" for i in places] for m, places in enumerate(run.shared.indices, start=1)},
        {f"shared_{i}" for i, t in enumerate(run.shared.tensors) if _has_rows(t, other.shared.tensors[i])},
        {0: list(made)},
    )
    hidden = made["hidden"]
    for m in tqdm(range(1, depth + 1), desc="exporting blocks", disable=not progress):
        block = Block(badge, lengths, m, m in read)
        places = run.shared.indices[m - 1]
        shared = [run.shared.tensors[i] for i in places]
        example = {"hidden": hidden, "shared": shared, "inputs": a}
        shape = {"hidden": moving, "shared": [shapes[i] for i in places], "inputs": inputs_moving}
        result.blocks[m] = to_onnx(block, example, shape, ["hidden", *result.shared[m], *a])
        made = block.named(hidden, shared, a)
        result.returned[m] = list(made)
        hidden = made.get("hidden", hidden)
    return result


def input_names(model: nn.Module) -> list[str]:
    """The inputs that an exported graph takes: those that the tokenizer makes for this model."""
    import inspect

    known = inspect.signature(model.forward).parameters
    config: Any = model.config
    wanted = ["input_ids", "attention_mask"]
    if "token_type_ids" in known and getattr(config, "type_vocab_size", 0) > 1:
        wanted.append("token_type_ids")
    return wanted


def to_onnx(
    module: nn.Module, inputs: dict[str, Any], dynamic_shapes: dict[str, Any], names: Sequence[str]
) -> onnx.ModelProto:
    """`module` as ONNX.

    Args:
        module: In eval mode, without gradients.
        inputs: Keyword arguments; lists and dicts of tensors among them.
        dynamic_shapes: As `torch.export.export` takes it.
        names: Names of the tensors in `inputs`, in order. One that occurs twice is told apart by its place.

    Raises:
        RuntimeError: torch cannot export it.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
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
            verbose=False,
        )
        return onnx.load(path)


def _distinct(names: Sequence[str]) -> list[str]:
    return [name if names.index(name) == i else f"{name}__{i}" for i, name in enumerate(names)]


def _moving(tensor: Tensor, other: Tensor) -> dict[int, Any]:
    """The dimensions that follow the sizes of the input."""
    return {d: torch.export.Dim.AUTO for d in range(tensor.dim()) if tensor.shape[d] != other.shape[d]}


def _has_rows(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dim() > 1 and (tensor.shape[0], other.shape[0]) == (EXAMPLE[0], OTHER[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
