"""`benchmarks/stack.py` on a tiny encoder: each task beside an encoder of its own, the clock, and the section."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import stack
from common import Results
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

from badge_peft import BadgeConfig
from tests.models import shake
from tests.texts import save_base, sentences


@pytest.mark.slow
def test_a_stack(tmp_path: Path) -> None:
    encoder = save_base(tmp_path / "model")
    fields: dict[str, Any] = {
        "final_exit": "exit",
        "label_names": ["bad", "good"],
        "early_exit": {"policy": "max_prob"},
    }
    for seed, task in enumerate(("mood", "tone")):
        base = AutoModelForSequenceClassification.from_pretrained(encoder)
        model: Any = get_peft_model(base, BadgeConfig(task_type="SEQ_CLS", r=4, **fields))
        shake(model.eval(), seed=seed)
        model.save_pretrained(str(tmp_path / "adapters" / task))
        (tmp_path / task).mkdir()
        for split, count in (("train", 24), ("test", 8)):
            lines = [json.dumps({"text": text, "label": label}) for text, label in sentences(count, seed)]
            (tmp_path / task / f"{split}.jsonl").write_text("\n".join(lines))
    results = tmp_path / "tasks.json"
    adapters = [f"{task}={tmp_path / 'adapters' / task}" for task in ("mood", "tone")]
    few = ["--epochs", "1", "--time", "3", "--threads", "1", "--json", str(results)]
    assert stack.main([encoder, str(tmp_path), "--adapters", *adapters, *few]) == 0
    data = Results(results)
    own, times = data["stack/mood"], data["stack-time"]
    assert own["frozen"]["rows"] == 8 and own["full"]["train_rows"] == 24 and 0 <= own["full"]["score"] <= 1
    assert [way["name"] for way in times["results"]] == ["2 full models", "2 calls", "one pass"]
    section = stack.stack_section(data)
    assert f"| mood | 8 | accuracy | {100 * own['frozen']['full_depth_score']:.1f} |" in section
    assert "| one pass | " in section and stack.stack_section(Results(tmp_path / "none.json")) == ""
