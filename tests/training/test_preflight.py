"""What is refused before a training starts; with models and trainers in test_trainer.py and test_objectives.py."""

from __future__ import annotations

import pytest
import torch

from badge_peft.training import MultiExitTrainingArguments
from badge_peft.training.objectives import Alternating, Objective
from badge_peft.training.preflight import (
    check_batch_metrics,
    check_best_model,
    check_evaluation,
    check_final_exit,
    check_processes,
)


@pytest.mark.parametrize(("started", "known", "fails"), [(1, 1, False), (2, 1, True), (2, 2, False)])
def test_processes_that_do_not_know_of_one_another(started, known, fails, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(started))
    if fails:
        with pytest.raises(ValueError, match="2 processes were started, but each would train alone.*use_cpu=True"):
            check_processes(known)
    else:
        check_processes(known)


def test_steps_without_a_gradient() -> None:
    check_final_exit(Objective(), [1, 2], trains_final_exit=False)
    check_final_exit(Alternating(), [1, 2], trains_final_exit=True)
    with pytest.raises(ValueError, match="Alternating trains exit 2 alone"):
        check_final_exit(Alternating(), [1, 2], trains_final_exit=False)


def test_evaluations_without_labels(tmp_path) -> None:
    args = MultiExitTrainingArguments(
        str(tmp_path), eval_strategy="epoch", metric_for_best_model="s_avg", use_cpu=True, report_to="none"
    )
    asked = []

    def batches(rows):
        asked.append(rows)
        return [{"labels": torch.zeros(1)}] if rows == [{"text": "labeled by the collator"}] else []

    check_evaluation(args, [{"label": 1}], ["labels"], batches)
    assert not asked  # the columns say it
    check_evaluation(args, [{"text": "labeled by the collator"}], ["labels"], batches)
    assert len(asked) == 1
    with pytest.raises(ValueError, match="metric_for_best_model='s_avg' .* no labels.*column 'labels'"):
        check_evaluation(args, [{"text": "a"}], ["labels"], batches)
    check_evaluation(args, None, ["labels"], batches)


def test_scores_of_one_batch_at_a_time(tmp_path) -> None:
    args = MultiExitTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    check_batch_metrics(args)
    args.batch_eval_metrics = True
    with pytest.raises(ValueError, match="batch_eval_metrics=True is not allowed: the scores of the exits"):
        check_batch_metrics(args)


def test_the_best_checkpoint_of_another_adapter(tmp_path) -> None:
    args = MultiExitTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    check_best_model(args, "second")
    args.load_best_model_at_end = True
    check_best_model(args, "default")
    with pytest.raises(ValueError, match="load_best_model_at_end=True is not .* active adapter 'second'"):
        check_best_model(args, "second")
