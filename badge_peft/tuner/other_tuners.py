"""Refuses other adapters of PEFT's on a model, below ours and above: BADGE is put on plain models.

Two tuners on one model share PEFT's switches (`set_adapter`, `disable_adapter`, `unload`), its list of configs and its
names of saved tensors. A LoRA below ours would be switched off with our adapter, taken out with it, or left out of
every file, and nothing would say so. Merged into the weights it is safe, costs nothing per call, and answers the same.
"""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from badge_peft.tuner.config import is_badge

_MERGE = (
    "merge it into the weights first, `model = model.merge_and_unload()`, and put BADGE on the result (save that, so "
    "that both can be loaded again); or train a LoRA together with the exits, BadgeConfig(backbone='lora')"
)
_MERGE_LAYERS = (
    "load it as a PeftModel, PeftModel.from_pretrained(base_model, folder), or make it with get_peft_model, and "
)
_ON_TOP = "model.add_adapter(name, BadgeConfig(...)) puts another adapter beside it, model.unload() takes it off"


def check_no_other_tuner(model: nn.Module) -> None:
    """Refuses `model` when an adapter of PEFT's is on it, BADGE's own among them. One that has been merged or unloaded
    has left nothing behind.

    Raises:
        ValueError: which adapter that is, where it is, and what to do. Nothing has been changed.
    """
    configs = getattr(model, "peft_config", None) or {}
    kinds = {name: _kind(config) for name, config in configs.items() if isinstance(config, PeftConfig)}
    if any(isinstance(config, PeftConfig) and is_badge(config) for config in configs.values()):
        raise ValueError(f"the model already carries a BADGE adapter ({_names(kinds)}): {_ON_TOP}.")
    if isinstance(model, (PeftModel, PeftMixedModel, BaseTuner)):
        found = f"a {type(model).__name__} with the adapter {_names(kinds)}"
        if not isinstance(getattr(model, "base_model", None), BaseTuner) and not isinstance(model, BaseTuner):
            raise ValueError(
                f"BADGE cannot be put on {found}: vectors before the sequence or the keys can neither be merged nor "
                "be cut with the rows that leave. Put it on the model without them, model.get_base_model()."
            )
        raise ValueError(f"BADGE cannot be put on {found}: {_MERGE}.")
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            of = f" of the adapter {_names(kinds)}" if kinds else ""
            raise ValueError(
                f"BADGE cannot be put on a model with a live {type(module).__module__}.{type(module).__name__}{of} at "
                f"{name!r}: {_MERGE_LAYERS}{_MERGE}."
            )
    if configs:
        raise ValueError(
            f"the model has no layer of the adapter {_names(kinds)} any more, but still its config: "
            "`del model.peft_config` before BADGE is put on it."
        )


class BadgeConfigs(dict[str, PeftConfig]):
    """The configs of a model's adapters by name, BADGE's alone. PEFT lets a tuner that is put on top write its config
    into the dict that it finds, over ours.

    Raises:
        ValueError: a config of another method is to be put in.
    """

    def __setitem__(self, name: str, config: PeftConfig) -> None:
        if not is_badge(config):
            raise ValueError(
                f"{_names({name: _kind(config)})} cannot be put on a model that carries a BADGE adapter "
                f"({_names({known: _kind(self[known]) for known in self})}): PEFT has one method per model, and would "
                "lose the exits. Train a LoRA together with the exits, BadgeConfig(backbone='lora'); or take BADGE "
                "off, model.unload(), train the other adapter, merge it, and put BADGE on the result."
            )
        super().__setitem__(name, config)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As a dict's, entry by entry."""
        for name, config in dict(*args, **kwargs).items():
            self[name] = config


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _names(kinds: dict[str, str]) -> str:
    return ", ".join(f"{name!r} ({kind})" for name, kind in kinds.items()) or "of PEFT"
