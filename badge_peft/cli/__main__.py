"""`python -m badge_peft.cli` is `badge-peft`: for launchers that start a module."""

from __future__ import annotations

from badge_peft.cli.main import main

main()
