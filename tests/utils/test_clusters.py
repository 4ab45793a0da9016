"""Who may connect to Ray: those who have its token, unless a cluster that was started otherwise is named."""

from __future__ import annotations

import sys

import pytest

from badge_peft.utils.extras import ask_for_token

NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    return monkeypatch


def found():
    import os

    return [os.environ.get(name) for name in NAMES]


def test_a_ray_of_our_own_asks_for_a_token_of_its_own():
    ask_for_token(None)
    mode, token, path = found()
    assert mode == "token" and len(token) >= 32 and path is None


def test_a_token_that_is_there_is_kept(environment):
    environment.setenv("RAY_AUTH_TOKEN_PATH", "/a/token")
    ask_for_token(None)
    assert found() == ["token", None, "/a/token"]


def test_a_cluster_has_its_own_token():
    ask_for_token("auto")
    assert found() == ["token", None, None]


def test_nobody_is_let_in_without_a_token_but_to_a_cluster_that_is_named(environment):
    environment.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ValueError, match="RAY_AUTH_MODE=disabled is not allowed: .* Unset it"):
        ask_for_token(None)
    ask_for_token("10.0.0.1:6379")
    assert found()[0] == "disabled"
