"""What the fields of a `BadgeConfig` may be, where more than a list of choices says it."""

from __future__ import annotations

from typing import Any

from badge_peft.utils.checks import is_number
from badge_peft.utils.problem import Problem

#: What has a meaning where each token has an answer.
TOKEN_CHOICES: dict[str, tuple[str | None, ...]] = {
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
    "norm": ("own", f"Leave it out: each bypass has a LayerNorm of its own. {_AGAIN}"),
}


def sorted_layers(layers: Any) -> list[int] | None:
    """`exit_layers`, in order."""
    if layers is None:
        return None
    numbers = isinstance(layers, (list, tuple)) and all(
        isinstance(m, int) and not isinstance(m, bool) and m >= 0 for m in layers
    )
    if not numbers or not layers or len(set(layers)) != len(layers):
        raise ValueError(
            f"exit_layers={layers!r} is not allowed: it must be None or a list of distinct block numbers, where 1 is "
            "the first block and 0 the embeddings."
        )
    return sorted(layers)


def check_links(carry: Any, exit_type: str, final_exit: str) -> None:
    """Checks what exits read of one another."""
    if carry == "states":
        raise ValueError(f"carry='states' is not allowed: it has been removed. Use carry='logits' or None. {_AGAIN}")
    if carry not in (None, "logits"):
        raise ValueError(f"carry={carry!r} is not allowed: it must be None or 'logits'.")
    if exit_type == "past_future" and final_exit != "exit":
        raise ValueError("exit_type='past_future' needs final_exit='exit': exit M is one of the exits it fuses.")


def check_label_names(names: Any, num_labels: int | None) -> None:
    """Checks that there is a different name for each label."""
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) != len(names):
        raise ValueError(f"label_names={names!r} is not allowed: it must be None or a list of different strings.")
    if num_labels is not None and len(names) != num_labels:
        raise ValueError(f"label_names={names!r} has {len(names)} names, but num_labels={num_labels}.")


def check_data_columns(columns: Any) -> None:
    """Checks what columns of the training data are called."""
    if columns is None or (
        isinstance(columns, dict)
        and all(isinstance(key, str) and isinstance(name, str | None) for key, name in columns.items())
    ):
        return
    raise ValueError(
        f"data_columns={columns!r} is not allowed: it must be None, or a dict from text, text_pair, label and "
        "query_id to names of columns (None: there is none)."
    )


def check_tokens(fields: dict[str, Any]) -> None:
    """Checks the fields that have fewer choices where each token has an answer."""
    for name, allowed in TOKEN_CHOICES.items():
        if fields[name] not in allowed:
            raise ValueError(
                f"{name}={fields[name]!r} is not allowed with task_type='TOKEN_CLS', where each token has an answer "
                f"of one label: it must be {' or '.join(map(repr, allowed))}."
            )


def check_filled_in(modules_to_save: Any, target_modules: Any, base_fingerprint: Any) -> None:
    """Checks what nobody writes by hand, but a damaged file may hold."""
    names, sample = modules_to_save, base_fingerprint
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"modules_to_save={names!r} is not allowed: it must be None or a list of names.")
    listed = isinstance(target_modules, (list, set, tuple)) and all(isinstance(name, str) for name in target_modules)
    if not (target_modules is None or isinstance(target_modules, str) or listed):
        raise ValueError(f"target_modules={target_modules!r} is not allowed: leave it None.")
    if sample is not None and not (
        isinstance(sample, dict)
        and all(isinstance(values, list) and values for values in sample.values())
        and all(is_number(v) or name.startswith("config.") for name, values in sample.items() for v in values)
    ):
        raise ValueError(
            f"base_fingerprint={sample!r} is not allowed: it must be None (nothing is compared then) or lists of "
            "numbers by name, as it was saved."
        )
