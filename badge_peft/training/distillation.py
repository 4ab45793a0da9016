"""The loss of an exit that follows another exit's distribution and not the label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from badge_peft.utils.problem import problem_of


def distillation_loss(student: Tensor, teacher: Tensor, problem_type: str, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of logits [B, K], the mean over rows; multi-label: summed over labels; regression:
    squared difference. The teacher comes without gradient."""
    student, teacher = student.float(), teacher.float()
    problem = problem_of(problem_type)
    if not problem.gives_labels:
        return F.mse_loss(student, teacher)
    student, teacher = student / temperature, teacher / temperature
    if not problem.many_labels:
        kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
        return kl * temperature**2
    both = torch.stack([student, -student], dim=-1), torch.stack([teacher, -teacher], dim=-1)
    kl = F.kl_div(F.logsigmoid(both[0]), F.logsigmoid(both[1]), reduction="sum", log_target=True)
    return kl / len(student) * temperature**2
