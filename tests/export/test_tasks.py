"""Many tasks in one ONNX file: each answers as in a call of the PyTorch model, with a threshold of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from badge_peft import BadgeConfig
from badge_peft.export import OnnxEarlyExitModel, OnnxReranker, OnnxTasksModel, export_tasks_onnx
from tests.early_exit.rules import with_threshold
from tests.export.cuts import one_cut
from tests.models import make_badge, make_batch, make_model, shake
from tests.texts import make_tokenizer, sentences

ROWS, LENGTH = 7, 9
# name -> (fields of BadgeConfig, rule)
TASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stock": ({"train_head": False}, {"policy": "entropy"}),
    "many": ({"num_labels": 5, "exit_pooling": "mean"}, {"policy": "divergence", "patience": 1}),
    "score": (
        {"num_labels": 1, "final_exit": "exit", "problem_type": "regression", "exit_layers": [0, 2]},
        {"policy": "patience", "patience": 1, "threshold": 0.3},
    ),
    "early": ({"num_labels": 2, "final_exit": "exit"}, {"policy": "fixed_depth", "depth": 1}),
    "doubts": ({"final_exit": "exit", "learn_to_exit": True, "placement": "ffn"}, {"policy": "learned"}),
    "cascade": ({"carry": "logits", "exit_layers": [0, 1, 2]}, {"policy": "entropy"}),
    "twin": ({"carry": "logits", "exit_layers": [0, 1, 2]}, {"policy": "entropy"}),  # decides together with cascade
    "steps": (
        {"carry": "logits", "final_exit": "exit", "num_labels": 4},
        {"policy": "entropy", "decide_every": 2},
    ),
    "future": (
        {"exit_type": "past_future", "placement": "none", "final_exit": "exit", "num_labels": 2},
        {"policy": "entropy"},
    ),
}


def make() -> Any:
    model = make_badge(base=make_model(num_hidden_layers=2), adapter_name="stock", **TASKS["stock"][0])
    for seed, (name, (fields, _)) in enumerate(TASKS.items()):
        if name != "stock":
            model.add_adapter(name, BadgeConfig(r=4, **fields))
            shake(model, seed=seed, only=f".{name}.")
    model.eval()
    for name, (_, rule) in TASKS.items():
        model.set_adapter(name)
        if rule["policy"] in ("entropy", "divergence", "learned"):
            with torch.no_grad():
                out = model(**make_batch(ROWS, LENGTH))
            rule = with_threshold(rule, out.exit_logits, model.exit_layers(), 0.5, out.exit_uncertainty)
        model.set_early_exit_config(rule)
    model.set_adapter("stock")
    return model


def check(model: Any, session: OnnxTasksModel, batch: dict[str, torch.Tensor], names: list[str], **rule: Any) -> None:
    want = model.early_exit_forward(**batch, tasks=names)
    found = session(**{name: value.numpy() for name, value in batch.items()}, **rule)
    assert list(found) == names
    for name in names:
        assert found[name].exit_layer.tolist() == want[name].exit_layer.tolist(), name
        np.testing.assert_allclose(found[name].logits, want[name].logits.numpy(), atol=1e-4)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tasks")
    model = make()
    with one_cut(__name__):
        return model, folder, export_tasks_onnx(model, folder, tokenizer=make_tokenizer())


def test_each_task_answers_as_in_pytorch(written: tuple[Any, Path, dict[str, Any]]) -> None:
    model, folder, report = written
    session = OnnxTasksModel.from_pretrained(folder, threads=1)
    assert report["max_difference"] < 1e-4 and list(report["tasks"]) == list(TASKS)
    names = {info.name for info in session.session.get_inputs()}
    assert names == {"input_ids", "attention_mask", "token_type_ids"}  # thresholds have defaults
    assert [info.name for info in session.session.get_outputs()] == [
        f"{task}.{kind}" for task in TASKS for kind in ("logits", "exit_layer")
    ]
    for batch in (make_batch(ROWS, LENGTH), make_batch(1, 5), make_batch(3, LENGTH, side="left")):
        check(model, session, batch, list(TASKS))


def test_names_that_mean_something_inside(tmp_path: Path) -> None:
    """What is kept, left for deeper exits, shared or comes before them begins with such words."""
    policies = {"default": "entropy", "kept_default": "divergence", "left_it": "max_prob", "shared_0": "patience"}
    links: dict[str, Any] = {"carry": "logits", "exit_layers": [1, 2]}
    model = make_badge(base=make_model(num_hidden_layers=2), **links)
    for seed, (name, policy) in enumerate(policies.items()):
        if name != "default":
            model.add_adapter(name, BadgeConfig(r=4, **links))
            shake(model, seed=seed, only=f".{name}.")
        model.set_adapter(name)
        with torch.no_grad():
            logits = model.eval()(**make_batch(ROWS, LENGTH)).exit_logits
        rule = {"policy": policy, "patience": 1} if policy in ("divergence", "patience") else {"policy": policy}
        model.set_early_exit_config(with_threshold(rule, logits, model.exit_layers(), 0.5))
    export_tasks_onnx(model, tmp_path)
    session = OnnxTasksModel.from_pretrained(tmp_path, threads=1)
    check(model, session, make_batch(ROWS, LENGTH), list(policies))


def test_labels_of_each_task_and_none_that_ranks(written: tuple[Any, Path, dict[str, Any]]) -> None:
    model, folder, _ = written
    session = OnnxTasksModel.from_pretrained(folder)
    assert session.labels == {task: model.base_model.label_names(task) for task in TASKS}
    for refused in (lambda: OnnxReranker(session), lambda: OnnxReranker.from_pretrained(folder)):
        with pytest.raises(ValueError, match="many tasks"):
            refused()


def test_each_task_names_the_weights_that_it_was_made_of(
    written: tuple[Any, Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Those of its adapter, as they are saved."""
    model, folder, _ = written
    facts = OnnxTasksModel.from_pretrained(folder).config["tasks"]
    found = {task: facts[task]["weights_hash"] for task in TASKS}
    assert len(set(found.values())) == len(TASKS)
    model.save_pretrained(tmp_path)
    for task in TASKS:
        assert json.loads((tmp_path / task / "adapter_config.json").read_text())["weights_hash"] == found[task]


