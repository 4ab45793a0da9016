"""What the exits of an adapter are worth on stored logits, as numbers and as a table."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from badge_peft.card_text import SHARES
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policies.text import describe
from badge_peft.evaluation.calibration import own_labels
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import METRICS, exit_scores
from badge_peft.evaluation.tradeoff import TradeOff, evaluate_policy
from badge_peft.utils.problem import problem_of
from badge_peft.workflows.tables import text_table


def default_metric(problem_type: str | None) -> str:
    """Accuracy; for regression Pearson's correlation."""
    return problem_of(problem_type or "single_label_classification").default_metric


def with_labels(exit_logits: ExitLogits) -> ExitLogits:
    """The logits as they are, or with full depth's own answers in the place of labels."""
    return exit_logits if exit_logits.labels is not None else own_labels(exit_logits)


def measure(exit_logits: ExitLogits, config: EarlyExitConfig, metric: str | None = None) -> dict[str, Any]:
    """Scores per exit, and what `config` costs and saves, by replay.

    Args:
        exit_logits: Without labels every score is the agreement with full depth.
        config: How the adapter stops.
        metric: As for `exit_scores`; None is accuracy, for regression Pearson.
    """
    metric = metric or default_metric(exit_logits.kind)
    scored = with_labels(exit_logits)
    scores = exit_scores(scored, metric)
    point = evaluate_policy(scored, config, metric)
    stops = build_policy(config).replay(exit_logits)
    numbers, counts = np.unique(stops.numpy(), return_counts=True)
    stopped = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    return {
        "rows": len(exit_logits),
        "labels": "given" if exit_logits.labels is not None else "full depth's own answers",
        "metric": metric,
        "num_blocks": exit_logits.depth,
        "exit_layers": scores.exit_layers,
        "per_exit": scores.per_exit,
        "s_avg": scores.avg,
        "s_best": scores.best,
        "full_depth_score": scores.per_exit[-1],
        "early_exit": {
            "config": {k: v for k, v in config.to_dict().items() if k not in ("calibration", "parameters")},
            "score": point.score,
            "mean_exit": point.mean_exit,
            "layer_speedup": point.layer_speedup,
            "answers_as_full_depth": _agreement(exit_logits, exit_logits.answers(stops)),
            "rows_stopped": [stopped.get(m, 0) for m in scores.exit_layers],
        },
    }


def measured_table(report: dict[str, Any]) -> str:
    """One line per exit: its score on all rows, and how many rows the rule lets it answer."""
    metric, rows = report["metric"], report["rows"]
    stopped = report["early_exit"]["rows_stopped"]
    lines = [
        [_exit_name(number, report["num_blocks"]), show(value, metric), f"{count / rows:.1%}"]
        for number, value, count in zip(report["exit_layers"], report["per_exit"], stopped, strict=True)
    ]
    return text_table(["exit after", f"{_metric_name(report)}, all rows", "rows it answers"], lines)


def summary(report: dict[str, Any]) -> str:
    """S-avg, S-best and the rule, in a few lines."""
    metric, early = report["metric"], report["early_exit"]
    same = early["answers_as_full_depth"]
    lines = [
        f"S-avg {show(report['s_avg'], metric)}, S-best {show(report['s_best'], metric)} "
        f"({_metric_name(report)}, {report['rows']} rows)",
        f"exit rule: {describe(EarlyExitConfig.of(early['config']))}",
        f"  {_metric_name(report)} {show(early['score'], metric)}; at full depth "
        f"{show(report['full_depth_score'], metric)}",
        f"  {early['mean_exit']:.2f} of {report['num_blocks']} blocks per row on average: "
        f"{early['layer_speedup']:.1%} of the blocks saved",
    ]
    if same is not None and report["labels"] == "given":
        lines.append(f"  {same:.1%} of the rows get the answer that full depth gives")
    return "\n".join(lines)


def tradeoff_table(found: TradeOff, against_full_depth: bool) -> str:
    """One line per setting of every policy: what it would cost and save.

    Args:
        found: From `sweep`.
        against_full_depth: The scores are the agreement with full depth.
    """
    lines = [
        [
            point.name,
            describe(point.config),
            f"{point.mean_exit:.2f}",
            f"{point.layer_speedup:.1%}",
            show(point.score, found.metric),
        ]
        for curve in found.names
        for point in found.curve(curve)
    ]
    score = found.metric + (" against full depth" if against_full_depth else "")
    return text_table(["policy", "setting", "mean exit", "blocks saved", score], lines)


def show(value: float, metric: str) -> str:
    """A score as it is usually read."""
    return f"{value:.1%}" if metric in SHARES else f"{value:.3f}"


def check_metric(metric: str | None, problem_type: str, num_labels: int) -> None:
    """Refuses a metric that does not suit, before any time is spent.

    Raises:
        ValueError: it does not.
    """
    if metric is None:
        return
    if metric in ("f1", "acc_and_f1") and problem_type == "single_label_classification" and num_labels > 2:
        raise ValueError(
            f"metric={metric!r} is for two classes, and there are {num_labels}: use 'macro_f1', or one of "
            f"{', '.join(METRICS)} that suits."
        )
    two = torch.zeros(2, 1, num_labels)
    labels = torch.zeros(problem_of(problem_type).label_shape(2, num_labels))
    exit_scores(ExitLogits(two, labels, problem_type=problem_type), metric)


def _agreement(exit_logits: ExitLogits, answers: torch.Tensor) -> float | None:
    """Share of rows whose answer is full depth's; None for regression."""
    return problem_of(exit_logits.kind).same(answers, exit_logits.logits[:, -1])


def _metric_name(report: dict[str, Any]) -> str:
    name = report["metric"].replace("_", " ")
    return name if report["labels"] == "given" else f"{name} against full depth"


def _exit_name(number: int, num_blocks: int) -> str:
    if number == 0:
        return "the embeddings (0)"
    return f"block {number}" + (" (full depth)" if number == num_blocks else "")
