"""Puts every text of a file before all guards at once: one pass of one encoder, however many tasks there are.

    badge-peft train encoder intent.csv --output-dir out/intent --backbone frozen
    badge-peft train encoder pii.csv --output-dir out/pii --backbone frozen
    badge-peft train encoder toxic.csv --output-dir out/toxic --backbone frozen
    badge-peft train encoder topic.csv --output-dir out/topic --backbone frozen
    python examples/guard_stack.py --tasks intent=out/intent pii=out/pii toxic=out/toxic topic=out/topic \
        --texts texts.txt --bundle out/guards

Each task stops by its own rule, and a text leaves with its slowest task. The bundle is all of it as one folder, which
`badge_peft.load_pretrained`, `badge_peft.pipeline` and `badge-peft predict` take.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, HfArgumentParser

import badge_peft


@dataclass
class Arguments:
    """The guards, and what they read."""

    tasks: list[str] = field(metadata={"help": "NAME=FOLDER of adapters that were trained on the same encoder."})
    texts: str = field(metadata={"help": "One text per line."})
    bundle: str | None = field(default=None, metadata={"help": "Also save all of them as this one folder."})


def main() -> None:
    """Prints one line of JSON per text: the answer of each task and the block that gave it."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    folders = dict(task.split("=", 1) for task in args.tasks)
    model = badge_peft.load_pretrained(folders)
    tokenizer = AutoTokenizer.from_pretrained(next(iter(folders.values())))
    if args.bundle:
        badge_peft.save_tasks(model, args.bundle, tokenizer=tokenizer)
    names = {task: model.base_model.label_names(task) for task in folders}

    seconds, blocks, alone = 0.0, 0, 0
    texts = Path(args.texts).read_text(encoding="utf-8").splitlines()
    for text in texts:
        batch = tokenizer(text, truncation=True, return_tensors="pt")
        start = time.perf_counter()
        out = model.early_exit_forward(**batch, tasks=list(folders))
        seconds += time.perf_counter() - start
        said = {}
        for task, answer in out.items():
            regression = model.peft_config[task].problem_type == "regression"
            said[task] = float(answer.logits[0, 0]) if regression else names[task][int(answer.logits[0].argmax())]
        exits = {task: int(answer.exit_layer[0]) for task, answer in out.items()}
        print(json.dumps({"text": text, "answers": said, "exits": exits}, ensure_ascii=False))
        blocks += int(torch.sum(out.blocks_run))
        alone += sum(exits.values())

    depth = model.base_model.num_blocks
    full = depth * len(folders) * len(texts)
    print(
        f"{len(texts)} texts, {len(folders)} tasks, {1000 * seconds / max(len(texts), 1):.1f} ms per text: {blocks} "
        f"blocks in one pass, {alone} with a call for each task, {full} with a full model for each",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
