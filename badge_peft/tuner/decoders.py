"""Decoders that classify a text at its last token: what is special in a call of theirs."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import Tensor, nn

from badge_peft.tuner.architectures import BlockLayout

_CACHES = ("past_key_values", "cache")  # by release of transformers


def decoder_arguments(model: nn.Module, arguments: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """The arguments of a call of `model`, a decoder without a cache of keys and values; others as they are."""
    if not _keeps_cache(type(model).forward):
        return arguments
    given = [name for name in ("use_cache", *_CACHES) if arguments.get(name) not in (None, False)]
    if given:
        raise ValueError(
            f"{given[0]} is not allowed: a classifier reads each text once, and rows stop at different blocks. Leave "
            "it out."
        )
    if batch_size > 1 and _pad_token(model) is None:
        raise ValueError(
            f"{batch_size} rows need a padding token, and {type(model).__name__} has none: set "
            "model.config.pad_token_id = tokenizer.pad_token_id (of a tokenizer without one, tokenizer.pad_token = "
            "tokenizer.eos_token first)."
        )
    return {**arguments, "use_cache": False}


def read_mask(model: nn.Module, layout: BlockLayout, pooling: str, arguments: dict[str, Any]) -> Tensor | None:
    """[B, S], of which the exits' pooling reads the last position that is not 0, or their mean; None: all positions.

    The model's own head reads a decoder's last token that is not the padding token, whatever the mask says.
    """
    mask = arguments.get("attention_mask")
    ids = arguments.get("input_ids")
    if pooling != "last" or layout.pooling != "last" or ids is None:
        return mask
    pad = _pad_token(model)
    return None if pad is None else ids != pad


def positions_read(layout: BlockLayout, arguments: dict[str, Any], ends: Tensor | None) -> Tensor | None:
    """[B, S], not 0 where a block or the model's own head reads a position; None: anywhere. `ends` is the `read_mask`
    of the last position."""
    mask = arguments.get("attention_mask")
    if mask is None or mask.dim() != 2 or layout.pooling != "last":
        return mask
    # of embeddings the head reads the last one, padding or not
    return None if ends is None or arguments.get("input_ids") is None else (mask != 0) | ends


def padding_token(model: nn.Module, layout: BlockLayout) -> int | None:
    """The token by which the model's own head knows padding, whatever the mask says; None: it goes by the mask."""
    return _pad_token(model) if layout.pooling == "last" else None


def unfilled_inputs(model: nn.Module, layout: BlockLayout) -> frozenset[str]:
    """Inputs behind which nothing may be put: the model's own head would read it, which knows padding by its token."""
    if layout.pooling != "last":
        return frozenset()
    return frozenset({"inputs_embeds"} if _pad_token(model) is not None else {"inputs_embeds", "input_ids"})


def _pad_token(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "pad_token_id", None)


@cache
def _keeps_cache(forward: Any) -> bool:
    return "use_cache" in inspect.signature(forward).parameters
