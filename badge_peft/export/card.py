"""The README.md beside an exported graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from badge_peft.export.onnx import OnnxExportReport

_PAGE = """---
library_name: onnx
tags:
- badge
- early-exit
- onnx
pipeline_tag: text-classification
---

# An encoder that answers early, as ONNX

`model.onnx` answers each input at the first block that is sure enough and does not compute the blocks behind it.
{num_blocks} blocks, answers at blocks {exits}; {weights}. Made by badge_peft {version}
(`export_onnx`).

| input | type | meaning |
|---|---|---|
{inputs}
| `threshold` | float32 scalar, may be left out ({threshold:g}) | {threshold_meaning} |
| `patience` | int64 scalar, may be left out ({patience}) | {patience_meaning} |

Outputs: `logits` [batch, {num_labels}] and `exit_layer` [batch], the number of the block that answered each row.
The rule is `{policy}`. A service changes its speed from call to call with these two inputs.

```python
from badge_peft.export import OnnxEarlyExitModel

model = OnnxEarlyExitModel.from_pretrained("this folder")
{usage}
```

Without badge_peft, with onnxruntime{and_tokenizers} alone:

```python
{plain}
```
{changes}"""

_WITH_TOKENIZER = """import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
session = onnxruntime.InferenceSession("model.onnx")
encoding = tokenizer.encode("a text")
inputs = {{
{feeds}
}}
logits, exit_layer = session.run(["logits", "exit_layer"], inputs)"""

_WITHOUT_TOKENIZER = """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
logits, exit_layer = session.run(["logits", "exit_layer"], {{
{feeds}
}})"""

_FEEDS = {
    "input_ids": "np.array([encoding.ids])",
    "attention_mask": "np.array([encoding.attention_mask])",
    "token_type_ids": "np.array([encoding.type_ids])",
}


def onnx_card(report: OnnxExportReport, facts: dict[str, Any], has_tokenizer: bool) -> str:
    """The card as text.

    Args:
        report: What was written.
        facts: The content of `early_exit.json`.
        has_tokenizer: Whether a tokenizer was saved beside the graph.
    """
    inputs = facts["inputs"]
    if has_tokenizer:
        lines = [f'    "{name}": {_FEEDS[name]},' for name in inputs]
        lines.append('    "threshold": np.array({:g}, dtype=np.float32),'.format(facts["threshold"]))
        plain = _WITH_TOKENIZER
        usage = 'print(model.predict(["a text"], threshold={:g}))'.format(facts["threshold"])
    else:
        lines = [f'    "{name}": {name},  # [batch, sequence] int64' for name in inputs]
        plain = _WITHOUT_TOKENIZER
        usage = f"output = model({', '.join(inputs)})"
    return _PAGE.format(
        num_blocks=facts["num_blocks"],
        exits=", ".join(map(str, facts["exit_layers"])),
        weights="the blocks' weights in int8" if report.int8 else "weights in float32",
        version=facts["badge_peft"],
        inputs="\n".join(f"| `{name}` | int64 [batch, sequence] | as the tokenizer makes it |" for name in inputs),
        threshold=facts["threshold"],
        patience=facts["patience"],
        threshold_meaning="where the rule stops" if facts["uses_threshold"] else "this rule does not read it",
        patience_meaning="how many exits must agree" if facts["uses_patience"] else "this rule does not read it",
        num_labels=facts["num_labels"],
        policy=report.policy,
        usage=usage,
        and_tokenizers=" and tokenizers" if has_tokenizer else "",
        plain=plain.format(feeds="\n".join(lines)),
        changes=_changes(report),
    )


def _changes(report: OnnxExportReport) -> str:
    found = report.changes
    if found is None:
        return ""
    text = (
        f"\nOn {found.rows} rows, against the PyTorch model: {found.same_exit:.1%} stop at the same block; mean "
        f"exit {found.mean_exit:.2f} against {found.mean_exit_before:.2f}"
    )
    if found.score is not None and found.score_before is not None:
        text += f"; score {found.score:.4f} against {found.score_before:.4f}"
    return text + ".\n"
