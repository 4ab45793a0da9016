"""EarlyExitConfig: what it refuses, how overrides win, and that JSON keeps it."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from badge_peft import EarlyExitConfig
from badge_peft.early_exit.config import DIVERGENCES, WINDOWS
from badge_peft.early_exit.policies import POLICIES

FULL = {
    "policy": "fixed_depth",
    "divergence": "js",
    "threshold": 0.25,
    "patience": 3,
    "window": "consecutive",
    "min_exit": 0,
    "max_exit": 7,
    "depth": 4,
    "top_k": 5,
    "exit_layers": [2, 4],
    "decide_every": 2,
    "temperature": [1.0, 0.5],
    "parameters": {"weights": [0.5, 1.0]},
    "calibration": {"rows": 100, "score": 0.9},
}
FULL["calibration"] = EarlyExitConfig(**FULL).calibration  # with what says which settings it is of

NOT_NUMBERS = (math.nan, math.inf, -math.inf, "0.2", True)
NOT_WHOLE = (-1, 1.5, 2.0, True, "2", math.nan)

WRONG = [
    *(("policy", v) for v in ("dge", "Divergence", "", None, 1, ["never"])),
    *(("divergence", v) for v in ("jsd", "CE", None)),
    *(("window", v) for v in ("any", 2, None)),
    *(("threshold", v) for v in (*NOT_NUMBERS, 10**400, [], [0.1, None], [0.1, math.nan], [True], ["a"], {})),
    *(("patience", v) for v in (0, *NOT_WHOLE)),
    *(("min_exit", v) for v in NOT_WHOLE),
    *(("max_exit", v) for v in NOT_WHOLE),
    *(("depth", v) for v in NOT_WHOLE),
    *(("top_k", v) for v in (0, *NOT_WHOLE)),
    *(("exit_layers", v) for v in ([], 3, "2", [2, 2], [4, 2], [-1], [1.5], [True])),
    *(("decide_every", v) for v in (0, None, *NOT_WHOLE)),
    *(("temperature", v) for v in (1.0, "1", [], [0.0], [1.0, -1.0], [math.nan], [True], [None])),
    *(("parameters", v) for v in (1, "x", [1.0])),
    *(("calibration", v) for v in (1, "x", [1.0])),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda v: repr(v))
def test_a_wrong_value_is_refused_with_its_field_and_value(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}")):
        EarlyExitConfig(**{field: value})


@pytest.mark.parametrize("field", sorted(FULL))
def test_every_field_has_a_wrong_value_above(field):
    assert field in {name for name, _ in WRONG}
    assert set(FULL) == set(EarlyExitConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("field", "allowed"), [("policy", tuple(POLICIES)), ("divergence", DIVERGENCES), ("window", WINDOWS)]
)
def test_names_that_are_allowed_are_in_the_message(field, allowed):
    with pytest.raises(ValueError, match=", ".join(allowed)):
        EarlyExitConfig(**{field: "x"})
    for value in allowed:
        assert getattr(EarlyExitConfig(**{field: value, "depth": 1}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "stored"),
    [
        ("threshold", np.float32(0.25), 0.25),
        ("threshold", np.int64(1), 1.0),
        ("patience", np.int64(2), 2),
        ("min_exit", np.int32(1), 1),
        ("max_exit", np.uint8(3), 3),
        ("depth", np.int64(4), 4),
        ("top_k", np.int64(3), 3),
        ("decide_every", np.int64(2), 2),
        ("temperature", [np.float32(0.5), np.float64(2.0)], [0.5, 2.0]),
    ],
    ids=repr,
)
def test_numpy_scalars_become_plain_numbers(field, value, stored):
    config = EarlyExitConfig(**{field: value})
    found = getattr(config, field)
    assert found == stored and type(found) is type(stored)
    assert EarlyExitConfig.of(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", np.float32("nan")),
        ("threshold", np.bool_(True)),
        ("patience", np.float32(2.0)),
        ("patience", np.int64(0)),
    ],
    ids=repr,
)
def test_numpy_scalars_are_checked_as_others_are(field, value):
    with pytest.raises(ValueError, match=f"{field}={value.item()!r} is not allowed"):
        EarlyExitConfig(**{field: value})


def test_exits_that_leave_no_block_are_refused():
    with pytest.raises(ValueError, match=r"min_exit=3 is deeper than max_exit=2"):
        EarlyExitConfig(min_exit=3, max_exit=2)
    assert EarlyExitConfig(min_exit=2, max_exit=2).max_exit == 2


def test_fixed_depth_needs_a_depth():
    with pytest.raises(ValueError, match=r"fixed_depth.*needs depth"):
        EarlyExitConfig(policy="fixed_depth")
    assert EarlyExitConfig(policy="fixed_depth", depth=0).depth == 0


def test_a_threshold_for_each_exit():
    given = [0.5, 1]
    config = EarlyExitConfig(threshold=given)
    given[0] = 7
    assert config.threshold == [0.5, 1.0] and all(type(tau) is float for tau in config.threshold)
    assert config == EarlyExitConfig(threshold=np.array([0.5, 1], np.float32)) == EarlyExitConfig(threshold=(0.5, 1.0))
    assert hash(config) == hash(EarlyExitConfig.of(json.loads(json.dumps(config.to_dict()))))
    assert (
        EarlyExitConfig.of(EarlyExitConfig(threshold=[0.5, 1], calibration={"rows": 1}), threshold=0.5).calibration
        is None
    )


def test_whole_thresholds_and_tuples_become_what_json_gives():
    config = EarlyExitConfig(threshold=1, temperature=(1, 2))
    assert type(config.threshold) is float and config.threshold == 1.0
    assert config.temperature == [1.0, 2.0] and all(type(t) is float for t in config.temperature)


class TestOf:
    def test_nothing_gives_the_defaults(self):
        assert EarlyExitConfig.of(None) == EarlyExitConfig() == EarlyExitConfig.of({})

    @pytest.mark.parametrize("kind", [EarlyExitConfig, dict])
    def test_overrides_win_and_change_nothing(self, kind):
        value = kind(**copy.deepcopy(FULL))
        before = copy.deepcopy(value)
        new = EarlyExitConfig.of(value, threshold=0.5, patience=None, policy="fixed_depth")
        assert value == before
        assert (new.threshold, new.patience, new.policy) == (0.5, None, "fixed_depth")
        assert new.calibration is None  # what was measured was another rule
        same = {n: getattr(new, n) for n in FULL if n not in ("threshold", "patience", "policy", "calibration")}
        assert same == {name: FULL[name] for name in same}

    @pytest.mark.parametrize("kind", [EarlyExitConfig, dict])
    def test_another_policy_takes_nothing_over(self, kind):
        value = kind(**copy.deepcopy(FULL))
        assert EarlyExitConfig.of(value, policy="max_prob") == EarlyExitConfig(policy="max_prob")
        assert EarlyExitConfig.of(value, policy="never", min_exit=2) == EarlyExitConfig(policy="never", min_exit=2)
        capped = kind(policy="never", max_exit=2)
        assert EarlyExitConfig.of(capped) == EarlyExitConfig(policy="never", max_exit=2)
        assert EarlyExitConfig.of(capped, policy="never") == EarlyExitConfig(policy="never")
        assert EarlyExitConfig.of({"max_exit": 2}, policy="entropy").max_exit == 2  # which names no policy

    def test_a_copy_shares_nothing_with_the_config(self):
        config = EarlyExitConfig(**copy.deepcopy(FULL))
        new = EarlyExitConfig.of(config)
        assert new == config and new is not config
        new.temperature.append(2.0)
        new.parameters["weights"].clear()
        assert config == EarlyExitConfig(**FULL)

    @pytest.mark.parametrize("given", [({"tau": 0.2}, {}), (None, {"tau": 0.2}), (EarlyExitConfig(), {"tau": 0.2})])
    def test_an_unknown_name_is_refused_with_those_that_exist(self, given):
        value, overrides = given
        with pytest.raises(ValueError, match=r"no field tau.*policy, divergence, threshold, patience"):
            EarlyExitConfig.of(value, **overrides)

    @pytest.mark.parametrize("value", ["divergence", 0.2, ["policy"]])
    def test_another_type_is_refused(self, value):
        with pytest.raises(ValueError, match=type(value).__name__):
            EarlyExitConfig.of(value)


@pytest.mark.parametrize("field", sorted(FULL))
def test_it_is_frozen(field):
    config = EarlyExitConfig(**FULL)
    with pytest.raises(FrozenInstanceError):
        setattr(config, field, FULL[field])
    assert config == EarlyExitConfig(**FULL) and hash(config) == hash(EarlyExitConfig(**FULL))
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == replace(config) == config


@pytest.mark.parametrize(
    "fields", [{}, FULL, {"threshold": 0.1, "policy": "patience"}], ids=["default", "full", "two"]
)
def test_json_gives_the_same_config_back(fields):
    config = EarlyExitConfig(**copy.deepcopy(fields))
    assert EarlyExitConfig.of(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == set(FULL)


def test_a_calibration_ends_with_the_rule_that_it_measured():
    config = EarlyExitConfig(policy="max_prob", threshold=0.5, calibration={"rows": 9, "weights_hash": "a"})
    for same in ({}, {"policy": "max_prob"}, {"threshold": np.float32(0.5)}, {"policy": "max_prob", "patience": None}):
        assert EarlyExitConfig.of(config, **same).calibration == config.calibration
        assert EarlyExitConfig.of(config.to_dict(), **same).calibration == config.calibration
    for other in ({"threshold": 0.75}, {"min_exit": 2}, {"decide_every": 2}):
        assert EarlyExitConfig.of(config, **other).calibration is None
        assert replace(config, **other).calibration is None
        assert EarlyExitConfig.of(config, **other, calibration={"rows": 1}).calibration["rows"] == 1
    edited = {**config.to_dict(), "threshold": 0.75}  # as somebody may in adapter_config.json
    assert EarlyExitConfig.of(edited).calibration is None


def test_a_calibration_ends_with_the_weights_that_it_measured():
    config = EarlyExitConfig(threshold=0.5, calibration={"rows": 9, "weights_hash": "a"})
    assert config.measured_on("a") is config and config.measured_on(None) is config
    assert config.measured_on("b") == EarlyExitConfig(threshold=0.5)
    earlier = EarlyExitConfig(threshold=0.5, calibration={"rows": 9})
    assert earlier.measured_on("b") is earlier
