"""Hooks that note, in the frame of the running block, what its norms see. Outside of a run they do nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from badge_peft.architectures import BlockLayout
from badge_peft.run import current_run


class RecordInput:
    """A forward pre-hook: notes the input of a norm as `name`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        run = current_run()
        if run is not None and run.frame is not None:
            run.frame.record(self.name, args[0])


class RecordOutput:
    """A forward hook: notes the output of a norm as `name`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        run = current_run()
        if run is not None and run.frame is not None:
            run.frame.record(self.name, output)


def watch_block(block: nn.Module, layout: BlockLayout, placement: str, handles: dict[str, Any]) -> None:
    """Puts the hooks on `block` that a placement needs and `handles` lacks."""
    if layout.last_norm and "ffn_sum" not in handles:
        handles["ffn_sum"] = block.get_submodule(layout.last_norm).register_forward_pre_hook(RecordInput("ffn_sum"))
    norm = block.get_submodule(layout.attention_norm)
    if layout.pre_norm:
        if placement in ("ffn", "mhsa") and "attention" not in handles:
            handles["attention"] = norm.register_forward_pre_hook(RecordInput("attention"))
    elif placement == "ffn" and "attention" not in handles:
        handles["attention"] = norm.register_forward_hook(RecordOutput("attention"))
    elif placement == "mhsa" and "attention_sum" not in handles:
        handles["attention_sum"] = norm.register_forward_pre_hook(RecordInput("attention_sum"))
