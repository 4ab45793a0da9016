"""`build_policy`: every form of a config, and no change goes unseen; and a policy in words."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from badge_peft import EarlyExitConfig
from badge_peft.early_exit.policies import POLICIES, build_policy
from badge_peft.early_exit.policies.base import describe, set_fields

from .rules import NAMES, fields_of

FIELDS = {"policy": "divergence", "threshold": 0.25, "patience": 2}


def test_every_form_of_a_config_builds_the_same_policy():
    config = EarlyExitConfig(**FIELDS)
    for policy in (
        build_policy(config),
        build_policy(None, **FIELDS),
        build_policy(dict(FIELDS)),
        build_policy({}, **FIELDS),
        build_policy(replace(config, threshold=0.5), threshold=0.25),
    ):
        assert type(policy) is POLICIES["divergence"] and policy.config == config


@pytest.mark.parametrize("name", NAMES)
def test_an_override_leaves_the_config_as_it_is(name):
    config = EarlyExitConfig(**fields_of(name, [1, 2, 3], 3, "single_label_classification"))
    before = copy.deepcopy(config)
    assert build_policy(config, threshold=0.5).config == replace(config, threshold=0.5)
    assert build_policy(config).config == config == before


def test_a_change_inside_of_what_was_given_is_seen():
    fields = fields_of("agreement", [1, 2, 3], 3, "single_label_classification")
    config, weights = EarlyExitConfig(**fields), fields["parameters"]["coefficients"][0]
    for build in (lambda: build_policy(fields), lambda: build_policy(**fields)):
        before = build().config.parameters["coefficients"][0][0]
        weights[0] = before + 1
        assert build().config.parameters["coefficients"][0][0] == before + 1
    assert build_policy(config).config.parameters == config.parameters != fields["parameters"]


@pytest.mark.parametrize(
    ("exits", "problem_type"),
    [([0, 1, 2, 3], "single_label_classification"), ([1, 2, 3], "multi_label_classification")],
)
def test_what_was_fitted_elsewhere_is_refused(exits, problem_type):
    policy = build_policy(fields_of("agreement", [1, 2, 3], 3, "single_label_classification"))
    policy.check([1, 2, 3], 3, "single_label_classification")
    with pytest.raises(ValueError, match=r"for single_label_classification with exits at blocks \[1, 2, 3\]"):
        policy.check(exits, 3, problem_type)


@pytest.mark.parametrize(("problem_type", "labels"), [("single_label_classification", 3), ("regression", 1)])
def test_no_row_goes_beyond_what_was_fitted(problem_type, labels):
    """The reference answers at the latest: nothing was fitted for what is deeper."""
    fields = fields_of("agreement", [1, 2, 3], labels, problem_type)
    fields["parameters"]["reference"] = 2
    logits = torch.randn(50, 3, labels, generator=torch.Generator().manual_seed(0))
    for cap, last in ((None, 2), (3, 2), (2, 2), (1, 1)):
        policy = build_policy(**fields, max_exit=cap, threshold=1.0 if labels > 1 else 0.0)
        assert int(policy.replay(logits, problem_type=problem_type).max()) == policy.max_exit == last
    with pytest.raises(ValueError, match="max_exit=4 is not allowed: the model has 3 blocks"):
        build_policy(**fields, max_exit=4).check([1, 2, 3], labels, problem_type)


# ------------------------------------------------------------------------------------------------------------ in words


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "divergence (ce)"),
        (
            {"divergence": "kl", "window": "consecutive", "threshold": 0.25, "patience": 1},
            "divergence (kl), window=consecutive, threshold=0.25, patience=1",
        ),
        (
            {"policy": "max_prob", "threshold": 0.123456, "decide_every": 2},
            "max_prob, threshold=0.1235, decide_every=2",
        ),
        ({"policy": "entropy", "threshold": 0.3, "min_exit": 2}, "entropy, threshold=0.3, min_exit=2"),
        ({"policy": "max_prob", "temperature": [1.5, 0.87654]}, "max_prob, temperature=[1.5, 0.8765]"),
        ({"policy": "patience", "patience": 3}, "patience, patience=3"),
        ({"policy": "fixed_depth", "depth": 4}, "fixed_depth, depth=4"),
        ({"policy": "entropy", "threshold": [0.5, 1]}, "entropy, threshold=[0.5, 1]"),
        ({"policy": "never"}, "never"),
    ],
)
def test_a_rule_in_one_line(fields: dict[str, Any], said: str) -> None:
    assert describe(EarlyExitConfig(**fields)) == said


def test_the_fields_of_a_table() -> None:
    fields = {"policy": "entropy", "threshold": 0.3, "decide_every": 2}
    assert set_fields(EarlyExitConfig(**fields, divergence="kl")) == fields
    assert set_fields(EarlyExitConfig(patience=1)) == {
        "policy": "divergence", "divergence": "ce", "window": "all", "patience": 1
    }  # fmt: skip
