"""No adapter file loads as something that it is not. `nox -s reliability` tries 10,000."""

from __future__ import annotations

import os
import subprocess
import warnings

import pytest

from .adapter_fuzz import WAYS, Fuzz, watched

COUNT = int(os.environ.get("BADGE_PEFT_FUZZ", "52"))


def test_no_corrupted_adapter_loads_as_another(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, wrong = Fuzz(tmp_path).run(COUNT)
    print(dict(found))
    assert not wrong, "\n".join(wrong)
    assert found.total() == COUNT
    for way in ("cut", "drop", "add", "not_finite", "pad", "garble"):
        assert found[f"{way}: loaded"] == 0
    assert {name.split(":")[0] for name in found} == set(WAYS)


def test_the_fuzzer_can_find_something(tmp_path, monkeypatch):
    """A loader that looks at nothing, one that writes, and one that starts a process."""
    fuzz = Fuzz(tmp_path)
    assert fuzz.load(fuzz.good[0], lambda path, base: base)[1].startswith("AttributeError")

    def writes(path, base):
        (tmp_path / "left").write_text("x")
        raise ValueError("this adapter is refused, but something was written")

    assert fuzz.load(fuzz.good[0], writes)[1] == "files were written"

    def starts(path, base):
        subprocess.run(["true"], check=True)
        raise ValueError("this adapter is refused, but something was started")

    assert fuzz.load(fuzz.good[0], starts)[1].startswith("it made the process do")
    with watched() as events, pytest.raises(FileNotFoundError):
        subprocess.run(["/no/such/program"])
    assert events
