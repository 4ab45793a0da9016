"""Puts every text of a file before all guards at once: one pass of one encoder, however many tasks there are.

    badge-peft train encoder intent.csv --output-dir out/intent --backbone frozen
    badge-peft train encoder pii.jsonl --output-dir out/pii --backbone frozen  # rows of tokens and their tags
    badge-peft train encoder toxic.csv --output-dir out/toxic --backbone frozen
    badge-peft train encoder topic.csv --output-dir out/topic --backbone frozen
    python examples/guard_stack.py --tasks intent=out/intent pii=out/pii toxic=out/toxic topic=out/topic \
        --texts texts.txt --bundle out/guards

Each task has its own policy, and a text runs as deep as its slowest task. A task may label tokens: its answer is the
words that have a tag. The bundle is all of it as one folder, which `badge_peft.load_pretrained`, `badge_peft.pipeline`
and `badge-peft predict` take.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BatchEncoding, HfArgumentParser

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
        batch = tokenizer(text, truncation=True, return_tensors="pt", return_special_tokens_mask=True)
        start = time.perf_counter()
        out = model.early_exit_forward(**batch, tasks=list(folders))
        seconds += time.perf_counter() - start
        said: dict[str, Any] = {}
        for task, answer in out.items():
            if answer.logits.dim() == 3:
                said[task] = tagged_words(text, batch, [names[task][i] for i in answer.logits[0].argmax(dim=-1)])
            elif model.peft_config[task].problem_type == "regression":
                said[task] = float(answer.logits[0, 0])
            else:
                said[task] = names[task][int(answer.logits[0].argmax())]
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


def tagged_words(text: str, batch: BatchEncoding, tags: list[str]) -> list[tuple[str, str]]:
    """The words of a text that are part of an entity; the first token of a word answers for it."""
    found = []
    for word in dict.fromkeys(number for number in batch.word_ids(0) if number is not None):
        tag, span = tags[batch.word_to_tokens(0, word).start], batch.word_to_chars(0, word)
        if tag != "O":
            found.append((text[span.start : span.end], tag))
    return found


if __name__ == "__main__":
    main()
