"""BADGE for Hugging Face PEFT: block-wise bypasses and divergence-based early exiting for encoders.

Importing this package makes BADGE known to PEFT.
"""

from __future__ import annotations

from badge_peft.compile import compile_blocks
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.evaluation import (
    ExitLogits,
    ExitScores,
    LatencyReport,
    TradeOff,
    TradeOffPoint,
    calibrate,
    collect_exit_logits,
    evaluate_policy,
    exit_scores,
    measure_latency,
    plot_tradeoff,
    sweep,
)
from badge_peft.hub import load_pretrained, push_to_hub
from badge_peft.model import BadgeModel
from badge_peft.outputs import EarlyExitOutput, MultiExitOutput
from badge_peft.pipelines import pipeline
from badge_peft.registry import register
from badge_peft.training import MultiExitTrainer, make_optimizer, multi_exit_arguments, parameter_groups
from badge_peft.tuner.architectures import ARCHITECTURES, BlockLayout
from badge_peft.tuner.bypass import Bypass
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.exits import MultiExitHead
from badge_peft.tuner.layer import BadgeBlock
from badge_peft.tuner.prepare import package_version

__version__ = package_version()

register(BadgeConfig, BadgeModel)

__all__ = [
    "ARCHITECTURES",
    "BadgeBlock",
    "BadgeConfig",
    "BadgeModel",
    "BlockLayout",
    "Bypass",
    "EarlyExitConfig",
    "EarlyExitOutput",
    "ExitLogits",
    "ExitScores",
    "LatencyReport",
    "MultiExitHead",
    "MultiExitOutput",
    "MultiExitTrainer",
    "TradeOff",
    "TradeOffPoint",
    "calibrate",
    "collect_exit_logits",
    "compile_blocks",
    "early_exit_forward",
    "evaluate_policy",
    "exit_scores",
    "load_pretrained",
    "make_optimizer",
    "measure_latency",
    "multi_exit_arguments",
    "parameter_groups",
    "pipeline",
    "plot_tradeoff",
    "push_to_hub",
    "sweep",
]
