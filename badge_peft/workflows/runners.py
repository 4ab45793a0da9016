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


def onnx_runners(
    adapter: Adapter, config: EarlyExitConfig, folder: Path, threads: int, int8: bool = False
) -> list[NamedRunner]:
    """The same two in ONNX Runtime on the CPU; sessions pin their threads and do not spin.

    Args:
        adapter: Its model is exported.
        config: Goes into the file.
        folder: For the exported files.
        threads: Of each session.
        int8: Weights in 8 bits (dynamic quantization).
    """
    from badge_peft.export import OnnxEarlyExitModel, export_full_depth, export_onnx
    from badge_peft.export.runtime import open_session

    kind = "int8" if int8 else "fp32"
    plain, early = folder / f"full-depth-{kind}" / "model.onnx", folder / f"early-exit-{kind}"
    plain.parent.mkdir(parents=True)
    early.mkdir()
    export_full_depth(stock_model(adapter).cpu(), plain, int8=int8)
    export_onnx(copy.deepcopy(adapter.model).cpu(), early, early_exit_config=config, int8=int8)
    session = open_session(plain, threads)
    known = {entry.name for entry in session.get_inputs()}
    model = OnnxEarlyExitModel.from_pretrained(early, threads=threads, spinning=False)

    def arrays(batch: Batch) -> dict[str, np.ndarray]:
        # not every tokenizer gives the token_type_ids that a graph asks for
        filled = {"token_type_ids": torch.zeros_like(batch["input_ids"]), **batch}
        return {name: value.numpy().astype(np.int64) for name, value in filled.items() if name in known}

    suffix = " int8" if int8 else ""
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
