"""What a call costs, by where a row stops and which exits are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from badge_peft import measure_costs
from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.evaluation.costs import CostModel, fit_parts
from badge_peft.evaluation.exit_logits import ExitLogits
from tests.models import make_badge, make_batch

COSTS = CostModel(full_ms=13.0, call_ms=1.0, block_ms=2.0, exit_ms=0.5)
EXITS = [0, 2, 4, 6]


@pytest.mark.parametrize(("config", "expected"), [
    ({"policy": "max_prob", "threshold": 0.9}, [1.5, 6, 10.5, 14.5]),  # M is the model's own head
    ({"policy": "max_prob", "threshold": 0.9, "exit_layers": [2]}, [1, 5.5, 9.5, 13.5]),
    ({"policy": "fixed_depth", "depth": 2}, [1, 5.5, 9.5, 13.5]),
    ({"policy": "divergence", "threshold": 0.9, "exit_layers": [4]}, [1.5, 6, 10.5, 14.5]),  # earlier exits count
    ({"policy": "never"}, [13, 13, 13, 13]),
])  # fmt: skip
def test_milliseconds_of_each_exit(config, expected):
    assert COSTS.milliseconds(EarlyExitConfig(**config), EXITS, 6).tolist() == expected


def test_linked_exits_are_computed_for_those_behind_them():
    linked = CostModel(13.0, 1.0, 2.0, 0.5, linked=True)
    config = EarlyExitConfig(policy="max_prob", threshold=0.9, exit_layers=[4])
    assert linked.milliseconds(config, EXITS, 6).tolist() == [1.5, 6, 10.5, 14.5]


def stored(rows):
    return ExitLogits(torch.zeros(rows, len(EXITS), 2), exit_layers=EXITS, num_blocks=6)


def test_time_saved_is_that_of_the_mean_row():
    config, stops = EarlyExitConfig(policy="max_prob", threshold=0.9), np.array([0, 0, 2, 6])
    assert COSTS.time_saved(config, stored(4), stops) == pytest.approx(1 - (1.5 + 1.5 + 6 + 14.5) / 4 / 13)


def test_blocks_alone_are_the_share_of_blocks():
    config, stops = EarlyExitConfig(policy="max_prob", threshold=0.9), np.array([0, 2, 4])
    assert CostModel.of_blocks(6).time_saved(config, stored(3), stops) == pytest.approx(1 - 2 / 6)


@pytest.mark.parametrize("fields", [{}, {"exit_layers": [0, 2]}, {"carry": "logits"}], ids=str)
def test_measured_costs_are_those_of_this_model(fields):
    model, batch = make_badge(**fields), make_batch(rows=3)
    rows = [{name: value[i].tolist() for name, value in batch.items()} for i in range(3)]
    found = measure_costs(model, rows, seconds=0.05)
    assert found.full_ms > 0 and min(found.call_ms, found.block_ms, found.exit_ms) >= 0
    assert found.linked == ("carry" in fields) and found.threads == 1 and "torch" in found.machine
    assert CostModel.from_dict(found.to_dict()) == found


def test_parts_of_calls_are_told_apart():
    known = np.array([[1, 6, 0, 0], *([1, m, k, 1] for m in (1, 3, 6) for k in (1, m))])
    parts = np.array([1.0, 2.0, 0.5, 0.25])
    assert fit_parts(known, known @ parts) == pytest.approx(parts, rel=1e-3)


def test_parts_that_always_come_together_are_right_in_sum():
    known = np.array([[1, 6, 0, 0], *([1, m, m + 1, 1] for m in (0, 3, 6))])  # each exit that there is, is read
    times = known @ np.array([1.0, 2.0, 0.5, 0.25])
    assert known @ fit_parts(known, times) == pytest.approx(times, rel=1e-3)


def test_what_cannot_be_measured_is_refused():
    model = make_badge()
    with pytest.raises(ValueError, match="there are no rows"):
        measure_costs(model, [])
    with pytest.raises(ValueError, match="seconds=0 "):
        measure_costs(model, [{"input_ids": [1, 2]}], seconds=0)
