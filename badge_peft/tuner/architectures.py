"""What differs between backbones, as one table: a new backbone is a new row, or a row of the user's own.

Decoders that are built as Llama is are found by their parts (`decoders.py`)."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, cast

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from badge_peft.tuner.decoders import decoder_layout
from badge_peft.tuner.layout import BlockLayout

# What PEFT's wrappers put into a name. (One saved module inside of another leaves an adapter's name in a file.)
_WRAPPERS = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")


_BERT = BlockLayout(
    blocks="encoder.layer",
    attention_norm="attention.output.LayerNorm",
    ffn=("intermediate", "output.dense", "output.dropout"),
    last_norm="output.LayerNorm",
    mask_arguments=("attention_mask",),
)

ARCHITECTURES: dict[str, BlockLayout] = {
    "bert": replace(_BERT, pooler="pooler.dense"),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), replace(_BERT, pooler="classifier.dense")),
    "electra": _BERT,
    "albert": BlockLayout(
        blocks="encoder.albert_layer_groups",
        inner_blocks="albert_layers",
        attention_norm="attention.LayerNorm",
        ffn=("ffn", "activation", "ffn_output"),
        last_norm="full_layer_layer_norm",
        pooler="pooler",
        mask_arguments=("attention_mask",),
    ),
    "distilbert": BlockLayout(
        blocks="transformer.layer",
        attention_norm="sa_layer_norm",
        ffn=("ffn",),
        last_norm="output_layer_norm",
        head=("pre_classifier", "classifier"),
        lora_targets=("q_lin", "v_lin"),
        mask_arguments=("attention_mask", "attn_mask"),  # its name before transformers 5
    ),
    "mpnet": BlockLayout(
        blocks="encoder.layer",
        attention_norm="attention.LayerNorm",
        ffn=("intermediate", "output.dense", "output.dropout"),
        last_norm="output.LayerNorm",
        pooler="classifier.dense",
        lora_targets=("attn.q", "attn.v"),
        mask_arguments=("attention_mask", "position_bias"),
    ),
    "deberta-v2": BlockLayout(
        blocks="encoder.layer",
        attention_norm="attention.output.LayerNorm",
        ffn=("intermediate", "output.dense", "output.dropout"),
        last_norm="output.LayerNorm",
        head=("pooler", "classifier"),
        lora_targets=("query_proj", "value_proj"),
        shared_arguments=("rel_embeddings", "relative_pos"),
        mask_arguments=("attention_mask", "relative_pos"),
        full_rows_until=1,  # its ConvLayer adds the embeddings to the output of block 1
    ),
    "modernbert": BlockLayout(
        blocks="layers",
        attention_norm="mlp_norm",
        ffn=("mlp_norm", "mlp"),
        final_norm="final_norm",
        pooling="classifier_pooling",
        head=("head", "classifier"),
        lora_targets=("Wqkv",),
        mask_arguments=("attention_mask", "sliding_window_mask"),
        position_arguments=("position_embeddings", "position_ids"),
    ),
    "gpt2": BlockLayout(
        blocks="h",
        attention_norm="ln_2",
        ffn=("ln_2", "mlp"),
        final_norm="ln_f",
        pooling="last",
        head=("score",),
        lora_targets=("c_attn",),
        mask_arguments=("attention_mask",),
        position_arguments=("position_ids",),
    ),
    "opt": BlockLayout(
        blocks="decoder.layers",
        attention_norm="",  # its blocks flatten rows and positions there
        ffn=(),
        final_norm="decoder.final_layer_norm",
        pooling="last",
        head=("score",),
        lora_targets=("q_proj", "v_proj"),
        mask_arguments=("attention_mask",),
        position_arguments=("position_ids",),
    ),
}


def get_layout(model: nn.Module, layout: BlockLayout | dict[str, Any] | None = None) -> BlockLayout:
    """The row for `model`: `layout` when given, else the table's row for `model.config.model_type`."""
    if getattr(model, "main_input_name", None) == "pixel_values":
        raise ValueError(
            f"{type(model).__name__} reads images, and exits are put on models that read texts: their rows are tokens "
            "with an attention mask, by which rows stop early. There is no remedy here yet."
        )
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if layout is None:
        layout = ARCHITECTURES.get(str(model_type)) or decoder_layout(model)
        if layout is None:
            raise ValueError(
                f"badge_peft does not know where the blocks of model_type={model_type!r} are; it knows "
                f"{', '.join(ARCHITECTURES)}, and decoders whose blocks are built as Llama's, Gemma's or OLMo 2's. "
                "For another backbone pass BadgeConfig(block_layout=BlockLayout(...))."
            )
    layout = BlockLayout.of(layout)
    _check(model, layout)
    return layout


