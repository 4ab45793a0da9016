"""What differs between backbones, as one table: a new backbone is a new row, or a row of the user's own.

Most families of decoders are built as Llama is and differ in norms alone: their row is found by what a block is made
of. What is special in a call of theirs: `decoders.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, cast

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

# What PEFT's wrappers put into a name. (One saved module inside of another leaves an adapter's name in a file.)
_WRAPPERS = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")


@dataclass(frozen=True)
class BlockLayout:
    """Where the parts of a backbone are. All names are relative: `blocks` and `final_norm` to the backbone (the module
    that `base_model_prefix` names), `head` to the model, the rest to one block.

    Args:
        blocks: Path of the `ModuleList` of transformer blocks.
        attention_norm: The LayerNorm whose *output* is H_{m,MHA} (post-LN), or the module whose *input* it is
            (pre-LN). '' where there is none: then an adapter has no `placement="ffn"` or `"mhsa"`.
        ffn: Submodules that, applied in order, are FFN(.) without its residual. () where these do not say it all:
            then an adapter has no `placement="mhsa"`, which runs them a second time.
        last_norm: The LayerNorm that ends a block; its input is H_{m,F}. `None` for pre-LN blocks, where the block's
            output is H_{m,F}.
        final_norm: Pre-LN only: the norm after the last block; LN' starts as its copy.
        pooling: What the model's own head reads: `cls`, `mean`, `last`, or the config attribute that says it.
        head: Modules of the model's own head that carry weights, for `train_head=True`.
        pooler: The dense layer, in front of a tanh, that the model's own head reads: in the backbone or in the model.
            None where its pooler is of another form.
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
    pooler: str | None = None
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
            elif isinstance(value, str) and str(self.__dataclass_fields__[name].type).startswith("tuple"):
                raise ValueError(f"{name}={value!r} is not allowed: it must be a tuple of names, ({value!r},).")

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
_WITH_IDS = replace(_LLAMA, position_arguments=("position_ids",))

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
    "mpnet": replace(
        _BERT,
        attention_norm="attention.LayerNorm",
        pooler="classifier.dense",
        lora_targets=("attn.q", "attn.v"),
        mask_arguments=("attention_mask", "position_bias"),
    ),
    "deberta-v2": replace(
        _BERT,
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
    "gpt2": replace(
        _WITH_IDS, blocks="h", attention_norm="ln_2", ffn=("ln_2", "mlp"), final_norm="ln_f", lora_targets=("c_attn",)
    ),
    # OPT's blocks flatten rows and positions where H_{m,MHA} is
    "opt": replace(
        _WITH_IDS, blocks="decoder.layers", attention_norm="", ffn=(), final_norm="decoder.final_layer_norm"
    ),
}
_PARTS = frozenset({"self_attn", "mlp", "post_attention_layernorm"})
#: Parts of a decoder's block -> its layout.
_DECODERS = {
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
    layout = _DECODERS.get(parts)
    if layout is None:
        return None
    if getattr(block, "residual_multiplier", 1.0) != 1.0:  # granite scales what the FFN gives
        layout = replace(layout, ffn=())
    if hasattr(block.self_attn, "qkv_proj"):  # phi3
        layout = replace(layout, lora_targets=("qkv_proj",))
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
