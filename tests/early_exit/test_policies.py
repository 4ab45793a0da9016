"""Every exit policy against its formula, exit by exit, on random logits."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import (
    POLICIES,
    DivergencePolicy,
    FixedDepthPolicy,
    NeverPolicy,
    PatiencePolicy,
    ThresholdPolicy,
    build_policy,
)

from .reference import MULTI, REGRESSION, SINGLE, dge, divergences, pabee
from .rules import NO_REGRESSION, ON_LOGITS, fields_of
from .table_model import as_inputs, table_model

KINDS = ("ce", "kl", "js", "label")
PROBLEMS = (SINGLE, MULTI, REGRESSION)
ROWS, EXITS = 120, 7
RULED = [(name, p) for name in ON_LOGITS for p in PROBLEMS if not (p == REGRESSION and name in NO_REGRESSION)]


@cache
def random_logits(problem_type, num_labels=3):
    """[N, E, K]: exits that agree more and more, some rows from the start and some hardly ever."""
    rng = np.random.default_rng(1)
    k = 1 if problem_type == REGRESSION else num_labels
    final = rng.normal(scale=2.0, size=(ROWS, 1, k))
    noise = rng.normal(size=(ROWS, EXITS, k)) * rng.uniform(0.1, 3.0, size=(ROWS, 1, 1))
    return (final + noise * np.linspace(1.0, 0.3, EXITS)[None, :, None]).astype(np.float32)


@cache
def tables(kind, problem_type):
    """S[m][i] of every row, by the reference."""
    return [divergences(kind, row, problem_type) for row in random_logits(problem_type).tolist()]


def gap_at(values, share):
    """The middle of a gap between the numbers of a list of lists, near the quantile `share`: no number is so close to
    it that float32 and float64 could disagree about which is the smaller."""
    s = np.sort([v for row in values for v in row])
    middle, gap = (s[1:] + s[:-1]) / 2, s[1:] - s[:-1]
    middle = middle[gap > 2e-4 * np.maximum(1, middle)]
    return float(middle[np.abs(middle - np.quantile(s, share)).argmin()])


def tau_at(s, share):
    """`gap_at` for S[m][i] of many rows."""
    return gap_at([v for table in s for v in table], share)


# ------------------------------------------------------------------------------------------------------ against loops


@pytest.mark.parametrize("problem_type", PROBLEMS)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("window", ["all", "consecutive"])
@pytest.mark.parametrize("kind", KINDS)
def test_dge_is_equations_3_and_4(kind, window, share, problem_type):
    s = tables(kind, problem_type)
    tau = tau_at(s, share) if problem_type == REGRESSION or kind != "label" else 2 * share
    for t in (1, 2, 3, 5):
        want = [dge(row, window, tau, t) for row in s]
        policy = DivergencePolicy(divergence=kind, window=window, threshold=tau, patience=t)
        assert policy.replay(random_logits(problem_type), problem_type=problem_type).tolist() == want


@pytest.mark.parametrize("problem_type", PROBLEMS)
@pytest.mark.parametrize("patience", [1, 2, 3, 6, 7])
def test_patience_is_pabees_counter(patience, problem_type):
    logits = random_logits(problem_type)
    threshold = tau_at(tables("label", REGRESSION), 0.4)
    policy = PatiencePolicy(patience=patience, threshold=threshold if problem_type == REGRESSION else None)
    want = [pabee(row, problem_type, patience, threshold) for row in logits.tolist()]
    assert policy.replay(logits, problem_type=problem_type).tolist() == want
    assert len(set(want)) >= (3 if patience < 6 else 1)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=9), st.integers(1, 5))
def test_patience_on_label_sequences(labels, patience):
    """Sequences of labels, so that hypothesis can shrink to the shortest one that goes wrong."""
    logits = np.eye(3, dtype=np.float32)[np.array(labels)]
    want = [pabee(row, SINGLE, patience, 0.0) for row in logits.tolist()]
    assert PatiencePolicy(patience=patience).replay(logits).tolist() == want
    same = DivergencePolicy(divergence="label", window="consecutive", patience=patience)
    assert same.replay(logits).tolist() == want


def first(values, condition):
    """Number (from 1) of the first value that meets the condition, or of the last."""
    return next((m for m, v in enumerate(values, start=1) if condition(v)), len(values))


def test_temperatures_divide_the_logits_of_their_exit():
    logits = random_logits(SINGLE)
    temperature = [0.5, 2.0, 1.0, 3.0, 0.7, 1.5, 1.0]
    scaled = logits / np.array(temperature, np.float32)[None, :, None]
    plain = build_policy(policy="max_prob", threshold=0.8)
    got = build_policy(policy="max_prob", threshold=0.8, temperature=temperature).replay(logits)
    assert got.tolist() == plain.replay(scaled).tolist() != plain.replay(logits).tolist()
    with pytest.raises(ValueError, match="temperature has 2 numbers, but there are 7 exits"):
        build_policy(policy="max_prob", temperature=[1.0, 1.0]).replay(logits)


def test_learned_stops_where_the_doubt_is_small():
    doubts = np.random.default_rng(0).uniform(size=(ROWS, EXITS)).astype(np.float32)
    policy = build_policy(policy="learned", threshold=0.3)
    want = [first(row, lambda v: v < 0.3) for row in doubts.tolist()]
    assert policy.replay(random_logits(SINGLE), uncertainty=doubts).tolist() == want
    with pytest.raises(ValueError, match="learn_to_exit"):
        policy.replay(random_logits(SINGLE))


@pytest.mark.parametrize("name", NO_REGRESSION)
def test_rules_that_need_a_distribution_refuse_regression(name):
    with pytest.raises(ValueError, match=f"policy='{name}' needs a distribution"):
        build_policy(policy=name).replay(random_logits(REGRESSION))


def test_equality_with_tau_does_not_stop():
    logits = np.array([[[1.0], [1.5], [2.0], [2.0]]], np.float32)
    assert DivergencePolicy(threshold=0.5).replay(logits).tolist() == [4]
    assert DivergencePolicy(threshold=0.5000001).replay(logits).tolist() == [2]
    assert PatiencePolicy(threshold=0.5, patience=1).replay(logits).tolist() == [4]


def test_equality_with_the_threshold_of_max_prob_stops():
    certain = np.array([[[50.0, -50.0]] * 3], np.float32)
    assert build_policy(policy="max_prob", threshold=1.0).replay(certain).tolist() == [1]


def test_cross_entropy_stops_on_agreement_with_confidence_only():
    """S(p, p) = H(p): two equal, undecided exits are not close, two equal, certain ones are."""
    undecided, certain = [[0.0, 0.0]] * 4, [[5.0, -5.0]] * 4
    logits = np.array([undecided, certain], np.float32)
    assert DivergencePolicy(divergence="ce", threshold=0.3).replay(logits).tolist() == [4, 2]
    for kind in ("kl", "js", "label"):
        assert DivergencePolicy(divergence=kind, threshold=0.3).replay(logits).tolist() == [2, 2]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(["all", "consecutive"]),
    st.floats(0, 3, width=32),
    st.floats(0, 3, width=32),
    st.integers(1, 4),
    st.sampled_from(PROBLEMS),
)
def test_a_stricter_rule_never_stops_earlier(kind, window, tau, more, t, problem_type):
    logits = random_logits(problem_type)
    rule = {"divergence": kind, "window": window}

    def stop(threshold, patience):
        policy = DivergencePolicy(**rule, threshold=threshold, patience=patience)
        return policy.replay(logits, problem_type=problem_type)

    assert (stop(tau + more, t) <= stop(tau, t)).all()
    assert (stop(tau, t) <= stop(tau, t + 1)).all()
    assert (stop(tau, t) > t).all() or t >= EXITS


# ---------------------------------------------------------------------------------------------- the ends of the model


@pytest.mark.parametrize("exits", [None, [0, 1, 3, 4, 8, 9, 12], [2, 3, 4, 5, 6, 7, 12]])
@pytest.mark.parametrize("name", ON_LOGITS)
def test_min_exit_and_max_exit(name, exits):
    logits = random_logits(SINGLE)
    numbers = exits or list(range(1, EXITS + 1))
    base = fields_of(name, numbers, 3, SINGLE)
    free = build_policy(base).replay(logits, exits)
    assert set(free.tolist()) <= set(numbers)
    for cap in range(numbers[0], numbers[-1] + 1):
        answers = max(m for m in numbers if m <= cap)
        capped = build_policy(base, max_exit=cap).replay(logits, exits)
        assert capped.tolist() == free.clamp(max=answers).tolist()
    for floor in range(numbers[-1] + 1):
        late = build_policy(base, min_exit=floor).replay(logits, exits)
        assert (late >= floor).all() and (late >= free).all()
        assert late[free >= floor].tolist() == free[free >= floor].tolist()
    both = build_policy(base, min_exit=numbers[3], max_exit=numbers[3]).replay(logits, exits)
    assert both.tolist() == [numbers[3]] * ROWS


@pytest.mark.parametrize("exits", [[1, 2, 3, 4, 5, 6, 7], [0, 2, 5, 6, 8, 10, 12]])
def test_fixed_depth_and_never(exits):
    logits = random_logits(SINGLE)
    for depth in exits:
        assert FixedDepthPolicy(depth=depth).replay(logits, exits).tolist() == [depth] * ROWS
    assert NeverPolicy().replay(logits, exits).tolist() == [exits[-1]] * ROWS


@pytest.mark.parametrize("exits", [[0, 2, 5], [1, 6], [3]])
def test_a_subset_of_exits_is_a_shorter_history(exits):
    logits = random_logits(SINGLE)[:, : len(exits)]
    policy = DivergencePolicy(threshold=0.7)
    by_index = policy.replay(logits) - 1
    assert policy.replay(logits, exits).tolist() == [exits[j] for j in by_index.tolist()]


# ----------------------------------------------------------------------------------------------------------- defaults


def plausible_logits(problem_type, num_labels, rows=300, exits=12):
    """Exits of a trained classifier: evidence for the right answer grows with depth, faster for easy rows."""
    rng = np.random.default_rng(2)
    depth = np.linspace(0.0, 1.0, exits)[None, :, None]
    ease = rng.uniform(0.3, 1.5, size=(rows, 1, 1))
    if problem_type == REGRESSION:
        wander = rng.normal(size=(rows, exits, 1)) * np.exp(-3 * depth * ease)
        return (rng.uniform(0, 5, size=(rows, 1, 1)) + wander).astype(np.float32)
    size = (rows, 1, num_labels)
    right = rng.integers(0, 2, size) * 2.0 - 1.0 if problem_type == MULTI else np.eye(num_labels)[None][:, :1] * 2.5
    noise = rng.normal(size=(rows, exits, num_labels)) * (1.5 - depth)
    return (right * depth * ease * (4.0 + np.log(num_labels)) + noise).astype(np.float32)


SIZES = [(SINGLE, 2), (SINGLE, 3), (SINGLE, 77), (SINGLE, 150), (MULTI, 10), (REGRESSION, 1)]
RULES = [
    *({"divergence": kind, "window": window} for kind in KINDS for window in ("all", "consecutive")),
    {"policy": "patience"},
]


@pytest.mark.parametrize(("problem_type", "num_labels"), SIZES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule.values()))
def test_defaults_stop_some_rows_and_not_all_at_once(rule, problem_type, num_labels):
    logits = plausible_logits(problem_type, num_labels)
    stops = build_policy(**rule).replay(logits, problem_type=problem_type)
    early = (stops < logits.shape[1]).float().mean()
    assert early > 0.2
    assert (stops == stops.min()).float().mean() < 0.95
    assert len(stops.unique()) > 1


LN_2 = math.log(2)


@pytest.mark.parametrize(
    ("policy", "problem_type", "num_labels", "threshold"),
    [
        ("ce", SINGLE, 2, 0.3 * LN_2),
        ("ce", SINGLE, 150, 0.3 * math.log(150)),
        ("kl", SINGLE, 77, 0.05 * math.log(77)),
        ("js", SINGLE, 3, 0.02 * math.log(3)),
        ("ce", MULTI, 10, 0.3 * 10 * LN_2),
        ("js", MULTI, 10, 0.02 * 10 * LN_2),
        ("label", SINGLE, 77, 0.5),
        ("label", MULTI, 10, 0.5),
        ("ce", REGRESSION, 1, 0.1),
        ("label", REGRESSION, 1, 0.1),
        ("patience", SINGLE, 77, 0.5),
        ("patience", REGRESSION, 1, 0.1),
        ("entropy", SINGLE, 2, 0.3 * LN_2),
        ("entropy", SINGLE, 77, 0.3 * math.log(77)),
        ("entropy", MULTI, 5, 0.3 * 5 * LN_2),
        ("max_prob", SINGLE, 2, 0.9),
        ("max_prob", SINGLE, 4, 0.7),
        ("max_prob", SINGLE, 80, 0.51),
        ("max_prob", MULTI, 5, 0.9),
        ("confident_patience", SINGLE, 2, 0.4),
        ("confident_patience", SINGLE, 77, 0.4),
        ("confident_patience", MULTI, 5, 0.4),
    ],
)
def test_documented_defaults(policy, problem_type, num_labels, threshold):
    rule = {"divergence": policy, "patience": 1} if policy in KINDS else {"policy": policy}
    rule |= {"patience": 2} if policy.endswith("patience") else {}
    logits = plausible_logits(problem_type, num_labels)
    if policy in ("entropy", "max_prob", "confident_patience"):
        logits = np.random.default_rng(0).normal(scale=4.0, size=(400, 5, num_labels)).astype(np.float32)
    default = build_policy({k: v for k, v in rule.items() if k != "patience"}).replay(logits, None, problem_type)
    assert 1 < len(default.unique())

    def written(share):
        return build_policy(rule, threshold=share * threshold).replay(logits, None, problem_type).tolist()

    assert default.tolist() == written(1)
    if policy not in ("label", "patience"):
        assert default.tolist() != written(0.7) and default.tolist() != written(1.3)


# -------------------------------------------------------------------------------------------------- building and input


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "problem_type"), RULED)
def test_half_precision_is_read_as_it_is(problem_type, name, dtype):
    logits = torch.from_numpy(random_logits(problem_type)) * 50
    logits[:3] = 0.0
    logits[:3, :, 0] = torch.finfo(dtype).max
    logits[1] = -logits[1]
    logits[2, :, 0] = torch.inf
    logits = logits.to(dtype)
    policy = build_policy(fields_of(name, range(1, EXITS + 1), logits.shape[2], problem_type))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        stops = policy.replay(logits, problem_type=problem_type)
    assert stops.tolist() == policy.replay(logits.float(), problem_type=problem_type).tolist()
    if name in ("divergence", "patience") and problem_type == SINGLE:
        assert stops[0] <= 3  # equal and certain exits, however large
    if name != "fixed_depth":
        assert stops[2] == EXITS  # infinity says nothing


@pytest.mark.parametrize("name", ON_LOGITS)
def test_a_policy_keeps_no_state(name):
    policy = build_policy(fields_of(name, range(1, EXITS + 1), 3, SINGLE))
    first = policy.replay(random_logits(SINGLE))
    policy.replay(random_logits(SINGLE)[:1] * 100)
    policy.replay(random_logits(SINGLE)[::-1] / 3)
    assert policy.replay(random_logits(SINGLE)).tolist() == first.tolist()


@pytest.mark.parametrize(("name", "problem_type"), RULED)
def test_a_rows_signal_does_not_depend_on_the_rows_beside_it(name, problem_type):
    """To the last bit, for as many exits as BERT-base has: or a row could stop elsewhere in another batch."""
    exits = list(range(13))
    logits = plausible_logits(problem_type, 1 if problem_type == REGRESSION else 10, rows=33, exits=13)
    policy = build_policy(fields_of(name, exits, logits.shape[2], problem_type))
    stops = policy.replay(logits, exits, problem_type)
    alone = [policy.replay(logits[n : n + 1], exits, problem_type).item() for n in range(33)]
    assert alone == stops.tolist()
    if isinstance(policy, ThresholdPolicy):
        history = ExitHistory.of(logits, exits, problem_type)
        signals = np.stack([policy.score(history, j) for j in range(13)])
        for n in range(33):
            one = ExitHistory.of(logits[n : n + 1], exits, problem_type)
            np.testing.assert_array_equal([policy.score(one, j)[0] for j in range(13)], signals[:, n])


@pytest.mark.parametrize(
    ("fields", "depths"),
    [({}, [6, 5, 2, 1]), ({"min_exit": 2, "max_exit": 5}, [5, 2]), ({"min_exit": 3, "max_exit": 4}, [2])],
)
def test_depths_to_choose_from(fields, depths):
    policy = build_policy(policy="fixed_depth", depth=6, **fields)
    assert [config.depth for config in policy.grid([1, 2, 5, 6], SINGLE)] == depths


def test_every_name_is_built():
    assert {*ON_LOGITS, "learned", "top_k"} == set(POLICIES)
    for name, policy in POLICIES.items():
        built = build_policy(fields_of(name, [1, 2], 3, SINGLE))
        assert type(built) is policy and built.name == built.config.policy == name


# ------------------------------------------------------------------------------------- an exit's own confidence


def signals(name, logits, problem_type=SINGLE, **fields):
    """[E, N] of a rule on logits [N, E, K]."""
    history = ExitHistory.of(np.asarray(logits, np.float32), range(1, len(logits[0]) + 1), problem_type)
    rule = build_policy(policy=name, **fields)
    return np.stack([rule.score(history, j) for j in range(len(logits[0]))])


def between(logit):
    """Rows of two exits with the logits (v, 0) and (0, v), v from 0 to `logit`."""
    v = np.linspace(0, logit, 41, dtype=np.float32)
    zero = np.zeros_like(v)
    return np.stack([np.stack([v, zero], -1), np.stack([zero, v], -1)], axis=1)


def test_ends():
    """Entropy and its share stop below the threshold, a probability at it."""
    logits = [[[0.0, 0.0]] * 3]
    half, most = 0.5, float(np.float32(math.log(2)))
    exact = float(signals("entropy", logits)[0, 0])
    assert exact == pytest.approx(most, abs=1e-6)
    assert build_policy(policy="entropy", threshold=exact).replay(logits).tolist() == [3]
    assert build_policy(policy="entropy", threshold=exact + 1e-6).replay(logits).tolist() == [1]
    assert build_policy(policy="max_prob", threshold=half).replay(logits).tolist() == [1]
    assert build_policy(policy="max_prob", threshold=half + 1e-6).replay(logits).tolist() == [3]
    for name in ("entropy", "confident_patience"):
        assert build_policy(policy=name, threshold=0.0).replay(between(30.0)).tolist() == [2] * 41
    assert build_policy(policy="max_prob", threshold=1.5).replay(between(30.0)).tolist() == [2] * 41


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
@pytest.mark.parametrize("final_exit", ["exit", "base_head"])
def test_temperatures_live_are_those_of_the_replay(final_exit, problem_type):
    blocks, exits = 4, (0, 1, 2, 3, 4)
    logits = 3 * torch.randn(13, blocks + 1, 3, generator=torch.Generator().manual_seed(0))
    logits[:2] *= 1e4
    model = table_model(3, problem_type, exits, blocks, final_exit)
    rule = {"policy": "max_prob", "threshold": 0.8, "temperature": [0.5, 2.0, 5.0, 0.9, 1.0]}
    want = build_policy(rule).replay(logits, exits, problem_type)
    out = model.early_exit_forward(**as_inputs(logits), early_exit_config=rule)
    assert out.exit_layer.tolist() == want.tolist() and len(want.unique()) > 2
    plain = build_policy(rule, temperature=None).replay(logits, exits, problem_type)
    assert plain.tolist() != want.tolist()
    with pytest.raises(ValueError, match="temperature has 4 numbers, but there are 5 exits"):
        model.early_exit_forward(**as_inputs(logits), early_exit_config={**rule, "temperature": [1.0] * 4})
