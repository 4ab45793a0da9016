"""GLUE tasks, from the Hub or from files, tokenized: what the other examples train on.

A folder given as `--data-dir` holds train.jsonl, validation.jsonl and, if there is one, test.jsonl. Each line is
{"text": "...", "label": ...}, for pairs of texts with "text_pair" as well. Labels are strings or whole numbers;
numbers with a decimal point make it a regression.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, DatasetDict, load_dataset

COLUMNS = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
METRICS = {"cola": "matthews", "mrpc": "acc_and_f1", "qqp": "acc_and_f1", "stsb": "pearson_and_spearman"}


@dataclass
class Task:
    """A task, ready for a Trainer.

    Args:
        name: Of the GLUE task, or of the folder.
        splits: `train`, `validation` and `test`: what the tokenizer gives, and `labels`.
        label_names: By number; None for a regression.
        metric: Its score in GLUE, else accuracy, for a regression Pearson's correlation.
    """

    name: str
    splits: DatasetDict
    label_names: list[str] | None
    metric: str

    @property
    def num_labels(self) -> int:
        """Outputs of a model for this task."""
        return 1 if self.label_names is None else len(self.label_names)


def load_task(
    task: str | None, data_dir: str | None, tokenizer: Any, max_length: int = 128, max_rows: int | None = None
) -> Task:
    """Reads and tokenizes a task. Where there is no labeled test split, as on the Hub, it is half of the validation
    split.

    Args:
        task: Name of a GLUE task on the Hub. With `data_dir` it only says the metric; None is the folder's name.
        data_dir: Folder with JSON lines.
        tokenizer: Of the model.
        max_length: Tokens per row; the model's own limit holds, too.
        max_rows: At most so many rows of each split, drawn at random.
    """
    name = task or Path(data_dir or "").name
    raw = _from_folder(Path(data_dir)) if data_dir else _from_hub(name)
    if "test" not in raw:
        halves = raw["validation"].train_test_split(test_size=0.5, seed=0)
        raw["validation"], raw["test"] = halves["train"], halves["test"]
    if max_rows is not None:
        for split, rows in raw.items():
            raw[split] = rows.shuffle(seed=0).select(range(min(max_rows, len(rows))))

    label = raw["train"].features["label"]
    if isinstance(label, ClassLabel):
        names, number = list(label.names), int
    elif str(label.dtype).startswith("float"):
        names, number = None, float
    else:
        values = sorted({value for rows in raw.values() for value in rows["label"]})
        names, number = [str(value) for value in values], values.index

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        limit = min(max_length, tokenizer.model_max_length)
        features = tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=limit)
        return {**features, "labels": [number(value) for value in rows["label"]]}

    splits = DatasetDict({k: v.map(encode, batched=True, remove_columns=v.column_names) for k, v in raw.items()})
    return Task(name, splits, names, METRICS.get(name, "pearson" if names is None else "accuracy"))


def _from_folder(folder: Path) -> DatasetDict:
    files = {split: folder / f"{split}.jsonl" for split in ("train", "validation", "test")}
    found = {split: str(path) for split, path in files.items() if path.is_file()}
    if not {"train", "validation"} <= found.keys():
        raise SystemExit(f"{folder} must hold train.jsonl and validation.jsonl; it has {sorted(found) or 'neither'}.")
    return load_dataset("json", data_files=found)


def _from_hub(name: str) -> DatasetDict:
    if name not in COLUMNS:
        raise SystemExit(f"--task {name!r} is not allowed: one of {', '.join(COLUMNS)}; or give files by --data-dir.")
    raw = load_dataset("nyu-mll/glue", name)
    parts = {"train": "train", "validation": "validation_matched" if name == "mnli" else "validation"}
    columns = dict(zip(COLUMNS[name], ("text", "text_pair"), strict=False))
    return DatasetDict(
        {split: raw[part].select_columns([*columns, "label"]).rename_columns(columns) for split, part in parts.items()}
    )
