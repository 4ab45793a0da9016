"""Token classification as one ONNX file: each token stops as in PyTorch and as in a replay, a row with its last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from badge_peft import BadgeConfig, collect_exit_logits
from badge_peft.early_exit.policies import build_policy
from badge_peft.export import OnnxEarlyExitModel, OnnxTasksModel, export_onnx, export_tasks_onnx
from badge_peft.export.onnx import OnnxExporter
from badge_peft.export.policies import Decision
from badge_peft.export.sliced import assemble
from badge_peft.export.trace import export_blocks
from badge_peft.workflows.labels import LabelSet
from badge_peft.workflows.predict import predict
from tests.early_exit.reference import SINGLE
from tests.early_exit.rules import with_threshold
from tests.early_exit.test_tokens import make, make_base, rows_of, safe_rule
from tests.export.cuts import one_cut
from tests.models import make_batch, shake
from tests.texts import make_tokenizer

ROWS, LENGTH, LABELS = 5, 8, 4
TAGS = ["O", "B-x", "I-x", "B-y"]
RULES: list[dict[str, Any]] = [
    {"policy": "divergence"},
    {"policy": "divergence", "divergence": "label", "window": "consecutive"},
    {"policy": "patience", "patience": 2},
    {"policy": "max_prob"},
    {"policy": "learned"},
    {"policy": "fixed_depth", "depth": 1},
    {"policy": "never"},
]


def special_of(batch: dict[str, torch.Tensor], seed: int = 0) -> torch.Tensor:
    """A third of the tokens need no answer; those of one row do not at all."""
    special = (torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(seed)) < 0.3).long()
    special[-1] = 1
    return special


def numpy(batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in batch.items()}


@pytest.fixture(scope="module")
def cut() -> tuple[Any, Any]:
    """A model with every kind of exit, and its pieces."""
    base = make_base(num_hidden_layers=2, id2label=dict(enumerate(TAGS)))
    model = make(base=base, exit_layers=[0, 1], learn_to_exit=True, train_head=False)
    return model, export_blocks(model.base_model, {("",): {0, 1, 2}})


def sessions(cut: tuple[Any, Any], rule: dict[str, Any]) -> onnxruntime.InferenceSession:
    decision = Decision(build_policy(rule), cut[0].base_model.exit_layers(), LABELS, SINGLE, True)
    graph = assemble(cut[1], {"": decision}, int8=False)
    return onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


def check(model: Any, session: Any, batch: dict[str, torch.Tensor], special: torch.Tensor, rule: Any) -> None:
    want = model.early_exit_forward(**batch, special_tokens_mask=special, **rule)
    feed = numpy({**batch, "special_tokens_mask": special, "token_type_ids": torch.zeros_like(special)})
    names = {info.name for info in session.get_inputs()}
    logits, exits = session.run(["logits", "exit_layer"], {name: feed[name] for name in names})
    assert exits.tolist() == want.token_exit_layer.tolist()
    np.testing.assert_allclose(logits, want.logits.numpy(), atol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_kind_of_rule(cut: tuple[Any, Any], rule: dict[str, Any]) -> None:
    model, batch = cut[0], make_batch(ROWS, LENGTH)
    rule = safe_rule(model, batch, rule)
    session = sessions(cut, rule)
    check(model, session, batch, special_of(batch), rule)
    check(model, session, {k: v[:1] for k, v in batch.items()}, torch.zeros(1, LENGTH, dtype=torch.long), rule)
    check(model, session, make_batch(3, 6, side="left"), torch.zeros(3, 6, dtype=torch.long), {**rule})


@pytest.fixture(scope="module")
def live(cut: tuple[Any, Any]) -> onnxruntime.InferenceSession:
    return sessions(cut, {"policy": "entropy", "threshold": 0.5})


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(4, 9), st.floats(0.05, 0.95))
def test_live_is_replay_is_onnx(cut: Any, live: Any, seed: int, rows: int, length: int, share: float) -> None:
    model, batch = cut[0], make_batch(rows, length, seed)
    special = special_of(batch, seed)
    with torch.no_grad():
        seen = model(**batch)
    asked = (batch["attention_mask"] != 0) & (special == 0)
    if not asked.any():
        return
    stored, exits = seen.exit_logits.transpose(1, 2)[asked], model.base_model.exit_layers()
    rule = with_threshold({"policy": "entropy"}, stored, exits, share)
    replayed = build_policy(rule).replay(stored, exits, SINGLE)
    out = model.early_exit_forward(**batch, special_tokens_mask=special, **rule)
    assert out.token_exit_layer[asked].tolist() == replayed.tolist()
    feed = numpy({**batch, "special_tokens_mask": special, "token_type_ids": torch.zeros_like(special)})
    threshold = np.asarray(rule["threshold"], dtype=np.float32)
    logits, found = live.run(["logits", "exit_layer"], {**feed, "threshold": threshold})
    assert found.tolist() == out.token_exit_layer.tolist() and found.max(axis=1).tolist() == out.exit_layer.tolist()
    np.testing.assert_allclose(logits, out.logits.numpy(), atol=1e-4)


def test_the_folder(cut: tuple[Any, Any], tmp_path: Path) -> None:
    model, rows = cut[0], rows_of()
    rule = {"policy": "max_prob", "threshold": 0.6}
    exporter = OnnxExporter(model, rule)
    exporter.pieces = cut[1]
    report = exporter.write(tmp_path / "fp32", tokenizer=make_tokenizer(), examples=rows)
    assert report.max_difference is not None and report.max_difference < 1e-4
    assert report.changes is not None and report.changes.same_exit == report.changes.same_answer == 1.0
    stored = collect_exit_logits(model, rows)
    full = float((stored.logits[:, -1].argmax(-1) == stored.labels).float().mean())
    assert report.changes.score == report.changes.score_before and abs(report.changes.score - full) < 0.5
    card = (tmp_path / "fp32" / "README.md").read_text()
    assert "`logits` [batch, sequence, 4]" in card and "pipeline_tag: token-classification" in card
    session = OnnxEarlyExitModel.from_pretrained(tmp_path / "fp32", threads=1)
    texts = ["the film was good", "a dull plot and a fine cast", "bad"]
    found = session.predict(texts, batch_size=2)

    class Opened:
        tokenizer, device, tags = make_tokenizer(), torch.device("cpu"), TAGS
        labels = LabelSet(TAGS, "single_label_classification", tokens=True)

    opened: Any = Opened()
    opened.model = model
    expected = list(
        predict(opened, [(text, None) for text in texts], model.base_model.get_early_exit_config().of(rule))
    )
    for answer, want in zip(found, expected, strict=True):
        assert answer["exit_layer"] == want["exit_layer"]
        for entity, other in zip(answer["entities"], want["entities"], strict=True):
            assert entity == {**other, "score": pytest.approx(other["score"], abs=1e-4)}
    with pytest.raises(ValueError, match="labels tokens of a text, and text_pairs are given"):
        session.predict(["a"], ["b"])
    int8 = exporter.write(tmp_path / "int8", int8=True, examples=rows)
    assert int8.int8 and int8.changes is not None and int8.changes.rows == len(rows)


def test_exits_that_need_one_another(tmp_path: Path) -> None:
    model = make(base=make_base(num_hidden_layers=1), exit_layers=[0, 1], carry="logits", final_exit="exit")
    batch = make_batch(ROWS, LENGTH)
    rule = safe_rule(model, batch, {"policy": "entropy"})
    export_onnx(model, tmp_path, early_exit_config=rule)
    found = OnnxEarlyExitModel.from_pretrained(tmp_path, threads=1)(**numpy(batch))
    want = model.early_exit_forward(**batch, **rule)
    assert found.exit_layer.tolist() == want.token_exit_layer.tolist()
    np.testing.assert_allclose(found.logits, want.logits.numpy(), atol=1e-4)


def test_tokens_and_texts_in_one_file(tmp_path: Path) -> None:
    """Beside a token task, a text task and a second token task with other labels, one of them in the model's head."""
    base = make_base(num_hidden_layers=2, id2label=dict(enumerate(TAGS)))
    model: Any = get_peft_model(base, BadgeConfig(task_type="TOKEN_CLS", r=4, train_head=False), adapter_name="names")
    model.add_adapter("mood", BadgeConfig(r=4, num_labels=3, final_exit="exit", exit_pooling="mean"))
    model.add_adapter("kinds", BadgeConfig(task_type="TOKEN_CLS", r=4, num_labels=5, final_exit="exit"))
    for seed, name in enumerate(("names", "mood", "kinds")):
        shake(model, seed=seed, only=f".{name}.")
    model.eval()
    batch, rules = make_batch(ROWS, LENGTH), {"mood": {"policy": "fixed_depth", "depth": 1}}
    for name, rule in (("names", {"policy": "entropy"}), ("kinds", {"policy": "divergence", "patience": 1})):
        model.set_adapter(name)
        rules[name] = safe_rule(model, batch, rule)
    names = ["names", "mood", "kinds"]
    rules = {name: rules[name] for name in names}
    options = {"tasks": names, "early_exit_config": rules, "tokenizer": make_tokenizer()}
    with one_cut("tokens and texts"):  # whose weights are the same each time
        report = export_tasks_onnx(model, tmp_path, **options)
    assert report["max_difference"] < 1e-4
    session = OnnxTasksModel.from_pretrained(tmp_path, threads=1)
    for rows in (slice(None), slice(0, 1)):
        part = {name: value[rows] for name, value in batch.items()}
        special = special_of(batch)[rows]
        want = model.early_exit_forward(**part, special_tokens_mask=special, tasks=names, early_exit_config=rules)
        found = session(**numpy({**part, "special_tokens_mask": special}))
        for name in names:
            exits = want[name].exit_layer if name == "mood" else want[name].token_exit_layer
            assert found[name].exit_layer.tolist() == exits.tolist(), name
            np.testing.assert_allclose(found[name].logits, want[name].logits.numpy(), atol=1e-4)
    (answer,) = session.predict("the film was good")
    assert set(answer["names"]) == {"entities", "exit_layer"} and "label" in answer["mood"]
