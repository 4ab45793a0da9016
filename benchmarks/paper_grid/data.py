"""Tasks: JSON-lines folders or GLUE from the Hub, cut to a seeded subset and tokenized once."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")


@dataclass
class TaskData:
    """One task, tokenized.

    Args:
        splits: Split -> rows of features and `labels`.
        num_labels: K; 1 is regression.
        digest: Of the texts, so that two results can be known to be of the same data.
    """

    splits: dict[str, list[Row]]
    num_labels: int
    digest: str

    @property
    def problem_type(self) -> str:
        """As transformers has it."""
        return "regression" if self.num_labels == 1 else "single_label_classification"


def load_task(settings: dict[str, Any], data_dir: str | Path | None, tokenizer: Any) -> TaskData:
    """Reads, cuts and tokenizes the task of a run.

    Args:
        settings: Of a run: `data`, `rows`, `data_seed`, `max_length`.
        data_dir: Where the folders are.
        tokenizer: Of the backbone.
    """
    raw = read_task(settings["data"], data_dir)
    numbers, num_labels = _numbers(raw)
    splits, digest = {}, hashlib.sha256()
    for split in SPLITS:
        rows = _some(raw[split], settings["rows"][split], settings["data_seed"])
        pair = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
        texts = [row["text"] for row in rows]
        encoded = tokenizer(texts, pair, truncation=True, max_length=settings["max_length"])
        names = list(encoded)
        splits[split] = [
            {**dict(zip(names, values, strict=True)), "labels": numbers(row["label"])}
            for row, values in zip(rows, zip(*(encoded[n] for n in names), strict=True), strict=True)
        ]
        digest.update(json.dumps(rows, sort_keys=True).encode())
    return TaskData(splits, num_labels, digest.hexdigest()[:16])


def read_task(data: str, data_dir: str | Path | None) -> dict[str, list[Row]]:
    """Rows with `text`, `label` and, for pairs, `text_pair`, by split.

    A test split that is missing (or whose labels are hidden) is half of the validation split, as the paper has it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a split that cannot be done without is missing.
    """
    raw = _hub(data.removeprefix("glue:")) if data.startswith("glue:") else _folder(data, data_dir)
    for split in ("train", "validation"):
        if not raw.get(split):
            raise ValueError(f"task data {data!r} has no {split} split; it has {', '.join(raw)}.")
    if not raw.get("test"):
        rows = random.Random(0).sample(raw["validation"], len(raw["validation"]))
        raw["validation"], raw["test"] = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    return raw


def _folder(name: str, data_dir: str | Path | None) -> dict[str, list[Row]]:
    if data_dir is None:
        raise ValueError(f"task data {name!r} is a folder: say where it is with --data-dir.")
    folder = Path(data_dir, name)
    files = {split: folder / f"{split}.jsonl" for split in SPLITS}
    found = {split: path for split, path in files.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(f"{folder} holds no train.jsonl: give --data-dir the folder that has {name!r} in it.")
    return {split: [json.loads(line) for line in path.open(encoding="utf-8")] for split, path in found.items()}


def _hub(name: str) -> dict[str, list[Row]]:
    from datasets import load_dataset

    source = load_dataset("nyu-mll/glue", name)
    columns = [c for c, f in source["train"].features.items() if getattr(f, "dtype", "") == "string"]
    names = dict(zip(columns, ("text", "text_pair"), strict=False))
    wanted = {"train": "train", "validation": "validation_matched" if name == "mnli" else "validation"}
    return {
        split: [{names.get(k, k): v for k, v in row.items() if k in names or k == "label"} for row in source[part]]
        for split, part in wanted.items()
    }


def _some(rows: list[Row], count: int | None, seed: int) -> list[Row]:
    """`count` rows, the same for the same seed, in their order."""
    if count is None or count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]


def _numbers(raw: dict[str, list[Row]]) -> tuple[Any, int]:
    """Label to number, and K."""
    values = {row["label"] for rows in raw.values() for row in rows}
    if any(isinstance(v, float) for v in values):
        return float, 1
    numbers = {v: i for i, v in enumerate(sorted(values, key=lambda v: (str(type(v)), v)))}
    return numbers.__getitem__, len(numbers)
