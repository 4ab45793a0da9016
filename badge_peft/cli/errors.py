"""Lines on stderr: an error the user can fix is one line, without a traceback."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console


def warn(line: str, style: str = "yellow") -> None:
    """A line on stderr, in color where that is a terminal."""
    Console(stderr=True).print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def tell(error: BaseException | None, what: str = "error") -> None:
    """An error in a line; with BADGE_PEFT_DEBUG=1 in the environment its traceback, too."""
    if os.environ.get("BADGE_PEFT_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    warn(f"{what}: {' '.join(str(error).split())}", "red")


@contextmanager
def exit_on_user_error(code: int = 1) -> Iterator[None]:
    """Prints a wrong value, a missing file or a missing package, and exits with `code`."""
    try:
        yield
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        tell(error)
        raise SystemExit(code) from error


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Tells this package's warnings in a line, without the place in the code."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if category is UserWarning and "badge_peft" in str(place[0]):
                warn(f"note: {message}")
            else:
                show(message, category, *place, **more)

        warnings.showwarning = note
        yield
