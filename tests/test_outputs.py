"""The outputs that pages show: the command in a `console` block prints lines of that shape, on tiny models.

A block is a command after `$ ` and what it printed in a real run. Numbers, and what stands after `policy: `, may
differ; `...` stands for lines that are left out.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from badge_peft import BadgeConfig
from tests.cli.conftest import FAST, ROWS, invoke, save_classifier
from tests.models import make_model, shake
from tests.pages import PAGES, ROOT, blocks
from tests.texts import make_tokenizer, write_csv

SHOWN = [
    pytest.param(page, block.code, id=f"{page.relative_to(ROOT).as_posix()}:{block.line}")
    for page in PAGES
    for block in blocks(page, "console")
]
TAGS = ["O", "B-person", "I-person", "B-place", "I-place"]


def save_adapter(base: str, folder: str, auto: Any = AutoModelForSequenceClassification, **config: Any) -> None:
    """An adapter on the model in `base`."""
    model = get_peft_model(auto.from_pretrained(base), BadgeConfig(r=4, **config)).eval()
    shake(model)
    for part in (model, make_tokenizer()):
        part.save_pretrained(folder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the models, adapters and files of the pages' commands."""
    monkeypatch.chdir(tmp_path)
    save_classifier(tmp_path / "my-model")
    write_csv(tmp_path / "requests.csv", ROWS)
    (tmp_path / "texts.txt").write_text("the film was good\na dull plot\n", encoding="utf-8")
    names = dict(enumerate(TAGS))
    tagging = {"id2label": names, "label2id": {tag: i for i, tag in names.items()}, "num_labels": len(TAGS)}
    make_model("bert", **tagging).save_pretrained("tagging")
    tagger = AutoModelForTokenClassification.from_pretrained("tagging")
    with torch.no_grad():
        tagger.classifier.bias[1] = 99.0  # each word is a person
    tagger.save_pretrained("tagging")
    never = {"train_head": False, "early_exit": {"policy": "never"}}
    save_adapter("tagging", "my-tagger", AutoModelForTokenClassification, task_type="TOKEN_CLS", **never)
    for task in ("intent", "sentiment"):
        save_adapter("my-model", f"out/{task}")
    return tmp_path


def shape(line: str) -> Any:
    """What two runs of a command have in common: of JSON the names, else all but numbers and policies."""
    if line.startswith("{"):
        return names_of(json.loads(line))
    line = re.sub(r"(policy: ).*|, [\d.]+% of the time expected", r"\1", line)  # tiny models save none
    return " ".join(re.sub(r"-?\d[\d,.]*", "#", line).replace("-", "").split())


def names_of(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: names_of(inner) for name, inner in value.items()}
    return [names_of(value[0])] if isinstance(value, list) and value else type(value)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "shown"), SHOWN)
def test_a_command_prints_lines_of_that_shape(page: Path, shown: str, place: Path) -> None:
    command, *lines = shown.splitlines()
    given, _, program = command.removeprefix("$ ").rpartition(" | ")
    arguments = shlex.split(program)
    options = (*FAST, "--exit-layers", "0-") if arguments[1] == "train" else ()
    said = invoke(*arguments[1:], *options, input=" ".join(shlex.split(given)[1:]) + "\n")
    assert said.exit_code == 0, said.output
    printed = [shape(line) for line in said.output.splitlines()]
    missing = [line for line in lines if line.strip() not in ("", "...") and shape(line) not in printed]
    assert not missing, said.output


def test_the_tutorials_show_what_they_print() -> None:
    assert {page.values[0].stem for page in SHOWN} >= {"after-deployment", "many-tasks", "tokens"}
