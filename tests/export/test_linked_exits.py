"""Exits that build on one another in an exported file: the states that they leave travel with their rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from badge_peft import early_exit_forward
from badge_peft.early_exit.policies import build_policy
from badge_peft.export import OnnxEarlyExitModel, export_onnx
from badge_peft.export.onnx import OnnxExporter
from badge_peft.export.pieces import ALONE
from badge_peft.export.sliced import assemble
from tests.early_exit.rules import labels_are_safe, mixed_rule, with_threshold
from tests.export.table import session_of
from tests.models import LINKS, exits_of, make_badge, make_batch, make_model

FORMS = [
    ({"carry": "logits"}, {"exit_layers": [0, 1, 3], "exit_pooling": "mean"}),
    (
        {"carry": "logits"},
        {"exit_layers": [1, 2], "final_exit": "exit", "exit_type": "residual_mha", "placement": "ffn"},
    ),
    ({"exit_type": "past_future", "final_exit": "exit"}, {}),
]


@pytest.mark.parametrize(("link", "kind"), FORMS, ids=str)
def test_the_file_answers_as_the_model(link, kind):
    blocks = max(kind.get("exit_layers", [2]))
    model = make_badge("bert", base=make_model(num_hidden_layers=blocks), **link, **kind)
    exits = model.base_model.exit_layers()
    for seed in range(10):
        batch = make_batch(7, 9, seed)
        logits = exits_of(model, batch)
        if labels_are_safe(logits):
            break
    exporter = OnnxExporter(model, mixed_rule(logits, exits))
    session = session_of(assemble(exporter.pieces, exporter.decisions, int8=False))
    tau = exporter.decisions[ALONE].threshold
    for rows, factor in ((7, 1.0), (7, 0.8), (1, 1.0)):
        fields = {name: tensor[:rows] for name, tensor in batch.items()}
        wanted = early_exit_forward(model, **fields, policy="entropy", threshold=tau * factor)
        feed = {name: tensor.numpy() for name, tensor in fields.items()}
        feed |= {"token_type_ids": np.zeros_like(feed["input_ids"])}
        answers, exit_layer = session.run(
            ["logits", "exit_layer"], {**feed, "threshold": np.asarray(tau * factor, np.float32)}
        )
        assert exit_layer.tolist() == wanted.exit_layer.tolist()
        assert rows == 1 or factor < 1 or len(set(exit_layer)) > 1
        scale = max(1.0, float(wanted.logits.abs().max()))
        np.testing.assert_allclose(answers / scale, wanted.logits.numpy() / scale, atol=1e-4)


def make_linked():
    return make_badge("bert", base=make_model(num_hidden_layers=2), exit_layers=[0, 1, 2], **LINKS[0])


@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_an_exit_on_which_no_decision_depends_is_in_the_file(int8, tmp_path):
    """The one before the exit that answers, which builds on it."""
    model, batch = make_linked(), make_batch()
    export_onnx(model, tmp_path, early_exit_config={"policy": "fixed_depth", "depth": 1}, int8=int8)
    found = OnnxEarlyExitModel.from_pretrained(tmp_path)(**{name: x.numpy() for name, x in batch.items()})
    wanted = exits_of(model, batch)[:, 1]
    assert found.exit_layer.tolist() == [1] * 4
    scale = float(wanted.abs().max())
    np.testing.assert_allclose(found.logits / scale, wanted / scale, atol=0.3 if int8 else 1e-4)


def test_replay_finds_the_exits_of_the_file(tmp_path):
    model, batch = make_linked(), make_batch(6, 8, 3)
    logits, exits = exits_of(model, batch), model.base_model.exit_layers()
    rule = with_threshold({"divergence": "js"}, logits, exits, 0.5)
    export_onnx(model, tmp_path, early_exit_config=rule)
    found = OnnxEarlyExitModel.from_pretrained(tmp_path)(**{name: x.numpy() for name, x in batch.items()})
    assert found.exit_layer.tolist() == build_policy(rule).replay(logits, exits).tolist()
    assert torch.tensor(found.exit_layer).unique().numel() > 1
