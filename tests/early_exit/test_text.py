"""A rule in words."""

from __future__ import annotations

from typing import Any

import pytest

from badge_peft import EarlyExitConfig
from badge_peft.early_exit.policies.base import describe, set_fields


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
