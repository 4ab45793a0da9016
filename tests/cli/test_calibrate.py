"""`badge-peft calibrate`: another policy for an adapter, and nothing else changed."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from badge_peft import EarlyExitConfig, ExitLogits, load_pretrained
from badge_peft.workflows.adapter_dir import write_early_exit
from tests.cli.conftest import Cli, one_line
from tests.models import shake


def test_only_the_exit_rule_changes(adapter: Path, cli: Cli) -> None:
    file = adapter / "adapter_config.json"
    file.chmod(0o640)
    before, others = json.loads(file.read_text()), _others(adapter)
    told = cli("calibrate", adapter, "--policy", "entropy", "--target-blocks-saved", 0.5)
    after = json.loads(file.read_text())
    assert after.pop("early_exit")["policy"] == "entropy" and before.pop("early_exit")["policy"] == "max_prob"
    assert after == before and list(after) == list(before)
    assert _others(adapter) == others and stat.S_IMODE(file.stat().st_mode) == 0o640
    config = load_pretrained(str(adapter)).base_model.get_early_exit_config()
    assert config.policy == "entropy" and config.calibration["blocks_saved"] >= 0.5
    card = (adapter / "README.md").read_text()
    assert f"{config.calibration['blocks_saved']:.1%} of the blocks are saved" in card and "`entropy`" in card
    assert "of the blocks saved" in told.output and str(file) in told.output


def test_writing_the_same_rule_again_gives_the_same_file(adapter: Path, cli: Cli) -> None:
    cli("calibrate", adapter, "--policy", "divergence", "--target-blocks-saved", 0.3)
    first = (adapter / "adapter_config.json").read_bytes()
    cli("calibrate", adapter, "--policy", "divergence", "--target-blocks-saved", 0.3)
    assert (adapter / "adapter_config.json").read_bytes() == first


def test_a_fixed_depth_is_found(adapter: Path, cli: Cli) -> None:
    cli("calibrate", adapter, "--policy", "fixed_depth", "--target-speedup", 0.5)
    config = load_pretrained(str(adapter)).base_model.get_early_exit_config()
    assert (config.policy, config.depth) == ("fixed_depth", 1)  # of 3
    assert config.calibration["blocks_saved"] >= 0.5 and config.calibration["policy_asked_for"] == "fixed_depth"


def test_on_data_with_labels(adapter: Path, place: Path, cli: Cli) -> None:
    cli("calibrate", adapter, place / "rows.csv", "--max-score-drop", 0.05, "--metric", "macro_f1")
    record = load_pretrained(str(adapter)).base_model.get_early_exit_config().calibration
    assert record["labels"] == "given" and record["rows"] == 120 and record["metric"] == "macro_f1"
    assert record["score"] >= record["full_depth_score"] - 0.05


def test_a_bound_for_new_data(adapter: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("badge_peft.evaluation.calibration.WORTH", -9.0)  # exits of so small a model save no time
    torch.manual_seed(0)
    last = torch.randn(3000, 2) * 4
    noisy = torch.stack([last + torch.randn(3000, 2), last + 0.05 * torch.randn(3000, 2), last], dim=1)
    ExitLogits(noisy).save(adapter / "exit_logits.safetensors")
    cli("calibrate", adapter, "--policy", "max_prob", "--max-score-drop", 0.05, "--confidence", 0.9)
    record = load_pretrained(str(adapter)).base_model.get_early_exit_config().calibration
    assert record["confidence"] == 0.9 and record["test_rows"] == 1500 and record["blocks_saved"] > 0


def test_a_write_that_fails_leaves_the_old_file(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, names = (adapter / "adapter_config.json").read_bytes(), sorted(os.listdir(adapter))

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_early_exit(adapter, EarlyExitConfig())
    assert (adapter / "adapter_config.json").read_bytes() == before and sorted(os.listdir(adapter)) == names


def test_wrong_input_changes_nothing(adapter: Path, place: Path, cli: Cli, tmp_path: Path) -> None:
    before = (adapter / "adapter_config.json").read_bytes()
    one_line(cli("calibrate", adapter, "--target-blocks-saved", 0.99, fails=True), "0.99", "cannot be reached")
    one_line(
        cli("calibrate", adapter, "--target-blocks-saved", 0.1, "--max-score-drop", 0.1, fails=True), "exactly one"
    )
    one_line(cli("calibrate", adapter, "--policy", "luck", fails=True), "policy='luck'", "auto")
    one_line(cli("calibrate", adapter, "--confidence", 0.95, fails=True), "too small")
    one_line(cli("calibrate", place, fails=True), "holds no adapter")
    one_line(cli("calibrate", "someone/exits", fails=True), "local folder")
    ExitLogits(torch.randn(9, 5, 2)).save(adapter / "exit_logits.safetensors")
    one_line(cli("calibrate", adapter, fails=True), "5 blocks", "give the data")
    (adapter / "exit_logits.safetensors").write_bytes(b"not a tensor")
    one_line(cli("calibrate", adapter, fails=True), "no exit logits")
    (adapter / "exit_logits.safetensors").unlink()
    one_line(cli("calibrate", adapter, fails=True), "exit_logits.safetensors", "give the data")
    assert (adapter / "adapter_config.json").read_bytes() == before


def test_logits_of_other_weights_or_exits_are_refused(adapter: Path, place: Path, cli: Cli) -> None:
    model, stored = load_pretrained(str(adapter), is_trainable=True), adapter / "exit_logits.safetensors"
    shake(model, seed=9)
    model.save_pretrained(adapter)
    before = (adapter / "adapter_config.json").read_bytes()
    remedy = f"badge-peft evaluate {adapter} DATA --save-logits {stored}"
    for command in ("calibrate", "sweep"):
        one_line(cli(command, adapter, fails=True), "of other weights", remedy)
    assert (adapter / "adapter_config.json").read_bytes() == before
    cli("evaluate", adapter, place / "texts.txt", "--save-logits", stored)
    cli("calibrate", adapter, "--target-blocks-saved", 0.3)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["early_exit"]["calibration"]["weights_hash"] == config["weights_hash"]
    ExitLogits(torch.randn(9, 2, 2), exit_layers=[1, 3]).save(
        stored
    )  # as in files of earlier versions, without a hash
    one_line(cli("calibrate", adapter, fails=True), "exits [1, 3]", "has [1, 2, 3]", remedy)


def _others(folder: Path) -> dict[str, bytes]:
    changing = ("adapter_config.json", "README.md")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in changing}


def test_a_card_that_cannot_be_kept_is_refused_before_anything_is_written(adapter: Path, cli: Cli) -> None:
    (adapter / "README.md").write_text("---\ntags: [\n---\nby hand")
    before = (adapter / "adapter_config.json").read_bytes()
    one_line(cli("calibrate", adapter, "--policy", "entropy", "--target-blocks-saved", 0.3, fails=True), "README.md")
    assert (adapter / "adapter_config.json").read_bytes() == before


def test_what_is_read_of_data_is_not_for_stored_logits(adapter: Path, cli: Cli) -> None:
    one_line(cli("calibrate", adapter, "--unlabeled", fails=True), "unlabeled=True", "name it")
    one_line(cli("sweep", adapter, "--label-column", "intent", fails=True), "label_column='intent'")
