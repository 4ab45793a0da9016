"""The curve of one setting: what its policy costs and gives where only the threshold moves (else the patience, or the
depth).

`calibrate` stores a few of its points with the setting that it chooses, so that whoever serves the adapter knows what
the next faster or more careful setting costs, without the data.

`ExitPromise` is what a calibration says about rows that nobody has labeled: where they stop, and how often early exits
answer as full depth does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import beta

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.metrics import Metric
from badge_peft.evaluation.tradeoff import TradeOffPoint, curve_points, evaluate_policy
from badge_peft.utils.problem import differs, problem_of

Array = np.ndarray


@dataclass(frozen=True)
class ExitPromise:
    """How many rows stop at each exit under one setting, and get another answer than full depth's (None for
    regression). Of token classification a row is a text, which stops with its last token, and its answer is that of
    all of them."""

    exit_layers: tuple[int, ...]
    rows_stopped: tuple[int, ...]
    disagreements: int | None

    @classmethod
    def of(cls, exit_logits: ExitLogits, config: EarlyExitConfig) -> ExitPromise:
        """By replay."""
        found = build_policy(config).replay_history(exit_logits.history())
        units, disagreements = exit_logits.units, None
        if problem_of(exit_logits.kind).gives_labels:
            changed = differs(exit_logits.predicted(found), exit_logits.predictions[-1])
            disagreements = int(units.largest(changed).sum())
        left = units.largest(found)
        counts = tuple(int((left == m).sum()) for m in exit_logits.exits)
        return cls(tuple(exit_logits.exits), counts, disagreements)

    @property
    def rows(self) -> int:
        """Of the calibration."""
        return sum(self.rows_stopped)

    @property
    def agreement(self) -> float | None:
        """Share of the rows that get full depth's answer."""
        return None if self.disagreements is None else (self.rows - self.disagreements) / self.rows

    @cached_property
    def bounds(self) -> tuple[float | None, Array, Array]:
        """What the shares of new rows of the same kind lie below with a probability of 99%, all of them together, as
        far as the calibration's rows can tell: that of disagreements, and [E-1] those of rows that have stopped by an
        exit and of rows that have not. Source: Clopper and Pearson, "The Use of Confidence or Fiducial Limits", 1934.
        """
        stopped = np.cumsum(self.rows_stopped)[:-1]
        level = 1 - 0.01 / (2 * len(stopped) + 1)
        most = None if self.disagreements is None else float(_upper(np.array(self.disagreements), self.rows, level))
        return most, _upper(stopped, self.rows, level), _upper(self.rows - stopped, self.rows, level)


def _upper(successes: Array, rows: int, level: float) -> Array:
    """The upper Clopper-Pearson limit of a share."""
    limit = beta.ppf(level, successes + 1, np.maximum(rows - successes, 1e-9))
    return np.where(successes >= rows, 1.0, limit)


POINTS = 12  # a few more lines in adapter_config.json; neighbors are about a twelfth of the range apart
_VARIED = ("threshold", "patience", "depth")


def setting_curve(
    exit_logits: ExitLogits, config: EarlyExitConfig, metric: Metric = "accuracy", points: int = POINTS
) -> list[TradeOffPoint]:
    """`config` and at most `points` other settings of its policy, slow to fast, with all but the threshold (patience,
    depth) as it is. Of settings that are equally fast there is one."""
    own = evaluate_policy(exit_logits, EarlyExitConfig.of(config, calibration=None), metric)
    family = build_policy(config).opened(exit_logits.kind) or own.config
    found = {point.blocks_saved: point for point in curve_points(exit_logits, [family], points, metric)}
    found[own.blocks_saved] = own
    return [found[speedup] for speedup in sorted(found)]


def curve_record(exit_logits: ExitLogits, points: list[TradeOffPoint]) -> list[dict[str, Any]]:
    """The points as they stand in `EarlyExitConfig.calibration["curve"]`: what varies, what was measured, and the
    counts of an `ExitPromise`."""
    record = []
    for point in points:
        varied = {name: getattr(point.config, name) for name in _VARIED}
        measured = {name: getattr(point, name) for name in ("mean_exit", "blocks_saved", "score")}
        promise = ExitPromise.of(exit_logits, point.config)
        counts = {"rows_stopped": list(promise.rows_stopped), "disagreements": promise.disagreements}
        record.append({**{name: value for name, value in varied.items() if value is not None}, **measured, **counts})
    return record


def stored_curve(config: EarlyExitConfig) -> list[TradeOffPoint]:
    """The curve that `calibrate` stored with this setting, slow to fast."""
    entries = _entries(config)
    depth = _exits(config)[-1]
    return [
        TradeOffPoint(config.policy, setting, entry["mean_exit"], 1 - entry["mean_exit"] / depth, entry["score"])
        for setting, entry in entries
    ]


def stored_promises(config: EarlyExitConfig) -> dict[EarlyExitConfig, ExitPromise]:
    """What is promised of each point of the stored curve."""
    entries, exits = _entries(config), _exits(config)
    return {
        setting: ExitPromise(exits, tuple(entry["rows_stopped"]), entry["disagreements"]) for setting, entry in entries
    }


def _exits(config: EarlyExitConfig) -> tuple[int, ...]:
    """The block numbers of the exits that were calibrated; the last is full depth."""
    return tuple(int(number) for number in (config.calibration or {})["exit_scores"])


def _entries(config: EarlyExitConfig) -> list[tuple[EarlyExitConfig, dict[str, Any]]]:
    """The points of the record, each with its setting."""
    record = (config.calibration or {}).get("curve")
    if not record:
        raise ValueError(
            f"no trade-off curve is stored with policy={config.policy!r}: calibrate the adapter again "
            "(`badge-peft calibrate ADAPTER`), or give the points of sweep(...).curve(name)."
        )
    return [(EarlyExitConfig.of(config, **{n: e[n] for n in _VARIED if n in e}, calibration=None), e) for e in record]
