"""`build_policy`: the same config finds the same policy, and no change goes unseen."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from badge_peft import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy

from .rules import NAMES, fields_of

FIELDS = {"policy": "divergence", "threshold": 0.25, "patience": 2}


def test_an_equal_config_finds_the_same_policy():
    first = build_policy(EarlyExitConfig(**FIELDS))
    assert build_policy(EarlyExitConfig(**FIELDS)) is first
    by_override = build_policy(**FIELDS)
    assert build_policy(None, **FIELDS) is build_policy(dict(FIELDS)) is build_policy({}, **FIELDS) is by_override
    assert first.config == by_override.config == EarlyExitConfig(**FIELDS)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_built_once(name):
    config = EarlyExitConfig(**fields_of(name, [1, 2, 3], 3, "single_label_classification"))
    assert build_policy(config) is build_policy(copy.deepcopy(config))
    assert build_policy(config, threshold=0.5) is build_policy(config, threshold=0.5) is not build_policy(config)


def test_another_config_is_seen():
    config = EarlyExitConfig(policy="fixed_depth", depth=2)
    assert build_policy(config).config.depth == 2
    assert build_policy(replace(config, depth=3)).config.depth == 3
    assert build_policy(config, depth=1).config.depth == 1
    assert build_policy(config, min_exit=1).config.min_exit == 1
    assert build_policy(config).config == config


def test_a_change_inside_of_what_was_given_is_seen():
    fields = fields_of("agreement", [1, 2, 3], 3, "single_label_classification")
    config, weights = EarlyExitConfig(**fields), fields["parameters"]["coefficients"][0]
    for build in (lambda: build_policy(fields), lambda: build_policy(**fields)):
        before = build().config.parameters["coefficients"][0][0]
        weights[0] = before + 1
        assert build().config.parameters["coefficients"][0][0] == before + 1
    assert build_policy(config).config.parameters == config.parameters != fields["parameters"]


def test_equal_numbers_of_other_types_are_not_the_same():
    build_policy(policy="patience", patience=1)
    with pytest.raises(ValueError, match="patience=True"):
        build_policy(policy="patience", patience=True)
    build_policy({"normalize": True})
    with pytest.raises(ValueError, match="normalize=1"):
        build_policy({"normalize": 1})


def test_only_a_few_are_kept():
    first = build_policy(threshold=0.5)
    for i in range(20):
        build_policy(threshold=1.0 + i)
    assert build_policy(threshold=0.5) is not first


@pytest.mark.parametrize("config", ["divergence", 0.2, ["never"]])
def test_a_config_of_another_type(config):
    with pytest.raises(ValueError, match="must be an EarlyExitConfig, a dict or None"):
        build_policy(config)
