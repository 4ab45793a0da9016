"""Tasks: folders of JSON lines, cut to a seeded subset and tokenized once."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import read_lines

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")


@dataclass
class TaskData:
    """One task, tokenized: rows of features and `labels` by split, K (1 is regression), and a digest of the texts, so
    that two results can be known to be of the same data."""

    splits: dict[str, list[Row]]
    num_labels: int
    digest: str


def load_task(settings: dict[str, Any], data_dir: str | Path | None, tokenizer: Any) -> TaskData:
    """Reads, cuts and tokenizes the task of a run."""
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
    """Rows with `text`, `label` and, for pairs, `text_pair`, by split. A test split that is missing is half of the
    validation split, as the paper has it."""
    folder = Path(data_dir or ".", data)
    raw = {split: read_lines(path) for split in SPLITS if (path := folder / f"{split}.jsonl").is_file()}
    if not {"train", "validation"} <= raw.keys():
        raise FileNotFoundError(
            f"{folder} lacks train.jsonl or validation.jsonl: give --data-dir the folder of {data!r}."
        )
    if "test" not in raw:
        rows = random.Random(0).sample(raw["validation"], len(raw["validation"]))
        raw["validation"], raw["test"] = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    return raw


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
