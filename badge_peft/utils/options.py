"""Fields of the dataclasses that users fill in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any


def option(default: Any, help: str, *, choices: Sequence[str] | None = None, **arguments: Any) -> Any:
    """A dataclass field with its default, and its line of help for parsers and the documentation."""
    metadata = {"help": help} if choices is None else {"help": help, "choices": choices}
    return field(default=default, metadata=metadata, **arguments)
