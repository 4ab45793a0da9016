"""`ExitLogits`: what goes in comes out again, and what does not belong together is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from badge_peft import ExitLogits
from tests.evaluation.rows import make_logits


def full(rows: int = 5) -> ExitLogits:
    torch.manual_seed(0)
    return ExitLogits(
        torch.randn(rows, 3, 4),
        torch.arange(rows) % 4,
        exit_layers=[0, 2, 6],
        problem_type="single_label_classification",
        num_blocks=6,
        uncertainty=torch.rand(rows, 3),
    )


def assert_equal(a: ExitLogits, b: ExitLogits) -> None:
    assert torch.equal(a.logits, b.logits)
    for left, right in ((a.labels, b.labels), (a.uncertainty, b.uncertainty)):
        assert (left is None and right is None) or torch.equal(left, right)  # type: ignore[arg-type]
    assert (a.exits, a.problem_type, a.depth) == (b.exits, b.problem_type, b.depth)


def test_defaults() -> None:
    data = ExitLogits(torch.zeros(2, 3, 4))
    assert (data.exits, data.depth, data.problem_type) == ([1, 2, 3], 3, "single_label_classification")
    assert (data.labels, data.uncertainty, len(data)) == (None, None, 2)
    assert ExitLogits(torch.zeros(2, 3, 1)).problem_type == "regression"


@pytest.mark.parametrize("data", [full(), ExitLogits(torch.zeros(1, 2, 1)), make_logits(7)])
def test_save_and_load(data: ExitLogits, tmp_path: Path) -> None:
    data.save(tmp_path / "exits.safetensors")
    assert_equal(ExitLogits.load(tmp_path / "exits.safetensors"), data)


def test_a_slice_can_be_saved(tmp_path: Path) -> None:
    data = ExitLogits(torch.randn(4, 6, 2)[:, ::2])
    data.save(tmp_path / "exits.safetensors")
    assert_equal(ExitLogits.load(tmp_path / "exits.safetensors"), data)


def test_multi_label_targets_are_kept(tmp_path: Path) -> None:
    data = ExitLogits(torch.randn(3, 2, 4), torch.ones(3, 4), problem_type="multi_label_classification")
    data.save(tmp_path / "exits.safetensors")
    assert_equal(ExitLogits.load(tmp_path / "exits.safetensors"), data)


def test_half_precision_becomes_float32() -> None:
    assert ExitLogits(torch.zeros(1, 2, 2, dtype=torch.bfloat16)).logits.dtype == torch.float32


@pytest.mark.parametrize("rows", [torch.tensor([3, 0]), torch.tensor([True, False, False, True, False])])
def test_select_by_numbers_and_by_mask(rows: torch.Tensor) -> None:
    data = full()
    chosen = data.select(rows)
    assert torch.equal(chosen.logits, data.logits[rows])
    assert torch.equal(chosen.labels, data.labels[rows])  # type: ignore[arg-type,index]
    assert torch.equal(chosen.uncertainty, data.uncertainty[rows])  # type: ignore[arg-type,index]
    assert (chosen.exits, chosen.depth) == (data.exits, data.depth)


def test_answers_are_the_logits_of_the_block_where_each_row_stopped() -> None:
    data = full(3)
    answers = data.answers(torch.tensor([6, 0, 2]))
    assert torch.equal(answers, torch.stack([data.logits[0, 2], data.logits[1, 0], data.logits[2, 1]]))


def test_the_history_is_made_once() -> None:
    data = full()
    history = data.history()
    assert data.history() is history
    assert (history.exits, history.rows, history.num_labels) == ([0, 2, 6], 5, 4)
    assert torch.equal(torch.from_numpy(history.logits[1]), data.logits[:, 1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logits": torch.zeros(2, 3)}, r"\[N, E, K\].*\[2, 3\]"),
        ({"logits": torch.zeros(0, 3, 2)}, "at least one row"),
        ({"exit_layers": [1, 2]}, r"exit_layers=\[1, 2\] must be 3"),
        ({"exit_layers": [1, 3, 2]}, "increasing"),
        ({"exit_layers": [1, 1, 2]}, "increasing"),
        ({"labels": torch.zeros(4)}, "4 labels for 2 rows"),
        ({"uncertainty": torch.zeros(2, 2)}, r"uncertainty must be \[2, 3\]"),
    ],
)
def test_what_does_not_belong_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExitLogits(**{"logits": torch.zeros(2, 3, 4), **fields})


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"weights": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no exit logits"):
        ExitLogits.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        ExitLogits.load(tmp_path / "nowhere.safetensors")
