"""`choose_exits` on a tiny model: forms are tried, and the model is as it was."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding

from badge_peft import BadgeConfig, choose_exits
from tests.models import make_batch, make_model
from tests.texts import make_tokenizer


def rows(model):
    """Each with what the model itself says."""
    batch = make_batch(rows=40)
    with torch.no_grad():
        labels = model(**batch).logits.argmax(-1)
    columns = {name: value.tolist() for name, value in batch.items() if name != "attention_mask"}
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    cut = {name: [row[:n] for row, n in zip(values, lengths, strict=True)] for name, values in columns.items()}
    return Dataset.from_dict({**cut, "labels": labels.tolist()})


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_states_of_any_size_can_be_cached(scale):
    """Of the larger ones float16 would make infinities."""
    model = make_model("bert", num_labels=2).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith("output.LayerNorm.weight"):
                weights.mul_(scale)
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    (form,) = choose_exits(
        model,
        rows(model),
        [BadgeConfig(exit_pooling="mean", task_type="SEQ_CLS")],
        data_collator=DataCollatorWithPadding(make_tokenizer()),
        epochs=1,
        use_cpu=True,
    )
    assert len(form.per_exit) == 3 and form.per_exit[-1] == 1.0  # full depth is the model, which gave the labels
    assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())
