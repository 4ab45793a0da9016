"""The demo's settings and tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from badge_peft import EarlyExitConfig, ExitLogits, exit_scores
from badge_peft.demo import DemoSettings
from badge_peft.demo.report import early_exit_entry, exit_table, peak_memory_mb, summary_table, text_table
from badge_peft.evaluation.latency import LatencyReport


def measured() -> tuple[ExitLogits, LatencyReport]:
    said = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]])  # [N, E]
    test = ExitLogits(torch.nn.functional.one_hot(said, 2).float(), torch.tensor([0, 0, 1, 1]), [1, 2])
    latency = LatencyReport(
        [1.0, 1.0, 1.0, 2.0], [2.0] * 4, [1, 1, 1, 2], [0, 1, 1, 1], 2, "full_depth", {}, 1, "cpu", "2"
    )
    return test, latency


def test_one_line_per_exit() -> None:
    test, latency = measured()
    lines = exit_table(exit_scores(test), test, latency).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["1", "50.0%", "75.0%", "66.7%"],
        ["2", "100.0%", "25.0%", "100.0%"],
    ]


def test_an_exit_that_answered_nothing() -> None:
    test, latency = measured()
    latency.exit_layer = [1] * 4
    assert exit_table(exit_scores(test), test, latency).splitlines()[-1].split() == ["2", "100.0%", "0.0%", "-"]


def test_entry_and_summary() -> None:
    _, latency = measured()
    config = EarlyExitConfig(threshold=0.3, patience=1, calibration={"rows": 9, "score": 0.9})
    entry = early_exit_entry(config, latency, 0.75)
    assert (entry["policy"], entry["threshold"], entry["patience"], entry["accuracy"]) == ("divergence", 0.3, 1, 0.75)
    assert (entry["mean_exit"], entry["layer_speedup"], entry["wall_clock_speedup"]) == (1.25, 0.375, 0.375)
    assert (entry["p50_ms"], entry["full_depth_p50_ms"]) == (1.0, 2.0)
    assert entry["validation"] == {"rows": 9, "score": 0.9, "full_depth_score": None, "layer_speedup": None}
    table = summary_table({"full_depth_accuracy": 1.0, "num_blocks": 2, "early_exit": entry})
    assert "100.0%" in table and "75.0%" in table and "37.5%" in table


def test_columns_line_up() -> None:
    lines = text_table(["a", "bb"], [["long name", "1"], ["x", "1000"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "long name     1"


def test_memory_is_plausible() -> None:
    peak = peak_memory_mb()
    assert peak is None or 50 < peak < 100_000


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
