"""BADGE for Hugging Face PEFT: block-wise bypasses and divergence-based early exiting for transformers that classify.

Importing this package makes BADGE known to PEFT. What loads a model and answers early is imported at once; evaluation,
training, pipelines and compilation, and the libraries that they need, when one of their names is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from badge_peft._version import package_version
from badge_peft.bundle import save_tasks
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.mixin import early_exit_forward
from badge_peft.hub import load_pretrained, push_to_hub
from badge_peft.integrations.adapters import AdaptersLibrary
from badge_peft.model import BadgeModel
from badge_peft.outputs import EarlyExitOutput, MultiExitOutput, MultiTaskOutput
from badge_peft.registry import register
from badge_peft.tuner.architectures import ARCHITECTURES, BlockLayout
from badge_peft.tuner.bypass import Bypass
from badge_peft.tuner.config import BadgeConfig
from badge_peft.tuner.exits import MultiExitHead
from badge_peft.tuner.extensions import register_extension
from badge_peft.tuner.layer import BadgeBlock

if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers and editors
    from badge_peft.compile import compile_blocks
    from badge_peft.evaluation import (
        CostModel,
        ExitLogits,
        ExitScores,
        LatencyReport,
        TradeOff,
        TradeOffPoint,
        calibrate,
        collect_exit_logits,
        evaluate_policy,
        exit_scores,
        measure_costs,
        measure_latency,
        plot_tradeoff,
        sweep,
    )
    from badge_peft.integrations.causal_lm import from_causal_lm
    from badge_peft.pipelines import pipeline
    from badge_peft.training import (
        CachedStates,
        MultiExitTrainer,
        MultiExitTrainingArguments,
        cache_states,
        choose_exits,
        make_optimizer,
        multi_exit_arguments,
        parameter_groups,
    )

__version__ = package_version()

__all__ = [
    "ARCHITECTURES",
    "BadgeBlock",
    "BadgeConfig",
    "BadgeModel",
    "BlockLayout",
    "Bypass",
    "CachedStates",
    "CostModel",
    "EarlyExitConfig",
    "EarlyExitOutput",
    "ExitLogits",
    "ExitScores",
    "LatencyReport",
    "MultiExitHead",
    "MultiExitOutput",
    "MultiExitTrainer",
    "MultiExitTrainingArguments",
    "MultiTaskOutput",
    "TradeOff",
    "TradeOffPoint",
    "cache_states",
    "calibrate",
    "choose_exits",
    "collect_exit_logits",
    "compile_blocks",
    "early_exit_forward",
    "evaluate_policy",
    "exit_scores",
    "from_causal_lm",
    "load_pretrained",
    "make_optimizer",
    "measure_costs",
    "measure_latency",
    "multi_exit_arguments",
    "parameter_groups",
    "pipeline",
    "plot_tradeoff",
    "push_to_hub",
    "save_tasks",
    "sweep",
]

#: The names that are imported when they are first asked for, by module.
_LAZY = {
    "compile": ("compile_blocks",),
    "evaluation": (
        "CostModel",
        "ExitLogits",
        "ExitScores",
        "LatencyReport",
        "TradeOff",
        "TradeOffPoint",
        "calibrate",
        "collect_exit_logits",
        "evaluate_policy",
        "exit_scores",
        "measure_costs",
        "measure_latency",
        "plot_tradeoff",
        "sweep",
    ),
    "integrations.causal_lm": ("from_causal_lm",),
    "pipelines": ("pipeline",),
    "training": (
        "CachedStates",
        "MultiExitTrainer",
        "MultiExitTrainingArguments",
        "cache_states",
        "choose_exits",
        "make_optimizer",
        "multi_exit_arguments",
        "parameter_groups",
    ),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}

register(BadgeConfig, BadgeModel)
register_extension(AdaptersLibrary())


if not TYPE_CHECKING:  # a type checker that sees a `__getattr__` takes any name for granted

    def __getattr__(name: str) -> Any:
        if name in _MODULE_OF:
            value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        elif name in _LAZY:  # badge_peft.evaluation, after `import badge_peft` alone
            value = import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value  # from now on it is found without this function
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, *(module for module in _LAZY if "." not in module)})
