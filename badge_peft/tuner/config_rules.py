"""What the fields of a `BadgeConfig` may be, where more than a list of choices says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import LoraConfig

from badge_peft.utils.checks import check_int, is_number, require
from badge_peft.utils.problem import Problem

#: What has a meaning where each token has an answer.
_TOKEN_CHOICES: dict[str, tuple[str | None, ...]] = {
    "exit_pooling": ("auto",),
    "exit_type": ("linear", "pooled", "mha", "residual_mha"),
    "problem_type": (None, Problem.name),
}
_AGAIN = (
    "An adapter that was saved with it has to be trained again, or loaded with the badge_peft that saved it "
    "(badge_version in its adapter_config.json)."
)
#: Fields that are no more, for `without_removed`.
REMOVED: dict[str, tuple[Any, str]] = {
    "ladder": (False, f"Leave it out. {_AGAIN}"),
    "norm": ("own", f"Leave it out: each bypass has its own LayerNorm. {_AGAIN}"),
}


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


def check_fields(config: Any) -> None:
    """Refuses, with a ValueError, values of a `BadgeConfig` that are right on no model."""

    def check(names: str, allows: Callable[[Any], bool], rule: str, optional: bool = True) -> None:
        for name in names.split():
            value = getattr(config, name)
            require((value is None and optional) or allows(value), name, value, rule)

    if config.carry == "states":
        raise ValueError(f"carry='states' is not allowed: it has been removed. Use carry='logits' or None. {_AGAIN}")
    check("bias train_head learn_to_exit inference_mode", _is_bool, "it must be True or False", optional=False)
    check(
        "base_model_name_or_path revision weights_hash", _is_text, "it must be a string that can be printed, or None"
    )
    check("exit_dropout", lambda p: is_number(p) and 0 <= p < 1, "it must be in [0, 1)", optional=False)
    check("carry", lambda value: value == "logits", "it must be None or 'logits'")
    check("exclude_modules", lambda value: not value, "exit_layers says which blocks have an exit")
    check(
        "exit_layers",
        lambda v: _are(int, v, (list, tuple)) and len(set(v)) == len(v) > 0 and min(v) >= 0,
        "it must be None or a list of distinct block numbers, where 1 is the first block and 0 the embeddings",
    )
    check(
        "label_names",
        lambda names: _are(str, names) and len(set(names)) == len(names),
        "it must be None or a list of different strings",
    )
    check_label_count(config.label_names, config.num_labels)
    check(
        "data_columns",
        lambda v: isinstance(v, dict) and _are(str, list(v)) and _are(str, [x for x in v.values() if x is not None]),
        "it must be None, or a dict from text, text_pair, label and query_id to names of columns (or None)",
    )
    # what nobody writes by hand, but a damaged file may hold
    check("modules_to_save", lambda names: _are(str, names), "it must be None or a list of names")
    check("target_modules", lambda v: isinstance(v, str) or _are(str, v, (list, set, tuple)), "leave it None")
    check(
        "base_fingerprint",
        lambda v: isinstance(v, dict) and all(_is_sample(name, values) for name, values in v.items()),
        "it must be None (nothing is compared then) or lists of numbers by name, as it was saved",
    )
    if config.exit_type == "past_future" and config.final_exit != "exit":
        raise ValueError("exit_type='past_future' needs final_exit='exit': exit M is one of the exits it fuses.")
    if config.lora is not None and config.backbone != "lora":
        raise ValueError(f"lora is set but backbone={config.backbone!r}: set backbone='lora', or leave lora out.")
    for name, choices in _TOKEN_CHOICES.items() if config.reads_tokens else ():
        if getattr(config, name) not in choices:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is not allowed with task_type='TOKEN_CLS', where each token "
                f"has an answer of one label: it must be {' or '.join(map(repr, choices))}."
            )


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _are(kind: type, values: Any, lists: Any = list) -> bool:
    return isinstance(values, lists) and all(isinstance(value, kind) and value is not True for value in values)


def _is_sample(name: str, values: Any) -> bool:
    return isinstance(values, list) and bool(values) and (name.startswith("config.") or all(map(is_number, values)))


def check_label_count(names: list[str] | None, num_labels: int | None) -> None:
    """Refuses, with a ValueError, more names than labels, or fewer."""
    if names is not None and num_labels is not None and len(names) != num_labels:
        raise ValueError(f"label_names={names!r} has {len(names)} names, but num_labels={num_labels}.")


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
