"""`ExitMonitor`: it is quiet while the traffic is the calibration's, and notices when it is not."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.calibration import calibrate
from badge_peft.evaluation.curve import ExitPromise, stored_curve
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.serving import DriftAlarm, ExitMonitor
from badge_peft.serving.monitor import ODDS, RateDetector
from tests.evaluation.logits import MULTI, REGRESSION, plausible

CALIBRATION, TRAFFIC = plausible(rows=1500, seed=1), plausible(rows=6000, seed=2)


@cache
def calibrated() -> EarlyExitConfig:
    return calibrate(CALIBRATION, "entropy", max_score_drop=0.03)


def shadow(exit_logits: ExitLogits, config: EarlyExitConfig, rows: torch.Tensor):
    """What `observe` is given for these rows."""
    part = exit_logits.select(rows)
    stops = torch.from_numpy(build_policy(config).replay_history(part.history()))
    return config, stops, part.answers(stops), part.logits[:, -1]


def harder(exit_logits: ExitLogits, share: float, seed: int = 0) -> ExitLogits:
    """With a share of rows whose early exits are sure of a wrong answer."""
    rng = np.random.default_rng(seed)
    logits = exit_logits.logits.clone()
    rows = torch.from_numpy(rng.choice(len(logits), int(share * len(logits)), replace=False))
    logits[rows, :-1] = 4 * logits[rows, :-1].roll(1, dims=-1)
    return replace(exit_logits, logits=logits)


def test_it_is_quiet_on_traffic_like_the_calibrations():
    for seed in range(10):
        monitor = ExitMonitor.for_adapter(calibrated())
        order = torch.randperm(6000, generator=torch.Generator().manual_seed(seed))[:1500]
        assert monitor.observe(*shadow(TRAFFIC, calibrated(), order)) is None
        assert monitor.rows == 1500 and sum(monitor.exit_shares.values()) == pytest.approx(1)
        assert monitor.agreement == pytest.approx(
            monitor.promises[replace(calibrated(), calibration=None)].agreement, abs=0.03
        )


def test_it_alarms_once_on_other_traffic_and_then_serves_carefully(caplog):
    heard: list[DriftAlarm] = []
    careful = EarlyExitConfig(policy="never")
    monitor = ExitMonitor.for_adapter(calibrated(), careful=careful, on_alarm=heard.append)
    assert monitor.setting(calibrated()) == calibrated()
    with caplog.at_level(logging.WARNING):
        alarm = monitor.observe(*shadow(harder(TRAFFIC, 0.3), calibrated(), torch.arange(1000)))
    assert alarm is monitor.alarm and heard == [alarm] and "drift" in caplog.text
    assert alarm.rows < 400 and alarm.kind in ("agreement", "exits") and alarm.agreement < alarm.promised
    assert monitor.observe(*shadow(harder(TRAFFIC, 0.3), calibrated(), torch.arange(1000))) is None and len(heard) == 1
    assert monitor.setting(calibrated()) == careful
    monitor.reset()
    assert monitor.setting(calibrated()) == calibrated() and monitor.agreement is None and monitor.exit_shares == {}


def test_exits_alone_raise_the_alarm_where_the_answers_agree():
    """Rows that go deeper than promised, each with full depth's answer."""
    monitor = ExitMonitor.for_adapter(calibrated())
    same = torch.zeros(300, 3)
    alarm = monitor.observe(calibrated(), np.full(300, 12), same, same)
    assert alarm is not None and alarm.kind == "exits" and alarm.agreement == 1.0


def test_each_row_is_held_to_the_promise_of_its_own_setting():
    monitor = ExitMonitor.for_adapter(calibrated())
    for point in stored_curve(calibrated()):
        assert monitor.observe(*shadow(TRAFFIC, point.config, torch.arange(300))) is None
    hasty = stored_curve(calibrated())[-1].config
    careful = stored_curve(calibrated())[0].config
    _, stops, answers, full = shadow(TRAFFIC, hasty, torch.arange(1000))
    assert monitor.observe(careful, stops, answers, full) is not None  # the answers of another setting than was said