def backbone_name(model: nn.Module) -> str:
    """The attribute of `model` that holds the encoder, '' when the model is the encoder."""
    name = getattr(model, "base_model_prefix", "")
    return name if name and hasattr(model, name) else ""


def block_names(model: nn.Module, layout: BlockLayout) -> list[str]:
    """Names of the blocks in the order in which a forward pass runs them. A shared block (ALBERT) appears again for
    each time that it runs."""
    prefix = backbone_name(model)
    root = f"{prefix}.{layout.blocks}" if prefix else layout.blocks
    entries = len(cast(nn.ModuleList, model.get_submodule(root)))
    if layout.inner_blocks is None:
        return [f"{root}.{i}" for i in range(entries)]
    runs = int(cast(Any, model.config).num_hidden_layers)
    names = []
    for i in range(runs):
        group = f"{root}.{int(i / (runs / entries))}.{layout.inner_blocks}"
        names += [f"{group}.{j}" for j in range(len(cast(nn.ModuleList, model.get_submodule(group))))]
    return names


def inner_block(model: nn.Module, name: str) -> nn.Module:
    """The block called `name` as the model made it, whatever wraps it now."""
    block = model.get_submodule(name)
    while hasattr(block, "base_layer"):
        block = cast(nn.Module, block.base_layer)
    return block


def base_name(name: str) -> str:
    """The name of a tensor in the model as it was before any wrapping, from its name in a PEFT model or in a file."""
    return _WRAPPERS.sub("", name.removeprefix("base_model.model."))


def exit_norm(model: nn.Module, block: str, layout: BlockLayout) -> nn.Module:
    """The norm of `model` that LN' copies at the block of that name: its last, or the final one (pre-LN)."""
    if layout.last_norm is not None:
        return inner_block(model, block).get_submodule(layout.last_norm)
    return model.get_submodule(final_norm_name(model, layout))


def final_norm_name(model: nn.Module, layout: BlockLayout) -> str:
    """The name in `model` of the norm after the last block (pre-LN)."""
    return ".".join(filter(None, (backbone_name(model), layout.final_norm)))


def head_pooling(model: nn.Module, layout: BlockLayout) -> str:
    """`cls`, `mean` or `last`: what the model's own head reads."""
    if layout.pooling in ("cls", "mean", "last"):
        return layout.pooling
    return str(getattr(model.config, str(layout.pooling), None))


def own_pooler(model: nn.Module, layout: BlockLayout, adapter_name: str | None = None) -> nn.Module | None:
    """The dense layer of the model's pooler, or the copy of it that this adapter trains with the head; None where it
    has none."""
    if layout.pooler is None:
        return None
    for root in (model.get_submodule(backbone_name(model)), model):
        found: Any = root
        for part in layout.pooler.split("."):
            found = getattr(found, part, None)
            if isinstance(found, ModulesToSaveWrapper):
                saved: Any = found.modules_to_save
                has_own = adapter_name is not None and adapter_name in saved
                found = saved[adapter_name] if has_own else found.original_module
        if isinstance(found, nn.Module):
            return found
    return None


def max_positions(model: nn.Module) -> int | None:
    """How many tokens the model's table of positions has room for; None where it has no table."""
    for name, module in model.named_modules():
        if name.endswith(("position_embeddings", ".wpe", ".embed_positions")) and isinstance(module, nn.Embedding):
            # RoBERTa and MPNet count positions from the one after the padding token's, OPT from 2
            unused = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            return module.num_embeddings - unused
    return None


def hidden_size(model: nn.Module, layout: BlockLayout, block: str) -> int:
    """d: the width of the states of the block called `block`."""
    return int(cast(nn.Parameter, exit_norm(model, block, layout).weight).shape[-1])


def _check(model: nn.Module, layout: BlockLayout) -> None:
    try:
        block = inner_block(model, block_names(model, layout)[0])
        for path in (layout.attention_norm, *layout.ffn, *([layout.last_norm] if layout.last_norm else [])):
            block.get_submodule(path)
        if layout.final_norm:
            model.get_submodule(final_norm_name(model, layout))
    except (AttributeError, IndexError, TypeError) as error:  # TypeError: `blocks` is no list
        raise ValueError(
            f"the block layout does not fit {type(model).__name__}: {error}. Check the paths of BlockLayout."
        ) from error
