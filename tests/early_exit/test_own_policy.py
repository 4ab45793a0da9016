"""A policy that is defined here, outside of the package, works wherever one can be named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from badge_peft import EarlyExitConfig, early_exit_forward
from badge_peft.app.explain import explain, read_exits
from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import POLICIES, ExitPolicy, ThresholdPolicy, build_policy, register_policy
from badge_peft.early_exit.policies.base import describe
from badge_peft.evaluation import calibrate, evaluate_policy, sweep
from badge_peft.evaluation.candidates import families
from badge_peft.export.exit_nodes import ExitNodes, Value
from badge_peft.model_card import write_model_card
from tests.evaluation.logits import plausible
from tests.models import exits_of, make_badge, make_batch, make_model

from .reference import MULTI, REGRESSION, SINGLE
from .rules import with_threshold


class OddsPolicy(ThresholdPolicy):
    """Stop where no label but the likeliest has more than `threshold` of its probability."""

    name = "odds"

    def score(self, history: ExitHistory, j: int) -> np.ndarray:
        sure = history.confidence(j)
        return (1 - sure) / sure

    def default_threshold(self, num_labels: int, problem_type: str) -> float:
        return 0.4

    @classmethod
    def suits(cls, problem_type: str) -> bool:
        return problem_type != REGRESSION

    def lookback(self) -> int:
        return 0

    def score_nodes(self, at: ExitNodes) -> Value:
        sure = at.confidence()
        return at.op("Div", at.op("Sub", at.floats(1), sure), sure)


class PositivePolicy(ExitPolicy):
    """The least that a policy has to say; and no form as nodes."""

    name = "positive"

    def should_exit(self, history: ExitHistory, j: int) -> np.ndarray:
        return history.logits[j][:, 1] > 0


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    for policy in (OddsPolicy, PositivePolicy):
        register_policy(policy)
    yield
    for policy in (OddsPolicy, PositivePolicy):
        del POLICIES[policy.name]


NAMES = ("odds", "positive")


def test_configs_know_it_by_its_name() -> None:
    for name in NAMES:
        assert type(build_policy(policy=name)) is POLICIES[name]
        with pytest.raises(ValueError, match=rf"policy='x' is not allowed.*never.*{name}"):
            EarlyExitConfig(policy="x")
        assert EarlyExitConfig.of(EarlyExitConfig(policy=name, threshold=0.3).to_dict()).policy == name


@pytest.mark.parametrize("name", NAMES)
def test_live_is_replay(name: str) -> None:
    model, batch = make_badge("bert", make_model("bert", num_hidden_layers=4)), make_batch(6)
    logits, exits = exits_of(model, batch), model.exit_layers()
    rule: dict[str, Any] = {"policy": name}
    if name == "odds":
        rule = with_threshold(rule, logits, exits, 0.4)
    out = early_exit_forward(model, **batch, **rule)
    assert out.exit_layer.tolist() == build_policy(rule).replay(logits, exits).tolist()
    assert len(out.exit_layer.unique()) > 1


def test_sweep_and_calibrate() -> None:
    stored = plausible(SINGLE, 3, rows=120, exits=6)
    found = sweep(stored, NAMES, points=6)
    assert set(found.names) == {"fixed_depth", *NAMES}
    points = found.curve("odds")
    assert len(points) >= 4 and len({p.config.threshold for p in points}) == len(points)
    for point in points:
        assert point.mean_exit == evaluate_policy(stored, point.config).mean_exit
    chosen = calibrate(stored, "odds", target_blocks_saved=0.2)
    assert chosen.policy in ("odds", "fixed_depth") and chosen.calibration is not None
    searched = {config.policy for config in families("auto", stored)}
    assert searched >= set(NAMES)
    assert "odds" not in {c.policy for c in families("auto", plausible(REGRESSION, 1, rows=40, exits=4))}


@pytest.mark.parametrize("kind", [SINGLE, MULTI])
def test_defaults_are_filled_in(kind: str) -> None:
    assert build_policy(policy="odds").resolve(3, kind).threshold == 0.4
    assert build_policy(policy="positive").resolve(3, kind) == EarlyExitConfig(policy="positive")


def test_the_model_card_says_how_it_stops(tmp_path: Any) -> None:
    model = make_badge()
    model.set_early_exit_config({"policy": "odds", "threshold": 0.25})
    model.save_pretrained(tmp_path)
    write_model_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| `policy` | `odds` |" in card and "| `threshold` | `0.25` |" in card and "`window`" not in card
    assert describe(model.get_early_exit_config()) == "odds, threshold=0.25"


def test_why_a_row_stops() -> None:
    model, batch = make_badge(), make_batch(1)
    found = explain(read_exits(model, batch), policy="odds", threshold=100.0)
    assert found.exit_layer == 1 and found.steps[0].evidence is not None
    assert "score of odds" in found.steps[0].evidence.quantity and found.reason.startswith("S = ")
    found = explain(read_exits(model, batch), policy="positive")
    assert found.steps[0].evidence is None and "'positive'" in found.steps[0].why


def test_the_page(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    from tests.app.conftest import opened, save_adapter

    callbacks = opened(save_adapter(tmp_path, logits=30), policy="odds", threshold=0.3)
    assert [control.field for control in callbacks.controls] == ["threshold"]
    assert "score of odds, tau = 0.3" in callbacks.answer("a good film", None, 0.3)
    assert "odds, threshold=0.3" in callbacks.curve(0.3)
    assert "odds" in callbacks.tradeoff.curves(callbacks.rule).names


@pytest.mark.parametrize("kind", [SINGLE, MULTI])
def test_exported_it_answers_as_replay_does(kind: str) -> None:
    pytest.importorskip("onnxruntime")
    from tests.export.table import TableGraph

    logits = plausible(kind, 4, rows=60, exits=5).logits.numpy()
    answers, exits = TableGraph({"policy": "odds"}, 5, 4, kind)(logits, 0.35, 1)
    wanted = build_policy(policy="odds", threshold=0.35).replay(logits, None, kind)
    assert exits.tolist() == wanted.tolist() and len(set(exits.tolist())) > 2
    np.testing.assert_array_equal(answers, logits[np.arange(60), exits - 1])


def test_without_nodes_the_export_is_refused() -> None:
    pytest.importorskip("onnx")
    from badge_peft.export.policies import Decision

    with pytest.raises(ValueError, match="'positive' of class PositivePolicy cannot be exported"):
        Decision(build_policy(policy="positive"), [1, 2], 3, SINGLE).check_exportable(learned=False)
    Decision(build_policy(policy="odds"), [1, 2], 3, SINGLE).check_exportable(learned=False)


def test_names_are_taken_once() -> None:
    assert register_policy(OddsPolicy) is OddsPolicy
    for name in ("entropy", "auto", "", None):
        with pytest.raises(ValueError, match="is not allowed|is the name of"):
            register_policy(type("Mine", (ExitPolicy,), {} if name is None else {"name": name}))
    for module in ("a_module", "z_module"):  # on either side of the other's
        with pytest.raises(ValueError, match="is the name of"):
            register_policy(type("Mine", (ExitPolicy,), {"name": "entropy", "__module__": module}))


def test_a_class_that_is_defined_again_takes_its_place() -> None:
    before = build_policy(policy="odds")
    again = type("OddsPolicy", (OddsPolicy,), {"name": "odds", "__module__": __name__})
    register_policy(again)
    assert type(build_policy(policy="odds")) is again is not type(before)
    assert torch.equal(before.replay(torch.zeros(1, 2, 2)), build_policy(policy="odds").replay(torch.zeros(1, 2, 2)))
