"""What `bench` compares: a model as it can be run, without exits and with them, in PyTorch and ONNX Runtime."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.evaluation.timing import Runner
from badge_peft.model import get_badge_model
from badge_peft.workflows.adapter_dir import Adapter

Batch = dict[str, Tensor]
Prediction = tuple[np.ndarray, np.ndarray | None]  # logits [B, K], and of exits the blocks that answered [B]


@dataclass(frozen=True)
class NamedRunner(Runner):
    """A runner of the table: padded batches [B, S] in, a `Prediction` out.

    Args:
        name: For the table.
        exits: Whether rows may leave early.
    """

    name: str = ""
    exits: bool = False


def torch_runners(adapter: Adapter, config: EarlyExitConfig) -> list[NamedRunner]:
    """Stock PyTorch: the base model with nothing of the adapter around it; and the model with early exits."""
    device = next(adapter.model.parameters()).device
    stock = stock_model(adapter)

    def move(batch: Batch) -> Batch:
        return {name: value.to(device) for name, value in batch.items()}

    def early(batch: Batch) -> Any:
        return early_exit_forward(adapter.model, early_exit_config=config, **batch)

    def read(output: Any) -> Prediction:
        exits = getattr(output, "exit_layer", None)
        return output.logits.float().cpu().numpy(), None if exits is None else exits.cpu().numpy()

    return [
        NamedRunner(lambda batch: stock(**batch), move, read, device, name="stock PyTorch"),
        NamedRunner(early, move, read, device, name="BADGE PyTorch", exits=True),
    ]


def onnx_runners(adapter: Adapter, config: EarlyExitConfig, folder: Path, threads: int) -> list[NamedRunner]:
    """The same two in ONNX Runtime on the CPU, in float32 and in int8; sessions pin their threads and do not spin.

    Args:
        adapter: Its model is exported.
        config: Goes into the files.
        folder: For the exported files.
        threads: Of each session.
    """
    from badge_peft.export import OnnxEarlyExitModel
    from badge_peft.export.onnx import OnnxExporter
    from badge_peft.export.plain import FullDepthExporter
    from badge_peft.export.runtime import open_session

    full_depth, early_exit = FullDepthExporter(stock_model(adapter).cpu()), OnnxExporter(adapter.model, config)
    runners = []
    for suffix in ("", " int8"):
        plain, early = folder / f"full-depth{suffix}.onnx", folder / f"early-exit{suffix}"
        full_depth.write(plain, int8=bool(suffix))
        early_exit.write(early, int8=bool(suffix))
        model = OnnxEarlyExitModel.from_pretrained(early, threads=threads, spinning=False)
        runners += _onnx_pair(open_session(plain, threads), model, suffix)
    return runners


def _onnx_pair(session: Any, model: Any, suffix: str) -> list[NamedRunner]:
    known = {entry.name for entry in session.get_inputs()}

    def arrays(batch: Batch) -> dict[str, np.ndarray]:
        # not every tokenizer gives the token_type_ids that a graph asks for
        filled = {"token_type_ids": torch.zeros_like(batch["input_ids"]), **batch}
        return {name: value.numpy().astype(np.int64) for name, value in filled.items() if name in known}

    return [
        NamedRunner(
            lambda inputs: session.run(["logits"], inputs),
            arrays,
            lambda output: (output[0], None),
            name=f"ONNX Runtime{suffix}, full depth",
        ),
        NamedRunner(
            lambda inputs: model(**inputs),
            arrays,
            lambda output: (output.logits, output.exit_layer),
            name=f"BADGE ONNX{suffix}",
            exits=True,
        ),
    ]


def stock_model(adapter: Adapter) -> Any:
    """A copy of the model with the adapter taken off."""
    return get_badge_model(copy.deepcopy(adapter.model)).unload().eval()
