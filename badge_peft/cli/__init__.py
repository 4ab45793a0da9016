"""The commands of `badge-peft`, by name. They import torch and transformers only once they run, so that `--help` is
quick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from badge_peft.cli.app import app
from badge_peft.cli.bench import bench
from badge_peft.cli.calibrate import calibrate
from badge_peft.cli.demo import demo
from badge_peft.cli.evaluate import evaluate
from badge_peft.cli.export import export
from badge_peft.cli.predict import predict
from badge_peft.cli.sweep import sweep
from badge_peft.cli.train import train

COMMANDS: dict[str, Callable[..., Any]] = {
    "train": train,
    "evaluate": evaluate,
    "sweep": sweep,
    "calibrate": calibrate,
    "predict": predict,
    "export": export,
    "bench": bench,
    "app": app,
    "demo": demo,
}
