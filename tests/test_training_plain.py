"""The plain `transformers.Trainer` trains a BADGE model; nothing of ours has to be there but the model."""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

from badge_peft import parameter_groups
from tests import reference
from tests.models import (
    checkpoint,
    exits_of,
    make_badge,
    make_batch,
    make_labels,
    make_model,
    needs_safe_torch_load,
    shake,
)

KINDS = [("single_label_classification", 3), ("multi_label_classification", 3), ("regression", 1)]
ROWS = 12


class Rows(Dataset):
    """Random rows with random labels, each row a dict as a tokenizer gives it."""

    def __init__(self, problem_type: str = "single_label_classification", num_labels: int = 3) -> None:
        self.batch: dict[str, Tensor] = make_batch(rows=ROWS)
        self.labels = make_labels(problem_type, rows=ROWS, num_labels=num_labels)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {**{name: value[i] for name, value in self.batch.items()}, "labels": self.labels[i]}


def arguments(path: Path, **changes: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(path),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
        "learning_rate": 0.02,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**{**defaults, **changes})


def make_trainer(path: Path, model: Any, data: Rows | None = None, metrics: Any = None, **changes: Any) -> Trainer:
    data = Rows() if data is None else data
    return Trainer(
        model=model, args=arguments(path, **changes), train_dataset=data, eval_dataset=data, compute_metrics=metrics
    )


def trained_weights(model: Any) -> dict[str, Tensor]:
    return {
        name.replace(".default.", "."): p.detach().clone()
        for name, p in model.named_parameters()
        if ".badge_" in name or ".modules_to_save." in name or model.peft_config["default"].backbone == "full"
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("problem_type", "num_labels"), KINDS)
@pytest.mark.parametrize("backbone", ["frozen", "full"])
def test_train_and_evaluate(problem_type, num_labels, backbone, tmp_path):
    data = Rows(problem_type, num_labels)
    seen: list[EvalPrediction] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"mean": float(prediction.predictions.mean())}

    base = make_model(num_labels=num_labels, problem_type=problem_type)
    frozen = {name: p.clone() for name, p in base.named_parameters()}
    model = make_badge(base=base, backbone=backbone)
    before = trained_weights(model)
    trainer = make_trainer(tmp_path, model, data, metrics, max_steps=20)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    end = trainer.evaluate()
    assert np.isfinite(end["eval_loss"]) and end["eval_loss"] < 0.7 * start
    assert all(not torch.equal(p, before[name]) for name, p in trained_weights(model).items() if ".badge_" in name)
    moved = [
        name
        for name, p in model.get_base_model().named_parameters()
        if ".badge_" not in name
        and ".modules_to_save." not in name
        and not torch.equal(p, frozen[name.replace(".base_layer.", ".").replace(".original_module.", ".")])
    ]
    assert bool(moved) == (backbone == "full")
    # compute_metrics sees what it would see from the base model: the logits of full depth and nothing else
    assert isinstance(seen[-1].predictions, np.ndarray)
    expected = model.eval()(**data.batch).logits.detach().numpy()
    np.testing.assert_allclose(seen[-1].predictions, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(seen[-1].label_ids, data.labels.numpy())
    assert end["eval_mean"] == pytest.approx(float(expected.mean()), abs=1e-5)
    np.testing.assert_allclose(trainer.predict(data).predictions, expected, rtol=1e-4, atol=1e-5)


def test_loss_of_an_evaluation_is_the_joint_loss(tmp_path):
    model = make_badge(exit_weights="linear")
    data = Rows()
    found = make_trainer(tmp_path, model, data, per_device_eval_batch_size=ROWS).evaluate()["eval_loss"]
    exits = exits_of(model.eval(), data.batch)
    expected = sum((m + 1) / 6 * reference.cross_entropy(exits[:, m], data.labels) for m in range(3))
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("problem_type", "num_labels"), KINDS)
def test_accumulated_gradients_are_those_of_the_whole_batch(problem_type, num_labels, tmp_path):
    data = Rows(problem_type, num_labels)
    found = []
    for size, steps in ((12, 1), (4, 3)):
        model = make_badge(base=make_model(num_labels=num_labels, problem_type=problem_type), exit_dropout=0.0)
        make_trainer(
            tmp_path,
            model,
            data,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        ).train()
        found.append(trained_weights(model))
    start = trained_weights(make_badge(base=make_model(num_labels=num_labels, problem_type=problem_type)))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=1e-5)
        assert not torch.equal(weight, start[name])


