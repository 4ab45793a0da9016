"""top_k: against a loop over queries, live against replay, and what happens at its edges."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft import EarlyExitConfig
from badge_peft.early_exit.history import group_codes
from badge_peft.early_exit.policies import build_policy
from badge_peft.early_exit.policies.base import describe, set_fields
from badge_peft.evaluation import ExitLogits, evaluate_policy, sweep

from .reference import MULTI, REGRESSION, SINGLE
from .table_model import as_inputs, table_model

BLOCKS = 6
EXITS = [(1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 4, 5, 6), (0, 2, 5, 6), (3, 6), (6,)]


def by_loops(scores, exits, groups, config):
    """[N]: the definition, query by query and candidate by candidate."""
    answer = [None] * len(scores)
    margins, factor = config["parameters"]["margins"], config.get("threshold")
    low, high, every = config.get("min_exit"), config.get("max_exit"), config.get("decide_every", 1)
    for query in set(groups):
        active = [n for n, g in enumerate(groups) if g == query]
        for j, block in enumerate(exits):
            if j == len(exits) - 1 or (high is not None and exits[j + 1] > high):
                for n in active:
                    answer[n] = block
                break
            if (j + 1) % every or (low is not None and block < low) or margins[j] is None:
                continue
            limit = np.float32(margins[j]) * np.float32(1.0 if factor is None else factor)
            ranked = sorted((scores[n][j] for n in active if math.isfinite(scores[n][j])), reverse=True)
            if len(ranked) < config["top_k"]:
                continue
            bar = ranked[config["top_k"] - 1]
            for n in list(active):
                if math.isfinite(scores[n][j]) and np.float32(bar) - np.float32(scores[n][j]) > limit:
                    answer[n] = block
                    active.remove(n)
    return answer


@st.composite
def cases(draw):
    """Scores [N, M + 1], their queries, exits and a config."""
    exits = draw(st.sampled_from(EXITS))
    n = draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    scores = rng.normal(size=(n, 1)) + rng.normal(size=(n, BLOCKS + 1)) * np.linspace(1.5, 0.1, BLOCKS + 1)
    if draw(st.booleans()):
        scores = scores.round()  # ties
    if draw(st.booleans()):
        scores[rng.random(scores.shape) < 0.2] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    groups = rng.integers(0, draw(st.integers(1, 4)), size=n)
    low = draw(st.none() | st.integers(0, BLOCKS))
    margin = st.sampled_from([0.0, 0.25, 1.0, 2.0, None])
    config = {
        "policy": "top_k",
        "top_k": draw(st.integers(1, 6)),
        "threshold": draw(st.sampled_from([None, 0.0, 0.5, 1.0, 2.0])),
        "parameters": {"margins": [draw(margin) for _ in exits]},
        "decide_every": draw(st.sampled_from([1, 1, 2, 3])),
        "min_exit": low,
        "max_exit": draw(st.none() | st.integers(max(low or 0, exits[0]), BLOCKS)),
    }
    return scores.astype(np.float32), groups, exits, config


@settings(deadline=None, derandomize=True, max_examples=300)
@given(cases())
def test_replay_is_the_definition(case):
    scores, groups, exits, config = case
    read = scores[:, list(exits)]
    found = build_policy(config).replay(read[:, :, None], exits, groups=groups)
    assert found.tolist() == by_loops(read.tolist(), exits, groups.tolist(), config)


@pytest.mark.filterwarnings("ignore:.* rows had logits that are NaN")
@settings(deadline=None, derandomize=True, max_examples=200)
@given(cases(), st.sampled_from(["exit", "base_head"]), st.booleans())
def test_live_is_replay(case, final_exit, one_query):
    scores, groups, exits, config = case
    model = table_model(1, REGRESSION, exits, BLOCKS, final_exit)
    table = torch.from_numpy(np.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0))[:, :, None]
    ids = None if one_query else groups.tolist()
    out = model.early_exit_forward(**as_inputs(table), early_exit_config=config, groups=ids)
    want = build_policy(config).replay(table[:, list(exits)], exits, groups=ids)
    assert out.exit_layer.tolist() == want.tolist()
    assert torch.equal(out.logits, table[torch.arange(len(table)), want])
    if not one_query:  # each query as it is alone
        for query in set(ids):
            rows = torch.from_numpy(groups == query)
            alone = model.early_exit_forward(**as_inputs(table[rows]), early_exit_config=config)
            assert alone.exit_layer.tolist() == out.exit_layer[rows].tolist()


def test_ids_of_several_kinds_and_missing_ones_are_refused():
    with pytest.raises(ValueError, match=r"ids of several kinds \(NoneType, int\): give numbers alone"):
        group_codes([1, None, 2], 3)
    with pytest.raises(ValueError, match=r"ids of several kinds \(int, str\): give numbers alone"):
        group_codes([1, "1", "2"], 3)
    for ids in ([1.0, math.nan, 2.0], torch.tensor([1.0, math.nan, 2.0])):
        with pytest.raises(ValueError, match="groups has a NaN, which is no id"):
            group_codes(ids, 3)


def test_endless_margins_are_full_depth_and_small_ones_leave_k():
    scores = torch.randn(40, 4, 1, generator=torch.Generator().manual_seed(0))
    config = EarlyExitConfig(policy="top_k", top_k=7, parameters={"margins": [None, math.inf, None, 0.0]})
    assert build_policy(config).replay(scores).tolist() == [4] * 40
    assert build_policy(config, threshold=0.0).replay(scores).tolist() == [4] * 40
    narrow = build_policy(config, parameters={"margins": [1.0] * 4}, threshold=0.0).replay(scores)
    assert [(narrow >= m).sum().item() for m in (1, 2, 3, 4)] == [40, 7, 7, 7]
    wider = [build_policy(config, parameters={"margins": [1.0] * 4}, threshold=f).replay(scores) for f in (0.5, 1, 2)]
    saved = [float(stops.float().mean()) for stops in wider]
    assert saved == sorted(saved) and saved[0] < saved[-1]


def test_stored_logits_know_their_queries(tmp_path):
    scores = torch.randn(30, 4, 1, generator=torch.Generator().manual_seed(2))
    ids = [f"q{i % 3}" for i in range(30)]
    stored = ExitLogits(scores, groups=ids)
    stored.save(tmp_path / "logits.safetensors")
    stored = ExitLogits.load(tmp_path / "logits.safetensors")
    config = EarlyExitConfig(policy="top_k", top_k=2, parameters={"margins": [0.5] * 4})
    want = build_policy(config).replay(scores, groups=ids)
    assert build_policy(config).replay(stored).tolist() == want.tolist()
    assert build_policy(config).replay(stored, groups=[0] * 30).tolist() != want.tolist()
    point = evaluate_policy(stored.labeled(), config, "neg_mse")
    assert point.mean_exit == want.double().mean().item()
    part = stored.select(torch.arange(0, 30, 3))
    assert build_policy(config).replay(part).tolist() == want[::3].tolist()
    points = sweep(stored.labeled(), [config], metric="neg_mse").curve("top_k")
    assert len({p.config.threshold for p in points}) == len(points) > 10
    assert points[0].blocks_saved < points[-1].blocks_saved


def test_in_words():
    config = EarlyExitConfig(policy="top_k", top_k=5, threshold=0.5, parameters={"margins": [1.0, 0.0]})
    assert describe(config) == "top_k, top_k=5, threshold=0.5, margins=[1]"
    assert describe(EarlyExitConfig(policy="top_k")) == "top_k"
    margins = [None, 2.34567, 0.0]
    assert describe(EarlyExitConfig(policy="top_k", parameters={"margins": margins})) == "top_k, margins=[None, 2.346]"
    assert set_fields(config) == {"policy": "top_k", "threshold": 0.5, "top_k": 5}
    assert build_policy(config).resolve(1, REGRESSION) == config
    assert build_policy(config, threshold=None).resolve(1, REGRESSION).threshold == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": -0.5}, "threshold=-0.5 is not allowed: with policy='top_k' it is a factor"),
        ({"parameters": {}}, "parameters={} is not allowed: policy='top_k' needs 'margins'"),
        ({"parameters": {"margins": [1.0, -1.0]}}, "parameters={'margins': [1.0, -1.0]} is not allowed"),
        ({"parameters": {"margins": [math.nan]}}, "'margins', a list of numbers that are 0 or more"),
        ({"parameters": {"margins": 1.0}}, "parameters={'margins': 1.0} is not allowed"),
    ],
)
def test_configs_that_cannot_be_meant(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EarlyExitConfig(policy="top_k", **fields)


def test_what_does_not_fit_the_model_is_refused():
    scores = torch.zeros(4, 3, 1)
    with pytest.raises(ValueError, match=r"no margins: find them with.*calibrate_ranking"):
        build_policy(policy="top_k").replay(scores)
    config = EarlyExitConfig(policy="top_k", parameters={"margins": [1.0, 1.0]})
    with pytest.raises(ValueError, match="2 margins, but there are 3 exits"):
        build_policy(config).replay(scores)
    with pytest.raises(ValueError, match="the model has 2 outputs: load it with num_labels=1"):
        build_policy(config).replay(torch.zeros(4, 2, 2))
    for ids in ([0, 1], [[0], [1], [2], [3]], "abc"):
        with pytest.raises(ValueError, match="for 4 rows: give one id for each row"):
            build_policy(config).replay(scores[:, :2], groups=ids)
    model = table_model(1, REGRESSION, EXITS[0], BLOCKS)
    with pytest.raises(ValueError, match="for 4 rows: give one id for each row"):
        model.early_exit_forward(**as_inputs(torch.zeros(4, BLOCKS + 1, 1)), groups=[1, 2, 3])
    assert not build_policy(config).suits(SINGLE)
    assert all(build_policy(config).suits(kind) for kind in (MULTI, REGRESSION))


def test_rows_of_several_adapters_have_their_own_queries():
    exits = EXITS[0]
    model = table_model.__wrapped__(1, REGRESSION, exits, BLOCKS)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.adapter_exits("other")
    scores = torch.randn(12, BLOCKS + 1, 1, generator=torch.Generator().manual_seed(1))
    config = {"policy": "top_k", "top_k": 2, "parameters": {"margins": [0.2] * BLOCKS}}
    names = ["default", "other"] * 6
    ids = torch.tensor([0, 0, 1, 1] * 3)
    out = model.early_exit_forward(**as_inputs(scores), early_exit_config=config, adapter_names=names, groups=ids)
    for name in ("default", "other"):
        rows = torch.tensor([n == name for n in names])
        model.set_adapter(name)
        alone = model.early_exit_forward(**as_inputs(scores[rows]), early_exit_config=config, groups=ids[rows])
        assert out.exit_layer[rows].tolist() == alone.exit_layer.tolist()
