"""Errors that a user can mend are told in one line, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def told_plainly() -> Iterator[None]:
    """Prints a wrong value, a missing file or a missing package to stderr and exits with 1."""
    try:
        yield
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        typer.secho(f"error: {' '.join(str(error).split())}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error
