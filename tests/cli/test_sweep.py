"""`badge-peft sweep`: the trade-off of every rule, from stored logits or from data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from badge_peft import ExitLogits, sweep
from tests.cli.conftest import Cli, one_line


def test_an_adapters_own_logits(trained: Path, cli: Cli, tmp_path: Path) -> None:
    names = ("--policies", "max_prob, patience", "--points", 6)
    told = cli("sweep", trained, *names, "--json", tmp_path / "s.json", "--plot", tmp_path / "new" / "s.png")
    found = json.loads((tmp_path / "s.json").read_text())
    stored = replace(ExitLogits.load(trained / "exit_logits.safetensors"), labels=None).labeled()
    assert found["points"] == sweep(stored, ["max_prob", "patience"], points=6).to_dicts()
    assert {point["name"] for point in found["points"]} == {"fixed_depth", "max_prob", "patience"}
    assert (tmp_path / "new" / "s.png").read_bytes().startswith(b"\x89PNG")
    assert "accuracy against full depth" in told.output and "fixed_depth, depth=3" in told.output


def test_data_and_a_file_of_logits_give_the_same(trained: Path, place: Path, cli: Cli, tmp_path: Path) -> None:
    cli("evaluate", trained, place / "rows.csv", "--save-logits", tmp_path / "l.safetensors")
    cli("sweep", trained, place / "rows.csv", "--json", tmp_path / "a.json")
    cli("sweep", tmp_path / "l.safetensors", "--json", tmp_path / "b.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found == json.loads((tmp_path / "b.json").read_text())
    assert {point["name"] for point in found["points"]} > {"fixed_depth", "divergence", "entropy"}


def test_wrong_input(trained: Path, place: Path, cli: Cli, adapter: Path, tmp_path: Path) -> None:
    one_line(cli("sweep", trained, "--policies", "patience,luck", fails=True), "policies='luck'", "divergence")
    one_line(cli("sweep", trained, "--policies", " ,", fails=True), "policies=' ,' names no policy", "divergence")
    one_line(cli("sweep", tmp_path / "nothing", fails=True), "no file or folder")
    one_line(cli("sweep", place / "rows.csv", fails=True), "rows.csv", "no exit logits")
    one_line(cli("sweep", place, fails=True), "holds no adapter")
    one_line(cli("sweep", trained, "--top-k", 5, fails=True), "--top-k 5 is for ranking", "leave it out")
    (adapter / "exit_logits.safetensors").unlink()
    one_line(cli("sweep", adapter, fails=True), "exit_logits.safetensors", "--save-logits")
    ExitLogits(torch.zeros(4, 2, 2)).save(tmp_path / "l.safetensors")
    one_line(cli("sweep", tmp_path / "l.safetensors", place / "rows.csv", fails=True), "no data is needed")


def test_what_cannot_be_written_is_said_before_anything_is_computed(trained: Path, cli: Cli, tmp_path: Path) -> None:
    for arguments, word in (
        (("--plot", tmp_path / "s.xyz", "--json", tmp_path / "s.json"), "'.xyz'"),
        (("--json", tmp_path), "is a folder"),
    ):
        told = cli("sweep", trained, *arguments, fails=True)
        one_line(told, word)
        assert not told.stdout and not list(tmp_path.iterdir())
