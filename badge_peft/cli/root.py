"""What comes before every command of `badge-peft`: its version, and whether several processes may run it."""

from __future__ import annotations

import typer

from badge_peft.cli.errors import told_plainly
from badge_peft.utils import distributed

#: Commands whose work several processes can share; the others are for one.
SHARED = ("train", "evaluate", "predict")


def _show_version(wanted: bool) -> None:
    if wanted:
        from badge_peft.tuner.prepare import package_version

        typer.echo(f"badge-peft {package_version()}")
        raise typer.Exit


def root(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    size, name = distributed.launched()[1], context.invoked_subcommand
    if size == 1:
        return
    with told_plainly():
        if name not in SHARED:
            raise ValueError(
                f"{name} is for one process, and {size} were started: call badge-peft {name} by itself. Processes can "
                f"share the work of {', '.join(SHARED)}."
            )
        distributed.join()
