"""What a setting costs on rows that did not choose it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from badge_peft.evaluation import calibrate, calibration, evaluate_policy, exit_scores
from badge_peft.evaluation.cross_fit import SPEEDUPS, HeldOut, best_at, cross_fit, fastest_within, fastest_without_loss
from badge_peft.evaluation.exit_logits import ExitLogits
from badge_peft.evaluation.tradeoff import search

from .logits import MULTI, REGRESSION, SINGLE, plausible


def noise(rows, exits=6, labels=2, seed=0):
    """Exits that know nothing: every setting is as good as any other on new rows, and some look better on these."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, exits, labels, generator=draw)
    return ExitLogits(logits, torch.randint(0, labels, (rows,), generator=draw))


@pytest.mark.parametrize(("kind", "labels", "metric"), [
    (SINGLE, 3, "accuracy"), (SINGLE, 3, "macro_f1"), (MULTI, 4, "accuracy"), (REGRESSION, 1, "pearson"),
])  # fmt: skip
def test_every_speed_up_has_its_drop(kind, labels, metric):
    stored = plausible(kind, labels, rows=80, exits=4)
    found = cross_fit(stored, "divergence", metric, "last")
    assert 5 < len(found) <= SPEEDUPS
    assert [h.goal for h in found] == sorted(h.goal for h in found) and found[0].goal == 0
    for held in found:
        assert held.low <= held.high and held.layer_speedup >= held.goal - 0.15
    bounds = [h.bound for h in found]
    assert bounds == sorted(bounds)  # a faster setting costs at least as much
    (one,) = cross_fit(stored, "divergence", metric, "last", [found[5].goal])
    assert (one.goal, one.layer_speedup, one.drop) == (found[5].goal, found[5].layer_speedup, found[5].drop)


def test_drop_is_that_of_settings_chosen_on_the_other_rows():
    """On noise the best of all settings looks good on the rows that chose it, and is no better than any on others."""
    gains, drops = [], []
    for seed in range(12):
        stored = noise(100, exits=4, seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = calibrate(stored, "divergence", target_speedup=0.3)
        full = exit_scores(stored).per_exit[-1]
        gains.append(config.calibration["score"] - full)
        drops += [held.drop for held in cross_fit(stored, "divergence", "accuracy", "last", [0.3])]
    assert np.mean(gains) > 0.05  # what searching alone pretends
    assert abs(np.mean(drops)) < 0.03


def test_what_calibrate_promises_holds_on_new_rows():
    """The drop on 4,000 rows that calibration never saw, over 8 draws of 300 rows."""
    pool = plausible(SINGLE, 3, rows=4300, exits=6)
    excess = []
    for seed in range(8):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        rows, test = pool.select(order[:300]), pool.select(order[300:])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = calibrate(rows, "max_prob", max_score_drop=0.02)
        excess.append(exit_scores(test).best - evaluate_policy(test, config).score - 0.02)
    assert np.mean(excess) < 0.003 and np.quantile(excess, 0.9) < 0.01


def test_a_drop_is_counted_from_the_deployed_model_or_from_the_best_exit():
    """Exit 2 is better than the last, as where the last exit is trained with the others (`final_exit="exit"`)."""
    labels = torch.arange(600) % 2
    right = torch.nn.functional.one_hot(labels, 2).float() * 4
    logits = torch.stack([1 - right, right, right], dim=1)
    logits[:60, 2] = 1 - logits[:60, 2]  # the last exit is wrong where exit 2 is right
    logits[60:90, :2] = 1 - logits[60:90, :2]  # exit 2 is wrong, the last one right
    stored = ExitLogits(logits, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best = calibrate(stored, "max_prob", max_score_drop=0.02)
        last = calibrate(ExitLogits(logits, labels, deployed=True), "max_prob", max_score_drop=0.02)
    assert best.calibration["drop_from"] == "best" and last.calibration["drop_from"] == "last"
    assert evaluate_policy(stored, best).score >= 0.95 - 0.02
    assert last.calibration["drop"] < 0  # better than the deployed model


@pytest.mark.parametrize("rows", [1, 2, 5, 20])
def test_rows_that_cannot_carry_the_claim(rows):
    stored = plausible(SINGLE, 3, rows=rows, exits=4)
    with pytest.warns(UserWarning, match=f"{rows} rows cannot show that any setting loses at most 0.01"):
        config = calibrate(stored, "max_prob", max_score_drop=0.01)
    assert evaluate_policy(stored, config).score == max(exit_scores(stored).best, config.calibration["score"])
    assert "drop" not in config.calibration


def test_without_a_bound_it_is_the_fastest_that_loses_nothing_elsewhere_or_else_the_reference():
    seen = set()
    for seed in range(12):
        stored = plausible(SINGLE, 3, rows=60, exits=4, seed=seed)
        for deployed in (False, True):
            asked = replace(stored, deployed=deployed)
            with pytest.warns(UserWarning, match="60 rows cannot show"):
                config = calibrate(asked, "max_prob", max_score_drop=0)
            found = fastest_without_loss(cross_fit(asked, "max_prob", "accuracy", "last" if deployed else "best"))
            scores = exit_scores(asked)
            best = found and best_at(search(asked, "max_prob", calibration.SETTINGS, "accuracy"), found.goal)
            free = best is not None and best.score >= (scores.per_exit[-1] if deployed else scores.best)
            if free:
                assert config.calibration["layer_speedup"] >= found.goal
                assert config.calibration["score"] == best.score
            else:
                depth = asked.exits[-1] if deployed else scores.best_exit
                assert (config.policy, config.depth) == ("fixed_depth", depth)
            seen.add((deployed, free))
    assert len(seen) == 4


def test_fastest_without_loss():
    def fastest(*drops):
        found = [HeldOut(g / 10, g / 10, drop, drop, drop, drop) for g, drop in enumerate(drops)]
        best = fastest_without_loss(found)
        return None if best is None else found.index(best)

    assert fastest(-0.1, 0.0, 0.1) == 1
    assert fastest(0.1, -0.3, 0.2) == 1  # the two cost the same: -0.1 in the mean
    assert fastest(0.1, 0.0) is None and fastest() is None
    assert fastest(0.0, 0.0) == 1


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_the_best_exit_is_that_of_all_rows(metric):
    """Folds of noise have other best exits; a drop is counted from one of them."""
    stored = noise(60, exits=4)
    scores = exit_scores(stored, metric)
    for m, score in zip(stored.exits, scores.per_exit, strict=True):
        alone = {"policy": "fixed_depth", "depth": m, "min_exit": m, "max_exit": m}
        (held,) = cross_fit(stored, alone, metric, "best", [0])
        assert held.drop == pytest.approx(scores.best - score)


def test_a_row_more_is_counted_as_lost():
    labels = torch.arange(40) % 2
    right = torch.nn.functional.one_hot(labels, 2).float()[:, None].expand(-1, 3, -1)
    for held in cross_fit(ExitLogits(right, labels), "max_prob", "accuracy", "best"):
        assert (held.drop, held.low, held.high) == (0, 0, 0) and held.bound == pytest.approx(1 / 41)


def test_fastest_within():
    found = [HeldOut(g / 10, g / 10, 0.0, 0.0, 0.0, bound) for g, bound in enumerate((0.0, 0.01, 0.02, 0.05))]
    assert fastest_within(found, 0.02) == found[2]
    assert fastest_within(found, 1.0) == found[3]
    assert fastest_within(found, -0.1) is None and fastest_within([], 1.0) is None
