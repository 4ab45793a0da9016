"""A classifier in service, a file of texts, and an adapter that `badge-peft train` made of the two."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from badge_peft.cli.main import main
from tests.models import make_model
from tests.texts import make_tokenizer, sentences, write_csv

ROWS = sentences(120)
Cli = Callable[..., "Result"]

# ending a training or a pass early is not what these tests are about
FAST = ("--epochs", 1, "--latency", 0, "--policy", "patience")


@dataclass
class Result:
    """What a run of `badge-peft` has left."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """Both."""
        return self.stdout + self.stderr


def invoke(*arguments: Any, input: str | None = "") -> Result:
    """Runs `badge-peft` with these arguments in this process; whatever is not an error of the user's is raised. Its
    standard input is this process's own where `input` is None."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        if input is not None:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input.encode()), encoding="utf-8"))
        patch.setenv("COLUMNS", "200")
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    return Result(code, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="session")
def cli() -> Cli:
    """`invoke`, for a command that succeeds, or `fails` with an error that the user can mend."""

    def run(*arguments: Any, input: str = "", fails: bool = False) -> Result:
        result = invoke(*arguments, input=input)
        assert result.exit_code == (1 if fails else 0), result.output
        return result

    return run


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, a fine-tuned checkpoint with its tokenizer; `texts.txt`; `rows.csv`, the same with labels."""
    folder = tmp_path_factory.mktemp("service")
    save_classifier(folder / "model")
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text, _ in ROWS), encoding="utf-8")
    write_csv(folder / "rows.csv", ROWS)
    return folder


@pytest.fixture(scope="session")
def trained(place: Path, cli: Cli) -> Path:
    """The adapter of the headline: a frozen checkpoint, its head kept, unlabeled text. Do not change it."""
    out = place / "adapter"
    train = ("train", place / "model", place / "texts.txt", "--output-dir", out, "--backbone", "frozen", "--keep-head")
    cli(
        *train,
        "--exit-pooling",
        "cls",
        "--epochs",
        6,
        "--latency",
        3,
        "--policy",
        "max_prob",
        "--target-blocks-saved",
        0.4,
    )
    return out


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained` to change."""
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """`predict_folder` answers in this process; tests/serving/test_batch_scoring.py is with Ray."""
    from badge_peft.workflows import folders
    from badge_peft.workflows.predict import Answerer, Answering
    from badge_peft.workflows.stream import TextFiles, chunks_of, texts_of

    def answer_files(files: TextFiles, answering: Answering, workers: int | None) -> Iterator[dict[str, Any]]:
        answerer = Answerer(answering)
        for number in range(len(files.paths)):
            for chunk in chunks_of(files, number, 2 * answering.batch_size):
                yield {**chunk, "table": answerer.table(texts_of(chunk))}

    monkeypatch.setattr(folders, "answer_files", answer_files)
    monkeypatch.setattr(folders, "cluster", lambda *_: nullcontext())


def save_classifier(folder: Path, names: tuple[str, ...] = ("bad", "good"), **changes: Any) -> str:
    """A checkpoint whose head knows its labels' names."""
    model = make_model("bert", num_labels=len(names), **changes)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def one_line(result: Result, *words: str) -> None:
    """The error is one line, without a traceback, that holds all `words`."""
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output
    assert all(word in lines[0] for word in words), lines[0]
