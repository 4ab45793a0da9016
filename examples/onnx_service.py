"""Answers texts with an exported graph, in plain onnxruntime and tokenizers: all that a service has to install.

usage: python examples/onnx_service.py FOLDER "a text" ["another text" ...] [--threshold 0.4] [--patience 1]

FOLDER is what `export_onnx(model, FOLDER, tokenizer=tokenizer)` (or `badge-peft export`) wrote. Threshold and patience
are inputs of the graph, so a service can change its speed from call to call; left out, they are those of the export.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def main() -> None:
    """Prints one line of JSON per text: label, probability and the block that answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--patience", type=int)
    args = parser.parse_args()

    facts = json.loads((args.folder / "early_exit.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    if facts["max_length"]:
        tokenizer.enable_truncation(facts["max_length"])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # two inputs have defaults, of which it would warn
    session = onnxruntime.InferenceSession(str(args.folder / "model.onnx"), options)

    for text in args.texts:
        encoding = tokenizer.encode(text)
        values = {
            "input_ids": encoding.ids,
            "attention_mask": encoding.attention_mask,
            "token_type_ids": encoding.type_ids,
        }
        feed = {name: np.array([values[name]], dtype=np.int64) for name in facts["inputs"]}
        if args.threshold is not None:
            feed["threshold"] = np.array(args.threshold, dtype=np.float32)
        if args.patience is not None:
            feed["patience"] = np.array(args.patience, dtype=np.int64)
        logits, exit_layer = session.run(["logits", "exit_layer"], feed)
        chances = np.exp(logits[0] - logits[0].max())
        chances /= chances.sum()
        best = int(chances.argmax())
        answer = {"text": text, "label": facts["labels"][best], "score": round(float(chances[best]), 4)}
        print(json.dumps({**answer, "exit_layer": int(exit_layer[0])}, ensure_ascii=False))


if __name__ == "__main__":
    main()
