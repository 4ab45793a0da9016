"""Stages: which an objective has, in which folders, and which parameters each trains."""

from __future__ import annotations

import pytest
from torch import nn

from badge_peft.early_exit.exit_pass import EarlyExitPass
from badge_peft.training import MultiExitTrainingArguments
from badge_peft.training.objectives import (
    Alternating,
    EarlierExits,
    FinalExit,
    GradientEquilibrium,
    Objective,
    PastFuture,
    SingleExit,
)
from badge_peft.training.passes import GradientEquilibriumPass, ImitationPass
from badge_peft.training.stages import Stage, make_stages

from .runs import make


def arguments(tmp_path, **values) -> MultiExitTrainingArguments:
    return MultiExitTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **values)


@pytest.mark.parametrize(
    ("name", "kinds", "run"),
    [
        ("joint", [Objective], EarlyExitPass),
        ("two_stage", [FinalExit, EarlierExits], EarlyExitPass),
        ("alternating", [Alternating], EarlyExitPass),
        ("gradient_equilibrium", [GradientEquilibrium], GradientEquilibriumPass),
        ("past_future", [PastFuture], ImitationPass),
        ("single_exit", [SingleExit], EarlyExitPass),
    ],
)
def test_stages_of_an_objective(name, kinds, run, tmp_path) -> None:
    share = 0.0 if name in ("single_exit", "past_future") else 0.25
    args = arguments(tmp_path, objective=name, depth=2, distillation=share, distillation_temperature=3.0)
    stages = make_stages(args, "linear")
    assert [type(stage.objective) for stage in stages] == kinds
    for stage in stages:
        assert (stage.objective.distillation, stage.objective.temperature) == (share, 3.0)
        assert stage.objective.exit_pass is run
        assert stage.objective.weights == (None if name == "past_future" else "linear")  # GPF has its own
    args.exit_weights = [1.0, 2.0, 3.0]
    assert make_stages(args, "linear")[-1].objective.weights == [1.0, 2.0, 3.0]
    own = FinalExit()
    assert [stage.objective for stage in make_stages(arguments(tmp_path), "linear", own)] == [own]


def test_arguments_of_a_stage_are_a_copy(tmp_path) -> None:
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "eval_loss"}
    args = arguments(tmp_path, objective="two_stage", load_best_model_at_end=True, greater_is_better=False, **options)
    first, second = make_stages(args, "uniform")
    found = [(own.output_dir, own.metric_for_best_model) for own in (first.arguments(args), second.arguments(args))]
    assert found == [(f"{tmp_path}/stage1", "final"), (f"{tmp_path}/stage2", "eval_loss")]
    assert first.arguments(args).greater_is_better and not second.arguments(args).greater_is_better
    assert first.arguments(args, "a").metric_for_best_model == "a_final"
    assert (args.output_dir, args.metric_for_best_model) == (str(tmp_path), "eval_loss")
    args.load_best_model_at_end = False
    assert first.arguments(args).metric_for_best_model == "eval_loss"  # nothing is chosen by it
    assert Stage(Objective()).arguments(args) is args


def test_what_a_stage_resumes_from(tmp_path) -> None:
    args = arguments(tmp_path, objective="two_stage")
    first, _ = make_stages(args, "uniform")
    assert first.resume(args, True) is None
    assert first.resume(args, "a folder") == "a folder"
    with pytest.raises(ValueError, match="no whole checkpoint"):
        Stage(Objective()).resume(args, True)
    place = tmp_path / "stage1" / "checkpoint-3"
    place.mkdir(parents=True)
    (place / "trainer_state.json").write_text("{}")
    assert first.resume(args, True) == str(place)
    for name, state in (("checkpoint-4", '{"global_step":'), ("checkpoint-10", None), ("checkpoint-x", "{}")):
        (place.parent / name).mkdir()  # which a process that was killed left half-written
        if state is not None:
            (place.parent / name / "trainer_state.json").write_text(state)
    assert first.resume(args, True) == str(place)


def test_only_the_exits_of_a_frozen_teacher_are_in_training_mode(tmp_path) -> None:
    first, second = make_stages(arguments(tmp_path, objective="two_stage"), "uniform")
    model = make()
    for stage, training in ((first, {True}), (second, {False})):
        model.train()
        stage.set_modes(model, 3)
        of = {name: module.training for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
        assert {mode for name, mode in of.items() if ".badge_" not in name} == training
        assert {module.training for name, module in model.named_modules() if ".badge_" in name} == {True}
    model.eval()
    second.set_modes(model, 3)
    assert not any(module.training for module in model.modules())
