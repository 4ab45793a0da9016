"""The longest input that a model's table of positions has room for."""

from __future__ import annotations

import pytest

from badge_peft.tuner.positions import max_positions
from tests.models import make_badge, make_model


@pytest.mark.parametrize(("case", "wanted"), [("bert", 40), ("roberta", 38), ("modernbert-cls", None)])
def test_longest_input(case, wanted):
    """RoBERTa counts from behind the padding position, ModernBERT has no table."""
    assert max_positions(make_model(case)) == wanted


def test_inside_of_a_peft_model():
    assert max_positions(make_badge("bert")) == 40
