"""Fields of the dataclasses that users fill in, and checks of their values: an error names the field, the value and
what is allowed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any

import numpy as np


def option(default: Any, help: str, *, choices: Sequence[str] | None = None, **arguments: Any) -> Any:
    """A dataclass field with its default, and its line of help for parsers and the documentation."""
    metadata = {"help": help} if choices is None else {"help": help, "choices": choices}
    return field(default=default, metadata=metadata, **arguments)


def to_python(value: Any) -> Any:
    """A numpy scalar as the Python value that JSON knows; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def is_number(value: Any) -> bool:
    """Whether `value` is an int or float that a finite float can hold, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def require(allowed: bool, name: str, value: Any, rule: str) -> None:
    """Raises a ValueError, ending in `rule`, unless `allowed`."""
    if not allowed:
        raise ValueError(f"{name}={value!r} is not allowed: {rule}.")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises a ValueError unless `value` is one of `allowed`."""
    require(value in allowed, name, value, f"it must be one of {', '.join(allowed)}")


def check_int(name: str, value: Any, at_least: int, optional: bool = True) -> None:
    """Raises a ValueError unless `value` is a whole number of at least `at_least`, or None where it is `optional`."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    allowed = (value is None and optional) or (is_int and value >= at_least)
    require(allowed, name, value, f"it must be a whole number of at least {at_least}")


def without_removed(fields: dict[str, Any], removed: dict[str, tuple[Any, str]]) -> dict[str, Any]:
    """The fields of a saved config that there still are; of those `removed`, by name, the value where nobody set them,
    and what takes their place. One that is no more and was set is a ValueError."""
    for name, (default, remedy) in removed.items():
        if fields.get(name, default) != default:
            raise ValueError(f"{name}={fields[name]!r} is not allowed: this field has been removed. {remedy}")
    return {name: value for name, value in fields.items() if name not in removed}


def check_number(name: str, value: Any, allowed: Callable[[float], bool], rule: str) -> None:
    """Raises a ValueError, ending in `rule`, unless `value` is None or a finite number that is `allowed`."""
    require(value is None or (is_number(value) and allowed(value)), name, value, rule)
