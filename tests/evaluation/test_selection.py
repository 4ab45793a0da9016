"""How `calibrate` chooses: what a rule loses on rows that did not choose, and that `auto` is behind no policy."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from badge_peft.early_exit.config import EarlyExitConfig
from badge_peft.early_exit.policies import POLICIES, build_policy
from badge_peft.evaluation import calibrate, evaluate_policy, exit_scores
from badge_peft.evaluation.calibration import policies_of
from badge_peft.evaluation.costs import CostModel
from badge_peft.evaluation.drops import Drops
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.selection import (
    Setting,
    best_at,
    choose_within,
    fastest_within,
    held_out,
    settings_of,
)

from .logits import MULTI, REGRESSION, SINGLE, plausible


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return calibrate(*args, **kwargs)


def noise(rows, exits=6, labels=2, seed=0):
    """Exits that know nothing: every setting is as good as any other on new rows, and some look better on these."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, exits, labels, generator=draw)
    return ExitLogits(logits, torch.randint(0, labels, (rows,), generator=draw))


@pytest.mark.parametrize(("kind", "labels", "metric"), [
    (SINGLE, 3, "accuracy"), (SINGLE, 3, "macro_f1"), (MULTI, 4, "accuracy"), (REGRESSION, 1, "pearson"),
])  # fmt: skip
def test_a_setting_has_its_drop(kind, labels, metric):
    stored = plausible(kind, labels, rows=80, exits=4)
    (forms,) = policies_of([EarlyExitConfig()])
    found = settings_of(Drops(stored, 4, metric), forms, CostModel.of_blocks(4))
    full = exit_scores(stored, metric).per_exit[-1]
    assert len(found) > 5
    for setting in found[::7]:
        point = evaluate_policy(stored, setting.config, metric)
        assert setting.saved == pytest.approx(point.blocks_saved) and setting.error > 0
        assert setting.counted == pytest.approx(full - point.score)
        assert (kind, metric) == (SINGLE, "accuracy") or setting.drop == setting.counted


def test_the_error_is_that_of_samples():
    """The standard error against the deviation over 2,000 resamples of the rows."""
    stored, draw = plausible(MULTI, 3, rows=300, exits=4), np.random.default_rng(0)
    _, (error,), _ = Drops(stored, 4, "accuracy").of(np.full((1, 300), 2))
    right = (stored.predictions == stored.targets).all(axis=-1)
    change = right[3].astype(float) - right[1]
    samples = [change[draw.integers(0, 300, 300)].mean() for _ in range(2000)]
    assert error == pytest.approx(np.sqrt(np.var(samples) + 1 / 300**2), rel=0.06)


def drawn(rows, seed):
    """Three classes, drawn from what the last exit says, sharpened by 2; exit 1 says the same with noise."""
    draw = torch.Generator().manual_seed(seed)
    last = torch.randn(rows, 3, generator=draw)
    labels = torch.multinomial((2 * last).softmax(dim=-1), 1, generator=draw)[:, 0]
    first = last + 0.3 * torch.randn(rows, 3, generator=draw)
    return ExitLogits(torch.stack([first, last], dim=1), labels, deployed=True)


def test_a_drop_lies_between_the_counted_and_the_expected_loss():
    """The expected one by the formula: the calibrated probability of each answer."""
    stored = drawn(400, 0)
    (drop,), (error,), (count,) = Drops(stored, 2, "accuracy").of(np.full((1, 400), 1))
    likely = (2 * stored.logits[:, 1]).softmax(dim=-1).gather(1, torch.from_numpy(stored.predictions.T))
    expected = float((likely[:, 1] - likely[:, 0]).mean())
    counted = float(np.diff((stored.predictions == stored.targets).mean(axis=1))[0])
    assert count == pytest.approx(counted)
    assert min(counted, expected) - 0.01 < drop < max(counted, expected) + 0.01  # the temperature is fitted
    assert Drops(stored, 2, "accuracy").of(np.full((1, 400), 2))[0] == [0.0]
    assert error > 0


def test_the_estimate_of_a_drop_is_nearer_to_the_truth_than_the_count():
    true = drawn(200_000, 99)
    truth = float(np.diff((true.predictions == true.targets).mean(axis=1))[0])
    off, counts_off = [], []
    for seed in range(40):
        stored = drawn(400, seed)
        off.append(Drops(stored, 2, "accuracy").of(np.full((1, 400), 1))[0][0] - truth)
        counts_off.append(np.diff((stored.predictions == stored.targets).mean(axis=1))[0] - truth)
    assert np.std(off) < 0.7 * np.std(counts_off)
    assert abs(np.mean(off)) < 0.02


