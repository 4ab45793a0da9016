"""Wall-clock measurement: what is run, in which order, and what is reported. No test looks at how fast anything is."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from badge_peft.early_exit.full_depth import FullDepthReader
from badge_peft.evaluation import timing
from badge_peft.evaluation.latency import LatencyReport, measure_latency
from badge_peft.tuner.context import current_pass
from tests.evaluation.rows import make_exits, make_rows
from tests.models import make_badge, make_model

EARLY = {"policy": "patience", "patience": 1}


def record_calls(model: Any) -> list[tuple[str, bool]]:
    """Notes for each pass whether it is one with exits, and whether the adapter is on."""
    calls: list[tuple[str, bool]] = []

    def hook(inner: Any, args: Any) -> None:
        run = current_pass()
        kind = "stock"
        if run is not None:
            kind = "all_exits" if isinstance(run.readers[0], FullDepthReader) else "early"
        calls.append((kind, model.base_model.adapters_enabled))

    model.base_model.model.register_forward_pre_hook(hook)
    return calls


def test_answers_and_exits_are_those_of_early_exit_forward() -> None:
    model, rows = make_exits(), make_rows(12)
    report = measure_latency(model, rows, EARLY, warmup=2)
    for i, row in enumerate(rows):
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}
        out = model.early_exit_forward(**batch, **EARLY)
        assert report.exit_layer[i] == out.exit_layer.item()
        assert report.predictions[i] == out.logits.argmax().item()
    assert len(set(report.exit_layer)) > 1  # otherwise this shows little
    assert (report.threads, report.torch_version) == (torch.get_num_threads(), torch.__version__)


def test_the_adapters_own_config_is_the_default() -> None:
    model = make_exits(early_exit={"policy": "fixed_depth", "depth": 2})
    report = measure_latency(model, make_rows(3), warmup=0)
    assert report.exit_layer == [2, 2, 2]
    assert report.early_exit["policy"] == "fixed_depth"
    assert (report.mean_exit, report.blocks_saved) == (2.0, pytest.approx(1 / 3))


@pytest.mark.parametrize(
    ("rows", "options", "kinds"),
    [
        (4, {}, ["early", "stock", "stock", "early"] * 2),
        (2, {"reference": "all_exits"}, ["early", "all_exits", "all_exits", "early"]),
        (3, {"repeats": 3, "warmup": 5}, ["early", "stock"] * (5 + 3 * 3)),
    ],
)
def test_both_take_turns_example_by_example(rows: int, options: dict[str, Any], kinds: list[str]) -> None:
    model = make_exits()
    calls = record_calls(model)
    report = measure_latency(model, make_rows(rows), EARLY, **{"warmup": 0, **options})
    found = [kind for kind, _ in calls]
    assert found == kinds if len(kinds) < 10 else sorted(found) == sorted(kinds)
    assert all(enabled == (kind != "stock") for kind, enabled in calls)
    assert len(report) == len(report.full_depth_times_ms) == rows


def set_clock(monkeypatch: pytest.MonkeyPatch, milliseconds: Callable[[bool], float]) -> None:
    """A clock of our own: what it says of a call that is early, or not."""

    def timed(runner: Any, batch: Any, pause: float, before: Any = ()) -> tuple[float, Any]:
        with runner.around():
            output = runner.run(runner.prepare(batch))
        return milliseconds(hasattr(output, "exit_layer")) / 1e3, runner.read(output)

    monkeypatch.setattr(timing, "_timed", timed)


def test_the_clock_decides_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each early pass takes 1, 2, 3, ... ms and each full one ten times as long."""
    count = {True: 0, False: 0}

    def milliseconds(early: bool) -> float:
        count[early] += 1
        return count[early] * (1.0 if early else 10.0)

    set_clock(monkeypatch, milliseconds)
    report = measure_latency(make_exits(), make_rows(4), EARLY, warmup=0)
    assert report.times_ms == pytest.approx([1, 2, 3, 4])
    assert (report.mean_ms, report.p50_ms, report.p95_ms) == pytest.approx((2.5, 2.5, 3.85))
    assert (report.full_depth_mean_ms, report.full_depth_p50_ms) == pytest.approx((25, 25))
    assert report.time_saved == pytest.approx(0.9)
    assert report.speedup_ratio == pytest.approx(10)


def test_the_median_of_the_repeats_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 9.0, 500.0, 8.0, 7.0, 3.0])  # early, full; full, early; early, full
    set_clock(monkeypatch, lambda early: next(times))
    report = measure_latency(make_exits(), make_rows(1), EARLY, repeats=3, warmup=0)
    assert (report.times_ms, report.full_depth_times_ms) == (pytest.approx([7.0]), pytest.approx([9.0]))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = make_exits().train(training).requires_grad_(training)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes: list[tuple[bool, bool]] = []
    model.base_model.model.register_forward_pre_hook(
        lambda inner, args: modes.append((inner.training, torch.is_inference_mode_enabled()))
    )
    measure_latency(model, make_rows(2), EARLY, warmup=1)
    assert set(modes) == {(False, True)}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert model.training is training and model.base_model.adapters_enabled


def test_the_model_is_left_as_it_was_when_a_pass_fails() -> None:
    model = make_exits().train()
    rows = [{"input_ids": [5, 6], "attention_mask": [1, 1]}, {"input_ids": [10**6], "attention_mask": [1]}]
    with pytest.raises(IndexError):
        measure_latency(model, rows, EARLY, warmup=0)
    assert model.training and model.base_model.adapters_enabled


def test_regression_predictions_are_values() -> None:
    model = make_badge(base=make_model(num_labels=1), problem_type="regression")
    report = measure_latency(model, make_rows(2, labels=False), {"policy": "never"}, warmup=0)
    assert all(isinstance(value, float) for value in report.predictions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference": "half"}, "reference='half'.*full_depth, all_exits"),
        ({"repeats": 0}, "repeats=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"early_exit_config": {"patience": 0}}, "patience=0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_latency(make_exits(), make_rows(1), **arguments)


def test_no_examples_and_no_adapter() -> None:
    with pytest.raises(ValueError, match="no examples"):
        measure_latency(make_exits(), [])
    with pytest.raises(ValueError, match="no BADGE adapter"):
        measure_latency(make_model(), make_rows(1))


def test_speedups_of_a_made_up_report() -> None:
    report = LatencyReport([1.0, 3.0], [4.0, 4.0], [1, 3], [0, 1], 4, "full_depth", {}, 2, "cpu", "2")
    assert report.time_saved == pytest.approx(0.5)
    assert report.speedup_ratio == pytest.approx(2.0)
    assert report.blocks_saved == pytest.approx(0.5)
    assert np.isclose(report.full_depth_p95_ms, 4.0)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["exit_layer"] == [1, 3] and {"mean_ms", "p50_ms", "p95_ms", "times_ms", "full_depth_p50_ms"} <= set(
        data
    )
