"""The base model's own weights: whether an adapter trains them (`backbone="full"`), and which."""

from __future__ import annotations

from torch import nn

from badge_peft.registry import PREFIX
from badge_peft.tuner.architectures import BlockLayout, block_names, final_norm_name, get_layout, own_pooler
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.lora import is_lora


def is_own_weight(name: str) -> bool:
    """Whether a parameter, or an entry of a state dict, is the base model's own: no adapter's and no saved head's."""
    others = (f".{PREFIX}", ".modules_to_save.", ".original_module.")
    return not is_lora(name) and not any(part in name for part in others)


def train_for(model: nn.Module, full: BadgeConfig | None) -> None:
    """Trains the model's own weights, as far as the exits of `full` read them; None: freezes them all."""
    unused = () if full is None else _unused_by_exits(model, full)
    for name, parameter in model.named_parameters():
        if is_own_weight(name):
            trained = full is not None and not name.startswith(unused)
            parameter.requires_grad = trained and parameter.is_floating_point()


def is_trained(model: nn.Module, layout: BlockLayout) -> bool:
    """Whether any weight that the blocks' outputs depend on is trained: neither ours nor the model's head."""
    return any(
        p.requires_grad and ".badge_" not in name and name.split(".")[0] not in layout.head
        for name, p in model.named_parameters()
    )


def _unused_by_exits(model: nn.Module, config: BadgeConfig) -> tuple[str, ...]:
    """Prefixes of parameters that no exit reads, when `final_exit="exit"`: the model's own head and pooler, and the
    norm after block M where exit M has its own."""
    if config.final_exit == "base_head":
        return ()
    layout = get_layout(model, config.block_layout)
    names = [name for name, _ in model.named_modules() if name.split(".")[-1] in (*layout.head, "pooler")]
    if config.exit_type == "shared_pooled":  # all exits read the pooler
        pooler = own_pooler(model, layout)
        names = [name for name in names if all(part is not pooler for part in model.get_submodule(name).modules())]
    blocks = block_names(model, layout)
    if config.placement != "none":
        if layout.pre_norm:
            names.append(final_norm_name(model, layout))
        elif blocks.count(blocks[-1]) == 1:  # a shared block (ALBERT) runs before, too
            names.append(f"{blocks[-1]}.base_layer.{layout.last_norm}")
    return tuple(f"{name}." for name in names)
