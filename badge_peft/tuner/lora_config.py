"""`BadgeConfig.lora`: what it may say, and PEFT's `LoraConfig` made of it."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig

from badge_peft.tuner.architectures import BlockLayout
from badge_peft.utils.checks import check_int, is_number

_LORA_STARTS = (True, False, "gaussian", "orthogonal")
_NOT_IN_LORA = {
    "bias": "it would train biases of the base model, which no adapter can be switched away from",
    "modules_to_save": "set it in BadgeConfig",
    "layers_to_transform": "say which blocks in target_modules, as a regular expression",
    "layers_pattern": "say which blocks in target_modules, as a regular expression",
    "layer_replication": "it changes the number of blocks",
    "target_parameters": "name modules in target_modules",
    "trainable_token_indices": "only modules inside of the blocks are adapted",
    "alora_invocation_tokens": "texts have no invocation, so it would change nothing",
    "arrow_config": "it chooses among several LoRAs, and an adapter has one",
    "init_lora_weights": f"it changes the base weights or needs data; use one of {_LORA_STARTS}",
}


def lora_fields(value: Any) -> dict[str, Any] | None:
    """`lora` as the fields that differ from PEFT's defaults, which is what a config file should hold."""
    if value is None:
        return None
    if not isinstance(value, (dict, LoraConfig)):
        raise ValueError(f"lora={value!r} is not allowed: it must be a LoraConfig, a dict of its fields, or None.")
    try:
        config = value if isinstance(value, LoraConfig) else LoraConfig(**value)
    except TypeError as error:
        raise ValueError(f"lora={value!r} is not allowed: {error}.") from error
    check_int("lora r", config.r, at_least=1, optional=False)
    if not is_number(config.lora_alpha) or not is_number(config.lora_dropout) or not 0 <= config.lora_dropout < 1:
        raise ValueError(
            f"lora lora_alpha={config.lora_alpha!r}, lora_dropout={config.lora_dropout!r} is not allowed: the first "
            "must be a number, the second one in [0, 1)."
        )
    default = LoraConfig().to_dict()
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items() if v != default[k]}
    for name, remedy in _NOT_IN_LORA.items():
        if name in fields and not (name == "init_lora_weights" and fields[name] in _LORA_STARTS):
            raise ValueError(f"lora {name}={fields[name]!r} is not allowed: {remedy}.")
    return {k: v for k, v in fields.items() if k not in ("peft_type", "task_type", "inference_mode", "peft_version")}


def lora_config(fields: dict[str, Any] | None, layout: BlockLayout) -> LoraConfig:
    """The LoRA that a `BadgeConfig.lora` describes; None is r=8, alpha=16, dropout 0.05. Without `target_modules` it
    adapts queries and values, as PEFT does by default."""
    fields = dict({"r": 8, "lora_alpha": 16, "lora_dropout": 0.05} if fields is None else fields)
    if not fields.get("target_modules"):
        fields["target_modules"] = list(layout.lora_targets)
    return LoraConfig(**fields)
