"""What comes from other libraries. `from_adapterhub` is imported when it is first asked for, since it stands above the
model, and `adapters`, which the package registers at once, below it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers and editors
    from badge_peft.integrations.adapterhub import from_adapterhub

__all__ = ["from_adapterhub"]

if not TYPE_CHECKING:  # a type checker that sees a `__getattr__` takes any name for granted

    def __getattr__(name: str) -> Any:
        if name != "from_adapterhub":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from badge_peft.integrations.adapterhub import from_adapterhub

        return from_adapterhub
