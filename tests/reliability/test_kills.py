"""SIGKILL at random moments leaves the old state or the new one. `nox -s reliability` kills 200 times."""

from __future__ import annotations

import os
import warnings
from collections import Counter

import pytest
import torch
from peft import PeftModel

from tests.models import exits_of, make_batch, make_model, shake, trained

from .kills import kill_at_random

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
TIMES = int(os.environ.get("BADGE_PEFT_KILLS", "15"))


def check(found: Counter[str]) -> None:
    assert set(found) <= {"old", "new"}, found
    assert found.total() == TIMES and found["old"] > 0  # some came in time


def test_save(tmp_path):
    models = {"old": trained(placement="block"), "new": trained(placement="ffn", exit_pooling="mean")}
    shake(models["new"], seed=9)
    batch = make_batch()
    answers = {name: exits_of(model, batch) for name, model in models.items()}

    def state() -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = exits_of(PeftModel.from_pretrained(make_model(), tmp_path).eval(), batch)
        return next((name for name, wanted in answers.items() if torch.equal(found, wanted)), "a mixture")

    check(
        kill_at_random(
            lambda: models["old"].save_pretrained(tmp_path),
            lambda: models["new"].save_pretrained(tmp_path),
            state,
            TIMES,
        )
    )
