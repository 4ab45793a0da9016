"""`collect_exit_logits`: the logits of every row, in the order of the data, whatever the batches were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from badge_peft import collect_exit_logits
from badge_peft.evaluation.collate import pad_features
from tests.evaluation.rows import make_exits, make_rows
from tests.models import PAD, make_model


def alone(model: Any, row: dict[str, Any]) -> torch.Tensor:
    batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model(**batch).exit_logits[0]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_rows_come_back_in_order_and_as_each_row_alone(batch_size: int) -> None:
    model, rows = make_exits(), make_rows(9)
    data = collect_exit_logits(model, rows, batch_size=batch_size)
    expected = torch.stack([alone(model, row) for row in rows])
    torch.testing.assert_close(data.logits, expected, atol=1e-5, rtol=1e-5)
    assert data.labels is not None and data.labels.tolist() == [row["label"] for row in rows]
    assert (data.exits, data.depth, data.problem_type) == ([1, 2, 3], 3, "single_label_classification")


def test_exit_zero_and_left_out_exits_have_their_block_numbers() -> None:
    data = collect_exit_logits(make_exits(exit_layers=[0, 2]), make_rows(2))
    assert data.exits == [0, 2, 3]
    assert data.logits.shape == (2, 3, 3)


def test_columns_that_the_model_does_not_read_are_left_out() -> None:
    model, rows = make_exits(), make_rows(3)
    plain = collect_exit_logits(model, rows)
    more = [{**row, "text": "a film", "idx": i, "labels": row["label"]} for i, row in enumerate(rows)]
    for row in more:
        row.pop("label")
    data = collect_exit_logits(model, Dataset.from_list(more))
    assert torch.equal(data.logits, plain.logits)
    assert torch.equal(data.labels, plain.labels)  # type: ignore[arg-type]


def test_rows_without_labels_and_without_masks() -> None:
    model, rows = make_exits(), make_rows(3, labels=False)
    data = collect_exit_logits(model, [{"input_ids": row["input_ids"]} for row in rows])
    assert data.labels is None
    assert torch.equal(data.logits, collect_exit_logits(model, rows).logits)


def test_tensors_are_rows_too() -> None:
    model, rows = make_exits(), make_rows(3)
    tensors = [{name: torch.tensor(value) for name, value in row.items()} for row in rows]
    assert torch.equal(collect_exit_logits(model, tensors).logits, collect_exit_logits(model, rows).logits)


def test_a_collator_of_ones_own() -> None:
    model, rows = make_exits(), make_rows(5)
    sizes: list[int] = []

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sizes.append(len(batch))
        return pad_features(batch, model.base_model.model)

    collect_exit_logits(model, rows, batch_size=2, data_collator=collate)
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_restored_and_no_graph_is_kept(training: bool) -> None:
    model = make_exits().train(training)
    data = collect_exit_logits(model, make_rows(2))
    assert model.training is training
    assert not data.logits.requires_grad


def test_the_training_mode_is_restored_after_an_error() -> None:
    model = make_exits().train()
    with pytest.raises(IndexError):
        collect_exit_logits(model, [{"input_ids": [10**6]}])
    assert model.training


def test_dropout_is_off() -> None:
    model, rows = make_exits(exit_dropout=0.9).train(), make_rows(4)
    assert torch.equal(collect_exit_logits(model, rows).logits, collect_exit_logits(model, rows).logits)


def test_padding() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8], "labels": 0}]
    batch = pad_features(rows, make_model())
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="data set is empty"):
        collect_exit_logits(make_exits(), [])
    with pytest.raises(ValueError, match="no input_ids, only text.*tokenise"):
        collect_exit_logits(make_exits(), [{"text": "a film"}])
    with pytest.raises(ValueError, match="no BADGE adapter"):
        collect_exit_logits(make_model(), make_rows(1))
    model = make_exits()
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="differ in length.*pad_token_id"):
        collect_exit_logits(model, [{"input_ids": [5, 6]}, {"input_ids": [5]}])
