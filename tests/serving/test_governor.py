"""`Governor`: changes are whole or nothing, replicas hear of them, and metrics count what was reported."""

from __future__ import annotations

from functools import cache

import pytest
import torch

pytest.importorskip("pydantic", reason="the extra `serve` is not installed")
pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")

from badge_peft.early_exit.config import EarlyExitConfig  # noqa: E402
from badge_peft.evaluation import calibrate  # noqa: E402
from badge_peft.serving.governor import Governor  # noqa: E402
from badge_peft.serving.requests import PolicyUpdate  # noqa: E402
from tests.evaluation.logits import SINGLE, plausible  # noqa: E402


@cache
def calibrated() -> EarlyExitConfig:
    return calibrate(plausible(), "entropy", target_speedup=0.4)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def governor(**arguments) -> tuple[Governor, Clock]:
    clock = Clock()
    return Governor({"default": calibrated()}, {"default": SINGLE}, clock=clock, **arguments), clock


def report(of: Governor, latencies=(), version=None, shadows=(), replica="a"):
    answered, statuses = [("default", 3, 2)], {"200": 1}
    return of.report(replica, version or of.version, list(latencies), answered, statuses, 0, list(shadows))


def no_check(task, config) -> None:
    return None


def shadow(disagree: bool, rows: int = 200):
    early = torch.eye(3)[torch.zeros(rows, dtype=torch.long)]
    full = early.roll(1, -1) if disagree else early
    setting = EarlyExitConfig.of(calibrated(), calibration=None).to_dict()
    return (
        "default",
        {"config": setting, "exit_layer": [4] * rows, "logits": early.tolist(), "full_logits": full.tolist()},
    )


def test_a_change_reaches_every_replica_with_its_next_report():
    of, _ = governor()
    assert report(of)["early_exit"]["default"]["threshold"] == calibrated().threshold
    state = of.update(PolicyUpdate(early_exit={"threshold": 0.2, "max_exit": 9}), no_check)
    assert state["version"] > state["replicas"]["a"]
    heard = report(of)
    assert heard["early_exit"]["default"]["threshold"] == 0.2 and heard["early_exit"]["default"]["max_exit"] == 9
    assert heard["replicas"]["a"] == heard["version"] == of.version


def test_another_policy_starts_from_its_own_defaults():
    of, _ = governor()
    of.update(PolicyUpdate(early_exit={"policy": "patience"}), no_check)
    assert of.configs["default"] == EarlyExitConfig(policy="patience")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (PolicyUpdate(early_exit={"policy": "nope"}), "policy='nope'"),
        (PolicyUpdate(early_exit={"treshold": 1}), "treshold"),
        (PolicyUpdate(tasks={"pii": {"threshold": 1}}), "no task 'pii'.*default"),
        (PolicyUpdate(target=0.1, max_score_drop=0.01, early_exit={"threshold": 0.2}), "target=0"),
        (PolicyUpdate(target=0.1, max_score_drop=0.01, tasks={"default": {"max_exit": 1}}), "target=0"),
    ],
)
def test_a_change_that_is_refused_changes_nothing(change, message):
    of, _ = governor()
    before = of.state()
    with pytest.raises(ValueError, match=message):
        of.update(change, no_check)
    assert of.state() == before


def test_a_target_moves_the_setting_once_in_an_interval_and_never_below_the_floor():
    of, clock = governor(target=0.1, max_score_drop=0.05)
    assert of.controller is not None
    slow = of.controller.point
    for second in range(1, 30):
        clock.now = float(second)
        report(of, [0.5] * 20)
        before = of.configs
        report(of, [0.5] * 20)  # within the same interval
        assert of.configs == before
    assert of.controller.point.layer_speedup > slow.layer_speedup
    assert of.controller.point == of.controller.points[-1]
    assert of.controller.point.score >= calibrated().calibration["full_depth_score"] - 0.05
    assert report(of)["early_exit"]["default"]["threshold"] == of.controller.config.threshold
    of.update(PolicyUpdate(target=0), no_check)
    assert of.controller is None and of.configs["default"].threshold == calibrated().threshold


def test_latencies_of_an_older_setting_do_not_count():
    of, clock = governor(target=0.1, max_score_drop=0.05)
    clock.now = 5.0
    report(of, [9.0] * 20, version=of.version - 1 or 99)
    assert of.controller is not None and of.controller.point == of.controller.points[0]


def test_a_target_is_for_one_adapter_whose_curve_is_known():
    with pytest.raises(ValueError, match="calibrate the adapter again"):
        Governor({"default": EarlyExitConfig()}, {"default": SINGLE}, target=0.1)
    two = {"a": calibrated(), "b": calibrated()}
    with pytest.raises(ValueError, match="one adapter"):
        Governor(two, dict.fromkeys(two, SINGLE), target=0.1)


def test_drift_goes_to_full_depth_until_it_is_reset():
    of, _ = governor(careful=True)
    state = report(of, shadows=[shadow(disagree=True)])
    assert state["drift"]["default"]["kind"] in ("agreement", "exits")
    assert state["early_exit"]["default"]["policy"] == "never"
    assert 'badge_drift{task="default"} 1.0' in of.metrics()
    state = of.update(PolicyUpdate(reset_drift=True), no_check)
    assert state["drift"] == {"default": None} and state["early_exit"]["default"]["policy"] == "entropy"


def test_without_careful_an_alarm_changes_no_setting():
    of, _ = governor()
    state = report(of, shadows=[shadow(disagree=True)])
    assert state["drift"]["default"] and state["early_exit"]["default"]["policy"] == "entropy"


def test_a_replica_that_is_silent_counts_no_more():
    of, clock = governor()
    report(of, replica="a")
    clock.now = 20.0
    assert set(report(of, replica="b")["replicas"]) == {"b"}
    assert 'badge_waiting_rows{replica="a"}' not in of.metrics()


def test_metrics_add_up_what_replicas_report():
    of, _ = governor()
    for replica in ("a", "b"):
        report(of, [0.02, 0.3], replica=replica)
    text = of.metrics()
    for line in (
        'badge_requests_total{status="200"} 2.0',
        "badge_latency_seconds_count 4.0",
        'badge_rows_total{exit_layer="3",task="default"} 4.0',
        'badge_blocks_total{task="default"} 12.0',
        f'badge_setting{{field="threshold",task="default"}} {calibrated().threshold}',
    ):
        assert line in text
