"""What the service refuses, with which status, and that the message has the remedy."""

from __future__ import annotations

import pytest

pydantic = pytest.importorskip("pydantic", reason="the extra `serve` is not installed")

from badge_peft.serving.requests import (  # noqa: E402
    Limits,
    PolicyUpdate,
    PredictRequest,
    RequestError,
    RerankRequest,
    check_room,
    check_rows,
    check_tasks,
    check_token,
    shape_message,
)


@pytest.mark.parametrize(
    ("inputs", "rows"),
    [
        ("a text", [("a text", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([["a", "b"], ["c", "d"]], [("a", "b"), ("c", "d")]),
        ([], []),
    ],
)
def test_texts_and_pairs(inputs, rows):
    assert PredictRequest(inputs=inputs).rows() == rows


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"inputs": 3},
        {"inputs": [["a", "b", "c"]]},
        {"inputs": ["a", ["b", "c"]]},
        {"inputs": "a", "max_exit": -1},
        {"inputs": "a", "task": "x"},
    ],
)
def test_a_body_of_another_shape_is_refused(body):
    with pytest.raises(pydantic.ValidationError):
        PredictRequest.model_validate(body)


def test_rerank_pairs_the_query_with_each_text():
    assert RerankRequest(query="q", texts=["a", "b"]).rows() == [("q", "a"), ("q", "b")]
    with pytest.raises(pydantic.ValidationError):
        RerankRequest(query="q", texts=["a"], top_k=0)
    with pytest.raises(pydantic.ValidationError):
        PolicyUpdate.model_validate({"threshold": 1})


@pytest.mark.parametrize(
    ("check", "status", "message"),
    [
        (lambda: check_rows([], Limits()), 422, "at least one"),
        (lambda: check_rows([("a", None)] * 3, Limits(rows=2)), 413, "3 texts.*2.*send parts"),
        (lambda: check_rows([("a", None), ("abc", "de")], Limits(characters=4)), 413, "text 1 has 5 characters"),
        (lambda: check_rows([("a", None), ("b", "\ud800")], Limits()), 422, "text 1 has one half of a surrogate pair"),
        (lambda: check_tasks(["x"], ["a", "b"]), 400, "a, b"),
        (lambda: check_tasks([], ["a"]), 400, "name some of a"),
        (lambda: check_tasks(["a", "a"], ["a"]), 400, "each once"),
        (lambda: check_tasks(["a"], []), 400, "leave `tasks` out"),
        (lambda: check_room(9, 2, Limits(waiting_rows=10)), 429, "try again"),
        (lambda: check_token(b"Bearer x", None), 403, "BADGE_PEFT_TOKEN"),
        (lambda: check_token(None, "x"), 401, "bearer token"),
        (lambda: check_token(b"Bearer y", "x"), 401, "Authorization"),
    ],
)
def test_what_is_refused(check, status, message):
    with pytest.raises(RequestError, match=message) as caught:
        check()
    assert caught.value.status == status and (caught.value.retry_after is not None) == (status == 429)


def test_what_is_not():
    limits = Limits(rows=2, characters=4, waiting_rows=10)
    check_rows([("abcd", None), ("ab", "cd")], limits)
    check_room(0, 11, limits)  # one large request alone is not refused for ever
    check_room(8, 2, limits)
    check_token(b"Bearer x", "x")
    assert check_tasks(None, []) is None and check_tasks(None, ["a", "b"]) == ("a", "b")
    assert check_tasks(["b"], ["a", "b"]) == ("b",)


@pytest.mark.parametrize(
    ("model", "body", "message"),
    [
        (PredictRequest, {"inputs": [["secret", "b"], "c"]}, "inputs: give a text, a list of texts, or a list of"),
        (PredictRequest, {"inputs": 3}, "inputs: give a text"),
        (PredictRequest, {"input": "secret"}, "inputs: Field required; input: Extra inputs are not permitted"),
        (PredictRequest, {"inputs": "x", "max_exit": -1}, "max_exit: Input should be greater than or equal to 0"),
        (PolicyUpdate, {"target": "secret"}, "target: Input should be a valid number"),
    ],
)
def test_a_body_of_another_shape_is_told_in_a_line_without_its_texts(model, body, message):
    with pytest.raises(ValueError) as refused:
        model.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in refused.value.errors()]
    found = shape_message(errors, "application/json; charset=utf-8")
    assert message in found and "secret" not in found and found.endswith("/docs has the fields.")
    broken = [{"type": "json_invalid", "loc": ("body", 11), "msg": "", "ctx": {"error": "Expecting value"}}]
    assert shape_message(broken, "application/json") == "the body is no JSON: Expecting value at character 11."
    assert "Content-Type: application/json" in shape_message(errors, "application/x-www-form-urlencoded")
