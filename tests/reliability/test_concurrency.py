"""One model, many callers: every answer is that of the same call made alone. `nox -s reliability` asks for more."""

from __future__ import annotations

import os
import sys

import pytest

from . import concurrency
from .requests import answer, differences, draw_requests, make_service

REQUESTS = int(os.environ.get("BADGE_PEFT_REQUESTS", "60"))


def test_requests_differ():
    """The comparison can fail: the answers of other requests are not these."""
    model, requests = make_service(), draw_requests(40)
    answers = concurrency.one_by_one(model, requests)
    assert differences(answers, answers) == 0
    assert differences(answers, answers[1:] + answers[:1]) > 30
    exits = [exits for _, exits in answers if exits is not None]
    assert len({int(layer) for found in exits for layer in found}) > 2
    assert differences([answer(model, requests[0])], answers[:1]) == 0


@pytest.mark.parametrize("callers", ["threads", "event_loop", "nested", "interrupted"])
def test_answers_are_those_of_calls_made_alone(callers):
    assert getattr(concurrency, callers)(REQUESTS) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_forked_workers():
    assert concurrency.forked(REQUESTS // 2) == 0
