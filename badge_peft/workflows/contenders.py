"""What `bench` compares: a model as it can be run, without exits and with them, in PyTorch and ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.model import get_badge_model
from badge_peft.workflows.adapter import Adapter

Batch = dict[str, Tensor]
Answer = tuple[np.ndarray, np.ndarray | None]  # logits [B, K], and the blocks that answered [B] where there are exits


@dataclass
class Contender:
    """One way to run the model.

    Args:
        name: For the table.
        prepare: A padded batch [B, S] to what `run` takes; not timed.
        run: What is timed.
        read: What `run` returned to numpy; not timed.
        exits: Whether rows may leave early.
        device: Where it runs, for a clock that has to wait.
    """

    name: str
    prepare: Callable[[Batch], Any]
    run: Callable[[Any], Any]
    read: Callable[[Any], Answer]
    exits: bool
    device: torch.device


def torch_contenders(adapter: Adapter, rule: EarlyExitConfig) -> list[Contender]:
    """Stock PyTorch: the base model with nothing of the adapter around it; and the model with early exits."""
    device = next(adapter.model.parameters()).device
    stock = stock_model(adapter)

    def move(batch: Batch) -> Batch:
        return {name: value.to(device) for name, value in batch.items()}

    def early(batch: Batch) -> Any:
        return early_exit_forward(adapter.model, early_exit_config=rule, **batch)

    def read(output: Any) -> Answer:
        exits = getattr(output, "exit_layer", None)
        return output.logits.float().cpu().numpy(), None if exits is None else exits.cpu().numpy()

    return [
        Contender("stock PyTorch", move, lambda batch: stock(**batch), read, False, device),
        Contender("BADGE PyTorch", move, early, read, True, device),
    ]


def onnx_contenders(
    adapter: Adapter, rule: EarlyExitConfig, folder: Path, threads: int, int8: bool = False
) -> list[Contender]:
    """The same two in ONNX Runtime on the CPU; sessions pin their threads and do not spin.

    Args:
        adapter: Its model is exported.
        rule: Goes into the file.
        folder: For the exported files.
        threads: Of each session.
        int8: Weights in 8 bits (dynamic quantisation).
    """
    from badge_peft.export import OnnxEarlyExitModel, export_full_depth, export_onnx
    from badge_peft.export.runtime import open_session

    kind = "int8" if int8 else "fp32"
    plain, early = folder / f"full-depth-{kind}" / "model.onnx", folder / f"early-exit-{kind}"
    plain.parent.mkdir(parents=True)
    early.mkdir()
    export_full_depth(stock_model(adapter).cpu(), plain, int8=int8)
    export_onnx(copy.deepcopy(adapter.model).cpu(), early, early_exit_config=rule, int8=int8)
    session = open_session(plain, threads)
    known = {entry.name for entry in session.get_inputs()}
    model = OnnxEarlyExitModel.from_pretrained(early, threads=threads, spinning=False)

    def arrays(batch: Batch) -> dict[str, np.ndarray]:
        # not every tokenizer gives the token_type_ids that a graph asks for
        filled = {"token_type_ids": torch.zeros_like(batch["input_ids"]), **batch}
        return {name: value.numpy().astype(np.int64) for name, value in filled.items() if name in known}

    suffix = " int8" if int8 else ""
    here = torch.device("cpu")
    return [
        Contender(
            f"ONNX Runtime{suffix}, full depth",
            arrays,
            lambda inputs: session.run(["logits"], inputs),
            lambda output: (output[0], None),
            False,
            here,
        ),
        Contender(
            f"BADGE ONNX{suffix}",
            arrays,
            lambda inputs: model(**inputs),
            lambda output: (output.logits, output.exit_layer),
            True,
            here,
        ),
    ]


def stock_model(adapter: Adapter) -> Any:
    """A copy of the model with the adapter taken off."""
    return get_badge_model(copy.deepcopy(adapter.model)).unload().eval()
