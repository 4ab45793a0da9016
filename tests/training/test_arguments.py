"""`MultiExitTrainingArguments`: checked when made, saved, parsed, searched, overridden by the trainer's keywords."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from badge_peft.training import MultiExitTrainer, MultiExitTrainingArguments, multi_exit_arguments
from badge_peft.training.objectives import OBJECTIVES, Objective

from .runs import Rows, Stop, arguments, make, make_trainer, moved, weights

OWN = {
    "objective": "two_stage",
    "depth": 2,
    "exit_weights": [0.5, 1.0, 2.0],
    "class_weights": [1.0, 2.0, 0.5],
    "distillation": 0.25,
    "distillation_temperature": 2.0,
    "adapter_learning_rate": 0.3,
    "head_learning_rate": 0.04,
    "exit_metric": "macro_f1",
    "early_stopping_patience": 4,
    "standardize": False,
    "exit_start": "random",
    "cache_states": False,
    "cache_dtype": "bfloat16",
    "cache_memory_gb": 0.5,
}
CPU = {"use_cpu": True, "report_to": "none"}


def own_fields(args: TrainingArguments) -> dict:
    return {name: getattr(args, name) for name in OWN}


def test_the_fields_are_these() -> None:
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {f.name: f for f in dataclasses.fields(MultiExitTrainingArguments) if f.name not in inherited}
    assert own.keys() == OWN.keys()
    assert all(field.metadata["help"] for field in own.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "joined"}, f"objective='joined' is not allowed: it must be one of {', '.join(OBJECTIVES)}"),
        ({"objective": "single_exit"}, "objective='single_exit' needs depth: the block number"),
        ({"depth": -1}, "depth=-1 is not allowed: it must be a whole number of at least 0"),
        ({"exit_weights": "linaer"}, "exit_weights='linaer' is not allowed: it must be one of uniform, linear"),
        ({"exit_weights": [0.0, -1.0]}, r"exit_weights=\[0.0, -1.0\] is not allowed: .* numbers >= 0"),
        ({"exit_weights": "[1, 2"}, r"exit_weights='\[1, 2' is not allowed"),
        ({"distillation": 1.5}, r"distillation=1.5 is not allowed: it is a share, in \[0, 1\]"),
        ({"distillation": "half"}, "distillation='half' is not allowed"),
        ({"objective": "past_future", "distillation": 0.5}, "distillation=0.5 .* with objective='past_future'"),
        ({"objective": "single_exit", "distillation": 0.5}, "distillation=0.5 .* with objective='single_exit'"),
        ({"distillation_temperature": 0.0}, "distillation_temperature=0.0 is not allowed: it must be positive"),
        ({"adapter_learning_rate": -0.1}, "adapter_learning_rate=-0.1 is not allowed: .* at least 0"),
        ({"head_learning_rate": float("nan")}, "head_learning_rate=nan is not allowed"),
        ({"exit_metric": "acuracy"}, "exit_metric='acuracy' is not allowed: it must be one of accuracy, "),
        ({"exit_start": "zero"}, "exit_start='zero' is not allowed: it must be one of regression, random"),
        ({"early_stopping_patience": 0}, "early_stopping_patience=0 is not allowed: .* at least 1"),
        ({"cache_states": "sometimes"}, "cache_states='sometimes' is not allowed: it must be True, False or 'auto'"),
        ({"cache_dtype": "int8"}, "cache_dtype='int8' is not allowed: it must be one of float16, bfloat16, float32"),
        ({"cache_memory_gb": -1}, "cache_memory_gb=-1 is not allowed: it must be at least 0"),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_when_it_is_given(values, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        MultiExitTrainingArguments(str(tmp_path), **CPU, **values)
    with pytest.raises(ValueError, match=message):
        multi_exit_arguments(make(), str(tmp_path), **CPU, **values)
    keywords = {"metric" if name == "exit_metric" else name: value for name, value in values.items()}
    with pytest.raises(ValueError, match=message):
        MultiExitTrainer(make(), arguments(tmp_path), train_dataset=Rows(), **keywords)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"objective": "single_exit", "depth": 7},
            r"depth=7 is not allowed: the model has exits at blocks \[1, 2, 3\]",
        ),
        ({"objective": "past_future"}, r"needs BadgeConfig\(exit_type='past_future', final_exit='exit'\)"),
        ({"exit_weights": [1.0, 2.0]}, r"exit_weights has 2 numbers, but there are 3 exits, at blocks \[1, 2, 3\]"),
    ],
    ids=str,
)
def test_what_the_model_has_no_exit_for_is_refused_before_training(values, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make(), **values)
    trainer = make_trainer(tmp_path, make())
    for name, value in values.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_tokens_are_not_shown(tmp_path) -> None:
    text = repr(MultiExitTrainingArguments(str(tmp_path), hub_token="secret", depth=2, **CPU))
    assert "secret" not in text and "depth=2" in text


# ---------------------------------------------------------------------------------------------------- saved and parsed


def test_every_checkpoint_has_them(tmp_path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path, make(), objective="alternating", distillation=0.5, metric="macro_f1", **options).train()
    args = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert isinstance(args, MultiExitTrainingArguments)
    found = (args.objective, args.distillation, args.exit_metric, args.adapter_learning_rate)
    assert found == ("alternating", 0.5, "macro_f1", 0.1)


@pytest.mark.parametrize(("text", "expected"), [("[0.5, 1, 2]", [0.5, 1.0, 2.0]), ("linear", "linear")])
def test_parsed_from_a_command_line(text, expected, tmp_path) -> None:
    parser = HfArgumentParser(MultiExitTrainingArguments)
    values = {**OWN, "exit_weights": text}
    line = [
        part
        for name, value in values.items()
        for part in (f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)]))
    ]
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", *line])
    assert own_fields(args) == {**OWN, "exit_weights": expected}
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu"])
    assert own_fields(args) == own_fields(MultiExitTrainingArguments(str(tmp_path), **CPU))
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--objective", "joined"])
    assert "Share of the loss of exits below M" in parser.format_help()


def test_there_and_back_by_dicts_and_files(tmp_path) -> None:
    args = MultiExitTrainingArguments(str(tmp_path), **CPU, **OWN)
    assert {name: args.to_dict()[name] for name in OWN} == OWN
    stored = json.loads(args.to_json_string())
    values = {name: stored[name] for name in ("output_dir", "use_cpu", *OWN)}
    (tmp_path / "args.json").write_text(json.dumps(values))
    parser = HfArgumentParser(MultiExitTrainingArguments)
    for (again,) in (parser.parse_dict(values), parser.parse_json_file(str(tmp_path / "args.json"))):
        assert own_fields(again) == OWN


# ----------------------------------------------------------------------------------------------------- in the trainer


def test_keywords_of_the_trainer_win_and_the_given_arguments_stay(tmp_path) -> None:
    args = MultiExitTrainingArguments(str(tmp_path), distillation=0.5, eval_strategy="steps", eval_steps=1, **CPU)
    before = args.to_dict()
    trainer = MultiExitTrainer(
        make(), args, train_dataset=Rows(), eval_dataset=Rows(), adapter_learning_rate=0.2, metric="macro_f1"
    )
    found = trainer.args
    assert (found.distillation, found.adapter_learning_rate, found.exit_metric) == (0.5, 0.2, "macro_f1")
    assert found.metric_for_best_model == "s_avg" and found.greater_is_better
    assert args.to_dict() == before


def test_plain_arguments_do(tmp_path) -> None:
    defaults = own_fields(MultiExitTrainingArguments(str(tmp_path), **CPU))
    plain = arguments(tmp_path, weight_decay=0.25)
    before = plain.to_dict()
    trainer = MultiExitTrainer(make(), plain, train_dataset=Rows(), objective="alternating")
    assert isinstance(trainer.args, MultiExitTrainingArguments)
    assert {**trainer.args.to_dict(), **before} == trainer.args.to_dict()
    assert own_fields(trainer.args) == {**defaults, "objective": "alternating"}
    assert plain.to_dict() == before and not hasattr(plain, "objective")
    trainer.train()


def test_without_arguments(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = MultiExitTrainer(make(), train_dataset=Rows(), distillation=0.5)
    assert trainer.args.distillation == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [("depth", 2), ("exit_weights", "linear"), ("distillation", 0.5), ("distillation_temperature", 2.0)],
)
def test_what_an_objective_of_ones_own_does_not_read(name, value, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r} would be ignored: .* give it to Objective"):
        make_trainer(tmp_path, make(), objective=Objective(), **{name: value})


def test_arguments_are_read_by_each_training(tmp_path) -> None:
    model = make()
    trainer = make_trainer(tmp_path, model, objective="single_exit", depth=1)
    trainer.train()
    before = weights(model)
    trainer.args.depth = 2
    trainer.train()
    names = {name for name in moved(before, weights(model)) if ".badge_" in name}
    assert names and all(".layer.1." in name for name in names)


def test_search_over_our_own_fields(tmp_path) -> None:
    """Each trial trains with its objective, also where it has two stages, and at its rate."""
    trained: list[tuple[str, float, set[int]]] = []

    class Watching(MultiExitTrainer):
        def train(self, *args, **kwargs):
            output = super().train(*args, **kwargs)
            (rate,) = {g["lr"] for g in self.optimizer.param_groups if g["name"] == "adapter"}
            names = {
                m for m in (1, 2, 3) if any(f".layer.{m - 1}.badge_" in n for n in moved(start, weights(self.model)))
            }
            trained.append((self.args.objective, rate, names))
            return output

    start = weights(make(train_head=False))
    trainer = Watching(
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=3),
        model_init=lambda: make(train_head=False),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        depth=1,
        standardize=False,
        exit_start="random",
    )
    objectives = ["joint", "single_exit", "two_stage"]
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {
            "objective": objectives[trial.number],
            "adapter_learning_rate": 0.01 * (trial.number + 1),
        },
        compute_objective=lambda metrics: metrics["eval_s_avg"],
        n_trials=3,
        direction="maximize",
        backend="optuna",
    )
    assert best.objective is not None  # in which Trainer keeps the result of a trial
    assert [objective for objective, _, _ in trained] == objectives
    assert [rate for _, rate, _ in trained] == pytest.approx([0.01, 0.02, 0.03])
    assert [exits for _, _, exits in trained] == [{1, 2}, {1}, {1, 2}]


def test_the_score_of_a_trial_is_that_of_its_objective(tmp_path) -> None:
    trainer = make_trainer(tmp_path, make(), eval_strategy="steps", eval_steps=1)
    assert trainer.args.metric_for_best_model == "s_avg"
    trainer.args.objective, trainer.args.depth = "single_exit", 2
    with pytest.raises(KeyboardInterrupt):
        trainer.add_callback(Stop(1))
        trainer.train()
    assert trainer.args.metric_for_best_model == "exit_2"
