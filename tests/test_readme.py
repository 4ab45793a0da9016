"""The README's code runs as printed, in one session, on a tiny model in place of the one from the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import badge_peft
from tests.texts import save_base

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
TEXTS = ["a fine film", "two hours that I want back", "not fine", "a film that I want"] * 4


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`google-bert/bert-base-uncased` is a tiny random BERT in a folder; the working directory is empty."""
    folder = save_base(tmp_path / "bert")
    for auto in (AutoModelForSequenceClassification, AutoTokenizer):
        real = auto.from_pretrained

        def from_pretrained(name: str, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            return real(folder if name == "google-bert/bert-base-uncased" else name, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)


def test_readme_code_runs_as_printed(hub: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) == 4
    space: dict[str, Any] = {}
    exec(BLOCKS[0], space)
    printed = capsys.readouterr().out
    assert "trainable params" in printed and "tensor(" in printed
    features = space["tokenizer"](TEXTS)
    data = Dataset.from_dict({**features, "labels": [0, 1, 1, 0] * 4})
    space.update(train_dataset=data, eval_dataset=data)
    exec(BLOCKS[1], space)
    exec(BLOCKS[2], space)
    exec(BLOCKS[3], space)
    assert space["model"].get_early_exit_config() == badge_peft.EarlyExitConfig.of(space["config"])
    assert set(space["out"].exit_layer.tolist()) <= {1, 2, 3}


def test_the_first_example_is_short() -> None:
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 12
