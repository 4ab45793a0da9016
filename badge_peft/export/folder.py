"""`ExportedFolder`: what an export wrote beside the graph: its facts, and the tokenizer that makes inputs of texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from badge_peft.evaluation.collate import SPECIAL
from badge_peft.evaluation.words import Words, tokenize_words
from badge_peft.utils.texts import check_second_text

MODEL = "model.onnx"
CONFIG = "early_exit.json"
LARGEST_PATIENCE = 2**31  # more than any model has exits; int64 holds it, whatever is added


class ExportedFolder:
    """A folder that an export wrote, and what its `early_exit.json` says."""

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self.directory = directory
        self.config = config

    @property
    def reads_tokens(self) -> bool:
        """Whether any answer of the file is one for each token."""
        return SPECIAL in self.config["inputs"]

    @property
    def reads_pairs(self) -> bool:
        """Whether what the file was made of was trained on pairs of texts."""
        return bool(self.config.get("reads_pairs"))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that was saved with the graph.

        Raises:
            FileNotFoundError: none was.
            ValueError: it is not the one that was saved with it.
        """
        if not (self.directory / "tokenizer_config.json").is_file():
            raise FileNotFoundError(
                f"{self.directory} has no tokenizer: export with export_onnx(..., tokenizer=tokenizer), or pass token "
                "numbers."
            )
        recorded = self.config.get("tokenizer_files") or {}
        if digests(self.directory, recorded) != recorded:
            raise ValueError(
                f"the tokenizer in {self.directory} is not the one that was exported with {MODEL}, as where an export "
                f"was interrupted: export again. If you changed it yourself, set tokenizer_files to null in {CONFIG}."
            )
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.directory)

    def tokenize(self, texts: Sequence[str], text_pairs: Sequence[str] | None = None) -> dict[str, Any]:
        """Texts, or pairs of texts, as inputs of the graph.

        Raises:
            ValueError: there are no second texts, and the adapter was trained on pairs.
        """
        check_second_text(self.reads_pairs, text_pairs is not None)
        encoded = self.tokenizer(
            list(texts),
            None if text_pairs is None else list(text_pairs),
            padding=True,
            truncation=True,
            max_length=self.config["max_length"],
            return_tensors="np",
        )
        return {name: encoded[name] for name in self.config["inputs"] if name in encoded}

    def batches(
        self, texts: Sequence[str], text_pairs: Sequence[str] | None, batch_size: int
    ) -> Iterator[tuple[dict[str, Any], list[Words]]]:
        """Texts, or pairs of texts, batch by batch: inputs of the graph and, where answers are those of tokens, the
        words of each text.

        Raises:
            ValueError: pairs, where answers are those of tokens.
        """
        if self.reads_tokens and text_pairs is not None:
            raise ValueError("the file labels tokens of a text, and text_pairs are given: leave them out.")
        for start in range(0, len(texts), batch_size):
            part = slice(start, start + batch_size)
            if self.reads_tokens:
                yield _word_inputs(texts[part], self.tokenizer, self.config)
            else:
                yield self.tokenize(texts[part], None if text_pairs is None else text_pairs[part]), []


def holds_tasks(directory: str | Path) -> bool:
    """Whether a folder that an export wrote is of many tasks.

    Raises:
        FileNotFoundError: the folder lacks `model.onnx` or `early_exit.json`.
    """
    check_folder(Path(directory), "`badge-peft export`")
    return "tasks" in json.loads((Path(directory) / CONFIG).read_text(encoding="utf-8"))


def check_folder(directory: Path, writer: str) -> None:
    """Refuses a folder that has not both files; `writer` is what would write them."""
    for name in (MODEL, CONFIG):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}: give a folder that {writer} wrote.")


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Sixteen hexadecimal digits for each of these files that is in `folder`, which say what it holds."""
    files = {name: folder / name for name in sorted(names)}
    return {name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for name, f in files.items() if f.is_file()}


def _word_inputs(
    texts: Sequence[Any], tokenizer: Any, config: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Words]]:
    """Texts, or lists of tokens, as inputs of a graph, in which the first sub-token of each word answers for it, and
    the words of each."""
    rows, words = tokenize_words(texts, tokenizer, config["max_length"])
    longest = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": tokenizer.pad_token_id or 0, SPECIAL: 1}
    return {
        name: np.array([row[name] + [fills.get(name, 0)] * (longest - len(row[name])) for row in rows])
        for name in config["inputs"]
        if name in rows[0]
    }, words
