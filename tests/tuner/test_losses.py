from __future__ import annotations

import pytest
import torch

from badge_peft.tuner.losses import exit_loss, loss_weights, uncertainty_loss
from badge_peft.utils.problem import problem_of
from tests.models import make_batch, make_labels, make_model

KINDS = [
    ("single_label_classification", 3),
    ("multi_label_classification", 3),
    ("regression", 1),
    ("regression", 3),
]


@pytest.mark.parametrize(("problem_type", "num_labels"), KINDS)
def test_loss_of_an_exit_is_that_of_transformers(problem_type, num_labels):
    base = make_model(num_labels=num_labels, problem_type=problem_type)
    labels = make_labels(problem_type, num_labels=num_labels)
    out = base(**make_batch(), labels=labels)
    torch.testing.assert_close(exit_loss(out.logits, labels, problem_type), out.loss, rtol=0, atol=0)


@pytest.mark.parametrize(("problem_type", "num_labels"), KINDS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_parts_of_a_batch_add_up_to_the_whole(problem_type, num_labels, as_tensor):
    """What Trainer needs when it accumulates gradients: each part is divided by the labels of all of them."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(8, num_labels, generator=generator)
    labels = make_labels(problem_type, rows=8, num_labels=num_labels)
    count = torch.tensor(labels.numel()) if as_tensor else labels.numel()
    parts = [
        exit_loss(logits[part], labels[part], problem_type, count) for part in (slice(0, 3), slice(3, 4), slice(4, 8))
    ]
    torch.testing.assert_close(sum(parts), exit_loss(logits, labels, problem_type))


def test_rows_without_a_label_are_left_out():
    logits = torch.randn(4, 3)
    labels = torch.tensor([0, -100, 2, -100])
    problem_of("single_label_classification").check_labels(labels, 3, 4)
    found = exit_loss(logits, labels, "single_label_classification")
    torch.testing.assert_close(found, exit_loss(logits[::2], labels[::2], "single_label_classification"))
    torch.testing.assert_close(exit_loss(logits, labels, "single_label_classification", 2), found)


@pytest.mark.parametrize(("problem_type", "num_labels"), KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_half_precision_logits_is_float32(problem_type, num_labels, dtype):
    logits = torch.randn(4, num_labels).to(dtype)
    labels = make_labels(problem_type, num_labels=num_labels)
    found = exit_loss(logits, labels, problem_type)
    assert found.dtype == torch.float32
    assert torch.equal(found, exit_loss(logits.float(), labels, problem_type))


@pytest.mark.parametrize(
    ("labels", "problem_type", "message"),
    [
        (
            torch.tensor([0, 3]),
            "single_label_classification",
            "label 3 of row . is out.*num_labels=3.*0 to 2",
        ),
        (torch.tensor([-1, 0]), "single_label_classification", "label -1 of row . is out of range"),
        (torch.tensor([0, 1, 2]), "single_label_classification", r"shape \[3\].*2 rows"),
        (torch.tensor([0.0, 1.0]), "single_label_classification", "whole-number labels, got torch.float32"),
        (torch.tensor([0.0, 1.0]), "multi_label_classification", r"shape \[2\].*num_labels=3 needs \[2, 3\]"),
        (torch.zeros(2, 4), "multi_label_classification", r"shape \[2, 4\].*needs \[2, 3\]"),
        (torch.zeros(3, 3), "regression", r"shape \[3, 3\]; regression.*needs \[2, 3\]"),
    ],
)
def test_wrong_labels(labels, problem_type, message):
    with pytest.raises(ValueError, match=message):
        problem_of(problem_type).check_labels(labels, 3, batch_size=2)


@pytest.mark.parametrize(
    ("weights", "exits", "expected"),
    [
        ("uniform", [1, 2, 3], [1.0, 1.0, 1.0]),
        ("linear", [1, 2, 3], [1 / 6, 2 / 6, 3 / 6]),
        ("linear", [2, 6], [2 / 8, 6 / 8]),
        ("linear", [0, 1, 2], [1 / 4, 1 / 4, 2 / 4]),
        ([0.5, 0.0, 2.0], [1, 2, 3], [0.5, 0.0, 2.0]),
    ],
)
def test_weights(weights, exits, expected):
    assert loss_weights(weights, exits) == pytest.approx(expected)


def test_loss_of_learning_to_exit():
    """The mean over exits and labeled rows of (u - t)^2, t being 1 where the exit is wrong."""
    logits = {
        1: torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]),
        2: torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 9.0]]),
    }
    uncertainty = {1: torch.tensor([0.25, 0.5, 0.9]), 2: torch.tensor([0.75, 0.0, 0.1])}
    labels = torch.tensor([0, 0, -100])
    expected = ((0.25**2 + (0.5 - 1) ** 2) / 2 + ((0.75 - 1) ** 2 + (0.0 - 1) ** 2) / 2) / 2
    found = uncertainty_loss(uncertainty, logits, labels, "single_label_classification")
    assert found.item() == pytest.approx(expected)
    nobody = uncertainty_loss(uncertainty, logits, torch.full((3,), -100), "single_label_classification")
    assert nobody.item() == 0.0
