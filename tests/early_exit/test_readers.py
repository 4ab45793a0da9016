"""EarlyExitRun: on any logits at all, live and replay give the same exits and the same answers, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.early_exit.history import ExitHistory
from badge_peft.early_exit.policies import build_policy

from .reference import MULTI, REGRESSION, SINGLE
from .rules import NO_REGRESSION, ON_LOGITS, fields_of, watched_exits
from .table_model import as_inputs, table_model

BLOCKS = 6
EXITS = [(1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 4, 5, 6), (0, 2, 5, 6), (3, 6), (0, 6), (6,)]
PROBLEMS = [(SINGLE, 2), (SINGLE, 5), (MULTI, 4), (REGRESSION, 1)]
KINDS = ("normal", "converging", "whole", "huge")


def logits_of(seed: int, rows: int, num_labels: int, kind: str) -> torch.Tensor:
    """[rows, M + 1, K]; entry m is what an exit at block m says. `whole` numbers have ties, in labels and in S."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, BLOCKS + 1, num_labels, generator=generator)
    if kind == "converging":
        final = 2 * torch.randn(rows, 1, num_labels, generator=generator)
        logits = final + logits * torch.linspace(1, 0.05, BLOCKS + 1).view(1, -1, 1)
    return {"whole": logits.round(), "huge": logits * 1e4}.get(kind, logits)


TAUS = st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.7, 1.0, 2.0, 1e4])


@st.composite
def configs(draw, exits, num_labels, problem_type):
    """Any config but those that `check` refuses."""
    names = [name for name in ON_LOGITS if problem_type != REGRESSION or name not in NO_REGRESSION]
    name = draw(st.sampled_from(names))
    low = draw(st.none() | st.integers(0, BLOCKS))
    high = draw(st.none() | st.integers(max(low or 0, exits[0]), BLOCKS))
    return {
        **fields_of(name, exits, num_labels, problem_type),
        "divergence": draw(st.sampled_from(["ce", "kl", "js", "label"])),
        "window": draw(st.sampled_from(["all", "consecutive"])),
        "threshold": draw(st.none() | TAUS | st.lists(TAUS, min_size=len(exits), max_size=len(exits))),
        "patience": draw(st.none() | st.integers(1, 4)),
        "decide_every": draw(st.sampled_from([1, 1, 2, 3, 4, 9])),
        "min_exit": low,
        "max_exit": high,
        **({"depth": draw(st.sampled_from(exits))} if name == "fixed_depth" else {}),
    }


def check(model, logits, exits, problem_type, config):
    """One call against the replay; returns the exits."""
    out = model.early_exit_forward(**as_inputs(logits), early_exit_config=config)
    want = build_policy(config).replay(logits[:, list(exits)], exits, problem_type)
    assert out.exit_layer.dtype == torch.long
    assert out.exit_layer.tolist() == want.tolist()
    assert torch.equal(out.logits, logits[torch.arange(len(logits)), want])
    going = [int((want >= m).sum()) for m in range(1, BLOCKS + 1)]
    full = model.base_model.layout.full_rows_until
    computed = [len(logits) if rows and m <= full else rows for m, rows in enumerate(going, start=1)]
    assert model.base_model.model.computed == [rows for rows in computed if rows]
    return want


@pytest.mark.parametrize(("problem_type", "num_labels"), PROBLEMS)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_live_is_replay(problem_type, num_labels, data):
    exits = data.draw(st.sampled_from(EXITS))
    style = data.draw(
        st.tuples(st.sampled_from(["exit", "base_head"]), st.booleans(), st.booleans(), st.sampled_from([0, 1, 3]))
    )
    rows = data.draw(st.integers(1, 17))
    config = data.draw(configs(exits, num_labels, problem_type))
    logits = logits_of(data.draw(st.integers(0, 999)), rows, num_labels, data.draw(st.sampled_from(KINDS)))
    model = table_model(num_labels, problem_type, exits, BLOCKS, *style)
    check(model, logits, exits, problem_type, config)


@pytest.mark.parametrize(("problem_type", "num_labels"), PROBLEMS)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_exits_that_are_not_read_change_nothing(problem_type, num_labels, data):
    """Whatever they would have said; and live they are not computed at all."""
    exits = data.draw(st.sampled_from(EXITS))
    config = data.draw(configs(exits, num_labels, problem_type))
    logits = logits_of(data.draw(st.integers(0, 999)), 5, num_labels, data.draw(st.sampled_from(KINDS)))
    policy = build_policy(config)
    want = policy.replay(logits[:, list(exits)], exits, problem_type)
    read = [m for j, m in enumerate(exits) if policy.needs_logits(exits, j)]
    unread = [m for m in exits if m not in read]
    logits[:, unread] = 1e3 * torch.randn(logits[:, unread].shape, generator=torch.Generator().manual_seed(1))
    assert policy.replay(logits[:, list(exits)], exits, problem_type).tolist() == want.tolist()
    model = table_model(num_labels, problem_type, exits, BLOCKS)
    with watched_exits(model) as computed:
        out = model.early_exit_forward(**as_inputs(logits), early_exit_config=config)
    assert out.exit_layer.tolist() == want.tolist()
    assert [m for _, m in computed] == [m for m in read if m <= want.max()]


