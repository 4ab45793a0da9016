"""`MultiExitTrainer`: scores per exit, the best checkpoint by them, learning rates by part, resuming."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset as TextDataset
from transformers import EvalPrediction, TrainingArguments

from badge_peft import exit_scores
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.training import MultiExitTrainer, multi_exit_arguments, parameter_groups
from badge_peft.training.objectives import SingleExit
from badge_peft.training.preflight import check_evaluation
from badge_peft.training.sampling import sampling
from tests import reference
from tests.models import exits_of, make_badge, needs_safe_torch_load

from .runs import (
    EACH_STEP,
    MULTI,
    PROBLEMS,
    REGRESSION,
    Rows,
    Stop,
    arguments,
    close,
    make,
    make_trainer,
    moved,
    scripted,
    weights,
)  # fmt: skip


def check(trainer):
    check_evaluation(trainer.args, trainer.eval_dataset, trainer.label_names, trainer.get_eval_dataloader)


def expected_scores(model, data, metric):
    exits = exits_of(model.eval(), data.batch)
    config = model.peft_config["default"]
    numbers = model.base_model.exit_layers()
    return exit_scores(ExitLogits(exits, data.labels, numbers, config.problem_type), metric)


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("exit_layers", [None, [0, 2]], ids=str)
@pytest.mark.parametrize(("problem_type", "num_labels"), PROBLEMS)
def test_scores_of_an_evaluation(problem_type, num_labels, exit_layers, tmp_path):
    data = Rows(problem_type, num_labels, rows=40)
    model = make(problem_type, num_labels, exit_layers=exit_layers)
    others = Rows(problem_type, num_labels)
    found = make_trainer(tmp_path, model, others, eval_dataset=data, per_device_eval_batch_size=3).evaluate()
    scores = expected_scores(model, data, "pearson" if problem_type == REGRESSION else "accuracy")
    assert len(set(scores.per_exit)) > 1
    numbers = model.base_model.exit_layers()
    assert numbers == ([1, 2, 3] if exit_layers is None else [0, 2, 3])
    expected = {f"eval_exit_{m}": s for m, s in zip(numbers, scores.per_exit, strict=True)}
    expected |= {"eval_s_avg": scores.avg, "eval_s_best": scores.best, "eval_final": scores.per_exit[-1]}
    names = ("eval_exit_", "eval_s_", "eval_final")
    assert {k: v for k, v in found.items() if k.startswith(names)} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("metric", ["macro_f1", "matthews", lambda predictions, labels: float(predictions.sum())])
def test_metric(metric, tmp_path):
    data, model = Rows(), make()
    found = make_trainer(tmp_path, model, Rows(rows=5), eval_dataset=data, metric=metric).evaluate(
        metric_key_prefix="dev"
    )
    scores = expected_scores(model, data, metric)
    assert [found[f"dev_exit_{m}"] for m in (1, 2, 3)] == pytest.approx(scores.per_exit)
    assert found["dev_s_avg"] == pytest.approx(sum(scores.per_exit) / 3)


@pytest.mark.parametrize("learn_to_exit", [False, True])
def test_compute_metrics_of_the_user_sees_full_depth_and_what_it_asks_for(learn_to_exit, tmp_path):
    seen: list[EvalPrediction] = []
    options = {"include_for_metrics": ["inputs", "loss"], "per_device_eval_batch_size": 3}
    options |= {"compute_metrics": lambda prediction: seen.append(prediction) or {"mine": 7.0}}
    data, model = Rows(), make(learn_to_exit=learn_to_exit)
    found = make_trainer(tmp_path, model, Rows(rows=5), eval_dataset=data, **options).evaluate()
    assert found["eval_mine"] == 7.0 and "eval_s_avg" in found
    assert isinstance(seen[0].predictions, np.ndarray)
    full_depth = exits_of(model.eval(), data.batch)[:, -1].numpy()
    np.testing.assert_allclose(seen[0].predictions, full_depth, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(seen[0].label_ids, data.labels.numpy())
    np.testing.assert_array_equal(seen[0].inputs, data.batch["input_ids"].numpy())
    assert seen[0].losses.mean() == pytest.approx(found["eval_loss"])


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("learn_to_exit", [False, True])
def test_predict(learn_to_exit, labeled, tmp_path):
    data, model = Rows(labeled=labeled), make(learn_to_exit=learn_to_exit)
    output = make_trainer(tmp_path, model, Rows(rows=5), per_device_eval_batch_size=3).predict(data)
    logits = exits_of(model.eval(), data.batch)[:, -1].numpy()
    np.testing.assert_allclose(output.predictions, logits, rtol=1e-4, atol=1e-5)
    if labeled:
        scores = expected_scores(model, data, "accuracy")
        assert output.metrics["test_s_avg"] == pytest.approx(scores.avg)
        np.testing.assert_array_equal(output.label_ids, data.labels.numpy())
    else:
        assert "test_s_avg" not in output.metrics


@pytest.mark.parametrize("ignore_keys", [None, [], ["hidden_states"]])
def test_keys_to_ignore(ignore_keys, tmp_path):
    trainer = make_trainer(tmp_path, make(learn_to_exit=True))
    assert trainer.evaluate(ignore_keys=ignore_keys)["eval_s_avg"] == trainer.evaluate()["eval_s_avg"]


def test_loss_of_an_evaluation_is_the_objectives(tmp_path):
    data, model = Rows(), make()
    exits = exits_of(model, data.batch)
    losses = [float(reference.cross_entropy(exits[:, m], data.labels)) for m in range(3)]
    for options, expected in (
        ({}, sum(losses)),
        ({"exit_weights": [1.0, 2.0, 3.0]}, losses[0] + 2 * losses[1] + 3 * losses[2]),
        ({"objective": "single_exit", "depth": 1}, losses[0]),
    ):
        trainer = make_trainer(tmp_path, model, Rows(rows=5), eval_dataset=data, **options)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_wrong_labels_are_refused(tmp_path):
    data = Rows()
    data.labels[5] = 3
    with pytest.raises(ValueError, match="label 3 of row . is out of range.*num_labels=3"):
        make_trainer(tmp_path, make(), data).train()


def test_problem_type_that_the_labels_say(tmp_path):
    model = make(problem_type=None)
    make_trainer(tmp_path, model, Rows(MULTI)).train()
    assert model.peft_config["default"].problem_type == MULTI


# ------------------------------------------------------------------------------------------------- the best checkpoint


SCORES = [[0.1, 0.2, 0.9], [0.6, 0.5, 0.4], [0.7, 0.1, 0.1], [0.2, 0.3, 0.3]]
# s_avg: 0.4, 0.5, 0.3, 0.27; s_best: 0.9, 0.6, 0.7, 0.3


@pytest.mark.parametrize(
    ("options", "name", "best"),
    [
        ({}, "s_avg", 2),
        ({"metric_for_best_model": "s_best", "greater_is_better": True}, "s_best", 1),
        ({"metric_for_best_model": "exit_1", "greater_is_better": True}, "exit_1", 3),
        ({"metric_for_best_model": "eval_final", "greater_is_better": False}, "eval_final", 3),
        ({"objective": "single_exit", "depth": 1}, "exit_1", 3),
        ({"objective": SingleExit(depth=1)}, "exit_1", 3),
    ],
    ids=str,
)
def test_the_best_checkpoint_is_loaded_at_the_end(options, name, best, tmp_path):
    model = make(backbone="full")
    trainer = make_trainer(tmp_path, model, metric=scripted(SCORES), max_steps=4, **EACH_STEP, **options)
    assert trainer.args.metric_for_best_model == name
    trainer.train()
    assert trainer.state.best_global_step == best
    key = name.removeprefix("eval_")
    values = {"s_avg": np.mean, "s_best": max, "exit_1": lambda s: s[0], "final": lambda s: s[-1]}[key]
    assert trainer.state.best_metric == pytest.approx(values(SCORES[best - 1]))
    stopped = make(backbone="full")
    plain = {key: value for key, value in options.items() if key in ("objective", "depth")}
    make_trainer(tmp_path / "other", stopped, max_steps=best, **plain).train()
    close(weights(model), weights(stopped))


def test_without_evaluation_nothing_is_selected(tmp_path):
    trainer = make_trainer(tmp_path, make(), max_steps=1)
    assert trainer.args.metric_for_best_model is None
    trainer.train()
    assert trainer.state.best_metric is None


@pytest.mark.parametrize(("patience", "steps"), [(1, 3), (2, 4), (None, 6)])
def test_early_stopping(patience, steps, tmp_path):
    metric = scripted([*SCORES, [0.1] * 3, [0.1] * 3])
    trainer = make_trainer(tmp_path, make(), metric=metric, max_steps=6, early_stopping_patience=patience, **EACH_STEP)
    assert trainer.train().global_step == steps
    assert trainer.state.best_global_step == 2


@needs_safe_torch_load
def test_a_resumed_training_stops_where_an_uninterrupted_one_does(tmp_path):
    """Step 2 is the best; with a patience of 2 the end comes at step 4, also where step 3 was in another process."""
    options = {"max_steps": 6, "early_stopping_patience": 2, **EACH_STEP}
    later = [[0.1] * 3, [0.1] * 3]
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, make(), metric=scripted([*SCORES, *later]), callbacks=[Stop(4)], **options).train()
    trainer = make_trainer(tmp_path, make(), metric=scripted([*SCORES[3:], *later]), **options)
    assert trainer.train(resume_from_checkpoint=True).global_step == 4
    patient = make_trainer(
        tmp_path, make(), metric=scripted([*SCORES[3:], *later]), **{**options, "early_stopping_patience": 3}
    )
    patient.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert patient.state.global_step == 5  # the patience is that of the new call


@pytest.mark.parametrize("objective", ["joint", "two_stage"])
@pytest.mark.parametrize(
    "options", [{}, {"metric_for_best_model": "s_best"}, {"load_best_model_at_end": False}], ids=str
)
def test_evaluation_rows_without_labels_are_refused_before_training(options, objective, tmp_path):
    trainer = make_trainer(tmp_path / "out", make(), objective=objective, **{**EACH_STEP, **options})
    bare = Rows(labeled=False)
    table = TextDataset.from_list([{k: v.tolist() for k, v in bare[i].items()} for i in range(len(bare))])
    for trainer.eval_dataset in (bare, table):
        name = options.get("metric_for_best_model", "s_avg")
        with pytest.raises(ValueError, match=f"metric_for_best_model='{name}' .* no labels.*column 'labels'"):
            trainer.train()
    assert trainer.state.global_step == 0


def test_evaluation_rows_that_have_labels_in_another_way(tmp_path):
    """A collator may make them of any column; random numbers stay the same."""
    trainer = make_trainer(tmp_path, make(), max_steps=1, remove_unused_columns=False, **EACH_STEP)
    collate = trainer.data_collator

    def with_labels(rows):
        batch = collate(rows)
        return {"labels" if name == "truth" else name: value for name, value in batch.items()}

    labeled = Rows()
    rows = [{**Rows(labeled=False)[i], "truth": int(labeled.labels[i])} for i in range(len(labeled))]
    trainer.data_collator, trainer.eval_dataset = with_labels, rows
    state = torch.get_rng_state()
    check(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    trainer.train()
    assert trainer.state.best_global_step == 1
    trainer.eval_dataset, trainer.args.eval_strategy = Rows(labeled=False), "no"
    check(trainer)


@pytest.mark.parametrize("objective", ["joint", "two_stage"])
def test_one_of_several_evaluation_sets_chooses(objective, tmp_path):
    sets = {"a": Rows(labeled=False), "a_b": Rows()}
    trainer = make_trainer(tmp_path, make(), objective=objective, **EACH_STEP)
    trainer.eval_dataset = sets
    with pytest.raises(ValueError, match="metric_for_best_model='s_avg' .* several sets.*'a', 'a_b'"):
        trainer.train()
    options = {**EACH_STEP, "metric_for_best_model": "a_b_s_avg"}
    trainer = make_trainer(tmp_path, make(), objective=objective, max_steps=1, **options)
    trainer.eval_dataset = {"a": Rows(), "a_b": Rows(labeled=False)}
    with pytest.raises(ValueError, match="metric_for_best_model='a_b_s_avg' .* no labels"):
        trainer.train()
    trainer.eval_dataset = sets
    trainer.train()
    assert trainer.state.best_global_step == 1


# ------------------------------------------------------------------------------------------------------ learning rates


@pytest.mark.parametrize(
    ("fields", "options", "rates"),
    [
        ({"backbone": "full"}, {}, {"backbone": 5e-5, "head": 5e-5, "adapter": 2.5e-3}),
        (
            {"backbone": "full"},
            {"learning_rate": 0.02, "adapter_learning_rate": 0.3, "head_learning_rate": 0.04},
            {"backbone": 0.02, "head": 0.04, "adapter": 0.3},
        ),
        ({}, {"adapter_learning_rate": 0.3}, {"head": 0.03, "adapter": 0.3}),
    ],
    ids=str,
)
def test_learning_rates_by_part(fields, options, rates, tmp_path):
    model = make(**fields)
    off = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    args = multi_exit_arguments(model, str(tmp_path), use_cpu=True, **off, **options)
    optimizer = MultiExitTrainer(model=model, args=args, train_dataset=Rows()).create_optimizer()
    assert type(optimizer) is torch.optim.AdamW
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(rates)


def test_each_training_has_an_optimizer_of_its_own(tmp_path):
    """With the rates that the arguments have by then, and the parameters of its objective."""
    model = make()
    trainer = make_trainer(tmp_path, model, objective="two_stage")
    trainer.train()
    before = weights(model)
    trainer.args.objective, trainer.args.adapter_learning_rate, trainer.args.head_learning_rate = "joint", 0.0, 0.1
    trainer.train()
    assert moved(before, weights(model)) == {name for name in before if ".modules_to_save." in name}


def test_a_kind_of_optimizer(tmp_path):
    kind = (torch.optim.Adagrad, {"eps": 0.5})
    trainer = MultiExitTrainer(make(), arguments(tmp_path), train_dataset=Rows(), optimizer_cls_and_kwargs=kind)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.Adagrad and optimizer.defaults["eps"] == 0.5
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"head": 2.5e-4, "adapter": 2.5e-3}
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs has lr=0.3"):
        MultiExitTrainer(make(), arguments(tmp_path), optimizer_cls_and_kwargs=(torch.optim.Adagrad, {"lr": 0.3}))


def test_a_given_optimizer_is_used_or_refused(tmp_path):
    model = make()
    given, before = torch.optim.SGD(parameter_groups(model, 0.5)), weights(model)
    trainer = MultiExitTrainer(model, arguments(tmp_path), train_dataset=Rows(), optimizers=(given, None))
    trainer.args.objective = "two_stage"
    with pytest.raises(ValueError, match="optimizers=... is not allowed with objective='two_stage'"):
        trainer.train()
    assert not moved(before, weights(model))
    trainer.args.objective = "joint"
    for _ in range(2):
        trainer.train()
        assert trainer.optimizer.optimizer is given


def test_a_schedule_scales_every_rate(tmp_path):
    trainer = make_trainer(tmp_path, make(backbone="full"), max_steps=4, lr_scheduler_type="linear", weight_decay=0.1)
    trainer.train()
    start = {"backbone": 0.01, "head": 0.01, "adapter": 0.1}
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.0, abs=1e-9) and group["initial_lr"] == start[group["name"]]
        assert group["weight_decay"] == (0.1 if all(p.dim() > 1 for p in group["params"]) else 0.0)


def test_arguments_are_the_papers(tmp_path):
    model = make(backbone="lora")
    args = multi_exit_arguments(model, str(tmp_path), num_train_epochs=25, learning_rate=0.5)
    assert isinstance(args, TrainingArguments)
    assert args.get_warmup_steps(1000) == 100
    assert (args.learning_rate, args.num_train_epochs, args.lr_scheduler_type) == (0.5, 25, "linear")
    assert (args.eval_strategy, args.save_strategy, args.load_best_model_at_end) == ("epoch", "epoch", True)
    assert (args.metric_for_best_model, args.greater_is_better, args.report_to) == ("s_avg", True, [])
    assert all(getattr(args, name) == value for name, value in sampling(by_length=True).items())
    assert multi_exit_arguments(model, str(tmp_path)).learning_rate == 1e-3
    assert multi_exit_arguments(make(backbone="full"), str(tmp_path)).learning_rate == 5e-5


# ------------------------------------------------------------------------------------------------- resuming, searching


@needs_safe_torch_load
@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"backbone": "full", "exit_dropout": 0.3}, {"objective": "alternating"}),
        ({"backbone": "lora", "learn_to_exit": True}, {"objective": "gradient_equilibrium"}),
        ({"exit_type": "past_future", "final_exit": "exit"}, {"objective": "past_future"}),
    ],
    ids=str,
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(fields, options, tmp_path):
    options = {**options, "max_steps": 5, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    options |= {"optim": "adamw_torch", "lr_scheduler_type": "linear"}
    options |= {"learning_rate": 0.001, "adapter_learning_rate": 0.01}
    whole = make(**fields)
    make_trainer(tmp_path / "whole", whole, **options).train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "cut", make(**fields), callbacks=[Stop(4)], **options).train()
    again = make(**fields)
    trainer = make_trainer(tmp_path / "cut", again, **options)
    trainer.train(resume_from_checkpoint=True)
    found, expected = weights(again), weights(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    state = json.loads((tmp_path / "cut" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["global_step"] == 5


def test_a_model_without_an_adapter_of_ours(tmp_path):
    with pytest.raises(ValueError, match="carries no BADGE adapter"):
        MultiExitTrainer(model=make_badge().unload(), args=arguments(tmp_path), train_dataset=Rows())
