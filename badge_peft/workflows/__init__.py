"""Whole workflows, from files to files: what the commands of `badge-peft` do, as functions."""

from __future__ import annotations

from badge_peft.workflows.adapter import Adapter, open_adapter, stored_logits, write_early_exit
from badge_peft.workflows.bench import bench_adapter
from badge_peft.workflows.evaluate import evaluate_adapter
from badge_peft.workflows.inputs import read_texts
from badge_peft.workflows.predict import exit_rule, predict
from badge_peft.workflows.rows import TextRows, read_rows
from badge_peft.workflows.settings import TrainSettings
from badge_peft.workflows.share import predict_shared
from badge_peft.workflows.train import train_adapter

__all__ = [
    "Adapter",
    "TextRows",
    "TrainSettings",
    "bench_adapter",
    "evaluate_adapter",
    "exit_rule",
    "open_adapter",
    "predict",
    "predict_shared",
    "read_rows",
    "read_texts",
    "stored_logits",
    "train_adapter",
    "write_early_exit",
]
