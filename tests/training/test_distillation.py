"""The loss of an exit that follows another one's distribution, against sums by hand."""

from __future__ import annotations

import pytest
import torch

from badge_peft.training.criterion import distillation_loss

from .runs import MULTI, REGRESSION, SINGLE, kl

LOGITS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))  # [E, B, K]


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_distillation_loss(problem_type, temperature):
    found = distillation_loss(LOGITS[0], LOGITS[1], problem_type, temperature)
    assert float(found) == pytest.approx(kl(LOGITS[1], LOGITS[0], problem_type, temperature), rel=1e-5)
    assert float(distillation_loss(LOGITS[0], LOGITS[0], problem_type, temperature)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_of_regression_is_the_squared_distance(temperature):
    student, teacher = LOGITS[0, :, :1], LOGITS[1, :, :1]
    expected = (
        sum((a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)) / 5
    )
    assert float(distillation_loss(student, teacher, REGRESSION, temperature)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, REGRESSION])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_distillation_of_large_logits_is_no_nan(problem_type, dtype):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]]).to(dtype).requires_grad_()
    loss = distillation_loss(student, -student.detach(), problem_type)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and loss.dtype == torch.float32
