"""The commands of `badge-peft`, by name. They import torch and transformers only once they run, so that `--help` is
quick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from badge_peft.commands.demo import demo

COMMANDS: dict[str, Callable[..., Any]] = {"demo": demo}
