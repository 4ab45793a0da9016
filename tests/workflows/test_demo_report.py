"""The demo's settings and tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from badge_peft import EarlyExitConfig, ExitLogits
from badge_peft.workflows.demo import _early_exit, exit_table, summary_table
from badge_peft.workflows.evaluate import measure
from badge_peft.workflows.report import text_table
from badge_peft.workflows.settings import DemoSettings

CONFIG = EarlyExitConfig(policy="max_prob", threshold=0.6, calibration={"rows": 9, "score": 0.9})


def measured(config: EarlyExitConfig = CONFIG) -> tuple[ExitLogits, dict[str, Any]]:
    predicted = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]])  # [N, E]
    logits = torch.nn.functional.one_hot(predicted, 2).float()
    logits[3, 0] = 0  # unsure: block 2 answers
    test = ExitLogits(logits, torch.tensor([0, 0, 1, 1]), [1, 2])
    return test, {**measure(test, config), "latency": dict.fromkeys(LATENCY, 2.0)}


LATENCY = ("p50_ms", "p95_ms", "full_depth_p50_ms", "full_depth_p95_ms", "speedup_ratio", "speedup_paper")


def test_one_line_per_exit() -> None:
    test, found = measured()
    lines = exit_table(test, CONFIG, found).splitlines()
    assert lines[0].split("  ")[-1] == "accuracy, these rows"
    assert [line.split() for line in lines[2:]] == [
        ["1", "50.0%", "75.0%", "66.7%"],
        ["2", "100.0%", "25.0%", "100.0%"],
    ]


def test_an_exit_that_answered_nothing() -> None:
    config = EarlyExitConfig(policy="fixed_depth", depth=1)
    test, found = measured(config)
    assert exit_table(test, config, found).splitlines()[-1].split() == ["2", "100.0%", "0.0%", "-"]


def test_entry_and_summary() -> None:
    _, found = measured()
    found["latency"] |= {"p50_ms": 1.0, "speedup_paper": 0.375}
    entry = _early_exit(CONFIG, found)
    assert (entry["policy"], entry["threshold"], entry["accuracy"]) == ("max_prob", 0.6, 0.75)
    assert (entry["mean_exit"], entry["layer_speedup"], entry["wall_clock_speedup"]) == (1.25, 0.375, 0.375)
    assert (entry["p50_ms"], entry["full_depth_p50_ms"]) == (1.0, 2.0)
    assert entry["validation"] == {"rows": 9, "score": 0.9, "full_depth_score": None, "layer_speedup": None}
    table = summary_table({"full_depth_accuracy": 1.0, "num_blocks": 2, "early_exit": entry})
    assert "100.0%" in table and "75.0%" in table and "37.5%" in table


def test_columns_line_up() -> None:
    lines = text_table(["a", "bb"], [["long name", "1"], ["x", "1000"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "long name     1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"max_train": 0}, "max_train=0"),
        ({"max_length": 2}, "max_length=2"),
        ({"seed": -1}, "seed=-1"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"max_score_drop": 1.5}, "max_score_drop=1.5"),
    ],
)
def test_settings_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoSettings(**fields)
