"""Decoders that classify a text at its last token: where their blocks are, and what is special in a call of theirs.

Most families are built as Llama is and differ in norms alone, so a row is found by what a block consists of.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor, nn

from badge_peft.tuner.layout import BlockLayout

_LLAMA = BlockLayout(
    blocks="layers",
    attention_norm="post_attention_layernorm",
    ffn=("post_attention_layernorm", "mlp"),
    final_norm="norm",
    pooling="last",
    head=("score",),
    lora_targets=("q_proj", "v_proj"),
    mask_arguments=("attention_mask",),
    position_arguments=(
        "position_embeddings",
        "position_embeddings_global",  # Gemma 3 before transformers 5
        "position_embeddings_local",
        "position_ids",
    ),
)
_PARTS = frozenset({"self_attn", "mlp", "post_attention_layernorm"})
#: Parts of a block -> its layout.
_LAYOUTS = {
    # llama, mistral, qwen2, qwen3, smollm3, granite, phi3, ...
    _PARTS | {"input_layernorm"}: _LLAMA,
    # gemma2, gemma3: norms before and after both parts
    _PARTS | {"input_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}: replace(
        _LLAMA,
        attention_norm="pre_feedforward_layernorm",
        ffn=("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    ),
    # olmo2: norms after both parts
    _PARTS | {"post_feedforward_layernorm"}: replace(
        _LLAMA, attention_norm="mlp", ffn=("mlp", "post_feedforward_layernorm")
    ),
}
_CACHES = ("past_key_values", "cache")  # by release of transformers


def decoder_layout(model: nn.Module) -> BlockLayout | None:
    """The layout of a decoder whose blocks have the parts of Llama's, Gemma's or OLMo 2's; None for other models."""
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "model", model)
    blocks = getattr(backbone, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0 or not hasattr(backbone, "norm"):
        return None
    block: Any = blocks[0]
    while hasattr(block, "base_layer"):
        block = block.base_layer
    parts = frozenset(name for name, part in block.named_children() if not isinstance(part, nn.Dropout))
    layout = _LAYOUTS.get(parts)
    if layout is None:
        return None
    if getattr(block, "residual_multiplier", 1.0) != 1.0:  # granite scales what the FFN gives
        layout = replace(layout, ffn=())
    if hasattr(block.self_attn, "qkv_proj"):  # phi3
        layout = replace(layout, lora_targets=("qkv_proj",))
    return layout


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
