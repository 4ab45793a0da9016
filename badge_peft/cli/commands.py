"""The application of `badge-peft`: its commands in the order of its help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cyclopts import App, Group, Parameter

from badge_peft._version import package_version
from badge_peft.cli.answering import app as page
from badge_peft.cli.answering import export, predict
from badge_peft.cli.measuring import bench, evaluate, sweep
from badge_peft.cli.serving import serve
from badge_peft.cli.training import calibrate, demo, train

COMMANDS: tuple[Callable[..., Any], ...] = (
    train,
    evaluate,
    sweep,
    calibrate,
    predict,
    export,
    serve,
    bench,
    page,
    demo,
)


def _shown_default(value: Any) -> str | None:
    """Nothing for a flag, which is off, and for what the help tells in words."""
    return None if value is None or value is False else str(value)


app = App(
    name="badge-peft",
    help="Early exits for Hugging Face encoders, as a small PEFT adapter: easy inputs get their answer before the "
    "last block.",
    version=f"badge-peft {package_version()}",
    group_parameters=Group("Options", sort_key=1),
    default_parameter=Parameter(negative="", show_default=_shown_default, allow_repeating=True),
)
for number, command in enumerate(COMMANDS):
    app.command(command, sort_key=number)
