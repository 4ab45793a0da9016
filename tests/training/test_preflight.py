"""What is refused before a training starts; with models and data sets in test_trainer.py and test_objectives.py."""

from __future__ import annotations

import pytest

from badge_peft.training import MultiExitTrainer, MultiExitTrainingArguments
from badge_peft.training.preflight import check_training

from .runs import arguments, make


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