@pytest.mark.parametrize(("problem_type", "num_labels"), PROBLEMS)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_exits_that_carry_logits(problem_type, num_labels, data):
    """Live is the replay of what full depth gives, and computed are the exits up to the last that a decision reads."""
    exits = data.draw(st.sampled_from(EXITS))
    final_exit = data.draw(st.sampled_from(["exit", "base_head"]))
    config = data.draw(configs(exits, num_labels, problem_type))
    table = logits_of(data.draw(st.integers(0, 999)), 7, num_labels, data.draw(st.sampled_from(KINDS)))
    model = table_model(num_labels, problem_type, exits, BLOCKS, final_exit, carry="logits")
    heads = [item for block in model.base_model.wrapped for head in block.badge_exit.values() for item in head.items()]
    shares = data.draw(st.lists(st.sampled_from([0.0, 1.0, -0.5, 0.3]), min_size=len(heads), max_size=len(heads)))
    for (_, exit_), share in zip(heads, shares, strict=True):
        if exit_.carry is not None:
            exit_.carry.weight.data.fill_(share)
    inputs = as_inputs(table)
    with torch.no_grad():
        logits = model(**inputs).exit_logits
    policy = build_policy(config)
    want = policy.replay(logits, exits, problem_type)
    with watched_exits(model) as computed:
        out = model.early_exit_forward(**inputs, early_exit_config=config)
    assert out.exit_layer.tolist() == want.tolist()
    found = logits[torch.arange(7), torch.tensor([exits.index(m) for m in want.tolist()])]
    assert torch.equal(out.logits, found)
    end = next(j for j in range(len(exits)) if policy.is_final(exits, j))
    own = [m for m in exits if final_exit == "exit" or m < BLOCKS]
    read = [m for j, m in enumerate(exits[: end + 1]) if policy.needs_logits(exits, j) and m in own]
    assert [m for _, m in computed] == [m for m in own if m <= max(read, default=-1) and m <= want.max()]


@pytest.mark.parametrize(
    ("config", "read"),
    [
        ({"policy": "fixed_depth", "depth": 3}, [3]),
        ({"policy": "fixed_depth", "depth": 3, "min_exit": 5}, [6]),
        ({"policy": "fixed_depth", "depth": 5, "max_exit": 4}, [4]),
        ({"policy": "never"}, [6]),
        ({"policy": "never", "max_exit": 2}, [2]),
        ({"policy": "entropy", "min_exit": 4}, [4, 5, 6]),
        ({"policy": "confident_patience", "patience": 3, "min_exit": 4}, [2, 3, 4, 5, 6]),
        ({"policy": "patience", "patience": 2, "min_exit": 5}, [3, 4, 5, 6]),
        ({"policy": "divergence", "min_exit": 5}, [0, 1, 2, 3, 4, 5, 6]),
        ({"policy": "divergence", "min_exit": 6}, [6]),
        ({"policy": "entropy", "decide_every": 3}, [2, 5, 6]),
        ({"policy": "entropy", "decide_every": 3, "max_exit": 4}, [2, 4]),
        ({"policy": "patience", "patience": 1, "decide_every": 3}, [1, 2, 4, 5, 6]),
        ({"policy": "fixed_depth", "depth": 3, "decide_every": 3}, [3]),
    ],
)
def test_which_exits_are_read(config, read):
    policy, exits = build_policy(config), range(7)
    reached = range(1 + next(j for j in exits if policy.is_final(exits, j)))
    assert [j for j in reached if policy.needs_logits(exits, j)] == read


@pytest.mark.parametrize(("problem_type", "num_labels"), PROBLEMS)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_decide_every_keeps_the_rule_and_thins_out_its_exits(problem_type, num_labels, data):
    """A row stops at the first k-th exit at which the rule holds; the exits between count as earlier exits."""
    exits = data.draw(st.sampled_from(EXITS))
    config = {**data.draw(configs(exits, num_labels, problem_type)), "min_exit": None, "max_exit": None}
    if config["policy"] == "fixed_depth":
        config["policy"] = "never"
    logits = logits_of(data.draw(st.integers(0, 999)), 9, num_labels, data.draw(st.sampled_from(KINDS)))[
        :, list(exits)
    ]
    every, last = config["decide_every"], exits[-1]
    policy = build_policy(config)
    if config["policy"] == "agreement":
        policy.config = replace(policy.config, max_exit=None)
    history = ExitHistory.of(logits.numpy(), exits, problem_type)
    holds = [policy.should_exit(history, j) for j in range(len(exits) - 1)]
    want = [
        next((exits[j] for j in range(every - 1, len(exits) - 1, every) if holds[j][row]), last) for row in range(9)
    ]
    assert policy.replay(logits, exits, problem_type).tolist() == want


def test_the_logits_above_reach_every_exit():
    logits = logits_of(0, 300, 5, "converging")
    reached = build_policy(threshold=0.8).replay(logits, range(BLOCKS + 1)).unique()
    assert reached.tolist() == list(range(1, BLOCKS + 1))


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("final_exit", ["exit", "base_head"])
def test_full_depth_gives_the_table(final_exit, exits):
    logits = logits_of(0, 4, 5, "normal")
    out = table_model(5, SINGLE, exits, BLOCKS, final_exit)(**as_inputs(logits))
    assert torch.equal(out.exit_logits, logits[:, list(exits)])
    assert torch.equal(out.logits, logits[:, -1])
