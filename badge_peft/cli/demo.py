"""`badge-peft demo`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from badge_peft.workflows.settings import DemoSettings


def demo(settings: Annotated[DemoSettings, Parameter("*")] = DemoSettings()) -> None:
    """See what early exits do, in a few minutes on a CPU.

    Trains an exit after every block of an encoder (the encoder itself is not changed), saves the exits as an adapter,
    calibrates a policy on validation data, and measures accuracy and time on test data, one text at a time, with early
    exits and without.
    """
    from badge_peft.workflows.demo import run_demo

    run_demo(settings)
