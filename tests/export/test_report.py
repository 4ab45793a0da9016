"""The card beside an exported file."""

from __future__ import annotations

import dataclasses
from typing import Any

from badge_peft.export.report import OnnxExportReport, ParityReport, onnx_card

REPORT = OnnxExportReport("a folder", 1000, False, "max_prob", 0.5, 1, [1, 2, 3])
METADATA: dict[str, Any] = {
    "num_blocks": 3,
    "exit_layers": [1, 2, 3],
    "int8": False,
    "badge_peft": "1.2",
    "inputs": ["input_ids", "attention_mask"],
    "threshold": 0.5,
    "patience": 1,
    "uses_threshold": True,
    "uses_patience": False,
    "num_labels": 2,
}


def test_its_code_is_python_and_it_says_what_the_inputs_are() -> None:
    card, bare = (onnx_card(REPORT, METADATA, has_tokenizer) for has_tokenizer in (True, False))
    for block in (part.split("```")[0] for text in (card, bare) for part in text.split("```python\n")[1:]):
        compile(block, "card", "exec")
    assert "| `input_ids` | int64 [batch, sequence] | as the tokenizer makes it |\n| `attention_mask` |" in card
    assert "| `threshold` | float32 scalar, may be left out (0.5) | where the policy stops |" in card
    assert "| `patience` | int64 scalar, may be left out (1) | this rule does not read it |" in card
    assert "answers at blocks 1, 2, 3; weights in float32. Made by badge_peft 1.2\n" in card
    assert card.startswith("---\nlibrary_name: onnx\n") and card.endswith("```\n")
    assert '"attention_mask": np.array([encoding.attention_mask])' in card and "Tokenizer.from_file" in card
    assert "output = model(input_ids, attention_mask)" in bare and "tokenizers" not in bare


def test_it_says_what_int8_changed() -> None:
    changes = ParityReport(8, 0.75, 0.875, 2.25, 2.5)
    card = onnx_card(dataclasses.replace(REPORT, int8=True, changes=changes), {**METADATA, "int8": True}, True)
    assert "the blocks' weights in int8" in card
    told = "On 8 rows, against the PyTorch model: 87.5% stop at the same block; mean exit 2.25 against 2.50"
    assert card.endswith(f"{told}.\n")
    changes = dataclasses.replace(changes, score=0.5, score_before=0.625)
    card = onnx_card(dataclasses.replace(REPORT, changes=changes), METADATA, True)
    assert card.endswith(f"{told}; score 0.5000 against 0.6250.\n")