@pytest.mark.parametrize(("problem_type", "labels"), [(MULTI, 4), (REGRESSION, 1)])
def test_other_problems(problem_type, labels):
    exit_logits = plausible(problem_type, labels, rows=800)
    config = EarlyExitConfig(policy="fixed_depth", depth=4)
    promise = ExitPromise.of(exit_logits, config)
    assert promise.rows == 800 and promise.rows_stopped[3] == 800
    monitor = ExitMonitor({config: promise}, problem_type)
    assert monitor.observe(*shadow(exit_logits, config, torch.arange(800))) is None
    for found in (promise, monitor):
        assert (found.agreement is None) == (problem_type == REGRESSION)
    if problem_type == MULTI:
        early, full = (exit_logits.logits[:, m] > 0 for m in (3, -1))
        assert promise.disagreements == (early != full).any(-1).sum()


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.integers(0, 5999), max_size=60), st.lists(st.integers(0, 5999), max_size=60))
def test_a_saved_state_goes_on_as_the_first_would_have(before, after):
    first, second = (ExitMonitor.for_adapter(calibrated(), rows_per_false_alarm=50) for _ in range(2))
    first.observe(*shadow(TRAFFIC, calibrated(), torch.tensor([0, *before])))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for monitor in (first, second):
        monitor.observe(*shadow(TRAFFIC, calibrated(), torch.tensor([1, *after])))
    assert first.state_dict() == second.state_dict() and first.alarm == second.alarm


def test_a_state_of_other_exits_is_refused():
    monitor = ExitMonitor.for_adapter(calibrated())
    state = monitor.state_dict()
    with pytest.raises(ValueError, match="exits"):
        monitor.load_state_dict({**state, "exit_layers": [1, 2]})
    with pytest.raises(ValueError, match="shape"):
        monitor.load_state_dict({**state, "disagree": [[1.0]]})
    assert monitor.state_dict() == state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows_per_false_alarm": 1}, "rows_per_false_alarm=1 "),
        ({"tolerance": 1.0}, "tolerance=1.0"),
        ({"exit_tolerance": -0.1}, "exit_tolerance=-0.1"),
        ({"window": 0}, "window=0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExitMonitor.for_adapter(calibrated(), **arguments)


def test_rows_that_cannot_be_compared_are_refused_before_one_is_counted():
    monitor = ExitMonitor.for_adapter(calibrated())
    config, stops, answers, full = shadow(TRAFFIC, calibrated(), torch.arange(5))
    for rows, message in (
        ((EarlyExitConfig(threshold=0.123), stops, answers, full), "nothing was measured of the setting 'divergence'"),
        ((config, stops[:4], answers, full), r"\[4\]"),
        ((config, stops, answers, full[:, :2]), r"\[5, 2\]"),
        ((config, stops + 99, answers, full), "without an exit"),
    ):
        with pytest.raises(ValueError, match=message):
            monitor.observe(*rows)
    assert monitor.rows == 0
    with pytest.raises(ValueError, match="one adapter"):
        ExitMonitor({})


# ------------------------------------------------------------------------------------------------------ the detector


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.floats(0.001, 0.999)), max_size=50))
def test_the_evidence_is_that_of_plain_products(rows):
    """R_n is the sum over all starts of the product of what the bets pay from there on."""
    detector = RateDetector(1)
    for happened, promised in rows:
        detector.update(np.array([happened]), np.array([promised]))
    total = 0.0
    for k in ODDS:
        pays = []
        for happened, p in rows:
            bet = k * p / (1 + (k - 1) * p)
            pays.append(bet / p if happened else (1 - bet) / (1 - p))
        total += sum(np.prod(pays[start:]) for start in range(len(pays)))
    assert detector.evidence == pytest.approx(total / len(ODDS))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.floats(0.001, 0.999), st.floats(0, 1))
def test_while_the_promise_holds_a_bet_pays_at_most_one_in_the_mean(promised, share):
    actual = share * promised
    yes, no = (RateDetector(1) for _ in range(2))
    yes.update(np.array([True]), np.array([promised]))
    no.update(np.array([False]), np.array([promised]))
    mean = actual * yes.values + (1 - actual) * no.values
    assert (mean <= 1 + 1e-9).all()


def test_false_alarms_are_as_rare_as_stated():
    """At the share that is promised exactly, 400 runs of 200 rows: a limit of 2000 lets at most a tenth alarm."""
    rng, alarms = np.random.default_rng(0), 0
    detector, over = RateDetector(400), np.zeros(400, dtype=bool)
    for _ in range(200):
        detector.update(rng.random(400) < 0.1, np.full(400, 0.1))
        over |= detector.values.mean(axis=1) >= 2000
    alarms = int(over.sum())
    assert 0 < alarms <= 40


def test_a_promise_that_nothing_can_break_is_no_evidence():
    detector = RateDetector(1)
    for _ in range(10):
        assert detector.update(np.array([True]), np.array([1.2])) == 0
