"""What is refused before a training starts (more is in test_trainer.py and test_objectives.py); and one that runs into
numbers that are not finite stops, and says at which step."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from badge_peft.training import MultiExitTrainer, MultiExitTrainingArguments
from badge_peft.training.preflight import check_parameters, check_training
from badge_peft.tuner.losses import exit_loss, uncertainty_loss

from .runs import REGRESSION, SINGLE, Rows, arguments, make, make_trainer


class Break(TrainerCallback):
    """Makes a weight infinite, as a step that is too large would."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if ".badge_" in name).view(-1)[0] = torch.inf


def test_a_loss_that_is_not_finite_stops_the_training_at_its_step(tmp_path):
    trainer = make_trainer(tmp_path, make(), max_steps=4, adapter_learning_rate=1e38)
    with pytest.raises(ValueError, match="training stopped: the loss of step 2 is nan.*smaller learning rate"):
        trainer.train()


def test_weights_that_the_last_step_broke_are_noticed(tmp_path):
    model = make()
    check_parameters(model, 1)
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad).view(-1)[0] = torch.nan
    check_parameters(model, 1)  # not of this training
    trainer = make_trainer(tmp_path, make(), max_steps=1, callbacks=[Break()])
    with pytest.raises(ValueError, match="training stopped: after step 1, .*badge_.* is not finite"):
        trainer.train()


def test_a_target_that_is_not_finite_is_refused_with_its_row(tmp_path):
    data = Rows(REGRESSION, 1)
    data.labels[:] = torch.nan
    with pytest.raises(ValueError, match="row 0 has the label .nan.*finite numbers"):
        make_trainer(tmp_path, make(REGRESSION, 1), data).train()


def test_rows_without_a_label_teach_and_score_nothing(tmp_path):
    torch.manual_seed(0)
    logits, doubts, labels = torch.randn(4, 3), torch.rand(4), torch.tensor([0, -100, 2, -100])
    kept = labels != -100
    found = uncertainty_loss({1: doubts}, {1: logits}, labels, SINGLE)
    assert found == uncertainty_loss({1: doubts[kept]}, {1: logits[kept]}, labels[kept], SINGLE)
    assert exit_loss(logits, labels, SINGLE) == exit_loss(logits[kept], labels[kept], SINGLE)
    nothing = torch.full((4,), -100)
    assert exit_loss(logits, nothing, SINGLE) == uncertainty_loss({1: doubts}, {1: logits}, nothing, SINGLE) == 0
    data = Rows(rows=12)
    trainer = make_trainer(tmp_path, make(), data)
    few, some = Rows(rows=12), Rows(rows=12)
    some.labels[4:] = -100
    few.labels, few.batch = few.labels[:4], {name: value[:4] for name, value in few.batch.items()}
    scores = [{k: v for k, v in trainer.evaluate(d).items() if "exit_" in k} for d in (some, few)]
    assert scores[0] == scores[1] != {k: v for k, v in trainer.evaluate(data).items() if "exit_" in k}


def test_several_values_per_row_train_and_score(tmp_path):
    data = Rows(REGRESSION, 2)
    trainer = make_trainer(tmp_path, make(REGRESSION, 2), data)
    trainer.train()
    assert -1 <= trainer.evaluate()["eval_exit_1"] <= 1


def test_processes_that_do_not_know_of_one_another(tmp_path, monkeypatch) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    trainer = MultiExitTrainer(make(), args)
    check_training(trainer.args, "default", False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but each would train alone.*use_cpu=True"):
        trainer.train()


def test_scores_of_one_batch_at_a_time(tmp_path) -> None:
    args = arguments(tmp_path, eval_strategy="no")
    args.batch_eval_metrics = True
    with pytest.raises(ValueError, match="batch_eval_metrics=True is not allowed: the scores of the exits"):
        MultiExitTrainer(make(), args)


def test_the_best_checkpoint_of_another_adapter(tmp_path) -> None:
    args = MultiExitTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    check_training(args, "second", False)
    args.load_best_model_at_end = True
    check_training(args, "default", False)
    with pytest.raises(ValueError, match="load_best_model_at_end=True is not .* active adapter 'second'"):
        check_training(args, "second", False)
