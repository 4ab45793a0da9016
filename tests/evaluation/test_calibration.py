"""`calibrate`: the goal is kept, nothing tried is better, and no fixed depth of the same cost is either. What it costs
on rows that did not choose the setting is in `test_selection.py`."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation import calibrate, collect_exit_logits, evaluate_policy, exit_scores, selection
from badge_peft.evaluation.candidates import families, fewer_exits
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.tradeoff import curve_points, search
from tests.design import pairs
from tests.models import make_badge, make_batch

from .logits import EXITS, KINDS, MULTI, REGRESSION, SINGLE, SIZES, plausible, strange

PROBLEMS = [(SINGLE, 2), (SINGLE, 4), (MULTI, 3), (REGRESSION, 1)]
WITHOUT_DISTRIBUTION = ("entropy", "max_prob", "confident_patience")


@pytest.fixture(autouse=True, scope="module")
def _few_settings():
    """A third of what is tried is enough to see that the best of it is taken; tests/stored has the whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "SETTINGS", 12)
        yield


def metric_of(problem_type):
    return "pearson" if problem_type == REGRESSION else "accuracy"


def quiet(*args, **kwargs):
    """`calibrate`, whether or not a fixed depth has won."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return calibrate(*args, **kwargs)


def check(stored, config, goal, metric):
    """The goal is kept, and no fixed depth that costs as little or less scores more."""
    point = evaluate_policy(stored, config, metric)
    scores = exit_scores(stored, metric).per_exit
    if "target_blocks_saved" in goal:
        assert point.blocks_saved >= goal["target_blocks_saved"] - 1e-9
    for depth, score in zip(stored.exits, scores, strict=True):
        if depth <= point.mean_exit + 1e-9:
            assert score <= point.score + 1e-9, (depth, score, point)
    return point


@st.composite
def goals(draw, exits):
    if draw(st.booleans()):
        return {"max_score_drop": draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 2.0]))}
    return {"target_blocks_saved": draw(st.floats(0, max(1 - exits[0] / exits[-1], 0) * 0.999))}


@pytest.mark.parametrize(("problem_type", "num_labels"), PROBLEMS)
@settings(deadline=None, derandomize=True, max_examples=12)
@given(data=st.data())
def test_never_worse_than_the_fixed_depth_of_the_same_cost(problem_type, num_labels, data):
    exits = data.draw(st.sampled_from(EXITS))
    rows, kind = data.draw(st.integers(2, 25)), data.draw(st.sampled_from(KINDS))
    stored = strange(problem_type, num_labels, rows, exits, kind, data.draw(st.integers(0, 99)))
    names = ["divergence", "patience", "learned", "fixed_depth_", *WITHOUT_DISTRIBUTION]
    names = [n for n in names if problem_type != REGRESSION or n not in WITHOUT_DISTRIBUTION]
    name = data.draw(st.sampled_from(names))
    policy = {"policy": "fixed_depth", "depth": exits[-1]} if name == "fixed_depth_" else name
    goal = data.draw(goals(exits))
    metric = metric_of(problem_type)
    check(stored, quiet(stored, policy, metric=metric, **goal), goal, metric)


@pytest.mark.parametrize(
    ("goal", "problem", "kind"),
    pairs([{"max_score_drop": 0.02}, {"target_blocks_saved": 0.4}], PROBLEMS, ["whole", "huge"]),
    ids=str,
)
def test_auto_is_never_worse_either(goal, problem, kind):
    problem_type, num_labels = problem
    stored = strange(problem_type, num_labels, 25, [1, 2, 3, 4, 6], kind, 5)
    metric = metric_of(problem_type)
    check(stored, quiet(stored, "auto", metric=metric, **goal), goal, metric)


@pytest.mark.parametrize(
    ("rows", "policy", "goal"),
    pairs(
        [150, 12],  # few rows: many settings cost the same
        ["divergence", "max_prob", "patience", "agreement", "confident_patience", "learned"],
        [{"target_blocks_saved": 0.3}, {"target_blocks_saved": 0.6}],
    ),
    ids=str,
)
def test_nothing_that_is_tried_is_better(rows, policy, goal):
    stored = plausible(rows=rows, exits=8)
    config = quiet(stored, policy, **goal)
    point = check(stored, config, goal, "accuracy")
    tried = search(stored, policy, selection.SETTINGS, "accuracy")
    fewer = [replace(form, exit_layers=few) for form in families(policy, stored) for few in fewer_exits(form, stored)]
    tried += curve_points(stored, fewer, selection.SETTINGS, "accuracy")
    assert len(tried) > 12
    good = [p for p in tried if p.blocks_saved >= goal["target_blocks_saved"] - 1e-12]
    assert max(p.score for p in good) == point.score
    assert max(p.blocks_saved for p in good if p.score == point.score) == point.blocks_saved


@pytest.mark.parametrize(("problem_type", "num_labels"), SIZES)
def test_a_dynamic_policy_wins_on_plausible_logits(problem_type, num_labels):
    stored, metric = plausible(problem_type, num_labels), metric_of(problem_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = calibrate(stored, "divergence", target_blocks_saved=0.4, metric=metric)
    assert config.policy == "divergence" and config.threshold is not None and config.patience is not None
    fixed = calibrate(stored, {"policy": "fixed_depth", "depth": 1}, target_blocks_saved=0.4, metric=metric)
    best = max(exit_scores(stored, metric).per_exit[:7])  # of 12, block 7 is the deepest that saves 40 per cent
    assert fixed.policy == "fixed_depth" and exit_scores(stored, metric).per_exit[fixed.depth - 1] == best
    found = evaluate_policy(stored, config, metric).score
    assert found > evaluate_policy(stored, fixed, metric).score


@pytest.mark.parametrize(("problem_type", "num_labels"), [(SINGLE, 3), (MULTI, 6), (REGRESSION, 1)])
def test_auto_is_as_good_as_each_policy(problem_type, num_labels):
    stored, metric = plausible(problem_type, num_labels, rows=80, exits=5), metric_of(problem_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        best = evaluate_policy(stored, calibrate(stored, "auto", metric=metric, target_blocks_saved=0.5), metric)
    names = ["divergence", "patience", "agreement", "learned"]
    names += [] if problem_type == REGRESSION else WITHOUT_DISTRIBUTION
    for name in names:
        point = evaluate_policy(stored, quiet(stored, name, metric=metric, target_blocks_saved=0.5), metric)
        assert best.score >= point.score - 0.06  # between policies, rows decide that chose none of the settings


def test_where_a_fixed_depth_wins_it_is_returned_and_said():
    """Exits that differ in all but the labels: no divergence tells the rows apart, and exit 2 is always right."""
    labels = torch.arange(40) % 2
    right = torch.nn.functional.one_hot(labels, 2).float()
    logits = torch.stack([1 - right, right, right], dim=1)
    stored = ExitLogits(logits, labels)
    wins = "no setting of policy='max_prob' beats answering at block 2 .*policy='auto'"
    unknown = "40 rows cannot show .* every row is answered at block 2"
    for goal, message in (({"max_score_drop": 0.0}, unknown), ({"target_blocks_saved": 0.3}, wins)):
        with pytest.warns(UserWarning, match=message):
            config = calibrate(stored, "max_prob", **goal)
        assert (config.policy, config.depth) == ("fixed_depth", 2)
        assert config.calibration["policy_asked_for"] == "max_prob" and config.calibration["score"] == 1.0
        assert quiet(stored, "auto", **goal).calibration["score"] == 1.0


@pytest.mark.parametrize(("problem_type", "num_labels"), SIZES)
def test_what_is_recorded(problem_type, num_labels):
    stored, metric = plausible(problem_type, num_labels, rows=100), metric_of(problem_type)
    config = calibrate(stored, "divergence", max_score_drop=0.05, metric=metric)
    point = evaluate_policy(stored, config, metric)
    record = config.calibration
    assert (record["policy_asked_for"], record["metric"], record["rows"]) == ("divergence", metric, 100)
    assert record["score"] == pytest.approx(point.score)
    assert record["full_depth_score"] == pytest.approx(exit_scores(stored, metric).per_exit[-1])
    assert record["exit_scores"] == dict(
        zip(map(str, range(1, 13)), exit_scores(stored, metric).per_exit, strict=True)
    )
    assert record["mean_exit"] == pytest.approx(point.mean_exit)
    assert record["blocks_saved"] == pytest.approx(1 - point.mean_exit / 12)
    again = EarlyExitConfig.of(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert torch.equal(build_policy(again).replay(stored), build_policy(config).replay(stored))


def test_the_fields_of_the_user_are_kept():
    stored = plausible(rows=150)
    asked = EarlyExitConfig(divergence="js", window="consecutive", patience=2, max_exit=10)
    config = calibrate(stored, asked, target_blocks_saved=0.4)
    kept = ("policy", "divergence", "window", "patience", "max_exit", "min_exit")
    assert {name: getattr(config, name) for name in kept} == {name: getattr(asked, name) for name in kept}
    assert config.threshold is not None and asked.threshold is None and asked.calibration is None
    tried = search(stored, {"policy": "entropy", "threshold": 0.5}, selection.SETTINGS, "accuracy")
    assert [p.config.threshold for p in tried if p.config.policy == "entropy"] == [0.5]


@pytest.mark.parametrize("policy", ["max_prob", "fixed_depth"])
@pytest.mark.parametrize(
    ("bounds", "depths"),
    [
        ({"min_exit": 4}, [6, 5, 4]),
        ({"max_exit": 3}, [3, 2, 1]),
        ({"min_exit": 2, "max_exit": 4}, [4, 2]),
        ({"min_exit": 3, "max_exit": 3}, [2]),  # the block has no exit: the one before it answers
    ],
    ids=str,
)
def test_a_fixed_depth_stays_between_the_bounds(bounds, depths, policy):
    stored = strange(SINGLE, 3, 60, [1, 2, 3, 4, 5, 6] if len(depths) == 3 else [1, 2, 4, 6], "plain", 3)
    asked = {"policy": policy, **bounds} | ({"depth": 6} if policy == "fixed_depth" else {})
    points = search(stored, asked, selection.SETTINGS, "accuracy")
    tried = [p.config for p in points if p.config.policy == "fixed_depth"]
    assert {c.depth for c in tried} == set(depths)
    assert all({name: getattr(c, name) for name in bounds} == bounds for c in tried)
    for goal in ({"max_score_drop": 2.0}, {"target_blocks_saved": 0.0}):
        stops = build_policy(quiet(stored, asked, **goal)).replay(stored)
        assert min(depths) <= stops.min() and stops.max() <= max(depths)


def test_a_score_that_no_exit_up_to_max_exit_has():
    labels = torch.arange(40) % 2
    right = torch.nn.functional.one_hot(labels, 2).float()
    stored = ExitLogits(torch.stack([1 - right, 1 - right, right], dim=1), labels)
    with pytest.raises(
        ValueError, match=r"max_score_drop=0\.1 cannot be reached .*1\.0000 and 0\.0000.*deeper max_exit"
    ):
        calibrate(stored, {"policy": "max_prob", "max_exit": 2}, max_score_drop=0.1)
    for bounds, message in (({"max_exit": 0}, "max_exit=0"), ({"min_exit": 4}, "min_exit=4")):
        with pytest.raises(ValueError, match=f"{message} is not allowed"):
            calibrate(stored, {"policy": "fixed_depth", "depth": 3, **bounds}, max_score_drop=0.1)


def test_another_metric_is_another_choice():
    stored = plausible(rows=150)

    def zeros(predictions, labels):
        return float((predictions == 0).mean())

    config = quiet(stored, "entropy", target_blocks_saved=0.3, metric=zeros)
    tried = [p for p in search(stored, "entropy", selection.SETTINGS, zeros) if p.blocks_saved >= 0.3 - 1e-12]
    assert config.calibration["score"] == max(p.score for p in tried)


def test_without_labels_the_score_is_agreement_with_full_depth():
    stored = plausible(rows=150)
    bare = ExitLogits(stored.logits)
    config = quiet(bare, "max_prob", max_score_drop=0.05)
    stops = build_policy(config).replay(bare)
    answers = bare.logits[torch.arange(150), stops - 1].argmax(-1)
    agreement = (answers == bare.logits[:, -1].argmax(-1)).double().mean().item()
    assert agreement >= 0.95 - 1e-9 and config.calibration["score"] == pytest.approx(agreement)
    assert config.calibration["full_depth_score"] == 1.0 and stops.double().mean() < 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of max_score_drop, target_blocks_saved"),
        ({"max_score_drop": 0.1, "target_blocks_saved": 0.5}, "exactly one of max_score_drop, target_blocks_saved"),
        ({"max_score_drop": -0.1}, r"max_score_drop=-0\.1 is not allowed"),
        ({"target_blocks_saved": 1.0}, r"target_blocks_saved=1\.0 is not allowed"),
        ({"target_blocks_saved": -0.1}, r"target_blocks_saved=-0\.1 is not allowed"),
        ({"target_blocks_saved": 0.8}, r"target_blocks_saved=0\.8 cannot be reached: 0\.750 is the most here"),
        ({"target_blocks_saved": 0.5, "policy": "guess"}, "policy='guess' is not allowed"),
        ({"target_blocks_saved": 0.5, "metric": "pearson"}, "metric='pearson' does not suit"),
        ({"target_blocks_saved": 0.5, "policy": "learned"}, "LTE layer"),
        ({"max_score_drop": 1, "confidence": 0.9}, "max_score_drop=1 is not allowed: with confidence it is a share"),
    ],
    ids=str,
)
def test_bad_values(options, message):
    stored = plausible(rows=20, exits=4)
    stored.uncertainty = None
    with pytest.raises(ValueError, match=message):
        calibrate(stored, **options)


def test_one_row_and_one_exit():
    stored = strange(SINGLE, 3, 1, [6], "plain", 0)
    config = quiet(stored, "auto", max_score_drop=0.0)
    assert build_policy(config).replay(stored).tolist() == [6]


@pytest.mark.parametrize("policy", ["divergence", "max_prob", "agreement", "auto"])
def test_the_model_stops_where_the_calibration_said(policy):
    model = make_badge(final_exit="exit", exit_layers=[0, 1, 2, 3]).double()
    batch = make_batch(rows=40, seed=9)
    labels = model(**batch).logits.argmax(-1)
    rows = [{**{name: value[i] for name, value in batch.items()}, "labels": labels[i]} for i in range(40)]
    stored = collect_exit_logits(model, rows, batch_size=40)
    config = quiet(stored, policy, target_blocks_saved=0.3)
    model.set_early_exit_config(config)
    out = model.early_exit_forward(**batch)
    assert out.exit_layer.tolist() == build_policy(config).replay(stored).tolist()
    assert 1 - out.exit_layer.double().mean().item() / 3 == pytest.approx(config.calibration["blocks_saved"])
    right = (out.logits.argmax(-1) == labels).double().mean().item()
    assert right == pytest.approx(config.calibration["score"])


def test_a_drop_that_min_exit_forbids_is_said_to_be_its_fault() -> None:
    labels = torch.arange(100) % 2
    right = torch.nn.functional.one_hot(labels, 2).float()
    stored = ExitLogits(torch.stack([right, 1 - right, right.roll(1, 0)], dim=1), labels)
    with pytest.raises(ValueError, match="an earlier min_exit"):
        calibrate(stored, {"policy": "entropy", "min_exit": 2}, max_score_drop=0.1)
