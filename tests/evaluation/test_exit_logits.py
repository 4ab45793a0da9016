"""`ExitLogits`: what goes in comes out again, and what does not belong together is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file

from badge_peft import ExitLogits, collect_exit_logits
from badge_peft.evaluation.collate import pad_features
from badge_peft.utils.problem import problem_of
from tests.evaluation.rows import make_exits, make_rows
from tests.models import PAD, make_badge, make_model, shake


def full(rows: int = 5) -> ExitLogits:
    torch.manual_seed(0)
    return ExitLogits(
        torch.randn(rows, 3, 4),
        torch.arange(rows) % 4,
        exit_layers=[0, 2, 6],
        problem_type="single_label_classification",
        num_blocks=6,
        uncertainty=torch.rand(rows, 3),
        weights_hash="0123456789abcdef",
    )


def assert_equal(a: ExitLogits, b: ExitLogits) -> None:
    assert torch.equal(a.logits, b.logits)
    for left, right in ((a.labels, b.labels), (a.uncertainty, b.uncertainty)):
        assert (left is None and right is None) or torch.equal(left, right)  # type: ignore[arg-type]
    assert (a.exits, a.problem_type, a.depth) == (b.exits, b.problem_type, b.depth)
    assert a.weights_hash == b.weights_hash


def test_defaults() -> None:
    data = ExitLogits(torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    assert data.logits.dtype == torch.float32
    assert (data.exits, data.depth, data.problem_type) == ([1, 2, 3], 3, "single_label_classification")
    assert (data.labels, data.uncertainty, len(data)) == (None, None, 2)
    assert ExitLogits(torch.zeros(2, 3, 1)).problem_type == "regression"


@pytest.mark.parametrize(
    "data",
    [
        full(),
        ExitLogits(torch.zeros(1, 2, 1)),
        ExitLogits(torch.randn(4, 6, 2)[:, ::2]),
        ExitLogits(torch.randn(3, 2, 4), torch.ones(3, 4), problem_type="multi_label_classification"),
        ExitLogits(torch.zeros(2, 3, 4), exit_layers=np.arange(1, 4), num_blocks=np.int64(5)),
    ],
)
def test_save_and_load(data: ExitLogits, tmp_path: Path) -> None:
    data.save(tmp_path / "exits.safetensors")
    assert_equal(ExitLogits.load(tmp_path / "exits.safetensors"), data)


@pytest.mark.parametrize("rows", [torch.tensor([3, 0]), torch.tensor([True, False, False, True, False])])
def test_select_by_numbers_and_by_mask(rows: torch.Tensor) -> None:
    data = full()
    chosen = data.select(rows)
    assert torch.equal(chosen.logits, data.logits[rows])
    assert torch.equal(chosen.labels, data.labels[rows])  # type: ignore[arg-type,index]
    assert torch.equal(chosen.uncertainty, data.uncertainty[rows])  # type: ignore[arg-type,index]
    assert (chosen.exits, chosen.depth) == (data.exits, data.depth)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_a_part_has_derived_what_the_whole_has(problem: str) -> None:
    data = ExitLogits(4 * torch.randn(30, 3, 4), problem_type=problem, groups=[i // 5 for i in range(30)])
    asked = [(kind, j) for kind in ("ce", "js", "label") for j in (1, 2)]
    for kind, j in asked:
        data.history().to_earlier(kind, j)
    rows = torch.randperm(30)[:17]
    part, alone = data.select(rows), replace(data, logits=data.logits[rows], groups=data.groups[rows])
    for kind, j in asked:
        found, expected = (some.history().to_earlier(kind, j) for some in (part, alone))
        assert found.tobytes() == expected.tobytes()
    assert part.history().rows == 17 and part.history().groups.tolist() == alone.history().groups.tolist()
    assert data.history().rows == 30  # which stays as it is


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_answers_and_predictions_are_those_of_the_block_where_each_row_stopped(problem: str) -> None:
    data = ExitLogits(torch.randn(5, 3, 4), exit_layers=[0, 2, 6], problem_type=problem)
    stops = torch.tensor([0, 2, 6, 6, 2])
    answers = torch.stack([data.logits[i, j] for i, j in enumerate([0, 1, 2, 2, 1])])
    assert torch.equal(data.answers(stops), answers)
    assert data.predicted(stops.numpy()).tolist() == problem_of(problem).predictions(answers).tolist()


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
        ({"num_blocks": 2}, "num_blocks=2 is not allowed: it must be a whole number of at least 3"),
        ({"logits": torch.zeros(2, 1, 3), "exit_layers": [0]}, "num_blocks=0 is not allowed: .* at least 1"),
        ({"texts": [0, 0, 1]}, r"texts has shape \[3\] for 2 tokens"),
        ({"logits": torch.zeros(4, 2, 3), "texts": [0, 1, 0, 1]}, "side by side"),  # each run would count as a text
        ({"label_names": ["O"]}, "label_names has 1 names for 4 labels"),
        ({"problem_type": "multilabel"}, "problem_type='multilabel' is not allowed: it must be one of single_label"),
    ],
)
def test_what_does_not_belong_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExitLogits(**{"logits": torch.zeros(2, 3, 4), **fields})


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"weights": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no exit logits"):
        ExitLogits.load(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    with pytest.raises(ValueError, match="text.safetensors holds no exit logits"):
        ExitLogits.load(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError):
        ExitLogits.load(tmp_path / "nowhere.safetensors")


# ---------------------------------------------------------------------------------------------- collect_exit_logits
# the logits of every row, in the order of the data, whatever the batches were


@pytest.mark.parametrize(("batch_size", "exit_layers", "exits"), [(1, None, [1, 2, 3]), (4, [0, 2], [0, 2, 3])])
def test_rows_come_back_in_order_and_as_each_row_alone(batch_size: int, exit_layers: Any, exits: list[int]) -> None:
    model, rows = make_exits(exit_layers=exit_layers), make_rows(9)
    data = collect_exit_logits(model, rows, batch_size=batch_size)
    for row, found in zip(rows, data.logits, strict=True):
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(found, model(**batch).exit_logits[0].detach(), atol=1e-5, rtol=1e-5)
    assert data.labels is not None and data.labels.tolist() == [row["label"] for row in rows]
    assert (data.exits, data.depth, data.problem_type) == (exits, 3, "single_label_classification")


@pytest.mark.parametrize(
    "clothe",
    [
        lambda rows: Dataset.from_list([{**row, "text": "a film", "idx": i} for i, row in enumerate(rows)]),
        lambda rows: [{"labels": row["label"], "input_ids": row["input_ids"]} for row in rows],
        lambda rows: [{name: torch.tensor(value) for name, value in row.items()} for row in rows],
    ],
    ids=["other columns", "no mask", "tensors"],
)
def test_rows_may_come_in_other_forms(clothe: Any) -> None:
    """Dropout is off, and the training mode as before afterwards."""
    model, rows = make_exits(exit_dropout=0.9).train(), make_rows(3)
    found, plain = (collect_exit_logits(model, form) for form in (clothe(rows), rows))
    assert torch.equal(found.logits, plain.logits) and not found.logits.requires_grad
    assert torch.equal(found.labels, plain.labels)  # type: ignore[arg-type]
    assert model.training and collect_exit_logits(model, make_rows(3, labels=False)).labels is None


def test_a_collator_of_ones_own() -> None:
    model, rows = make_exits(), make_rows(5)
    sizes: list[int] = []

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sizes.append(len(batch))
        return pad_features(batch, model.base_model.model)

    collect_exit_logits(model, rows, batch_size=2, data_collator=collate)
    assert sizes == [2, 2, 1]


def test_the_training_mode_is_restored_after_an_error() -> None:
    model = make_exits().train()
    with pytest.raises(IndexError):
        collect_exit_logits(model, [{"input_ids": [10**6]}])
    assert model.training


def test_padding() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8], "labels": 0}]
    batch = pad_features(rows, make_model())
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_refusals() -> None:
    for batch_size in (0, -1, 2.0):
        with pytest.raises(ValueError, match=f"batch_size={batch_size} is not allowed: .* at least 1"):
            collect_exit_logits(make_exits(), make_rows(1), batch_size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="data set is empty"):
        collect_exit_logits(make_exits(), [])
    with pytest.raises(ValueError, match="no input_ids, only text.*tokenize"):
        collect_exit_logits(make_exits(), [{"text": "a film"}])
    with pytest.raises(ValueError, match="no BADGE adapter"):
        collect_exit_logits(make_model(), make_rows(1))
    model = make_exits()
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="differ in length.*pad_token_id"):
        collect_exit_logits(model, [{"input_ids": [5, 6]}, {"input_ids": [5]}])


@pytest.mark.parametrize(
    "fields", [{}, {"backbone": "lora"}, {"backbone": "full"}, {"adapter_name": "other"}], ids=str
)
def test_the_weights_that_gave_them_are_named(fields: dict[str, Any], tmp_path: Path) -> None:
    """By the hash that the saved config has, until the weights change."""
    model = make_badge(**fields)
    found = collect_exit_logits(model, make_rows(3))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / fields.get("adapter_name", "") / "adapter_config.json").read_text())
    assert found.weights_hash == config["weights_hash"] == found.select(torch.tensor([0])).labeled().weights_hash
    shake(model, seed=9)
    assert collect_exit_logits(model, make_rows(3)).weights_hash != found.weights_hash


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "exits.safetensors"
    full().save(file)
    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        full(9).save(file)
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("problem_type", ["single_label_classification", "regression"])
def test_a_column_of_labels_is_a_row_of_them(problem_type: str) -> None:
    labels = torch.tensor([[1], [0], [0]])
    outputs = 1 if problem_type == "regression" else 2
    data = ExitLogits(torch.randn(3, 2, outputs), labels, problem_type=problem_type)
    assert data.labels is not None and data.labels.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("labels", "problem_type", "message"),
    [
        (torch.tensor([0, 1, 3]), None, "label 3 of row 2 is out of range.*0 to 2"),
        (torch.tensor([0, -1, 1]), None, "label -1 of row 1 is out of range"),
        (torch.tensor([0, 1, -100]), None, "row 2 has the label -100.*leave out"),
        (torch.tensor([0.0, 1.0, 2.0]), None, "whole-number labels"),
        (torch.zeros(3, 2), "multi_label_classification", r"shape \[3, 2\].*needs \[3, 3\]"),
        (torch.tensor([[0.0] * 3, [0, 2, 1], [1] * 3]), "multi_label_classification", "row 1 .*from 0 to 1"),
        (torch.tensor([[0.0] * 3, [1.0] * 3, [1, 2, torch.nan]]), "regression", "row 2 has.*nan.*finite numbers"),
    ],
)
def test_labels_that_cannot_be_scored(labels: torch.Tensor, problem_type: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExitLogits(torch.zeros(3, 2, 3), labels, problem_type=problem_type)


def test_numbers_that_are_not_finite_name_their_row() -> None:
    for name, bad in (("logits", torch.nan), ("uncertainty", torch.inf)):
        fields = {"logits": torch.zeros(5, 3, 2), "uncertainty": torch.zeros(5, 3)}
        fields[name][4, 1] = bad
        with pytest.raises(ValueError, match=f"{name} of row 4 at the exit after block 4 are not finite"):
            ExitLogits(**fields, exit_layers=[2, 4, 6])


@pytest.mark.parametrize("missing", [None, -100, [-100]])
def test_rows_without_a_label_are_left_out_and_counted(missing: Any) -> None:
    model = make_exits("bert")
    rows = [{**row, "labels": [0] if isinstance(missing, list) else 0} for row in make_rows(6, labels=False)]
    some = [{**row, "labels": missing} if i in (1, 2) else row for i, row in enumerate(rows)]
    with pytest.warns(UserWarning, match=f"2 of {len(rows)} rows have no label"):
        found = collect_exit_logits(model, some)
    kept = [i for i in range(len(rows)) if i not in (1, 2)]
    whole = collect_exit_logits(model, rows)
    assert torch.equal(found.logits.argmax(-1), whole.logits[kept].argmax(-1))
    assert found.labels is not None and found.labels.tolist() == [0] * len(kept)
    none = collect_exit_logits(model, [{**row, "labels": missing} for row in rows])
    assert none.labels is None and len(none) == len(rows)


def test_labels_are_checked_before_any_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_exits("bert")
    monkeypatch.setattr(model.base_model, "forward", lambda **_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match="label 9 of row 1"):
        collect_exit_logits(
            model, [{**row, "labels": 9 * (i == 1)} for i, row in enumerate(make_rows(3, labels=False))]
        )
