"""Token classification with both trainers: labels of -100 do not count, padding least of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments

from badge_peft import MultiExitTrainer, MultiExitTrainingArguments
from tests.early_exit.test_tokens import make, rows_of
from tests.texts import make_tokenizer


def arguments(folder: Path, kind: Any = TrainingArguments, **more: Any) -> Any:
    common = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 5e-2, "report_to": "none"}
    return kind(output_dir=str(folder), use_cpu=True, save_strategy="no", disable_tqdm=True, **{**common, **more})


def loss_of(model: Any) -> float:
    model.eval()
    batch = DataCollatorForTokenClassification(make_tokenizer())(rows_of())
    with torch.no_grad():
        return float(model(**batch).loss)


def test_the_plain_trainer(tmp_path: Path) -> None:
    model = make(exit_dropout=0.0)
    before = loss_of(model)
    trainer = Trainer(
        model,
        arguments(tmp_path, num_train_epochs=8),
        train_dataset=rows_of(),
        eval_dataset=rows_of(),
        data_collator=DataCollatorForTokenClassification(make_tokenizer()),
        compute_metrics=lambda p: {"shape": list(p.predictions.shape)},
    )
    trainer.train()
    assert loss_of(model) < before
    assert trainer.evaluate()["eval_shape"] == [6, 9, 4]


@pytest.mark.parametrize("fields", [{}, {"distillation": 0.5}, {"objective": "alternating"}], ids=str)
def test_the_multi_exit_trainer(fields: dict[str, Any], tmp_path: Path) -> None:
    model = make(learn_to_exit=True)
    trainer = MultiExitTrainer(
        model,
        arguments(tmp_path, MultiExitTrainingArguments, num_train_epochs=1, **fields),
        train_dataset=rows_of(),
        eval_dataset=rows_of(),
        data_collator=DataCollatorForTokenClassification(make_tokenizer()),
    )
    trainer.train()
    scores = trainer.evaluate()
    assert {"eval_s_avg", "eval_s_best", "eval_exit_1", "eval_exit_3"} <= scores.keys()


def test_what_is_padded_counts_for_nothing(tmp_path: Path) -> None:
    """The loss of a batch is the same with more padding behind it."""
    model = make()
    trainer = MultiExitTrainer(model, arguments(tmp_path, MultiExitTrainingArguments, distillation=0.5))
    batch: dict[str, Tensor] = dict(DataCollatorForTokenClassification(make_tokenizer())(rows_of()))
    fill = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    wide = {name: torch.nn.functional.pad(value, (0, 4), value=fill[name]) for name, value in batch.items()}
    with torch.no_grad():
        losses = [float(trainer.compute_loss(model, inputs)) for inputs in (batch, wide)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