def test_thresholds_come_with_the_call(written: tuple[Any, Path, dict[str, Any]]) -> None:
    model, folder, _ = written
    session, batch = OnnxTasksModel.from_pretrained(folder, threads=1), make_batch(ROWS, LENGTH)
    ids = {name: value.numpy() for name, value in batch.items()}
    never = session(**ids, threshold={"stock": 0.0, "many": 0.0})
    assert never["stock"].exit_layer.tolist() == never["many"].exit_layer.tolist() == [2] * ROWS
    plain = session(**ids)
    assert never["score"].exit_layer.tolist() == plain["score"].exit_layer.tolist()
    patient = session(**ids, patience=np.int64(2), threshold={"score": np.float32(0.5)})
    assert patient["many"].exit_layer.tolist() == [2] * ROWS
    with pytest.raises(ValueError, match="threshold has 'other', which is no task of this file; they are stock, many"):
        session(**ids, threshold={"other": 1.0})
    with pytest.raises(ValueError, match="threshold='x' is not allowed"):
        session(**ids, threshold="x")  # type: ignore[arg-type]


def test_texts(written: tuple[Any, Path, dict[str, Any]]) -> None:
    model, folder, _ = written
    texts = [text for text, _ in sentences(5)]
    found = OnnxTasksModel.from_pretrained(folder, threads=1).predict(texts, batch_size=2)
    batch = make_tokenizer()(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    out = model.early_exit_forward(**batch, tasks=list(TASKS))
    for name in TASKS:
        assert [answer[name]["exit_layer"] for answer in found] == out[name].exit_layer.tolist()
    assert found[0]["many"]["label"] == f"LABEL_{int(out['many'].logits[0].argmax())}" and "value" in found[0]["score"]


def test_int8(written: tuple[Any, Path, dict[str, Any]], tmp_path: Path) -> None:
    model = written[0]
    with one_cut(__name__):
        report = export_tasks_onnx(model, tmp_path / "int8", int8=True)
        assert report["max_difference"] is None and report["int8"]
        out = OnnxTasksModel.from_pretrained(tmp_path / "int8", threads=1)(**numpy(make_batch(ROWS, LENGTH)))
        assert out["early"].exit_layer.tolist() == [1] * ROWS and out["many"].logits.shape == (ROWS, 5)


def numpy(batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in batch.items()}


@pytest.mark.parametrize(
    "case",
    ["distilbert", *(pytest.param(c, marks=pytest.mark.exhaustive) for c in ("deberta-v2", "modernbert-mean"))],
)
def test_heads_of_other_backbones(case: str, tmp_path: Path) -> None:
    layers = "n_layers" if case == "distilbert" else "num_hidden_layers"
    base = make_model(case, **{layers: 1})
    model = make_badge(case, base=base, adapter_name="stock", train_head=False)
    for name in ("many", "left out"):
        model.add_adapter(name, BadgeConfig(r=4, num_labels=5))
    shake(model, seed=4, only=".many.")
    model.eval()
    names = ["many", "stock"]
    export_tasks_onnx(model, tmp_path, tasks=names, early_exit_config={"policy": "never"})
    session = OnnxTasksModel.from_pretrained(tmp_path)
    want = model.early_exit_forward(**make_batch(ROWS, LENGTH), tasks=names, policy="never")
    found = session(**numpy(make_batch(ROWS, LENGTH)))
    for name in names:
        np.testing.assert_allclose(found[name].logits, want[name].logits.numpy(), atol=1e-4)


def test_what_is_refused(written: tuple[Any, Path, dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    model, of_tasks, _ = written
    with pytest.raises(ValueError, match="no adapter 'other'"):
        export_tasks_onnx(model, tmp_path, tasks=["other"])
    with pytest.raises(ValueError, match="holds a file of many tasks: OnnxTasksModel runs it"):
        OnnxEarlyExitModel.from_pretrained(of_tasks)
    with pytest.raises(ValueError, match="holds a file of one task: OnnxEarlyExitModel runs it"):
        OnnxTasksModel.from_pretrained(folder)