@needs_safe_torch_load
@pytest.mark.parametrize("fields", [{}, {"backbone": "full", "placement": "ffn"}, {"final_exit": "exit"}], ids=str)
def test_resumed_run_ends_where_an_uninterrupted_one_does(fields, tmp_path):
    """Dropout included: the trainer restores the state of the random numbers with the checkpoint."""
    whole = make_badge(**fields)
    make_trainer(tmp_path, whole, max_steps=6, save_strategy="steps", save_steps=3).train()
    checkpoint = tmp_path / "checkpoint-3"
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= {
        p.name for p in checkpoint.iterdir()
    }

    halfway = PeftModel.from_pretrained(make_model(), checkpoint).eval()
    assert not torch.equal(exits_of(halfway, make_batch()), exits_of(whole.eval(), make_batch()))
    resumed = make_badge(**fields)
    make_trainer(tmp_path, resumed, max_steps=6).train(resume_from_checkpoint=str(checkpoint))
    assert same(trained_weights(resumed), trained_weights(whole))
    assert torch.equal(exits_of(resumed.eval(), make_batch()), exits_of(whole.eval(), make_batch()))


@pytest.mark.parametrize("backbone", ["frozen", "full"])
def test_best_checkpoint_is_loaded_at_the_end(backbone, tmp_path):
    scores = iter([0.1, 0.9, 0.3])
    states: list[dict[str, Tensor]] = []
    model = make_badge(backbone=backbone)

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        states.append(trained_weights(model))
        return {"score": next(scores)}

    trainer = make_trainer(
        tmp_path,
        model,
        metrics=metrics,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.train()
    assert len(states) == 3 and Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"
    assert same(trained_weights(model), states[1]) and not same(states[1], states[2])
    trainer.save_model(str(tmp_path / "best"))
    best = PeftModel.from_pretrained(make_model(), tmp_path / "best").eval()
    assert torch.equal(exits_of(best, make_batch()), exits_of(model.eval(), make_batch()))


def test_the_best_checkpoint_of_another_adapter_is_warned_of(tmp_path):
    """transformers loads the checkpoint's own folder, that of `default`, into whatever is active."""
    model = make_badge()
    model.add_adapter("second", deepcopy(model.peft_config["default"]))
    shake(model, only=".second.")
    model.set_adapter("second")
    best = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, model, load_best_model_at_end=True, metric_for_best_model="loss", **best)
    with pytest.warns(UserWarning, match="'second' gets the weights of 'default'.*load_best_model_at_end=True"):
        trainer.train()
    hashes = [model.base_model.weights_hash(name) for name in ("default", "second")]
    assert hashes[0] == hashes[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(Path(trainer.state.best_model_checkpoint, "second"), "second")
    assert model.base_model.weights_hash("second") != hashes[0]


def test_problem_type_that_the_labels_say_is_saved(tmp_path):
    data = Rows("multi_label_classification")
    model = make_badge()
    trainer = make_trainer(tmp_path, model, data)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "out")
    assert loaded.peft_config["default"].problem_type == "multi_label_classification"


def test_gradient_checkpointing(tmp_path):
    names = {field.name for field in fields(TrainingArguments)}
    new = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    found = []
    for on in (False, True):
        model = make_badge(backbone="full", placement="ffn", exit_dropout=0.0)
        make_trainer(
            tmp_path,
            model,
            max_steps=2,
            **({new: True, f"{new}_kwargs": {"use_reentrant": False}} if on else {}),
        ).train()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == on
        found.append(trained_weights(model))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=1e-5)


def test_two_learning_rates(tmp_path):
    """A rate of its own for the backbone, by the parameter groups that Trainer takes with an optimizer."""
    model = make_badge(backbone="full")
    before = trained_weights(model)
    optimizer = torch.optim.SGD(parameter_groups(model, adapter_lr=0.1, head_lr=0.1, backbone_lr=0.0))
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows(), optimizers=(optimizer, None))
    trainer.train()
    after = trained_weights(model)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if ".badge_" in name or ".modules_to_save." in name} == before.keys() - still


def test_reentrant_checkpointing_of_a_lora_is_refused():
    """transformers 4.57 takes it by default, and no LoRA tensor would move."""
    model = make_badge(backbone="lora").train()
    checkpoint(model.get_base_model(), {"use_reentrant": True})
    for parameter in model.get_input_embeddings().parameters():
        assert not parameter.requires_grad  # so no input of a block has a gradient
    with pytest.raises(RuntimeError, match="re-entrant gradient checkpointing hides what a block computes"):
        model(**make_batch(), labels=make_labels())


def test_reentrant_checkpointing_of_a_lora_whose_blocks_are_not_read():
    """The same gradients where the input of the blocks has one, as transformers 5 sees to; else it is refused."""
    gradients = []
    for kwargs in (None, {"use_reentrant": True}):
        model = make_badge(backbone="lora", placement="none", exit_dropout=0.0, lora={"r": 2, "lora_dropout": 0.0})
        shake(model)
        model.train()
        for dropout in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
            dropout.p = 0.0
        if kwargs is not None:
            checkpoint(model.get_base_model(), kwargs)
        try:
            model(**make_batch(), labels=make_labels()).loss.backward()
        except RuntimeError as error:
            assert kwargs is not None and "use_reentrant" in str(error)
            return
        gradients.append({name: p.grad for name, p in model.named_parameters() if "lora_" in name})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
