"""`compile_blocks`: torch.compile for each block on its own, at a few fixed lengths.

The layer loop of the model, the exits and the decisions stay Python, as rows leave between the blocks; what is between
two exits is compiled. Blocks of one shape share their compilations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from badge_peft.model import get_badge_model
from badge_peft.tuner.architectures import max_positions
from badge_peft.tuner.compiled import CompiledBlocks
from badge_peft.tuner.decoders import unfilled_inputs
from badge_peft.tuner.extensions import extension_of

BUCKETS = (16, 32, 64, 128, 256, 512)


def compile_blocks(
    model: nn.Module, *, buckets: Sequence[int] | None = None, **torch_compile_options: Any
) -> CompiledBlocks:
    """Compiles the blocks of a BADGE model for inference, each on its own (regional compilation).

    Afterwards, with gradients off, `model(**batch)` and `early_exit_forward` pad sequences on the right up to the next
    bucket, so that lengths cause no recompilation, and run compiled blocks. Answers are equal to rounding, no longer
    to the last bit. Survivors of an early exit are cut to a bucket, too. The first call at a bucket compiles, and
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
    lengths = list(buckets) if isinstance(buckets, (list, tuple, range)) else None
    whole = lengths is not None and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in lengths)
    if not lengths or not whole or sorted(set(lengths)) != lengths:
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
