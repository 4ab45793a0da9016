"""What the problem types say of single rows, against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch

from badge_peft.utils.problem import PROBLEM_TYPES, infer_problem_type, problem_of
from tests.early_exit.reference import MULTI, REGRESSION, SINGLE

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.1, 0.2], [0.4, 0.3, -0.2]])


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_how_wrong_a_class_is(shape: tuple[int, ...]) -> None:
    labels = torch.tensor([0, 1, 0]).reshape(shape)
    assert problem_of(SINGLE).error(LOGITS, labels).tolist() == [0.0, 1.0, 0.0]


def test_how_wrong_several_labels_are() -> None:
    labels = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    found = problem_of(MULTI).error(LOGITS, labels)
    assert found.tolist() == problem_of(MULTI).error(LOGITS, labels.float()).tolist() == [0.0, 1.0, 1.0]
    even = torch.zeros(2, 1)  # a probability of 0.5 is no yes
    assert problem_of(MULTI).error(even, torch.tensor([[0], [1]])).tolist() == [0.0, 1.0]


def test_how_wrong_values_are() -> None:
    """BERxiT, section 4.2; the mean where a row has several."""
    labels = torch.tensor([[1.5, -1.0, 0.0], [0.0, 0.0, 0.0], [0.4, 0.3, -0.2]])
    expected = [
        sum(abs(math.tanh(y - x)) for y, x in zip(*rows, strict=True)) / 3
        for rows in zip(LOGITS.tolist(), labels.tolist(), strict=True)
    ]
    assert problem_of(REGRESSION).error(LOGITS, labels).tolist() == pytest.approx(expected, abs=1e-6)
    assert problem_of(REGRESSION).error(LOGITS[:, :1], labels[:, 0])[0].item() == pytest.approx(math.tanh(0.5))


def test_which_rows_have_a_label() -> None:
    assert problem_of(SINGLE).has_label(torch.tensor([[0], [-100], [2]])).tolist() == [True, False, True]
    for kind in (MULTI, REGRESSION):
        assert problem_of(kind).has_label(torch.zeros(2, 3)).tolist() == [True, True]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool], ids=str)
def test_any_whole_numbers_have_a_loss(dtype: torch.dtype) -> None:
    labels = torch.tensor([[0, 9], [1, 9], [0, 9]])[:, 0]  # nor does it matter how they lie in memory
    expected = torch.nn.functional.cross_entropy(LOGITS, labels)
    assert torch.equal(problem_of(SINGLE).loss(LOGITS, labels.to(dtype), "mean"), expected)


def test_a_row_in_words() -> None:
    names = ["bad", "odd", "good"]
    row = LOGITS[0].numpy()
    sure = math.exp(2.0) / sum(map(math.exp, (2.0, -1.0, 0.5)))
    assert problem_of(SINGLE).format_prediction(row, names) == {
        "label": "bad",
        "score": pytest.approx(sure, abs=1e-6),
    }
    least = 1 / (1 + math.exp(-0.5))  # of the three decisions
    found = problem_of(MULTI).format_prediction(row, names)
    assert found == {"labels": ["bad", "good"], "score": pytest.approx(least, abs=1e-6)}
    assert problem_of(REGRESSION).format_prediction(row, names) == {"value": [2.0, -1.0, 0.5]}
    assert problem_of(REGRESSION).format_prediction(row[:1], ["value"]) == {"value": 2.0}
    broken = LOGITS[0].numpy() * float("nan")
    assert problem_of(SINGLE).format_prediction(broken, names)["score"] is None  # JSON has no NaN


def test_the_names_are_those_of_transformers() -> None:
    assert PROBLEM_TYPES == (SINGLE, MULTI, REGRESSION)
    assert infer_problem_type(1, torch.tensor([3])) == infer_problem_type(1) == REGRESSION
    assert infer_problem_type(2, torch.tensor([[1.0, 0.0]])) == MULTI
    assert infer_problem_type(2, torch.tensor([1])) == infer_problem_type(2) == SINGLE
