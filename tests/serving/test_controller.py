"""`LatencyController` on simulated services: it keeps the target and the floor, and settles."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.evaluation import TradeOffPoint, calibrate
from badge_peft.evaluation.curve import stored_curve
from badge_peft.serving import LatencyController
from tests.evaluation.logits import plausible

DEPTH = 12


def curve(count: int = 8) -> list[TradeOffPoint]:
    """From 11 blocks down to 2, from a score of 0.9 down to 0.8."""
    points = []
    for i in range(count):
        share = i / max(count - 1, 1)
        config = EarlyExitConfig(threshold=0.1 + share)
        points.append(
            TradeOffPoint("divergence", config, 11 - 9 * share, 1 - (11 - 9 * share) / DEPTH, 0.9 - share / 10)
        )
    return points


def position(controller: LatencyController) -> int:
    return controller.points.index(controller.point)


anything = st.one_of(st.none(), st.floats(0, 1e6), st.just(math.inf), st.just(0))
quick = settings(deadline=None, derandomize=True, max_examples=60)


@quick
@given(st.lists(anything, max_size=80), st.sampled_from(["p95_latency", "queue_wait", "rows_per_second"]))
def test_whatever_is_measured_the_floor_is_kept_and_steps_are_bounded(measured, measure):
    controller = LatencyController(curve(), 0.1, min_score=0.85, measure=measure)
    before = 0
    for value in measured:
        assert controller.update(value) is controller.config
        now = position(controller)
        assert controller.point.score >= 0.85 and -1 <= now - before <= 4
        before = now


@quick
@given(
    st.lists(st.floats(0.01, 10), min_size=8, max_size=8).map(lambda x: sorted(x, reverse=True)),
    st.integers(1, 5),
    st.integers(10, 60),
)
def test_at_a_steady_load_it_settles(latencies, wait, longest):
    """A service whose latency depends on the point alone: the target is met wherever a point meets it, and the
    number of changes grows with the logarithm of the time, up to one trial in `longest` measurements."""
    steps = 1000
    controller = LatencyController(curve(), 1.0, wait=wait, longest_wait=longest)
    seen, missed = [], 0
    for _ in range(steps):
        here = position(controller)
        missed += latencies[here] > 1
        controller.update(latencies[here])
        seen.append(position(controller))
    good = [i for i, value in enumerate(latencies) if value <= 1]
    trials = math.ceil(math.log2(longest / wait)) + 1 + steps // longest
    changes = sum(a != b for a, b in zip(seen, seen[1:], strict=False))
    assert changes <= 2 * 8 + 2 * trials
    if good:
        assert missed <= 8 + trials
        assert set(seen[-longest // 2 :]) <= {good[0] - 1, good[0], *good}
    else:
        assert set(seen[8:]) == {7}


class Queue:
    """A service in discrete time: `arrivals` rows come in each step, each costs its mean exit of the work that a step
    can do, and waits for those before it."""

    def __init__(self, work: float) -> None:
        self.work, self.waiting = work, 0.0

    def step(self, arrivals: float, blocks: float) -> float:
        """Steps that the last row waits."""
        capacity = self.work / blocks
        self.waiting = max(0.0, self.waiting + arrivals - capacity)
        return (self.waiting + arrivals) / capacity


@quick
@given(st.floats(0.5, 0.95), st.floats(0.05, 0.5))
def test_a_burst_is_served_faster_and_the_care_comes_back(burst, quiet):
    """The load, as a share of what the fastest point can do, goes from `quiet` to `burst` and back. (The most careful
    point can do 2/11 of the fastest.)"""
    controller, queue = LatencyController(curve(), 2.0), Queue(work=1000.0)
    most = 1000 / controller.points[-1].mean_exit

    def serve(load, steps):
        waits = []
        for _ in range(steps):
            waits.append(queue.step(load * most, controller.point.mean_exit))
            controller.update(waits[-1])
        return waits

    serve(quiet, 200)
    waits = serve(burst, 300)
    assert max(waits) < 60 and sum(wait > 2 for wait in waits[100:]) <= 20  # at the most careful point it would grow
    serve(quiet, 1500)
    slowest = min(i for i, p in enumerate(controller.points) if 1000 / p.mean_exit > quiet * most)
    assert position(controller) <= slowest + 1
    assert queue.waiting < most


def test_what_the_service_can_do_is_kept_above_a_number_of_rows():
    controller = LatencyController(curve(), 300.0, measure="rows_per_second")
    for _ in range(400):
        controller.update(1000 / controller.point.mean_exit * 1.5)
    assert 1500 / controller.point.mean_exit >= 300 or position(controller) == 0
    assert 1500 / controller.points[position(controller) - 1].mean_exit < 300 / 0.7


def test_without_requests_it_becomes_careful_again():
    controller = LatencyController(curve(), 1.0)
    for _ in range(4):
        controller.update(9.0)
    assert position(controller) == 7
    for _ in range(200):
        controller.update(None)
    assert position(controller) == 0


@quick
@given(st.lists(anything, max_size=40), st.lists(anything, max_size=40))
def test_a_saved_state_goes_on_as_the_first_would_have(before, after):
    first, second = (LatencyController(curve(), 1.0) for _ in range(2))
    for value in before:
        first.update(value)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [first.update(value) for value in after] == [second.update(value) for value in after]
    assert first.state_dict() == second.state_dict()


def test_a_state_that_does_not_fit_is_refused_whole():
    controller = LatencyController(curve(), 1.0)
    controller.update(5.0)
    state = controller.state_dict()
    for wrong, message in (
        (LatencyController(curve(5), 1.0).state_dict(), "another curve or floor"),
        ({**state, "position": 8}, "position=8"),
        ({**state, "waits": [1]}, "waits"),
        ({**state, "calm": -1}, "calm=-1"),
        ({}, "another curve"),
    ):
        with pytest.raises(ValueError, match=message):
            controller.load_state_dict(wrong)
        assert controller.state_dict() == state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0}, "target=0"),
        ({"measure": "p99"}, "measure='p99'.*queue_wait"),
        ({"spare": 1.0}, "spare=1.0"),
        ({"wait": 0}, "wait=0"),
        ({"longest_wait": 2}, "longest_wait=2"),
        ({"min_score": 0.99}, "min_score=0.99 cannot be kept.*0.9000"),
        ({"curve": []}, "from slow to fast"),
        ({"curve": curve()[::-1]}, "from slow to fast"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LatencyController(**{"curve": curve(), "target": 1.0, **arguments})


@pytest.mark.parametrize("measured", [-1.0, math.nan, True])
def test_a_wrong_measurement_changes_nothing(measured):
    controller = LatencyController(curve(), 1.0)
    state = controller.state_dict()
    with pytest.raises(ValueError, match="measured="):
        controller.update(measured)
    assert controller.state_dict() == state


def test_no_lucky_point_beyond_the_floor_is_used():
    points = curve()
    lucky = points[:-1] + [TradeOffPoint("divergence", points[-1].config, 2.0, 1 - 2 / DEPTH, 0.95)]
    assert LatencyController(lucky, 1.0, min_score=0.85).points == points[:4]
    dominated = [TradeOffPoint("divergence", points[0].config, 11.0, 1 - 11 / DEPTH, 0.7), *points[1:]]
    assert LatencyController(dominated, 1.0, min_score=0.85).points == points[1:4]


def test_it_moves_along_the_curve_that_calibrate_stored():
    exit_logits = plausible()
    config = calibrate(exit_logits, "entropy", max_score_drop=0.02)
    controller = LatencyController.for_adapter(config, 0.05, max_score_drop=0.05)
    assert len(controller.points) > 3
    assert controller.points == stored_curve(config)[: len(controller.points)]
    assert all(p.score >= config.calibration["full_depth_score"] - 0.05 for p in controller.points)
    with pytest.raises(ValueError, match="max_score_drop=-1"):
        LatencyController.for_adapter(config, 0.05, max_score_drop=-1)
    with pytest.raises(ValueError, match="calibrate the adapter again"):
        LatencyController.for_adapter(EarlyExitConfig(), 0.05, max_score_drop=0.01)
