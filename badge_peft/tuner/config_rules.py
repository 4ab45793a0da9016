"""What the fields of a `BadgeConfig` may be, where more than a list of choices says it."""

from __future__ import annotations

from typing import Any

from badge_peft.utils.checks import is_list_of, is_number, require
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


def check_fields(config: Any) -> None:
    """Refuses, with a ValueError, values of a `BadgeConfig` that are right on no model."""
    for name in ("bias", "train_head", "learn_to_exit", "inference_mode"):
        value = getattr(config, name)
        require(isinstance(value, bool), name, value, "it must be True or False")
    for name in ("base_model_name_or_path", "revision", "weights_hash"):
        value = getattr(config, name)
        printable = value is None or (isinstance(value, str) and value.isprintable())
        require(printable, name, value, "it must be a string that can be printed, or None")
    p = config.exit_dropout
    require(is_number(p) and 0 <= p < 1, "exit_dropout", p, "it must be in [0, 1)")
    if config.carry == "states":
        raise ValueError(f"carry='states' is not allowed: it has been removed. Use carry='logits' or None. {_AGAIN}")
    require(config.carry in (None, "logits"), "carry", config.carry, "it must be None or 'logits'")
    if config.exit_type == "past_future" and config.final_exit != "exit":
        raise ValueError("exit_type='past_future' needs final_exit='exit': exit M is one of the exits it fuses.")
    if config.lora is not None and config.backbone != "lora":
        raise ValueError(f"lora is set but backbone={config.backbone!r}: set backbone='lora', or leave lora out.")
    excluded = config.exclude_modules
    require(not excluded, "exclude_modules", excluded, "exit_layers says which blocks have an exit")
    _check_exit_layers(config.exit_layers)
    check_label_names(config.label_names, config.num_labels)
    _check_data_columns(config.data_columns)
    if config.reads_tokens:
        for name, choices in _TOKEN_CHOICES.items():
            if getattr(config, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(config, name)!r} is not allowed with task_type='TOKEN_CLS', where each token "
                    f"has an answer of one label: it must be {' or '.join(map(repr, choices))}."
                )
    _check_filled_in(config.modules_to_save, config.target_modules, config.base_fingerprint)


def _check_exit_layers(layers: Any) -> None:
    numbers = isinstance(layers, (list, tuple)) and all(type(m) is int and m >= 0 for m in layers)
    require(
        layers is None or (numbers and len(set(layers)) == len(layers) > 0),
        "exit_layers",
        layers,
        "it must be None or a list of distinct block numbers, where 1 is the first block and 0 the embeddings",
    )


def check_label_names(names: Any, num_labels: int | None) -> None:
    """Refuses, with a ValueError, what is not a different name for each label."""
    if names is None:
        return
    different = is_list_of(str, names) and len(set(names)) == len(names)
    require(different, "label_names", names, "it must be None or a list of different strings")
    if num_labels is not None and len(names) != num_labels:
        raise ValueError(f"label_names={names!r} has {len(names)} names, but num_labels={num_labels}.")


def _check_data_columns(columns: Any) -> None:
    named = isinstance(columns, dict) and all(
        isinstance(key, str) and isinstance(name, str | None) for key, name in columns.items()
    )
    require(
        columns is None or named,
        "data_columns",
        columns,
        "it must be None, or a dict from text, text_pair, label and query_id to names of columns (or None)",
    )


def _check_filled_in(names: Any, target: Any, sample: Any) -> None:
    """What nobody writes by hand, but a damaged file may hold."""
    require(names is None or is_list_of(str, names), "modules_to_save", names, "it must be None or a list of names")
    listed = isinstance(target, (list, set, tuple)) and all(isinstance(name, str) for name in target)
    require(target is None or isinstance(target, str) or listed, "target_modules", target, "leave it None")
    sampled = isinstance(sample, dict) and all(
        isinstance(values, list) and values and (name.startswith("config.") or all(map(is_number, values)))
        for name, values in sample.items()
    )
    require(
        sample is None or sampled,
        "base_fingerprint",
        sample,
        "it must be None (nothing is compared then) or lists of numbers by name, as it was saved",
    )
