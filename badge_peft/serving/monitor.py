"""`ExitMonitor`: does the traffic still look like the rows that the adapter was calibrated on?

Some rows, drawn by chance, are answered a second time at full depth (a shadow run). Whether the two answers agree, and
at which exit the row stopped, goes into sequential tests; texts, labels and logits are not kept.

The test is a Shiryaev-Roberts e-detector of Bernoulli likelihood ratios: R = (R + 1) L for each new row, where L is
what a bet on a larger share pays, at most 1 in the mean while the promise holds. R less the number of rows is then a
supermartingale, so with a limit c on R the probability of an alarm within n rows is at most n / c, and c rows pass
before a false one in the mean, whatever the share below the promise. The mean of several such R, for several larger
shares and several promises, has the same property. It needs no window.

Source: Shin, Ramdas and Rinaldo, "E-detectors: A Nonparametric Framework for Sequential Change Detection", 2023.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.evaluation.curve import ExitPromise, stored_promises
from badge_peft.utils.checks import check_int, is_number
from badge_peft.utils.problem import differs, problem_of

logger = logging.getLogger(__name__)
Array = np.ndarray
ODDS = (1.5, 2.0, 3.0, 5.0, 10.0)  # a bet for each factor by which the odds may have risen
_LARGEST = 1e300  # R stays a finite number in JSON


class RateDetector:
    """Evidence that one of `count` shares lies above its promise."""

    def __init__(self, count: int) -> None:
        self.values: np.ndarray = np.zeros((count, len(ODDS)))

    def update(self, happened: Array, promised: Array) -> float:
        """Takes one row: what happened, [count] bool, and the largest shares that keep the promise, [count]. Where one
        is 1 or more, nothing can break it. Returns the evidence: to be compared with the limit c."""
        p = np.clip(promised, 1e-6, 1.0)[:, None]
        odds = np.array(ODDS)
        bet = odds * p / (1 + (odds - 1) * p)  # the larger share whose odds are so many times those of p
        with np.errstate(invalid="ignore", divide="ignore"):
            pays = np.where(np.asarray(happened)[:, None], bet / p, (1 - bet) / (1 - p))
            grown = np.minimum((self.values + 1) * pays, _LARGEST)
        self.values = np.where(p < 1, grown, self.values)
        return self.evidence

    @property
    def evidence(self) -> float:
        """The mean of all R."""
        return float(self.values.mean()) if self.values.size else 0.0


@dataclass(frozen=True)
class DriftAlarm:
    """What the monitor noticed.

    Args:
        kind: `agreement`: early exits disagree with full depth more often than promised. `exits`: rows stop elsewhere.
        rows: Shadow rows since the start or the last `reset`.
        agreement: Of the last rows (`window`); None for regression.
        promised: The agreement on the calibration's rows, at the setting in force; None for regression.
    """

    kind: str
    rows: int
    agreement: float | None
    promised: float | None


class ExitMonitor:
    """Watches shadow rows, and raises an alarm at most once until `reset`.

    A false alarm within n shadow rows has a probability of at most n / `rows_per_false_alarm`, at any time and for any
    changes of the setting, where the traffic is drawn as the calibration's rows were (and 99% of calibrations, whose
    rows are a sample themselves). Traffic that comes in waves of a kind is not, and may alarm: that is drift, too.

    Args:
        promises: For each setting that is served, without its `calibration`, what was measured of it.
        problem_type: As transformers has it.
        rows_per_false_alarm: Shadow rows between two false alarms, in the mean at least. Default: 100,000.
        tolerance: How much more disagreement than promised is no drift. Default: 0.01.
        exit_tolerance: The same for the share of rows that have stopped by an exit. Default: 0.05.
        careful: A setting to serve at after an alarm, see `setting`; None: there is none.
        on_alarm: Called with the `DriftAlarm`, once.
        window: Shadow rows of which `agreement` and `exit_shares` are. Default: 1000.

    Attributes:
        alarm: The alarm, once there was one.
        rows: Shadow rows since the start or the last `reset`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        promises: Mapping[EarlyExitConfig, ExitPromise],
        problem_type: str = "single_label_classification",
        *,
        rows_per_false_alarm: float = 100_000,
        tolerance: float = 0.01,
        exit_tolerance: float = 0.05,
        careful: EarlyExitConfig | None = None,
        on_alarm: Callable[[DriftAlarm], None] | None = None,
        window: int = 1000,
    ) -> None:
        if not is_number(rows_per_false_alarm) or rows_per_false_alarm <= 1:
            raise ValueError(f"rows_per_false_alarm={rows_per_false_alarm!r} is not allowed: it must be above 1.")
        for name, value in (("tolerance", tolerance), ("exit_tolerance", exit_tolerance)):
            if not is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name}={value!r} is not allowed: it is a share of the rows, in [0, 1).")
        check_int("window", window, at_least=1, optional=False)
        self.exit_layers = _common_exits(promises)
        self.promises, self.problem = dict(promises), problem_of(problem_type)
        self.rows_per_false_alarm, self.careful, self.on_alarm = float(rows_per_false_alarm), careful, on_alarm
        self.tolerance, self.exit_tolerance = tolerance, exit_tolerance
        self._seen: deque[tuple[int, bool]] = deque(maxlen=window)
        self.reset()

    @classmethod
    def for_adapter(
        cls, config: EarlyExitConfig, problem_type: str = "single_label_classification", **arguments: Any
    ) -> ExitMonitor:
        """A monitor of what `calibrate` stored with an adapter's setting, for all points of its curve.

        Args:
            config: `model.get_early_exit_config()`.
            problem_type: Of the adapter's config.
            **arguments: As above, from `rows_per_false_alarm` on.

        Raises:
            ValueError: nothing is stored, or an argument is out of range.
        """
        return cls(stored_promises(config), problem_type, **arguments)

    def reset(self) -> None:
        """Starts anew: after an alarm whose cause was found, or a new calibration."""
        self.alarm: DriftAlarm | None = None
        self.rows = 0
        self._seen.clear()
        self._disagree, self._exits = RateDetector(1), RateDetector(2 * (len(self.exit_layers) - 1))

    def setting(self, config: EarlyExitConfig) -> EarlyExitConfig:
        """What to serve by: `careful` after an alarm, where there is such a setting, else `config`."""
        return config if self.alarm is None or self.careful is None else self.careful

    def observe(self, config: EarlyExitConfig, exit_layer: Any, logits: Any, full_logits: Any) -> DriftAlarm | None:
        """Takes rows that were answered early and then at full depth.

        Args:
            config: The setting that answered them.
            exit_layer: [n], the blocks that did.
            logits: [n, K], what they gave.
            full_logits: [n, K], of full depth.

        Returns:
            The alarm, where these rows raised it.

        Raises:
            ValueError: nothing was promised of this setting, or the shapes do not belong together.
        """
        setting = replace(config, calibration=None)
        if setting not in self.promises:
            raise ValueError(
                f"nothing was measured of the setting {setting.policy!r} with threshold={setting.threshold}: serve at "
                "a point of the calibrated curve, or give its ExitPromise."
            )
        exits, early, full = np.asarray(exit_layer), torch.as_tensor(logits), torch.as_tensor(full_logits)
        shapes = [list(values.shape) for values in (exits, early, full)]
        if [[len(exits)], shapes[1], shapes[1]] != shapes or early.ndim != 2 or len(early) != len(exits):
            raise ValueError(f"exit_layer, logits and full_logits of {shapes} must be [n], [n, K] and [n, K].")
        if not np.isin(exits, self.exit_layers).all():
            raise ValueError(f"exit_layer={exits.tolist()} has a block without an exit: they are {self.exit_layers}.")
        wrong = differs(*(self.problem.predictions(x) for x in (early, full)))
        for number, disagrees in zip(exits.tolist(), wrong.tolist(), strict=True):
            if self._take(self.promises[setting], number, disagrees):
                return self.alarm
        return None

    def _take(self, promise: ExitPromise, number: int, disagrees: bool) -> bool:
        """Counts one row; whether it raised the alarm."""
        self.rows += 1
        self._seen.append((number, disagrees))
        if self.alarm is not None:
            return False
        most, stopped, going = promise.bounds
        evidence = {"agreement": 0.0}
        if most is not None:
            evidence["agreement"] = self._disagree.update(np.array([disagrees]), np.array([most + self.tolerance]))
        by_exit = number <= np.array(self.exit_layers[:-1])
        shares = np.concatenate([stopped, going]) + self.exit_tolerance
        evidence["exits"] = self._exits.update(np.concatenate([by_exit, ~by_exit]), shares)
        kind = max(evidence, key=lambda name: evidence[name])
        if evidence[kind] < 2 * self.rows_per_false_alarm:  # two tests, each with half of the false alarms
            return False
        self.alarm = DriftAlarm(kind, self.rows, self.agreement, promise.agreement)
        logger.warning("drift: %s. Calibrate the adapter on rows of the present traffic.", self.alarm)
        if self.on_alarm is not None:
            self.on_alarm(self.alarm)
        return True

    @property
    def agreement(self) -> float | None:
        """Share of the last rows that had full depth's answer; None before there was one, and for regression."""
        if not self._seen or not self.problem.gives_labels:
            return None
        return 1 - sum(wrong for _, wrong in self._seen) / len(self._seen)

    @property
    def exit_shares(self) -> dict[int, float]:
        """For each exit the share of the last rows that it answered; empty before there was one."""
        if not self._seen:
            return {}
        numbers = [number for number, _ in self._seen]
        return {m: numbers.count(m) / len(numbers) for m in self.exit_layers}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes, for JSON: numbers alone, and nothing of the texts."""
        return {
            "exit_layers": list(self.exit_layers),
            "rows": self.rows,
            "seen": [[number, int(wrong)] for number, wrong in self._seen],
            "disagree": self._disagree.values.tolist(),
            "exits": self._exits.values.tolist(),
            "alarm": None if self.alarm is None else asdict(self.alarm),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another monitor was.

        Raises:
            ValueError: the state is of other exits, or of another shape; nothing has changed then.
        """
        if state.get("exit_layers") != list(self.exit_layers):
            raise ValueError(f"the state is not of an adapter with the exits {list(self.exit_layers)}: leave it out.")
        alarm = None if state["alarm"] is None else DriftAlarm(**state["alarm"])
        found = [np.array(state[name], dtype=np.float64) for name in ("disagree", "exits")]
        shapes = [own.values.shape for own in (self._disagree, self._exits)]
        if [values.shape for values in found] != shapes:
            raise ValueError(f"evidence of shape {[list(values.shape) for values in found]} does not fit {shapes}.")
        self.alarm, self.rows = alarm, state["rows"]
        self._disagree.values, self._exits.values = found
        self._seen = deque(((number, bool(wrong)) for number, wrong in state["seen"]), self._seen.maxlen)


def _common_exits(promises: Mapping[EarlyExitConfig, ExitPromise]) -> tuple[int, ...]:
    found = {promise.exit_layers for promise in promises.values()}
    if len(found) != 1:
        raise ValueError(f"the promises must be of settings of one adapter, got those of the exits {sorted(found)}.")
    return found.pop()
