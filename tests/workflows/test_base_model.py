"""What the pooling file of sentence-transformers says, in both of its formats; lists of blocks; what exits add."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from badge_peft.workflows import base_model
from badge_peft.workflows.base_model import POOLING_FILE, badge_config, parse_blocks, sentence_pooling
from badge_peft.workflows.settings import ExitOptions

RESPONSE: Any = SimpleNamespace(headers={}, request=None)


def write(folder: Path, text: str) -> str:
    file = folder / POOLING_FILE
    file.parent.mkdir()
    file.write_text(text, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False},
            "mean",
        ),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, None),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
        ({"embedding_dimension": 16, "pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode": ["cls", "mean"]}, None),
        ({"pooling_mode": "weightedmean"}, None),
        ({"pooling_mode": 3}, None),
        ({"pooling_mode": [["cls"]]}, None),
        ({}, None),
        ([], None),
    ],
)
def test_the_ways_to_say_it(config: Any, expected: str | None, tmp_path: Path) -> None:
    assert sentence_pooling(write(tmp_path, json.dumps(config))) == expected


def test_a_file_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert sentence_pooling(str(tmp_path)) is None
    assert sentence_pooling(write(tmp_path, "{")) is None


@pytest.mark.parametrize(
    "error",
    [
        EntryNotFoundError.__new__(EntryNotFoundError),
        HfHubHTTPError("no such repository", response=RESPONSE),
        LocalEntryNotFoundError("offline"),
        ConnectionError("no network"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_of_a_repository(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(write(tmp_path, json.dumps({"pooling_mode": "mean"})))
    monkeypatch.setattr(base_model, "hf_hub_download", lambda repo, name: str(folder / name))
    assert sentence_pooling("user/encoder") == "mean"

    def fail(repo: str, name: str) -> str:
        raise error

    monkeypatch.setattr(base_model, "hf_hub_download", fail)
    assert sentence_pooling("user/encoder") is None


@pytest.mark.parametrize(
    ("fields", "carry"),
    [
        ({}, "logits"),
        ({"exit_type": "residual_mha", "keep_head": True}, "logits"),
        ({"carry": "none"}, None),
        ({"backbone": "lora"}, None),
        ({"placement": "none"}, None),
        ({"exit_type": "past_future"}, None),
        ({"backbone": "full", "carry": "logits"}, "logits"),
    ],
)
def test_exits_carry_logits_where_it_has_been_shown_to_win(fields: dict[str, Any], carry: str | None) -> None:
    assert badge_config(ExitOptions(**fields)).carry == carry


def test_exits_of_tokens_carry_what_is_asked_for() -> None:
    assert badge_config(ExitOptions(), task_type="TOKEN_CLS").carry is None
    assert badge_config(ExitOptions(carry="logits"), task_type="TOKEN_CLS").carry == "logits"


def test_blocks_are_read_from_lists_and_ranges() -> None:
    assert parse_blocks(None) is None and parse_blocks("all") is None
    assert parse_blocks("2,4,6") == [2, 4, 6]
    assert parse_blocks("0-2, 5") == [0, 1, 2, 5]
    assert parse_blocks("1, 4-", num_blocks=6) == [1, 4, 5, 6]


@pytest.mark.parametrize("value", ["", "a", "2-1", "-3", "1,,2", "0-1001"])
def test_what_is_no_list_of_blocks(value: str) -> None:
    with pytest.raises(ValueError, match="exit_layers=.* is not allowed"):
        parse_blocks(value)
