"""`Governor`: changes are whole or nothing, replicas hear of them, and metrics count what was reported."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch

pytest.importorskip("pydantic", reason="the extra `serve` is not installed")
pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")

from badge_peft.early_exit.config import EarlyExitConfig  # noqa: E402
from badge_peft.evaluation import calibrate  # noqa: E402
from badge_peft.serving.governor import Governor  # noqa: E402
from badge_peft.serving.report import Done, Report  # noqa: E402
from badge_peft.serving.requests import PolicyUpdate  # noqa: E402
from tests.evaluation.logits import SINGLE, plausible  # noqa: E402


@cache
def calibrated() -> EarlyExitConfig:
    return calibrate(plausible(), "entropy", target_blocks_saved=0.4)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def governor(**arguments) -> tuple[Governor, Clock]:
    clock = Clock()
    check = arguments.pop("check", no_check)
    return Governor({"default": calibrated()}, {"default": SINGLE}, check, clock=clock, **arguments), clock


def report(of: Governor, latencies=(), version=None, shadows=(), replica="a", **more):
    seconds = list(latencies)
    done = Done(seconds, seconds, Counter({("default", 3): 2}), Counter({("/predict", 200): 1}), list(shadows))
    return of.report(Report(replica, version or of.version, done, **more))


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
    state = of.update(PolicyUpdate(early_exit={"threshold": 0.2, "max_exit": 9}))
    assert state["version"] > state["replicas"]["a"]
    heard = report(of)
    assert heard["early_exit"]["default"]["threshold"] == 0.2 and heard["early_exit"]["default"]["max_exit"] == 9
    assert heard["replicas"]["a"] == heard["version"] == of.version


def test_another_policy_starts_from_its_own_defaults():
    of, _ = governor()
    of.update(PolicyUpdate(early_exit={"policy": "patience"}))
    assert of.configs["default"] == EarlyExitConfig(policy="patience")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (PolicyUpdate(early_exit={"policy": "nope"}), "policy='nope'"),
        (PolicyUpdate(early_exit={"treshold": 1}), "treshold"),
        (PolicyUpdate(target=1e-300), "target=1e-300 is not allowed"),
        (PolicyUpdate(target=float("inf")), "target=inf"),
        (PolicyUpdate(target=float("nan")), "target=nan"),
        (PolicyUpdate(target=-1), "target=-1"),
        (PolicyUpdate(max_score_drop=5), "max_score_drop=5.0.*0.05"),
        (PolicyUpdate(max_score_drop=float("nan")), "max_score_drop=nan"),
        (PolicyUpdate(tasks={"pii": {"threshold": 1}}), "no task 'pii'.*default"),
        (PolicyUpdate(target=0.1, max_score_drop=0.01, early_exit={"threshold": 0.2}), "target=0"),
        (PolicyUpdate(target=0.1, max_score_drop=0.01, tasks={"default": {"max_exit": 1}}), "target=0"),
    ],
)
def test_a_change_that_is_refused_changes_nothing(change, message):
    of, _ = governor()
    before = of.state()
    with pytest.raises(ValueError, match=message):
        of.update(change)
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
    assert of.controller.point.blocks_saved > slow.blocks_saved
    assert of.controller.point == of.controller.points[-1]
    assert of.controller.point.score >= calibrated().calibration["full_depth_score"] - 0.05
    assert report(of)["early_exit"]["default"]["threshold"] == of.controller.config.threshold
    of.update(PolicyUpdate(target=0))
    assert of.controller is None and of.configs["default"].threshold == calibrated().threshold


def test_latencies_of_an_older_setting_do_not_count():
    of, clock = governor(target=0.1, max_score_drop=0.05)
    clock.now = 5.0
    report(of, [9.0] * 20, version=of.version - 1 or 99)
    assert of.controller is not None and of.controller.point == of.controller.points[0]


def test_a_request_that_waits_too_long_counts_before_its_answer():
    of, clock = governor(target=0.1, max_score_drop=0.05)
    for second in range(1, 9):
        clock.now = float(second)
        report(of, waiting=40, oldest=3.0, version=99)  # answered all at older settings
    assert of.controller is not None and of.controller.point == of.controller.points[-1]


def test_what_will_wait_too_long_counts_before_it_has():
    of, clock = governor(target=0.1, max_score_drop=0.05)
    clock.now = 1.0
    report(of, [0.01], waiting=40, oldest=0.05, expected=0.3)
    assert of.controller is not None and of.controller.point == of.controller.points[1]


def test_while_all_wait_and_none_is_late_the_setting_stays():
    of, clock = governor(target=10.0, max_score_drop=0.05)
    clock.now = 1.0
    report(of, [20.0])
    before = of.controller.state_dict()
    assert before["position"] == 1
    for second in range(2, 9):
        clock.now = float(second)
        report(of, waiting=40, oldest=1.0)
    assert of.controller.state_dict() == before


def test_a_target_starts_at_the_most_careful_point_and_its_points_are_checked():
    of, _ = governor()
    state = of.update(PolicyUpdate(target=0.1, max_score_drop=0.05))
    assert of.configs["default"] == of.controller.points[0].config and state["target"] == 0.1

    def check(task, config):
        raise ValueError(f"{task} cannot answer at {config.threshold}")

    with pytest.raises(ValueError, match="default cannot answer"):
        governor(target=0.1, max_score_drop=0.05, check=check)
    refuses, _ = governor(check=check)
    before = refuses.state()
    with pytest.raises(ValueError, match="default cannot answer"):
        refuses.update(PolicyUpdate(target=0.1, max_score_drop=0.05))
    assert refuses.state() == before and refuses.controller is None


def test_many_replicas_report_less_often():
    of, _ = governor(interval=0.25)
    assert report(of)["report_every"] == 0.25
    for i in range(800):
        state = report(of, replica=str(i))
    assert state["report_every"] == pytest.approx(2.0, rel=0.01)
    assert state["on_all_replicas"] is True
    assert of.update(PolicyUpdate(early_exit={"threshold": 0.2}))["on_all_replicas"] is False


def test_a_target_is_for_one_adapter_whose_curve_is_known():
    with pytest.raises(ValueError, match="calibrate the adapter again"):
        Governor({"default": EarlyExitConfig()}, {"default": SINGLE}, no_check, target=0.1)
    two = {"a": calibrated(), "b": calibrated()}
    with pytest.raises(ValueError, match="one adapter"):
        Governor(two, dict.fromkeys(two, SINGLE), no_check, target=0.1)


def test_drift_goes_to_full_depth_until_it_is_reset():
    of, _ = governor(careful=True)
    state = report(of, shadows=[shadow(disagree=True)])
    assert state["drift"]["default"]["kind"] in ("agreement", "exits")
    assert state["early_exit"]["default"]["policy"] == "never"
    assert 'badge_drift{task="default"} 1.0' in of.metrics()
    state = of.update(PolicyUpdate(reset_drift=True))
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
        'badge_requests_total{path="/predict",status="200"} 2.0',
        "badge_latency_seconds_count 4.0",
        'badge_rows_total{exit_layer="3",task="default"} 4.0',
        'badge_blocks_total{task="default"} 12.0',
        f'badge_setting{{field="threshold",task="default"}} {calibrated().threshold}',
        'badge_policy{policy="entropy",task="default"} 1.0',
        "badge_target_seconds NaN",
    ):
        assert line in text


@pytest.mark.parametrize("change", [{"early_exit": {"threshold": 0.2}}, {"target": 0.1, "max_score_drop": 0.05}])
def test_a_governor_that_was_started_again_hears_from_a_replica_where_it_was(change):
    first, _ = governor(careful=True)
    report(first, shadows=[shadow(disagree=True)])
    known = first.update(PolicyUpdate(**change))
    again, _ = governor(careful=True)
    assert again.version < known["version"]
    state = report(again, version=known["version"], state=known)
    assert state["version"] > known["version"]
    for name in ("early_exit", "chosen", "drift", "target", "max_score_drop"):
        assert state[name] == known[name], name
    assert state["drift"]["default"] and state["early_exit"]["default"]["policy"] == "never"
    assert report(again)["version"] == state["version"]  # once


def test_a_change_that_reaches_a_new_governor_first_is_not_lost_to_what_replicas_knew():
    first, _ = governor()
    known = [report(first, replica="a"), first.update(PolicyUpdate(early_exit={"threshold": 0.1}))][1]
    again, _ = governor()
    acknowledged = again.update(PolicyUpdate(early_exit={"threshold": 0.2}), known)
    assert acknowledged["on_all_replicas"] is False  # `a` has yet to hear of it
    newer = {**known, "version": 9}
    state = report(again, version=9, state=newer)
    assert state["early_exit"]["default"]["threshold"] == 0.2 and state["version"] > 9
    assert report(again, version=state["version"], state=state)["on_all_replicas"] is True


def test_a_change_beside_what_was_in_force_keeps_the_rest_of_it():
    first, _ = governor()
    known = first.update(PolicyUpdate(early_exit={"max_exit": 7}))
    again, _ = governor()
    state = again.update(PolicyUpdate(early_exit={"threshold": 0.2}), known)
    assert state["early_exit"]["default"]["max_exit"] == 7 and state["early_exit"]["default"]["threshold"] == 0.2


def test_of_what_replicas_know_the_newest_counts_and_all_hear_of_it():
    """Two replicas know different settings, and the older one is the first to report."""
    first, _ = governor()
    older = first.update(PolicyUpdate(early_exit={"threshold": 0.1}))
    newer = first.update(PolicyUpdate(early_exit={"threshold": 0.2}))
    again, _ = governor()
    heard = report(again, replica="a", version=older["version"], state=older)
    assert heard["version"] == newer["version"]  # by chance, the number that another setting had
    state = report(again, replica="b", version=newer["version"], state=newer)
    assert state["version"] > newer["version"] and state["early_exit"]["default"]["threshold"] == 0.2
    assert state["on_all_replicas"] is False


def test_it_says_where_no_drift_would_be_noticed():
    of, _ = governor()
    assert report(of)["unwatched"] == {} and 'badge_drift_watched{task="default"} 1.0' in of.metrics()
    by_hand = of.update(PolicyUpdate(early_exit={"threshold": 0.123}))
    assert "nothing was measured of the setting" in by_hand["unwatched"]["default"]
    assert 'badge_drift_watched{task="default"} 0.0' in of.metrics()
    assert governor(unwatched={"default": "why"})[0].state()["unwatched"] == {"default": "why"}
    bare = Governor({"default": EarlyExitConfig()}, {"default": SINGLE}, no_check)
    assert "calibrate" in bare.state()["unwatched"]["default"]


def test_the_end_is_told_to_all_replicas_and_what_waits_is_known():
    of, clock = governor()
    report(of, replica="a", waiting=3)
    report(of, replica="b", waiting=4)
    known = of.end()
    assert (known["ending"], known["waiting"], known["on_all_replicas"]) == (True, 7, False)
    assert report(of, replica="a")["ending"] is True
    clock.now = 20.0  # b has died
    state = report(of, replica="a")
    assert (state["waiting"], state["on_all_replicas"]) == (0, True)
    again, _ = governor()
    assert report(again, version=known["version"], state=known)["ending"] is True


def test_a_setting_that_was_chosen_stays_where_only_the_floor_changes():
    of, _ = governor()
    of.update(PolicyUpdate(early_exit={"threshold": 0.123}))
    assert of.update(PolicyUpdate(max_score_drop=0.02))["early_exit"]["default"]["threshold"] == 0.123
    of.update(PolicyUpdate(target=0.1, max_score_drop=0.05))
    own = of.controller.config.threshold  # chosen by name, though the controller is there already
    state = of.update(PolicyUpdate(target=0, early_exit={"threshold": own}))
    assert state["early_exit"]["default"]["threshold"] == own != calibrated().threshold
