"""The command line, `badge-peft`. A command is a function: its signature has the options, its docstring is the help.
The work is in `badge_peft.workflows`."""

from __future__ import annotations
