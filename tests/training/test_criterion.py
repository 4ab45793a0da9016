"""Label smoothing, class weights and `compute_loss_func` in the loss of every exit, what has no meaning being refused;
and the loss of an exit that follows another one, against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from badge_peft.training.criterion import Criterion, distillation_loss
from badge_peft.training.objectives import Objective
from tests.models import exits_of

from .runs import (
    MULTI,
    PROBLEMS,
    REGRESSION,
    ROWS,
    SINGLE,
    Rows,
    arguments,
    close,
    kl,
    make,
    make_trainer,
    moved,
    weights,
)  # fmt: skip

WEIGHTS = [1.0, 2.0, 0.5]


def weighted(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, torch.tensor(WEIGHTS), reduction="sum") / num_items_in_batch


def loss_of(trainer):
    return trainer.compute_loss(trainer.model.eval(), trainer.data_collator([*trainer.train_dataset])).item()


def test_label_smoothing_is_that_of_trainer(tmp_path) -> None:
    data, model = Rows(), make()
    logits = exits_of(model.eval(), data.batch).unbind(1)
    expected = sum(LabelSmoother(0.3)({"logits": x}, data.labels).item() for x in logits)
    assert loss_of(make_trainer(tmp_path, model, data, label_smoothing_factor=0.3)) == pytest.approx(expected)


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_class_weights(kind, tmp_path) -> None:
    data, model = Rows(), make()
    logits = exits_of(model.eval(), data.batch).unbind(1)
    trainer = make_trainer(tmp_path, model, data)
    trainer.args.class_weights = kind(WEIGHTS)  # as a search sets it
    trainer.args.check()
    expected = sum(F.cross_entropy(x, data.labels, torch.tensor(WEIGHTS)).item() for x in logits)
    assert loss_of(trainer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fields", "label"), [({"class_weights": [0.0, 1.0, 1.0]}, 0), ({"label_smoothing": 0.1}, -100)], ids=str
)
def test_a_batch_of_which_nothing_counts_has_no_loss(fields, label) -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = Criterion(**fields)(logits, torch.full((4,), label), "single_label_classification")
    loss.backward()
    assert loss == 0 and not logits.grad.any()


@pytest.mark.parametrize("objective", ["joint", "two_stage", "alternating", "gradient_equilibrium", "single_exit"])
def test_objectives_train_by_the_function(objective, tmp_path) -> None:
    """An equal function gives equal weights, with accumulated batches, too."""
    trained = []
    for function in (None, lambda o, y, num_items_in_batch: F.cross_entropy(o.logits, y)):
        model = make(final_exit="exit")
        trainer = make_trainer(
            tmp_path,
            model,
            objective=objective,
            depth=2 if objective == "single_exit" else None,
            per_device_train_batch_size=ROWS // 4,
            gradient_accumulation_steps=2,
        )
        trainer.compute_loss_func = function
        before = weights(model)
        trainer.train()
        trained.append(weights(model))
        assert moved(before, trained[-1])
    close(*trained)


def test_function_knows_how_many_labels_count(tmp_path) -> None:
    data, model = Rows(), make()
    data.labels[0] = -100
    trainer = make_trainer(tmp_path, model, data)
    trainer.compute_loss_func = weighted
    logits, kept = exits_of(model.eval(), data.batch)[1:].unbind(1), data.labels[1:]
    expected = sum(F.cross_entropy(x, kept, torch.tensor(WEIGHTS), reduction="sum").item() for x in logits)
    assert loss_of(trainer) == pytest.approx(expected / (ROWS - 1))


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p[0] in (MULTI, REGRESSION)], ids=str)
@pytest.mark.parametrize("name", ["label_smoothing_factor", "class_weights"])
def test_refused_without_classes(name, problem, tmp_path) -> None:
    trainer = make_trainer(tmp_path, make(*problem), Rows(*problem))
    setattr(trainer.args, name, 0.1 if name == "label_smoothing_factor" else [1.0] * problem[1])
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed for {problem[0]}"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_refused_where_nothing_would_read_them(tmp_path) -> None:
    trainer = make_trainer(tmp_path, make(), label_smoothing_factor=0.1)
    trainer.args.distillation = 1.0
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 would be ignored: the objective reads"):
        trainer.train()
    own = make_trainer(tmp_path, make(), objective=Objective(distillation=1.0), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 would be ignored: the objective reads"):
        own.train()
    trainer.args.distillation, trainer.compute_loss_func = 0.0, weighted
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 would be ignored with compute_loss_func"):
        trainer.train()
    trainer.args.label_smoothing_factor, trainer.compute_loss_func = 0.0, None
    trainer.args.class_weights = [1.0, 2.0]
    with pytest.raises(ValueError, match="class_weights has 2 numbers, but the model has 3 classes"):
        trainer.train()
    for wrong in ([0, 0, 0], [1, -1, 1], "1", [float("nan"), 1, 1], torch.eye(3)):
        trainer.args.class_weights = wrong
        with pytest.raises(ValueError, match="(?s)class_weights=.* is not allowed: it must be a list or tensor"):
            trainer.train()


@pytest.mark.parametrize("smoothing", [True, False])
def test_plain_trainer_warns_that_no_exit_learns(smoothing, tmp_path) -> None:
    model = make().train()
    options = {} if smoothing else {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.sum()}
    args = arguments(tmp_path, label_smoothing_factor=0.1 if smoothing else 0.0)
    before = weights(model)
    with pytest.warns(UserWarning, match="no labels reach the model .* trains no exit.*use MultiExitTrainer"):
        Trainer(model=model, args=args, train_dataset=Rows(), **options).train()
    assert not [name for name in moved(before, weights(model)) if ".badge_" in name]


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
