"""What differs between backbones, as one table: a new backbone is a new row, or a row of the user's own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

# What PEFT's wrappers put into a name. (One saved module inside of another leaves an adapter's name in a file.)
_WRAPPERS = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")


@dataclass(frozen=True)
class BlockLayout:
    """Where the parts of an encoder are. All names are relative: `blocks` and `final_norm` to the backbone (the module
    that `base_model_prefix` names), `head` to the model, the rest to one block.

    Args:
        blocks: Path of the `ModuleList` of transformer blocks.
        attention_norm: The LayerNorm whose *output* is H_{m,MHA} (post-LN), or whose *input* it is (pre-LN).
        ffn: Submodules that, applied in order, are FFN(.) without its residual.
        last_norm: The LayerNorm that ends a block; its input is H_{m,F}. `None` for pre-LN blocks, where the block's
            output is H_{m,F}.
        final_norm: Pre-LN only: the norm after the last block; LN' starts as its copy.
        pooling: What the model's own head reads: `cls`, `mean`, `last`, or the config attribute that says it.
        head: Modules of the model's own head that carry weights, for `train_head=True`.
        inner_blocks: Path inside an entry of `blocks` when entries are groups that run again and again (ALBERT).
        shared_arguments: Keyword arguments of a block whose first dimension is never the batch.
        mask_arguments: Arguments of a block that have positions in their last two dimensions ([B, 1, S, S] or
            [B, 1, 1, S] or [B, S]). Without any, rows that survive an early exit keep the padding of those that left.
        position_arguments: Arguments of a block that have positions in dimension 1 ([B, S] or [1, S, ...]).
        lora_targets: Modules of a block that `backbone="lora"` adapts when its LoraConfig does not say.
        full_rows_until: The model mixes the output of this block with other full-size tensors, so rows may leave only
            after it.
    """

    blocks: str
    attention_norm: str
    ffn: tuple[str, ...]
    last_norm: str | None = None
    final_norm: str | None = None
    pooling: str = "cls"
    head: tuple[str, ...] = ("classifier",)
    inner_blocks: str | None = None
    shared_arguments: tuple[str, ...] = ()
    mask_arguments: tuple[str, ...] = ()
    position_arguments: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ("query", "value")
    full_rows_until: int = 0

    def __post_init__(self) -> None:
        if (self.last_norm is None) == (self.final_norm is None):
            raise ValueError(
                f"a BlockLayout has either last_norm (post-LN blocks) or final_norm (pre-LN blocks), got "
                f"last_norm={self.last_norm!r} and final_norm={self.final_norm!r}."
            )
        for name, value in vars(self).copy().items():
            if isinstance(value, list):  # from JSON
                object.__setattr__(self, name, tuple(value))

    @classmethod
    def of(cls, value: Any) -> BlockLayout:
        """A layout from one, or from a dict of its fields.

        Raises:
            ValueError: `value` is neither, or a field is missing or unknown.
        """
        if not isinstance(value, (dict, BlockLayout)):
            raise ValueError(f"block_layout={value!r} is not allowed: it must be a BlockLayout or a dict.")
        try:
            return cls(**value) if isinstance(value, dict) else value
        except TypeError as error:
            allowed = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"block_layout={value!r} is not allowed: {error}; its fields are {allowed}.") from error

    @property
    def pre_norm(self) -> bool:
        """Whether blocks normalize their inputs (ModernBERT) and not their output (BERT)."""
        return self.last_norm is None


_BERT = BlockLayout(
    blocks="encoder.layer",
    attention_norm="attention.output.LayerNorm",
    ffn=("intermediate", "output.dense", "output.dropout"),
    last_norm="output.LayerNorm",
    mask_arguments=("attention_mask",),
)

ARCHITECTURES: dict[str, BlockLayout] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "albert": BlockLayout(
        blocks="encoder.albert_layer_groups",
        inner_blocks="albert_layers",
        attention_norm="attention.LayerNorm",
        ffn=("ffn", "activation", "ffn_output"),
        last_norm="full_layer_layer_norm",
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
}


def get_layout(model: nn.Module, layout: BlockLayout | dict[str, Any] | None = None) -> BlockLayout:
    """The row for `model`: `layout` when given, else the table's row for `model.config.model_type`.

    Raises:
        ValueError: the table has no such row, or `layout` does not fit the model.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if layout is None:
        if model_type not in ARCHITECTURES:
            raise ValueError(
                f"badge_peft does not know where the blocks of model_type={model_type!r} are; it knows "
                f"{', '.join(ARCHITECTURES)}. For another encoder pass BadgeConfig(block_layout=BlockLayout(...))."
            )
        layout = ARCHITECTURES[model_type]
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
    entries = _length(model, root)
    if layout.inner_blocks is None:
        return [f"{root}.{i}" for i in range(entries)]
    runs = int(cast(Any, model.config).num_hidden_layers)
    names = []
    for i in range(runs):
        group = f"{root}.{int(i / (runs / entries))}.{layout.inner_blocks}"
        names += [f"{group}.{j}" for j in range(_length(model, group))]
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
    """The norm of `model` that LN' copies or shares at the block of that name: its last, or the final one (pre-LN)."""
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
    return str(getattr(model.config, layout.pooling))


def max_positions(model: nn.Module) -> int | None:
    """How many tokens the model's table of positions has room for; None where it has no table."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and MPNet count positions from the one after the padding token's
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def hidden_size(model: nn.Module, layout: BlockLayout, block: str) -> int:
    """d: the width of the states of the block called `block`."""
    norm = inner_block(model, block).get_submodule(layout.last_norm or layout.attention_norm)
    return int(cast(nn.Parameter, norm.weight).shape[-1])


def _length(model: nn.Module, path: str) -> int:
    return len(cast(nn.ModuleList, model.get_submodule(path)))


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
