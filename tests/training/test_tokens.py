"""Token classification with both trainers: labels of -100 do not count, padding least of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments

from badge_peft import MultiExitTrainer, MultiExitTrainingArguments, cache_states
from tests.early_exit.test_tokens import make, make_base, rows_of
from tests.models import make_batch
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


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"train_head": False},
        {"final_exit": "exit", "exit_layers": [0, 2]},
        {"exit_type": "mha", "placement": "ffn"},
    ],
    ids=str,
)
def test_cached_states(fields: dict[str, Any]) -> None:
    model, batch = make(learn_to_exit=True, **fields), make_batch(6, 9)
    chosen = torch.tensor([4, 0, 3])
    part = {name: value[chosen] for name, value in batch.items()}
    real = part["attention_mask"] != 0
    with torch.no_grad(), cache_states(model, rows_of(), dtype="float32", batch_size=4) as states:
        found = model(**part, cached_states=states, cached_rows=chosen)
        expected = model(**part)
    for name in ("exit_logits", "exit_uncertainty"):
        kept, wanted = (getattr(out, name).transpose(1, 2)[real] for out in (found, expected))
        torch.testing.assert_close(kept, wanted, rtol=1e-4, atol=1e-4)


def test_a_training_on_cached_states_is_one_without(tmp_path: Path) -> None:
    trained = {}
    for cache in ("auto", False):
        base = make_base(id2label=dict(enumerate(["O", "B-x", "I-x", "B-y"])))
        model = make(base=base, exit_dropout=0.0)
        trainer = MultiExitTrainer(
            model,
            arguments(tmp_path, MultiExitTrainingArguments, cache_dtype="float32", exit_metric="entity_f1"),
            train_dataset=rows_of(),
            eval_dataset=rows_of(),
            data_collator=DataCollatorForTokenClassification(make_tokenizer()),
            cache_states=cache,
        )
        trainer.train()
        assert trainer.state_cache["kept"] == (cache == "auto")
        trained[cache] = model.state_dict(), trainer.evaluate()
    for name, value in trained["auto"][0].items():
        torch.testing.assert_close(value, trained[False][0][name], rtol=1e-3, atol=1e-4)
    assert trained["auto"][1]["eval_s_avg"] == pytest.approx(trained[False][1]["eval_s_avg"], abs=0.05)
