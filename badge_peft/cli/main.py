"""`badge-peft`: the command line. Each command is a module of `badge_peft.cli`; here they are put together."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

from badge_peft.utils import distributed

if TYPE_CHECKING:
    import typer

MISSING = "the command line needs typer, which is in the extra `train`: pip install 'badge-peft[train]'"


def make_app() -> typer.Typer:
    """The application with all commands.

    Raises:
        ModuleNotFoundError: typer is not installed.
    """
    import typer

    from badge_peft.cli import COMMANDS
    from badge_peft.cli.root import root

    app = typer.Typer(
        name="badge-peft",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Early exits for Hugging Face encoders, as a small PEFT adapter: easy inputs get their answer before the "
        "last block.",
    )

    app.callback()(root)
    for name, command in COMMANDS.items():
        app.command(name)(command)
    return app


def main() -> None:
    """Entry point of `badge-peft`."""
    try:
        app = make_app()
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        print(MISSING, file=sys.stderr)
        raise SystemExit(1) from None
    if distributed.is_main():
        _run(app)
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        _run(app)  # one process speaks for all; what fails here alone is seen when it leaves this block


def _run(app: typer.Typer) -> None:
    """Runs the command; at its end, no process leaves the others behind."""
    try:
        app()
    except SystemExit as end:
        if not end.code:
            distributed.part()
        raise


if __name__ == "__main__":
    main()
