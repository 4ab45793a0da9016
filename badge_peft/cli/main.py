"""`badge-peft`: takes the command line apart, runs the command, and tells errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from typing import TYPE_CHECKING, Any

from badge_peft._version import package_version
from badge_peft.utils import distributed

if TYPE_CHECKING:
    from cyclopts import App

COMMANDS = ("train", "evaluate", "sweep", "calibrate", "predict", "export", "bench", "app", "demo")
DISTRIBUTED = ("train", "evaluate", "predict")  # whose work several processes can share
MISSING = "the command line needs cyclopts, which is in the extra `train`: pip install 'badge-peft[train]'"


def make_app() -> App:
    """The application with all commands: each is the function of its name in the module of its name.

    Raises:
        ModuleNotFoundError: cyclopts is not installed.
    """
    from cyclopts import App, Group, Parameter

    app = App(
        name="badge-peft",
        help="Early exits for Hugging Face encoders, as a small PEFT adapter: easy inputs get their answer before the "
        "last block.",
        version=f"badge-peft {package_version()}",
        group_parameters=Group("Options", sort_key=1),
        default_parameter=Parameter(negative="", show_default=_shown_default, allow_repeating=True),
    )
    for number, name in enumerate(COMMANDS):
        app.command(getattr(import_module(f"badge_peft.cli.{name}"), name), name=name, sort_key=number)
    return app


def main(tokens: Sequence[str] | None = None) -> None:
    """Entry point of `badge-peft`.

    Args:
        tokens: The command line; None takes the process's own.
    """
    try:
        app = make_app()
    except ModuleNotFoundError as error:
        if error.name != "cyclopts":
            raise
        print(MISSING, file=sys.stderr)
        raise SystemExit(1) from None
    if distributed.is_main():
        _run(app, tokens)
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        _run(app, tokens)  # one process speaks for all; what fails here alone is seen when it leaves this block


def _run(app: App, tokens: Sequence[str] | None) -> None:
    """Runs the command; at its end, no process leaves the others behind."""
    from cyclopts import CycloptsError

    from badge_peft.cli.errors import exit_on_user_error, warn

    try:
        with exit_on_user_error(2):  # an option's value out of its range
            command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        see = " ".join(["badge-peft", *(error.command_chain or ()), "--help"])
        warn(f"error: {' '.join(str(error).split())} See {see}.", "red")
        raise SystemExit(2) from error
    with exit_on_user_error():
        _join(command.__name__)
        command(*bound.args, **bound.kwargs)
    distributed.shutdown()


def _join(command: str) -> None:
    """Meets the other processes, where several were started.

    Raises:
        ValueError: the command is for one process.
    """
    size = distributed.env_rank_world()[1]
    if size == 1 or command not in COMMANDS:  # --help, --version
        return
    if command not in DISTRIBUTED:
        raise ValueError(
            f"{command} is for one process, and {size} were started: call badge-peft {command} by itself. Processes "
            f"can share the work of {', '.join(DISTRIBUTED)}."
        )
    distributed.init_process_group()


def _shown_default(value: Any) -> str | None:
    """Nothing for a flag, which is off, and for what the help tells in words."""
    return None if value is None or value is False else str(value)
