"""`LatencyController`: which point of the calibrated curve to serve at, from the load that was measured.

It moves by whole points of the curve, on feedback alone, since what a setting gives under load depends on the machine,
the batches and the queue. Towards faster settings the steps double while the target is missed (1, 2, 4, ... points);
towards more careful ones it goes one point at a time, after a wait of calm measurements. A point at which the target
was missed doubles its wait, as TCP backs off from a network that was full (Jacobson, "Congestion Avoidance and
Control", 1988): a load that lies between two points makes fewer and fewer trials instead of an oscillation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.evaluation.curve import stored_curve
from badge_peft.evaluation.tradeoff import TradeOffPoint
from badge_peft.utils.checks import check_choice, check_int, check_number, is_number

MEASURES = ("p95_latency", "queue_wait", "rows_per_second")
_LARGEST_STEP = 4  # points of the curve in one update


@dataclass
class _State:
    """What a controller remembers; all of it is JSON."""

    position: int  # index of the point in force
    missed: int  # measurements in a row that missed the target
    calm: int  # in a row that kept it with room to spare
    held: int  # since the target was last missed, or the setting last became faster
    waits: list[int]  # for each point, how many calm measurements come before it is entered from its faster neighbor


class LatencyController:
    """Keeps a target by moving along a trade-off curve, and never below a score.

    Call `update` with what was measured since the last call (every second, say), and serve by `config` until the
    next. It does no input or output, and has no clock; calls belong to one thread.

    Args:
        curve: Points of one policy, slow to fast: `stored_curve(config)` for what `calibrate` stored, or
            `sweep(...).curve(name)`.
        target: What to keep: seconds for `p95_latency` and `queue_wait`, which are to lie below it; rows for
            `rows_per_second`, which is to lie above it.
        min_score: The floor: no point is used that scores less on the calibration's rows (`points_above`). None: the
            whole curve.
        measure: What `update` is given: `p95_latency`, `queue_wait` or `rows_per_second`. The last is what the service
            can do, rows per second of busy time, since a service without requests answers none.
        spare: The target is kept with room to spare where a time is below this share of it (rows per second: where the
            target is below this share of the rows). Below 1.
        wait: Calm measurements before a more careful point is tried. Default: 3.
        longest_wait: The most that a wait is doubled to; also, how many measurements within the target make a point's
            wait short again. Default: 120.

    Raises:
        ValueError: the curve is empty or not in order, no point keeps the floor, or an argument is out of range.
    """

    def __init__(
        self,
        curve: Sequence[TradeOffPoint],
        target: float,
        min_score: float | None = None,
        measure: str = "p95_latency",
        *,
        spare: float = 0.7,
        wait: int = 3,
        longest_wait: int = 120,
    ) -> None:
        check_choice("measure", measure, MEASURES)
        if not is_number(target) or target <= 0:
            raise ValueError(f"target={target!r} is not allowed: it must be a positive number, in seconds or rows.")
        if not is_number(spare) or not 0 < spare < 1:
            raise ValueError(f"spare={spare!r} is not allowed: it must lie between 0 and 1.")
        check_number("min_score", min_score, lambda score: True, "it must be a score of the curve's metric, or None")
        check_int("wait", wait, at_least=1, optional=False)
        check_int("longest_wait", longest_wait, at_least=wait, optional=False)
        self.points = points_above(curve, min_score)
        self.target, self.min_score, self.measure = float(target), min_score, measure
        self.spare, self.wait, self.longest_wait = spare, wait, longest_wait
        self._state = _State(0, 0, 0, 0, [wait] * len(self.points))

    @classmethod
    def for_adapter(
        cls, config: EarlyExitConfig, target: float, max_score_drop: float, **arguments: Any
    ) -> LatencyController:
        """A controller on the curve that `calibrate` stored with an adapter's setting.

        Args:
            config: `model.get_early_exit_config()`.
            target: As above.
            max_score_drop: The floor, counted from full depth's score on the calibration's rows (0.01 is a point of
                accuracy).
            **arguments: `measure`, `spare`, `wait`, `longest_wait`.

        Raises:
            ValueError: no curve is stored, or no point of it keeps the floor.
        """
        curve, record = stored_curve(config), config.calibration or {}
        if not is_number(max_score_drop) or max_score_drop < 0:
            raise ValueError(f"max_score_drop={max_score_drop!r} is not allowed: it must be 0 or more.")
        return cls(curve, target, record["full_depth_score"] - max_score_drop, **arguments)

    @property
    def point(self) -> TradeOffPoint:
        """The point in force."""
        return self.points[self._state.position]

    @property
    def config(self) -> EarlyExitConfig:
        """The setting in force."""
        return self.point.config

    def update(self, measured: float | None) -> EarlyExitConfig:
        """Takes a measurement and returns the setting to use from now on.

        Args:
            measured: In the unit of the target, of requests that were answered at the setting in force. None: there
                were none, which counts as calm. Infinity is allowed.

        Raises:
            ValueError: it is negative or not a number.
        """
        strain = self._strain(measured)
        state = self._state
        if strain > 1:
            if not state.missed:
                state.waits[state.position] = min(2 * state.waits[state.position], self.longest_wait)
            step = min(2**state.missed, _LARGEST_STEP)
            state.missed = min(state.missed + 1, _LARGEST_STEP)
            state.position = min(state.position + step, len(self.points) - 1)
            state.calm = state.held = 0
            return self.config
        state.missed = 0
        state.held += 1
        if state.held >= self.longest_wait:  # what holds here would hold at every faster point
            state.waits[state.position :] = [self.wait] * (len(self.points) - state.position)
        state.calm = state.calm + 1 if strain < self.spare else 0
        if state.position and state.calm >= state.waits[state.position - 1]:
            state.position -= 1
            state.calm = state.held = 0
        return self.config

    def _strain(self, measured: float | None) -> float:
        """The measurement as a share of the target: above 1 it is missed."""
        if measured is None:
            return 0.0
        if isinstance(measured, bool) or not measured >= 0:  # NaN fails this, too
            raise ValueError(f"measured={measured!r} is not allowed: it must be 0 or more, or None for no request.")
        if self.measure == "rows_per_second":
            return self.target / measured if measured else float("inf")
        return measured / self.target

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes, for JSON: another process goes on where this one was."""
        return {"points": [point.to_dict() for point in self.points], **asdict(self._state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another controller was.

        Raises:
            ValueError: the state is of other points, or is none; nothing has changed then.
        """
        points = [point.to_dict() for point in self.points]
        if state.get("points") != points:
            raise ValueError(
                "the state belongs to another curve or floor than this controller's: leave it out, and the controller "
                "starts at the most careful point."
            )
        found = _State(**{field.name: state[field.name] for field in fields(_State)})
        for name in ("position", "missed", "calm", "held"):
            check_int(name, getattr(found, name), at_least=0, optional=False)
        if len(found.waits) != len(points) or found.position >= len(points):
            raise ValueError(f"position={found.position} and waits={found.waits} do not fit {len(points)} points.")
        self._state = replace(found, waits=list(found.waits))


def points_above(curve: Sequence[TradeOffPoint], min_score: float | None) -> list[TradeOffPoint]:
    """The points that score at least `min_score`: from the slowest such point to the last before one that does not,
    so that no lucky point far out is used. A ValueError where there is none, or the curve is not in order."""
    speeds = [point.blocks_saved for point in curve]
    if not speeds or sorted(set(speeds)) != speeds:
        raise ValueError(f"a curve needs points from slow to fast, each faster than the last, got speed-ups {speeds}.")
    keeps = [min_score is None or point.score >= min_score for point in curve]
    if not any(keeps):
        raise ValueError(
            f"min_score={min_score} cannot be kept: the best point of the curve scores "
            f"{max(point.score for point in curve):.4f}. Allow a lower score, or calibrate again."
        )
    first = keeps.index(True)
    end = keeps.index(False, first) if False in keeps[first:] else len(keeps)
    return list(curve[first:end])
