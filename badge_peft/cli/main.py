"""`badge-peft`: takes the command line apart, runs the command, and tells errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from typing import Any

from badge_peft.utils import distributed

MISSING = "the command line needs cyclopts, which is in the extra `train`: pip install 'badge-peft[train]'"
DISTRIBUTED = ("train", "evaluate", "predict")  # whose work several processes can share


def main(tokens: Sequence[str] | None = None) -> None:
    """Entry point of `badge-peft`.

    Args:
        tokens: The command line; None takes the process's own.
    """
    if find_spec("cyclopts") is None:
        print(MISSING, file=sys.stderr)
        raise SystemExit(1)
    if distributed.is_main():
        try:
            _run(tokens)
        except SystemExit as end:
            if end.code:
                distributed.tell_failure()
            raise
        return
    told = sys.stderr
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            _run(tokens)  # one process speaks for all
        except SystemExit as end:  # any other error is seen when it leaves this block
            if end.code and not distributed.main_fails():
                from badge_peft.cli.errors import tell

                with redirect_stderr(told):
                    tell(end.__cause__, f"error in process {distributed.rank_world()[0]} alone")
            raise


def _run(tokens: Sequence[str] | None) -> None:
    """Runs the command; at its end, no process leaves the others behind."""
    from cyclopts import CycloptsError

    from badge_peft.cli.commands import COMMANDS, app
    from badge_peft.cli.errors import exit_on_user_error, warn, warnings_as_notes

    try:
        with exit_on_user_error(2):  # an option's value out of its range
            command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        see = " ".join(["badge-peft", *(error.command_chain or ()), "--help"])
        warn(f"error: {' '.join(str(error).split())} See {see}.", "red")
        raise SystemExit(2) from error
    try:
        with exit_on_user_error(), warnings_as_notes():
            if command in COMMANDS:  # and not --help or --version
                _meet(command)
            command(*bound.args, **bound.kwargs)
    except KeyboardInterrupt as interrupt:
        warn("interrupted")
        raise SystemExit(130) from interrupt
    distributed.shutdown()


def _meet(command: Callable[..., Any]) -> None:
    """Meets the other processes, where several were started."""
    name = command.__name__
    size = distributed.env_rank_world()[1]
    if size > 1 and name not in DISTRIBUTED:
        raise ValueError(
            f"{name} is for one process, and {size} were started: call badge-peft {name} by itself. Processes can "
            f"share the work of {', '.join(DISTRIBUTED)}."
        )
    distributed.init_process_group()