def test_more_rows_let_the_count_speak():
    """Where full depth's probabilities mislead: it is unsure, and each early answer that differs is wrong."""
    labels = torch.arange(20_000) % 2
    last = torch.nn.functional.one_hot(labels, 2) * 2.0 + torch.randn(20_000, 1)  # no two rows are one input
    last[::5] = last[::5].flip(-1)  # wrong in a fifth of the rows, and no less sure there
    first = last.clone()
    first[1::10] = first[1::10].flip(-1)  # each tenth row, which was right
    stored = ExitLogits(torch.stack([first, last], dim=1), labels, deployed=True)
    drops = [Drops(stored.select(torch.arange(n)), 2, "accuracy").of(np.full((1, n), 1))[0][0] for n in (40, 20_000)]
    assert drops[0] < 0.09 and drops[1] == pytest.approx(0.1, abs=0.001)


def test_what_is_promised_holds_on_new_rows():
    """The drop on 4,000 rows that calibration never saw, over 8 draws of 300 rows."""
    pool = plausible(SINGLE, 3, rows=4300, exits=6)
    for policy in ("max_prob", "auto"):
        excess, saved = [], []
        for seed in range(8):
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
            rows, test = pool.select(order[:300]), pool.select(order[300:])
            point = evaluate_policy(test, quietly(rows, policy, max_score_drop=0.02))
            excess.append(exit_scores(test).best - point.score - 0.02)
            saved.append(point.blocks_saved)
        assert np.mean(excess) < 0.003 and np.quantile(excess, 0.9) < 0.012
        assert np.mean(saved) > 0.25  # a rule so careful that it returns nothing is broken


@pytest.mark.parametrize("rows", [200, 500, 2000])
@pytest.mark.parametrize("labels", [2, 20])
def test_auto_is_never_behind_a_single_policy(rows, labels):
    """Law: within the same drop, `auto` saves at least 0.9 of what the best policy saves, in the mean of draws."""
    pool = plausible(SINGLE, labels, rows=4000, exits=6, seed=labels)
    names = ["auto", *(name for name, kind in POLICIES.items() if kind.templates(SINGLE))]
    saved: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(3):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        part, test = pool.select(order[:rows]), pool.select(order[rows:])
        for name in names:
            saved[name].append(evaluate_policy(test, quietly(part, name, max_score_drop=0.02)).blocks_saved)
    best = max(np.mean(values) for name, values in saved.items() if name != "auto")
    assert np.mean(saved["auto"]) >= 0.9 * best


def test_equal_inputs_count_once():
    """40 rows that come ten times each say no more than 40, in whatever order they come."""
    for seed in range(4):
        once = plausible(SINGLE, 3, rows=40, exits=4, seed=seed)
        order = torch.randperm(400, generator=torch.Generator().manual_seed(seed)) % 40
        often = once.select(order)
        assert len(set(Drops(often, 4, "accuracy").inputs)) == 40
        stops = np.full((1, 40), 2)
        found = [Drops(rows, 4, "accuracy").of(s) for rows, s in ((once, stops), (often, stops[:, order]))]
        assert found[0][0] == pytest.approx(found[1][0]) and found[0][1] == pytest.approx(found[1][1])
        chosen = [quietly(rows, "max_prob", max_score_drop=0.05) for rows in (once, often)]
        assert replace(chosen[0], calibration=None) == replace(chosen[1], calibration=None)


def test_at_a_target_the_drop_is_that_of_rows_that_did_not_choose():
    """On noise the best of all settings looks good on the rows that chose it, and is no better than any on others."""
    gains, drops = [], []
    for seed in range(12):
        stored = noise(100, exits=4, seed=seed)
        config = quietly(stored, "divergence", target_blocks_saved=0.3)
        gains.append(config.calibration["score"] - exit_scores(stored).per_exit[-1])
        drops.append(config.calibration["drop"] - exit_scores(stored).best + exit_scores(stored).per_exit[-1])
    assert np.mean(gains) > 0.02  # what searching alone pretends
    assert abs(np.mean(drops)) < 0.08


def test_a_drop_is_counted_from_the_deployed_model_or_from_the_best_exit():
    """Exit 2 is better than the last, as where the last exit is trained with the others (`final_exit="exit"`)."""
    labels = torch.arange(600) % 2
    right = torch.nn.functional.one_hot(labels, 2).float() * 4
    right = right + torch.randn(600, 1, generator=torch.Generator().manual_seed(0))  # no two rows are one input
    logits = torch.stack([1 - right, right, right], dim=1)
    logits[:60, 2] = 1 - logits[:60, 2]  # the last exit is wrong where exit 2 is right
    logits[60:90, :2] = 1 - logits[60:90, :2]  # exit 2 is wrong, the last one right
    stored = ExitLogits(logits, labels)
    best = quietly(stored, "max_prob", max_score_drop=0.02)
    last = quietly(replace(stored, deployed=True), "max_prob", max_score_drop=0.02)
    assert best.calibration["drop_from"] == "best" and last.calibration["drop_from"] == "last"
    assert evaluate_policy(stored, best).score >= 0.95 - 0.02
    assert last.calibration["drop"] < 0  # better than the deployed model


