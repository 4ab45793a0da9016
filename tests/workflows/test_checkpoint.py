"""Full depth is compared with the checkpoint that it was made from."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from peft import get_peft_model
from transformers import BertConfig, BertForTokenClassification

from badge_peft import BadgeConfig
from badge_peft.workflows.evaluate import compare_with_checkpoint


def test_a_tagger_is_compared_with_its_checkpoint(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertForTokenClassification(BertConfig(vocab_size=20, num_labels=3, **sizes)).save_pretrained(tmp_path)
    base = BertForTokenClassification.from_pretrained(tmp_path)
    model = get_peft_model(base, BadgeConfig(task_type="TOKEN_CLS", train_head=False)).eval()
    rows = Dataset.from_list([{"input_ids": [2] * n, "labels": [1] * n} for n in (3, 5)])  # of unequal length
    assert compare_with_checkpoint(model, str(tmp_path), rows)["equal"]
