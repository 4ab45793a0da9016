"""Tasks that are alike in one graph: their exits are one product, one set of nodes decides, each answers as alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft import BadgeConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.export import OnnxTasksModel, export_tasks_onnx
from badge_peft.export.policies import Decision, grouped
from badge_peft.export.sliced import assemble
from badge_peft.export.trace import export_blocks
from tests.early_exit.reference import SINGLE
from tests.export.table import session_of
from tests.models import make_badge, make_batch, make_model, shake

EXITS, LENGTH = [1, 2, 3], 9
LABELS = {"two": 2, "seven": 7, "three": 3, "five": 5}
ALIKE = ["divergence", "entropy", "max_prob", "patience"]  # whatever the number of labels


def decisions_of(rules: dict[str, Any]) -> dict[str, Decision]:
    return {name: Decision(build_policy(rule), EXITS, LABELS[name], SINGLE) for name, rule in rules.items()}


def check(model: Any, session: Any, rules: dict[str, Any], rows: int, **feed: Any) -> None:
    batch = make_batch(rows, LENGTH)
    want = model.early_exit_forward(**batch, tasks=list(rules), early_exit_config=rules)
    given = {name: value.numpy() for name, value in batch.items()}
    given["token_type_ids"] = np.zeros_like(given["input_ids"])
    names = [f"{task}.{kind}" for task in rules for kind in ("logits", "exit_layer")]
    found = dict(zip(names, session.run(names, {**given, **feed}), strict=True))
    for task in rules:
        assert found[f"{task}.exit_layer"].tolist() == want[task].exit_layer.tolist(), task
        np.testing.assert_allclose(found[f"{task}.logits"], want[task].logits.numpy(), atol=1e-4)


@pytest.fixture(scope="module")
def cut() -> tuple[Any, Any]:
    """Four tasks of like shape with 2, 7, 3 and 5 labels, and the pieces of their model."""
    model = make_badge(adapter_name="two", num_labels=2, final_exit="exit")
    for seed, name in enumerate(["seven", "three", "five"]):
        model.add_adapter(name, BadgeConfig(r=4, num_labels=LABELS[name], final_exit="exit"))
        shake(model, seed=seed, only=f".{name}.")
    model.eval()
    return model, export_blocks(model.base_model, {tuple(LABELS): {*EXITS}})


_SHARED: list[Any] = []


@pytest.fixture(autouse=True)
def _share(cut: Any) -> None:
    _SHARED[:] = [cut]


@settings(deadline=None, derandomize=True, max_examples=25)
@given(data=st.data())
def test_a_group_decides_as_each_alone(data: Any) -> None:
    model, pieces = _SHARED[0]
    shared = {
        "policy": data.draw(st.sampled_from(ALIKE)),
        "divergence": data.draw(st.sampled_from(["ce", "kl", "js", "label"])),
        "window": data.draw(st.sampled_from(["all", "consecutive"])),
        "patience": data.draw(st.none() | st.integers(1, 2)),
    }
    rules = {}
    for name in LABELS:
        rules[name] = {
            **shared,
            "threshold": data.draw(st.none() | st.floats(0.05, 1.5).map(lambda x: x + 1e-4 / 3)),
            "decide_every": data.draw(st.sampled_from([1, 1, 2])),
            "min_exit": data.draw(st.sampled_from([None, None, 2])),
            "max_exit": data.draw(st.sampled_from([None, None, 2])),
        }
    decisions = decisions_of(rules)
    assert [group.tasks for group in grouped(decisions)] == [tuple(LABELS)]
    session = session_of(assemble(pieces, decisions, int8=False))
    check(model, session, rules, data.draw(st.sampled_from([1, 6])))


def test_each_task_takes_a_threshold_and_patience_of_its_own(cut: tuple[Any, Any]) -> None:
    model, pieces = cut
    rules = {name: {"policy": "divergence", "threshold": 0.1 * i} for i, name in enumerate(LABELS, start=1)}
    session = session_of(assemble(pieces, decisions_of(rules), int8=False))
    called = {name: {**rule, "threshold": 1.3 - rule["threshold"], "patience": 1} for name, rule in rules.items()}
    called["three"]["patience"] = 2
    feed = {
        f"{name}.{field}": np.asarray(rule[field], dtype=dtype)
        for name, rule in called.items()
        for field, dtype in (("threshold", np.float32), ("patience", np.int64))
    }
    check(model, session, called, 6, **feed)


def test_weights_of_like_exits_are_in_the_file_once_side_by_side(cut: tuple[Any, Any]) -> None:
    graph = assemble(cut[1], decisions_of(dict.fromkeys(LABELS, {})), int8=False).graph
    sizes = [list(weight.dims) for weight in graph.initializer]
    tasks, rank, hidden = len(LABELS), 4, 32
    assert sizes.count([tasks, rank, hidden]) == len(EXITS) and [rank, hidden] not in sizes
    operations = [node.op_type for node in nodes(graph)]
    assert operations.count("LogSoftmax") == len(EXITS) - 1  # one decision at each exit but the last


def nodes(graph: Any) -> list[Any]:
    """With those of branches."""
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [*graph.node, *(node for branch in inner for node in nodes(branch))]


def test_exits_of_other_shapes_decide_together_too(tmp_path: Path) -> None:
    """The model's own head beside exits at block M, other poolings, ranks and placements: read one by one, or those of
    like shape in a product, and decided side by side."""
    fields: dict[str, dict[str, Any]] = {
        "head": {"num_labels": 5},
        "exit": {"num_labels": 2, "final_exit": "exit"},
        "mean": {"num_labels": 4, "final_exit": "exit", "exit_pooling": "mean"},
        "none": {"num_labels": 3, "placement": "none", "final_exit": "exit"},
        "like": {"num_labels": 6, "final_exit": "exit"},
    }
    stock: dict[str, Any] = {"train_head": False, "exit_layers": [0, 1]}
    model = make_badge(base=make_model(num_hidden_layers=1), adapter_name="stock", **stock)
    for seed, (name, own) in enumerate(fields.items()):
        model.add_adapter(name, BadgeConfig(r=4, exit_layers=[0, 1], **own))
        shake(model, seed=seed, only=f".{name}.")
    names = [*fields, "stock"]
    rules = {name: {"policy": "max_prob", "threshold": 0.35 + 0.07 * i} for i, name in enumerate(names)}
    export_tasks_onnx(model.eval(), tmp_path, tasks=names, early_exit_config=rules)
    session = OnnxTasksModel.from_pretrained(tmp_path, threads=1)
    for rows in (1, 7):
        check(model, session.session, rules, rows)
    out = model.early_exit_forward(**make_batch(7, LENGTH), tasks=names, early_exit_config=rules)
    assert {int(m) for answer in out.values() for m in answer.exit_layer} == {0, 1}