@pytest.mark.parametrize("rows", [1, 2, 5, 20])
def test_rows_that_cannot_carry_the_claim(rows):
    stored = plausible(SINGLE, 3, rows=rows, exits=4)
    with pytest.warns(UserWarning, match=f"{rows} rows cannot show that any setting loses at most 0"):
        config = calibrate(stored, "max_prob", max_score_drop=0)
    assert (config.policy, config.depth) == ("fixed_depth", exit_scores(stored).best_exit)
    assert "drop" not in config.calibration


def test_a_rule_stops_at_the_first_setting_beyond_the_drop():
    def at(form, saved, drop, error=0.01):
        return Setting(form, EarlyExitConfig(policy="max_prob"), saved, drop, error, drop)

    found = [at(0, 0.1, 0.0), at(0, 0.3, 0.03), at(0, 0.5, 0.0), at(1, 0.2, 0.01)]
    assert fastest_within(found, 0.02, 0.0) is found[3]
    assert fastest_within(found, 0.03, 0.0) is found[2]
    assert fastest_within(found, 0.02, 1.5) is found[0]
    assert fastest_within(found, 0.0, 1.0) is None and fastest_within([], 1.0, 0.0) is None
    assert best_at(found, 0.3) is found[2] and best_at(found, 0.6) is None


def test_more_policies_take_nothing_away():
    stored = replace(plausible(SINGLE, 3, rows=400, exits=6), deployed=True)
    drops, blocks = Drops(stored, 6, "accuracy"), CostModel.of_blocks(6)
    few = [
        choose_within(drops, held_out(drops), forms, blocks, 0.02)
        for forms in policies_of([EarlyExitConfig(policy="max_prob")])
    ]
    most = max(choice.saved for choice in few if choice is not None)
    assert quietly(stored, "auto", max_score_drop=0.02).calibration["blocks_saved"] >= most - 1e-9


def test_exits_that_are_too_sure_are_passed_over():
    """Exit 2 of 6 is as sure as the last, and knows nothing."""
    stored = replace(plausible(SINGLE, 3, rows=600, exits=6), deployed=True)
    draw = torch.Generator().manual_seed(1)
    stored.logits[:, 1] = 8 * torch.nn.functional.one_hot(torch.randint(0, 3, (600,), generator=draw), 3).float()
    config = quietly(stored, "max_prob", max_score_drop=0.02)
    assert config.exit_layers is not None and 2 not in config.exit_layers
    assert config.calibration["blocks_saved"] > 0.2


def test_time_decides_which_exits_are_read():
    """Where an exit costs more than a block, those that hardly answer anybody are left out, and no score is lost."""
    stored = plausible(SINGLE, 3, rows=600, exits=12)
    cheap, dear = (CostModel(12.5, 0.5, 1.0, exit_ms) for exit_ms in (0.01, 0.4))
    own = [quietly(stored, "max_prob", max_score_drop=0.02, costs=costs) for costs in (cheap, dear)]
    read = [12 if config.exit_layers is None else len(config.exit_layers) for config in own]
    assert read[1] < read[0]
    every = quietly(stored, {"policy": "max_prob", "exit_layers": [*range(1, 12)]}, max_score_drop=0.02, costs=dear)
    assert own[1].calibration["time_saved"] > every.calibration["time_saved"] - 0.02
    stops = [build_policy(config).replay_history(stored.history()) for config in own]
    assert dear.time_saved(own[1], stored, stops[1]) > dear.time_saved(own[0], stored, stops[0])


def test_it_says_when_it_is_not_worth_it():
    stored = replace(noise(400, exits=4), deployed=True)
    stored.logits[:, -1] = torch.nn.functional.one_hot(stored.labels, 2) * 4.0  # the model itself is always right
    with pytest.warns(UserWarning, match="not worth it here: within a drop of 0.01 they would save 0% of the time"):
        config = calibrate(stored, "auto", max_score_drop=0.01, costs=CostModel(4.4, 0.5, 1.0, 0.2))
    assert config.policy == "never" and config.calibration["time_saved"] == 0
    assert "exits 1 to 3 score below 0.9900" in config.calibration["not_worth_it"].lower()
