"""Fine-tunes a classifier as any user would: transformers.Trainer, a new head, nothing of badge_peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def label_names(rows: list[dict[str, Any]], tokens: bool) -> list[str]:
    """The labels of the rows, in order, as text."""
    found = {tag for row in rows for tag in row["tags"]} if tokens else {row["label"] for row in rows}
    return [str(name) for name in sorted(found)]


def encode(rows: list[dict[str, Any]], tokenizer: Any, names: list[str], length: int, tokens: bool) -> Dataset:
    """Token columns and labels; of tokens, the first sub-token of each word has one."""
    number = {name: i for i, name in enumerate(names)}
    if not tokens:
        texts = [[row["text"] for row in rows]]
        if "text_pair" in rows[0]:
            texts.append([row["text_pair"] for row in rows])
        columns = dict(tokenizer(*texts, truncation=True, max_length=length))
        return Dataset.from_dict({**columns, "labels": [number[str(row["label"])] for row in rows]})
    found = tokenizer(
        [row["tokens"] for row in rows],
        is_split_into_words=True,
        truncation=True,
        max_length=length,
    )
    labels = []
    for i, row in enumerate(rows):
        words = found.word_ids(i)
        seen = set()
        own = []
        for word in words:
            own.append(-100 if word is None or word in seen else number[row["tags"][word]])
            seen.add(word)
        labels.append(own)
    return Dataset.from_dict({**dict(found), "labels": labels})


def finetune(
    backbone: str,
    data: Path,
    out: Path,
    *,
    epochs: int,
    max_length: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    bf16: bool = False,
    tokens: bool = False,
    max_blocks: int | None = None,
) -> None:
    """Writes a fine-tuned classifier and its tokenizer."""
    set_seed(seed)
    rows = read_rows(data / "train.jsonl")
    names = label_names(rows, tokens)
    tokenizer = AutoTokenizer.from_pretrained(backbone, model_max_length=max_length)
    auto = AutoModelForTokenClassification if tokens else AutoModelForSequenceClassification
    labels = dict(enumerate(names))
    fields = {} if max_blocks is None else {"num_hidden_layers": max_blocks}
    model = auto.from_pretrained(
        backbone,
        num_labels=len(names),
        id2label=labels,
        label2id={name: i for i, name in labels.items()},
        dtype=torch.float32,
        **fields,
    )
    collate = DataCollatorForTokenClassification(tokenizer) if tokens else DataCollatorWithPadding(tokenizer)
    arguments = TrainingArguments(
        str(out.with_name(out.name + ".trainer")),
        learning_rate=learning_rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="linear",
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        logging_steps=100,
        seed=seed,
    )
    train = encode(rows, tokenizer, names, max_length, tokens)
    Trainer(model, arguments, train_dataset=train, data_collator=collate).train()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
