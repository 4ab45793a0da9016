"""Hooks that note, in the frame of the running block, what its norms see. Outside of a run they do nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from badge_peft.tuner.architectures import BlockLayout
from badge_peft.tuner.run import current_run


class Recorder:
    """What the two kinds of hooks share: where a tensor is noted.

    In compiled code (`badge_peft.compile_blocks`), which cannot look for the run, it is kept in `seen` until the
    compiled function returns it; it never stays there.

    Args:
        name: Of the tensor, as in `Frame`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: Tensor | None = None

    def note(self, value: Tensor) -> None:
        """Notes `value`, or the next chunk of the sequence."""
        if torch.compiler.is_dynamo_compiling():
            self.seen = value if self.seen is None else torch.cat([self.seen, value], dim=1)
            return
        run = current_run()
        if run is not None and run.frame is not None:
            run.frame.record(self.name, value)


class RecordInput(Recorder):
    """A forward pre-hook: notes the input of a norm."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.note(args[0])


class RecordOutput(Recorder):
    """A forward hook: notes the output of a norm."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.note(output)


def watch_block(
    block: nn.Module, layout: BlockLayout, placement: str, handles: dict[str, Any], recorders: dict[str, Recorder]
) -> None:
    """Puts the hooks on `block` that a placement needs and `handles` lacks."""
    wanted: list[tuple[str, str, type[Recorder]]] = []  # tensor, norm, hook
    if layout.last_norm:
        wanted.append(("ffn_sum", layout.last_norm, RecordInput))
    if layout.pre_norm:
        if placement in ("ffn", "mhsa"):
            wanted.append(("attention", layout.attention_norm, RecordInput))
    elif placement == "ffn":
        wanted.append(("attention", layout.attention_norm, RecordOutput))
    elif placement == "mhsa":
        wanted.append(("attention_sum", layout.attention_norm, RecordInput))
    for name, path, kind in wanted:
        if name not in handles:
            recorder: Any = kind(name)
            norm = block.get_submodule(path)
            register = norm.register_forward_pre_hook if kind is RecordInput else norm.register_forward_hook
            handles[name], recorders[name] = register(recorder), recorder
