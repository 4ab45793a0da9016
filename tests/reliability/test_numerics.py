"""Logits that no policy should trust, and those at the ends of what floats hold: NaN and infinity never cause an exit.

| covered | by |
|---|---|
| NaN and infinity in any rows, any exits, every policy, K = 1, 2, 5, 1000, 1 to 257 rows: live, replay | `test_live` |
| the same against the ONNX graph, both forms of it | `test_onnx` |
| logits of up to +-1e4 and +-3e38, equal and tied ones | kinds of logits in `test_live` and `test_onnx` |
| a row of NaN states in float32, bfloat16 and float16; its neighbors do not notice | `test_a_row_of_nan` |
| rows of several adapters | `test_adapter_names` |
| rows of padding alone, padding on the left, each pooling | `test_padding` |
| what a sweep makes of such rows | `test_sweep` |

A row trusts an exit when all exits that the policy looks at there gave finite logits; the last exit answers anyway.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from badge_peft.early_exit.history import as_history
from badge_peft.early_exit.policies import build_policy
from badge_peft.evaluation.candidates import settings as settings_of
from tests.early_exit.reference import MULTI, REGRESSION, SINGLE
from tests.early_exit.rules import NO_REGRESSION, ON_LOGITS, fields_of
from tests.early_exit.table_model import as_inputs, table_model
from tests.early_exit.test_readers import configs
from tests.labels import label
from tests.models import exits_of, make_badge, make_batch, make_model

BLOCKS, EXITS = 6, (0, 1, 2, 3, 6)
PROBLEMS = [(SINGLE, 1), (SINGLE, 2), (SINGLE, 1000), (MULTI, 1), (MULTI, 5), (REGRESSION, 1), (REGRESSION, 2)]
BAD = {1e37: torch.nan, 2e37: torch.inf, -2e37: -torch.inf}  # in the tests' tables: what an exit makes of an entry
SCALES = (0.0, 1.0, 1e4, 1e36)


def table_of(seed: int, rows: int, num_labels: int, scale: float, share: float) -> torch.Tensor:
    """[rows, M + 1, K] logits, of which a share has entries that stand for NaN or infinity."""
    generator = torch.Generator().manual_seed(seed)
    final = torch.randn(rows, 1, num_labels, generator=generator)
    noise = torch.randn(rows, BLOCKS + 1, num_labels, generator=generator)
    logits = scale * (final + noise * torch.linspace(1, 0.05, BLOCKS + 1).view(1, -1, 1))
    bad = torch.rand(rows, BLOCKS + 1, generator=generator) < share
    place = torch.randint(num_labels, bad.shape, generator=generator)
    kind = torch.tensor(list(BAD))[torch.randint(len(BAD), bad.shape, generator=generator)]
    here = torch.nn.functional.one_hot(place, num_labels).bool() & bad.unsqueeze(-1)
    return torch.where(here, kind.unsqueeze(-1), logits)


def as_exits_give(table: torch.Tensor) -> torch.Tensor:
    """The table with NaN and infinity for the entries that stand for them."""
    for stand_in, value in BAD.items():
        table = table.masked_fill(table == torch.tensor(stand_in), value)
    return table


@cache
def model_of(problem: str, num_labels: int) -> Any:
    # transformers has no config of one class, but an adapter may have
    model = table_model.__wrapped__(num_labels, REGRESSION if num_labels == 1 else problem, EXITS, BLOCKS)
    model.peft_config["default"].problem_type = problem
    for name, module in model.named_modules():
        if name.endswith(".linear"):
            module.register_forward_hook(lambda module, args, output: as_exits_give(output))
    return model


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_live(data) -> None:
    problem, k = data.draw(st.sampled_from(PROBLEMS))
    rows = data.draw(st.sampled_from([1, 2, 3, 8, 257] if k < 1000 else [1, 2, 8]))
    scale, share = data.draw(st.sampled_from(SCALES)), data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    table = table_of(data.draw(st.integers(0, 10**6)), rows, k, scale, share)
    config = data.draw(configs(EXITS, k, problem))
    logits = as_exits_give(table)[:, list(EXITS)]
    policy, model = build_policy(config), model_of(problem, k)
    wanted = policy.replay(logits, EXITS, problem)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = model.early_exit_forward(**as_inputs(table), early_exit_config=config)
    assert output.exit_layer.tolist() == wanted.tolist()
    # one warning, and the rows that it is about
    assert len([w for w in caught if "NaN or infinite at an exit" in str(w.message)]) == bool(output.non_finite.any())
    index = torch.tensor([EXITS.index(m) for m in wanted.tolist()])
    finite = logits.isfinite().all(-1)  # [B, E]
    answer = finite[torch.arange(rows), index]
    last = next(j for j in range(len(EXITS)) if policy.is_final(EXITS, j))
    assert not (~answer & (index < last)).any()  # no exit that gave NaN or infinity, but for the last
    assert output.non_finite[~answer].all()
    through = torch.arange(len(EXITS)) <= index.unsqueeze(1)
    assert not output.non_finite[(finite | ~through).all(1)].any()
    # nor is an exit taken because of what such an exit said
    window = policy.lookback()
    for i in range(rows):
        first = 0 if window is None else max(0, int(index[i]) - window)
        assert index[i] == last or finite[i, first : index[i] + 1].all()


RULES: list[dict[str, Any]] = [
    *({"divergence": d, "window": w} for d in ("ce", "kl", "js", "label") for w in ("all", "consecutive")),
    *({"policy": name} for name in ON_LOGITS if name not in ("divergence", "fixed_depth", "never")),
    {"policy": "learned"},
    {"policy": "entropy", "decide_every": 2},
    {"policy": "patience", "decide_every": 2, "max_exit": 4},
]


@pytest.mark.parametrize("rule", RULES, ids=label)
def test_onnx(rule) -> None:
    pytest.importorskip("onnx_ir")
    pytest.importorskip("onnxruntime")
    from tests.export.table import TableGraph

    name, bad_seen, early = rule.get("policy", "divergence"), 0, 0
    exits = list(range(1, BLOCKS + 2))
    for problem, k in PROBLEMS:
        if problem == REGRESSION and name in NO_REGRESSION:
            continue
        full = {**rule, **fields_of(name, exits, k, problem)}
        graph = TableGraph(full, len(exits), k, problem)
        for seed, (scale, rows) in enumerate([(1.0, 257 if k < 1000 else 8), (1e4, 16), (0.0, 1)]):
            logits = as_exits_give(table_of(seed, rows, k, scale, 0.2)).numpy()
            doubts = np.random.default_rng(seed).uniform(size=logits.shape[:2]).astype(np.float32)
            doubts[rows // 2 :, 1] = np.nan
            for patience in (1, 2, 3):
                policy = build_policy({**full, "patience": patience})
                history = as_history(logits, exits, problem, doubts)
                wanted = policy.replay(logits, exits, problem, doubts).numpy()
                answers, found = graph(logits, None, patience, doubts)
                safe = _far_from_threshold(policy, history)
                np.testing.assert_array_equal(found[safe], wanted[safe])
                np.testing.assert_array_equal(answers, logits[np.arange(rows), found - 1])
                bad_seen += int((~np.isfinite(logits).all((1, 2)) & safe).sum())
                early += int((wanted[safe] < policy.max_exit if policy.max_exit else wanted[safe] < exits[-1]).sum())
    assert bad_seen > 50 and early > 50


def _far_from_threshold(policy: Any, history: Any) -> np.ndarray:
    """[n] bool: the rows of which no score is the threshold but for rounding."""
    tau = policy.threshold(history.num_labels, history.problem_type)
    scores = np.stack([policy.score(history, j) for j in range(len(history.exits))])
    return (np.abs(scores - tau) > 1e-3 * max(1.0, abs(tau))).all(axis=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ON_LOGITS)
def test_a_row_of_nan(name, dtype) -> None:
    model = make_badge("bert", final_exit="exit").to(dtype)
    config = {**fields_of(name, [1, 2, 3], 3, SINGLE), "threshold": 1e6 if name != "max_prob" else 0.0}
    config |= {"patience": 1, "depth": 2 if name == "fixed_depth" else None}
    batch = make_batch(rows=5)
    states = model.get_input_embeddings()(batch["input_ids"]).detach()
    inputs = {"inputs_embeds": states.clone(), "attention_mask": batch["attention_mask"]}
    before = model.early_exit_forward(**inputs, early_exit_config=config)
    assert not before.non_finite.any()
    inputs["inputs_embeds"][2] = torch.nan
    with pytest.warns(UserWarning, match="1 of 5 rows had logits that are NaN or infinite at an exit"):
        after = model.early_exit_forward(**inputs, early_exit_config=config)
    others = torch.tensor([0, 1, 3, 4])
    assert after.non_finite.tolist() == [False, False, True, False, False]
    assert after.exit_layer[2] == (2 if name == "fixed_depth" else 3) and after.logits[2].isnan().all()
    assert torch.equal(after.exit_layer[others], before.exit_layer[others])
    torch.testing.assert_close(after.logits[others], before.logits[others])
    exits = exits_of(model, inputs)
    assert build_policy(config).replay(exits).tolist() == after.exit_layer.tolist()


def test_adapter_names() -> None:
    model = make_badge("bert", train_head=False)
    model.add_adapter("second", model.peft_config["default"])
    batch = make_batch(rows=4)
    states = model.get_input_embeddings()(batch["input_ids"]).detach()
    states[1] = torch.inf
    inputs = {"inputs_embeds": states, "attention_mask": batch["attention_mask"], "threshold": 1e6}
    with pytest.warns(UserWarning, match="1 of 4 rows"):
        output = model.early_exit_forward(**inputs, adapter_names=["second", "default", "second", "default"])
    assert output.non_finite.tolist() == [False, True, False, False]
    assert output.exit_layer[1] == 3 and (output.exit_layer[[0, 2, 3]] < 3).all()


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("exit_type", ["linear", "mha"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, exit_type, pooling) -> None:
    """A row of padding alone has an answer, and the others have theirs."""
    model = make_badge(base=make_model("bert"), exit_pooling=pooling, exit_type=exit_type, final_exit="exit")
    batch = make_batch(rows=6, side=side)
    batch["attention_mask"][3] = 0
    exits = exits_of(model, batch)
    assert exits.isfinite().all()
    for name in ON_LOGITS:
        config = fields_of(name, [1, 2, 3], 3, SINGLE)
        output = model.early_exit_forward(**batch, early_exit_config=config)
        assert output.exit_layer.tolist() == build_policy(config).replay(exits).tolist()
        assert not output.non_finite.any()
        torch.testing.assert_close(output.logits, exits[torch.arange(6), output.exit_layer - 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["divergence", "entropy", "max_prob", "agreement"])
def test_sweep(name) -> None:
    """The settings that a search finds stop rows where `replay` stops them."""
    logits = as_exits_give(table_of(0, 60, 3, 1.0, 0.2))
    exits = list(range(1, BLOCKS + 2))
    history = as_history(logits, exits, SINGLE)
    family = build_policy(fields_of(name, exits, 3, SINGLE)).config
    found = settings_of(family, history, 10)
    assert len(found) > 5
    for config, stops in found:
        assert stops.tolist() == build_policy(config).replay(logits, exits, SINGLE).tolist()
