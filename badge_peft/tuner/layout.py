"""`BlockLayout`: where the parts of a backbone are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
