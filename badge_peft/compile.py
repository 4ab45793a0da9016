"""`compile_blocks`: torch.compile for each block on its own, at a few fixed lengths.

The layer loop of the model, the exits and the decisions stay Python, as rows leave between the blocks; what is between
two exits is compiled. Blocks of one shape share their compilations.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from badge_peft.model import get_badge_model
from badge_peft.tuner.architectures import max_positions
from badge_peft.tuner.context import Recorder
from badge_peft.tuner.decoders import unfilled_inputs
from badge_peft.tuner.extensions import extension_of

BUCKETS = (16, 32, 64, 128, 256, 512)
_FILLED = frozenset({"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"})


def compile_blocks(
    model: nn.Module, *, buckets: Sequence[int] | None = None, **torch_compile_options: Any
) -> CompiledBlocks:
    """Compiles the blocks of a BADGE model for inference, each on its own (regional compilation).

    Afterwards, with gradients off, `model(**batch)` and `early_exit_forward` pad sequences on the right up to the next
    bucket, so that lengths cause no recompilation, and run compiled blocks. Answers are equal to rounding, no longer
    to the last bit. ActiveRows of an early exit are cut to a bucket, too. The first call at a bucket compiles, and
    takes its time.

    Longer sequences than the largest bucket run as before, as do training, calls that ask for `hidden_states` or
    `attentions`, those with a mask that is not [B, S], and those of a decoder that would take what is filled in for
    text: without a padding token, or of `inputs_embeds`. Compiled code is neither copied by `deepcopy` nor pickled:
    the copy compiles again.

    Args:
        model: A PEFT model with a BADGE adapter.
        buckets: Lengths, increasing. None: 16 to 512, as far as the model's positions reach.
        **torch_compile_options: For `torch.compile`: `mode`, `backend`, `fullgraph`, `dynamic`, `options`.

    Returns:
        A handle; its `remove()` makes the model what it was.

    Raises:
        ValueError: `model` has no BADGE adapter, or an active one of the adapters library, or the buckets are no
            increasing whole numbers that the model's positions reach.
    """
    badge = get_badge_model(model)
    extension_of(badge.model).check_compilable(badge.model)
    limit = longest_sequence(badge.model)
    if buckets is None:
        lengths = [n for n in BUCKETS if n <= limit] or [limit]
    else:
        lengths = _checked(buckets, limit)
    pad_token = getattr(badge.model.config, "pad_token_id", None) or 0
    unfilled = unfilled_inputs(badge.model, badge.layout)
    badge.compiled = CompiledBlocks(lengths, pad_token, torch_compile_options, unfilled)
    return badge.compiled


def longest_sequence(model: nn.Module) -> int:
    """How many tokens the position table of `model` has room for; what its config says where it has none."""
    return max_positions(model) or int(getattr(model.config, "max_position_embeddings", BUCKETS[-1]))


def _checked(buckets: Sequence[int], limit: int) -> list[int]:
    lengths = list(buckets) if isinstance(buckets, (list, tuple, range)) else []
    if not lengths or any(type(n) is not int or n < 1 for n in lengths) or sorted(set(lengths)) != lengths:
        raise ValueError(
            f"buckets={buckets!r} is not allowed: it must be a list of increasing whole numbers of at least 1, such "
            f"as {[n for n in BUCKETS if n <= limit]}."
        )
    if lengths[-1] > limit:
        raise ValueError(
            f"buckets={buckets!r} is not allowed: the model has positions for {limit} tokens, so no bucket may be "
            "larger."
        )
    return lengths


class CompiledBlocks:
    """The compiled code of a model's blocks, by bucket; what `compile_blocks` returns. `unfilled` are inputs of the
    model that are never filled up."""

    def __init__(
        self, buckets: list[int], pad_token: int, options: dict[str, Any], unfilled: frozenset[str] = frozenset()
    ) -> None:
        self.buckets = buckets
        self.pad_token = pad_token
        self.options = options
        self.filled = _FILLED - unfilled
        self._steps: dict[Any, Callable[..., Any]] = {}

    def remove(self) -> None:
        """The model runs its own blocks again, at every length."""
        self.buckets = []
        self._steps.clear()

    def round_up(self, length: int) -> int:
        """The bucket of `length`; a length beyond the largest stays as it is."""
        return next((n for n in self.buckets if n >= length), length)

    def run(
        self, layer: nn.Module, recorders: list[Recorder], length: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Tensor | None]]:
        """Calls `layer`; returns what it returns, and what the `recorders` saw (nothing where the pass has it)."""
        if length not in self.buckets:
            return layer(*args, **kwargs), []
        # torch keeps and limits compilations by function, so each kind of call has one, which all blocks share
        given = [*args, *kwargs.values()]
        rows = next(x.shape[0] for x in given if isinstance(x, Tensor))
        inference = torch.is_inference_mode_enabled()
        key: tuple[Any, ...] = (length, rows == 1, len(recorders), inference, *map(type, given))
        if torch.__version__ < "2.5":  # there they cannot share
            key = (*key, id(layer))
        if rows > 1:  # compiled for any number of rows, and not for the first one first
            for x in given:
                if isinstance(x, Tensor) and x.dim() > 1 and x.shape[0] == rows:
                    torch._dynamo.maybe_mark_dynamic(x, 0)
        step = self._steps.get(key)
        if step is None:
            step = self._steps.setdefault(key, torch.compile(_copy(_step), **self.options))
        return step(layer, recorders, args, kwargs)

    def pad(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs, filled up on the right to the next bucket; as they are where that is not possible."""
        if torch.is_grad_enabled() or inputs.get("output_hidden_states") or inputs.get("output_attentions"):
            return inputs
        given = inputs.get("input_ids")
        given = inputs.get("inputs_embeds") if given is None else given
        if given is None or given.dim() < 2:
            return inputs
        rows, length = given.shape[:2]
        more = self.round_up(length) - length
        mask = inputs.get("attention_mask")
        if not more or (mask is not None and mask.dim() != 2):
            return inputs
        if mask is None:
            mask = torch.ones(rows, length, dtype=torch.long, device=given.device)
        padded = dict(inputs)
        for name, value in {**inputs, "attention_mask": mask}.items():
            if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == length:
                if name not in self.filled:
                    return inputs  # its value at a padded position is unknown
                sizes = (0, 0) * (value.dim() - 2) + (0, more)
                padded[name] = F.pad(value, sizes, value=self.pad_token if name == "input_ids" else 0)
        return padded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": {}}


def _step(layer: Any, recorders: list[Recorder], args: Any, kwargs: Any) -> Any:
    """One block. Compiled code must not look for the pass of its thread, so there the recorders hand over what they
    saw as results; where torch gives up and calls this as it is, the pass has it, as always."""
    if not torch.compiler.is_dynamo_compiling():
        return layer(*args, **kwargs), []
    for recorder in recorders:
        recorder.seen = None
    result = layer(*args, **kwargs)
    seen = [recorder.seen for recorder in recorders]
    for recorder in recorders:
        recorder.seen = None
    return result, seen


def _copy(function: Any) -> Any:
    """The same function with code of its own."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
