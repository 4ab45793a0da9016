"""One full-depth pass, and what its reader saw."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from badge_peft.early_exit.exit_pass import EarlyExitPass
from badge_peft.early_exit.full_depth import FullDepthReader


def full_depth(
    model: Any, batch: dict[str, Tensor], kind: type[EarlyExitPass] = EarlyExitPass, reader: Any = FullDepthReader
) -> tuple[Any, Any]:
    """The pass, of class `kind`, and its reader."""
    badge = model.base_model
    rows, mask = len(batch["input_ids"]), batch.get("attention_mask")
    read = reader(badge.adapter_exits(badge.single_active_adapter()), rows, mask)
    running = kind([read], rows, mask, badge.num_blocks)
    with running:
        badge.model(**batch)
    return running, read
