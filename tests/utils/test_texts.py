"""How long a text may be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from badge_peft.utils.texts import longest_text

UNKNOWN = int(1e30)  # what transformers says for a tokenizer without a limit


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        (128, (None, None), 128),
        (128, (64, None), 64),
        (128, (512, 200), 128),
        (UNKNOWN, (8192, None), 8192),
        (UNKNOWN, (8192, 300), 300),
        (UNKNOWN, (None, None), 512),
        (UNKNOWN, (), 512),
    ],
)
def test_longest_text_is_the_least_that_is_known(own, limits, expected):
    assert longest_text(SimpleNamespace(model_max_length=own), *limits) == expected
