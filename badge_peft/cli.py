"""`badge-peft`: the command line. Each command is a module of `badge_peft.commands`; here they are put together."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

MISSING = "the command line needs typer, which is in the extra `train`: pip install 'badge-peft[train]'"


def make_app() -> typer.Typer:
    """The application with all commands.

    Raises:
        ModuleNotFoundError: typer is not installed.
    """
    import typer

    from badge_peft.commands import COMMANDS

    app = typer.Typer(
        name="badge-peft",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Early exits for Hugging Face encoders, as a small PEFT adapter: easy inputs get their answer before the "
        "last block.",
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            from badge_peft.prepare import package_version

            typer.echo(f"badge-peft {package_version()}")
            raise typer.Exit

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Show the version and exit."
        ),
    ) -> None:
        pass

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
    app()


if __name__ == "__main__":
    main()
