"""Policies that are kept between calls: the same config finds the same policy, and no change goes unseen."""

from __future__ import annotations

import pytest

from badge_peft import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.recent import policy_for

from .rules import fields_of


def test_an_equal_config_finds_the_same_policy():
    fields = {"policy": "divergence", "threshold": 0.25, "patience": 2}
    first = policy_for(EarlyExitConfig(**fields), {})
    assert policy_for(EarlyExitConfig(**fields), {}) is first
    by_override = policy_for(None, fields)
    assert policy_for(None, dict(fields)) is by_override
    for found in (first, by_override):
        assert found.config == build_policy(fields).config


def test_a_changed_config_is_seen():
    config = EarlyExitConfig(policy="fixed_depth", depth=2)
    assert policy_for(config, {}).config.depth == 2
    config.depth = 3
    assert policy_for(config, {}).config.depth == 3
    assert policy_for(config, {"depth": 1}).config.depth == 1


def test_a_change_inside_of_a_field_is_seen():
    config = EarlyExitConfig(**fields_of("agreement", [1, 2, 3], 3, "single_label_classification"))
    before = policy_for(config, {}).config.parameters["coefficients"][0][0]
    config.parameters["coefficients"][0][0] = before + 1
    assert policy_for(config, {}).config.parameters["coefficients"][0][0] == before + 1


def test_equal_numbers_of_other_types_are_not_the_same():
    policy_for(None, {"policy": "patience", "patience": 1})
    with pytest.raises(ValueError, match="patience=True"):
        policy_for(None, {"policy": "patience", "patience": True})
    policy_for({"normalize": True}, {})
    with pytest.raises(ValueError, match="normalize=1"):
        policy_for({"normalize": 1}, {})


def test_only_a_few_are_kept():
    first = policy_for(None, {"threshold": 0.5})
    for i in range(20):
        policy_for(None, {"threshold": 1.0 + i})
    assert policy_for(None, {"threshold": 0.5}) is not first


@pytest.mark.parametrize("config", ["divergence", 0.2, ["never"]])
def test_a_config_of_another_type(config):
    with pytest.raises(ValueError, match="must be an EarlyExitConfig, a dict or None"):
        policy_for(config, {})
