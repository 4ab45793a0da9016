"""The demo from end to end, on a tiny random model and made-up texts, through the command line."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from badge_peft import evaluate_policy, load_pretrained
from badge_peft.workflows.evaluate import stored_logits
from tests.cli.conftest import invoke
from tests.models import make_batch
from tests.texts import save_base, sentences, write_csv

EARLY_EXIT = {
    "policy",
    "threshold",
    "patience",
    "accuracy",
    "mean_exit",
    "layer_speedup",
    "wall_clock_speedup",
    "p50_ms",
    "p95_ms",
    "full_depth_p50_ms",
}
KEYS = {
    "model",
    "dataset",
    "num_train",
    "num_test",
    "trainable_parameters",
    "adapter_bytes",
    "per_exit_accuracy",
    "s_avg",
    "s_best",
    "full_depth_accuracy",
    "early_exit",
    "seconds",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The output folder of one run, its report, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    base = save_base(folder / "base", num_labels=3)  # a head of another size is no hindrance
    data = write_csv(folder / "films.csv", sentences(400), ("review", "sentiment"))
    command = ["demo", "--model", base, "--dataset", data, "--output-dir", folder / "out", "--max-eval", 60]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", ResourceWarning)  # nobody sees them outside of tests
        warnings.showwarning = print_warning
        done = invoke(*command, "--epochs", 15, "--learning-rate", 0.03)
    assert done.exit_code == 0, done.output
    report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    return folder / "out", report, done.output


def print_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """As Python does it outside of tests."""
    print(warnings.formatwarning(message, category, *where[:2]), file=sys.stderr)


def test_the_report_has_every_key(finished: tuple[Path, dict[str, Any], str]) -> None:
    report = finished[1]
    assert KEYS <= set(report)
    assert EARLY_EXIT <= set(report["early_exit"])


def test_the_numbers_fit_together(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, report, _ = finished
    early = report["early_exit"]
    assert (report["num_train"], report["num_validation"], report["num_test"]) == (280, 60, 60)
    assert report["exit_layers"] == [0, 1, 2, 3]
    assert report["per_exit_accuracy"][-1] == report["full_depth_accuracy"]
    assert report["s_avg"] == pytest.approx(sum(report["per_exit_accuracy"]) / 4)
    assert report["s_best"] == max(report["per_exit_accuracy"])
    assert early["layer_speedup"] == pytest.approx(1 - early["mean_exit"] / 3)
    assert early["wall_clock_speedup"] == pytest.approx(1 - 1 / early["speedup_ratio"])
    assert report["adapter_bytes"] == (out / "adapter" / "adapter_model.safetensors").stat().st_size
    assert report["labels"] == ["bad", "good"]
    assert report["seconds"] > 0


def test_it_has_learnt_something(finished: tuple[Path, dict[str, Any], str]) -> None:
    assert finished[1]["s_best"] > 0.75  # a single word gives the label away


def test_the_rule_keeps_to_the_limit_on_the_validation_split(finished: tuple[Path, dict[str, Any], str]) -> None:
    report = finished[1]
    chosen = report["early_exit"]["validation"]
    assert chosen["rows"] == report["num_validation"]
    assert chosen["score"] >= chosen["full_depth_score"] - report["max_score_drop"] - 1e-9


def test_the_saved_adapter_carries_the_rule_and_answers(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, report, _ = finished
    model = load_pretrained(str(out / "adapter"))
    rule, early = model.get_early_exit_config(), report["early_exit"]
    assert (rule.policy, rule.threshold, rule.patience) == (early["policy"], early["threshold"], early["patience"])
    assert rule.calibration["rows"] == report["num_validation"]
    out_ = model.early_exit_forward(**make_batch())
    assert out_.logits.shape == (4, 2)
    assert torch.isfinite(out_.logits).all()


def test_the_rule_was_chosen_on_the_exit_logits_in_the_adapters_folder(
    finished: tuple[Path, dict[str, Any], str],
) -> None:
    out, report, _ = finished
    stored, chosen = stored_logits(out / "adapter"), report["early_exit"]["validation"]
    rule = load_pretrained(str(out / "adapter")).get_early_exit_config()
    point = evaluate_policy(stored, rule)
    assert (len(stored.logits), point.score) == (chosen["rows"], pytest.approx(chosen["score"]))
    assert point.layer_speedup == pytest.approx(chosen["layer_speedup"])


def test_the_picture(finished: tuple[Path, dict[str, Any], str]) -> None:
    assert (finished[0] / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_printed(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, report, printed = finished
    assert "accuracy, all rows" in printed and "full depth" in printed
    for number, accuracy in zip(report["exit_layers"], report["per_exit_accuracy"], strict=True):
        line = next(line for line in printed.splitlines() if line.split()[:1] == [str(number)])
        assert f"{accuracy:.1%}" in line
    assert "training: 100%" in printed  # the progress bar
    assert "Warning" not in printed and "Traceback" not in printed
