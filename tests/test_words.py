"""The pages have no phrase that readers stumble over, and a planted one is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT
from tests.words import INSTEAD, found

PLANTED = [
    "A row that goes all the way costs more.",
    "It saves half of the time on the clock.",
    "An unused column is named.",
    "A broken file is not\nrefused.",
    "Attention exits want another rate.",
    "It computes no block behind the exit.",
    "Beside the model, nothing is loaded.",
    "While it runs, nobody may change anything.",
    "This service takes no changes.",
    "The exit rule decides.",
    "Most rows leave early.",
    "It keeps the answers of the model.",
    "All of them but for one.",
    "Each task has a head of its own.",
    "It is stored in no format.",
    "Equal scores share their fate.",
    "It takes a collator at its word.",
    "A bad policy is good for nothing.",
    "An error that a user can mend.",
    "What no model has, no data gives.",
    "This hardly reads English.",
]


@pytest.mark.parametrize("sentence", PLANTED)
def test_a_planted_sentence_is_found(sentence: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n```text\n{sentence}\n```\n\n`{sentence.split()[0]}` is fine.\n\n{sentence}\n")
    (line,) = found([page])
    assert int(line.removeprefix(f"{page}:").partition(":")[0]) >= 9 and line.partition(": ")[2]


def test_every_phrase_has_a_planted_sentence(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("\n\n".join(PLANTED))
    assert {line.rpartition(": ")[2] for line in found([page])} >= {
        say.rpartition(": ")[2] for say in INSTEAD.values()
    }


def test_what_people_want_is_no_phrase(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "As a rule, choose the policy you want; `behind it` is code, and [this](but-for-it.md) an address."
    )
    assert found([page]) == []


@pytest.mark.parametrize(("pages", "code"), [((), 0), (("bad.md",), 1)])
def test_the_command_that_lint_runs(pages: tuple[str, ...], code: int, tmp_path: Path) -> None:
    (tmp_path / "bad.md").write_text("Rows leave.\n")
    given = [str(tmp_path / page) for page in pages]
    done = subprocess.run([sys.executable, "-m", "tests.words", *given], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout == (f"{tmp_path}/bad.md:1: Rows leave: stop\n" if code else "")
