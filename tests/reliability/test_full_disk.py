"""A disk without space: what was there stays, and the error says so."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from badge_peft import EarlyExitConfig
from badge_peft.model_card import write_model_card
from badge_peft.utils.files import install
from badge_peft.workflows.adapter_dir import write_early_exit
from tests.cli.conftest import FAST, ROWS, invoke, one_line, save_classifier
from tests.models import shake, trained
from tests.texts import write_csv


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path, left: int) -> None:
    """Leaves `left` bytes of the disk free, to a page."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(max(0, free - left)))


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file, temporary ones included."""
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("left", [0, 4096])
def test_a_save_keeps_weights_and_config(left, disk):
    model = trained()
    model.save_pretrained(disk / "a")
    before = {name: (disk / "a" / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")}
    shake(model, seed=9)
    fill(disk, left)
    with pytest.raises(Exception, match="No space left"):
        model.save_pretrained(disk / "a")
    assert {name: (disk / "a" / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("work", ["calibrate", "card"])
def test_files_of_an_adapter_stay(work, disk, tmp_path):
    trained().save_pretrained(disk / "a")
    fill(disk, 0)
    before = contents(disk / "a")
    with pytest.raises(OSError, match="No space left"):
        if work == "calibrate":
            write_early_exit(disk / "a", EarlyExitConfig(threshold=0.5))
        else:
            write_model_card(disk / "a")
    assert contents(disk / "a") == before


def test_a_training_says_that_the_disk_is_full(disk, tmp_path):
    save_classifier(tmp_path / "model")
    write_csv(tmp_path / "rows.csv", ROWS)
    command = ("train", tmp_path / "model", tmp_path / "rows.csv", "--output-dir", disk / "a", "--keep-head", *FAST)
    assert invoke(*command).exit_code == 0
    fill(disk, 16384)
    before = contents(disk / "a")
    result = invoke(*command, "--overwrite", "--seed", 5)
    assert result.exit_code == 1
    one_line(result, "No space left on device")
    assert contents(disk / "a") == before


def test_files_that_are_put_in_place_together(disk, tmp_path):
    """As an export over an older one does it."""
    for name, size in (("old", 100_000), ("new", 300_000)):
        (tmp_path / name).mkdir()
        for file in ("model.onnx", "early_exit.json"):
            (tmp_path / name / file).write_bytes(name.encode() * (size // 3))
    install(tmp_path / "old", disk / "x")
    before = contents(disk / "x")
    for left in (0, 8192, 350_000):
        fill(disk, left)
        with pytest.raises(OSError, match="No space left"):
            install(tmp_path / "new", disk / "x")
        assert contents(disk / "x") == before
        (disk / "filler").unlink()
    install(tmp_path / "new", disk / "x")
