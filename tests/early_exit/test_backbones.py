"""Early exit on every backbone: live == replay, a batch == each of its rows alone, and no block computed in vain.

A full-depth pass and a compacted one differ by rounding. So that this cannot move a row to another exit, thresholds
lie in the middle of gaps between the signals that a batch really has, and batches whose labels hang on rounding are
not used (`rules.py`). Exits are then compared exactly.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from badge_peft.early_exit.policies import build_policy
from tests.design import pairs
from tests.models import CASES, KIN, LABELS, crossed, link, make_badge, make_batch, make_model

from .rules import MARGIN, RULES, answers, labels_are_safe, mixed_rule, watched_blocks, with_threshold

BLOCKS = 6  # of every model but one
FACTORS = (("block", "ffn", "mhsa", "none"), ("cls", "mean", "last"), ("base_head", "exit"))
OTHERS = (*FACTORS[:2], FACTORS[2][::-1])  # the rows that `pairs` of FACTORS lacks
GRID = list(itertools.product(*FACTORS))
EXIT_LAYERS = [None, [0, 1, 2, 3, 4, 5], [0, 2, 5], [1, 3, 4, 5], [0, 5], [5]]
EXIT_TYPES = ("linear", "pooled", "mha", "residual_mha", "past_future")


def make(case, dtype=torch.float32, **fields):
    """A badge model of 6 blocks (two runs of two groups of two blocks, for `albert-inner`)."""
    layers = {"distilbert": "n_layers"}.get(case, "num_hidden_layers")
    changes = {} if case == "albert-inner" else {layers: BLOCKS}
    return make_badge(case, base=make_model(case, **changes).to(dtype), learn_to_exit=True, **fields)


def close(found, wanted):
    """Equal to rounding: the weights of these models are large, and logits of 10 are usual."""
    exact = 1e-9 if found.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, wanted, rtol=exact, atol=exact * max(1.0, float(wanted.abs().max())))


def safe_batch(model, rows, seed, side="right"):
    """A padded batch whose labels do not hang on rounding, and the logits and doubts of all its exits."""
    for attempt in range(10):
        batch = make_batch(rows, seed=seed + 100 * attempt, side=side)
        with torch.no_grad():
            out = model(**batch)
        if labels_are_safe(out.exit_logits):
            return batch, out.exit_logits, out.exit_uncertainty
    raise AssertionError(f"ten batches in a row have labels closer than {MARGIN}")


def rules_for(model, logits, doubts, turn, every):
    """One rule in `every`, others at each turn, with a threshold that suits these logits; how many rows stop changes
    from rule to rule."""
    exits = model.base_model.exit_layers()
    for i, rule in enumerate(RULES[turn % every :: every]):
        if rule.get("policy") != "learned" or doubts is not None:
            yield with_threshold(rule, logits, exits, (0.2, 0.4, 0.6)[(turn + i) % 3], doubts)


def rows_going(model, exit_layer):
    """Rows of each block: block m runs for the rows that go past exit m - 1 and for no others (DeBERTa's first one,
    whose output a convolution mixes with the embeddings: for all rows or none)."""
    going = [int((exit_layer >= m).sum()) for m in range(1, model.base_model.num_blocks + 1)]
    full = model.base_model.layout.full_rows_until
    return [len(exit_layer) if m <= full else rows for m, rows in enumerate(going, start=1) if rows]


def rows_of(case):
    """What a backbone is tried with: every two settings meet; on kin of another backbone a third of these rows."""
    turn = sorted(CASES).index(case)
    for i, row in enumerate(pairs(*(FACTORS if turn % 2 else OTHERS))):
        yield pytest.param(case, *row, marks=pytest.mark.exhaustive if case in KIN and (i + turn) % 3 else [])


@pytest.mark.parametrize(
    ("case", "placement", "pooling", "final_exit"), [row for case in sorted(CASES) for row in rows_of(case)]
)
def test_live_is_replay(case, placement, pooling, final_exit):
    turn = GRID.index((placement, pooling, final_exit)) + sorted(CASES).index(case)
    exit_type = EXIT_TYPES[turn % (4 if final_exit == "exit" else 3)]
    model = make(
        case,
        placement=placement,
        exit_pooling=pooling,
        final_exit=final_exit,
        exit_type=exit_type,
        exit_layers=EXIT_LAYERS[turn % len(EXIT_LAYERS)] if case != "albert-inner" else None,
        **link(turn),
    )
    exits = model.base_model.exit_layers()
    batch, logits, doubts = safe_batch(model, 1 + turn % 17, seed=turn, side="left" if turn % 3 == 0 else "right")
    assert logits.shape == (len(batch["input_ids"]), len(exits), LABELS)
    for rule in rules_for(model, logits, doubts, turn, every=3):
        with watched_blocks(model) as seen:
            out = model.early_exit_forward(**batch, early_exit_config=rule)
        want = build_policy(rule).replay(logits, exits, uncertainty=doubts)
        assert out.exit_layer.tolist() == want.tolist(), rule
        close(out.logits, answers(logits, exits, want))
        assert [rows for rows, _ in seen] == rows_going(model, out.exit_layer)


KINDS = [
    ("block", "auto", "base_head", "linear", "eager"),
    ("ffn", "mean", "base_head", "mha", None),
    ("mhsa", "last", "exit", "past_future", "eager"),
    ("none", "cls", "exit", "pooled", None),
]


@pytest.mark.parametrize(
    ("case", "placement", "pooling", "final_exit", "exit_type", "attention"),
    [
        pytest.param(case, *KINDS[(i + more) % 4], marks=pytest.mark.exhaustive if more and case in KIN else [])
        for i, case in enumerate(sorted(CASES))
        for more in (0, 1)
    ],
)
def test_a_batch_is_each_row_alone(case, placement, pooling, final_exit, exit_type, attention):
    """In float64, so that a difference that is no rounding has nowhere to hide. Each row is asked with its padding and
    without it."""
    kind = {"placement": placement, "exit_pooling": pooling, "final_exit": final_exit, "exit_type": exit_type}
    turn = sorted(CASES).index(case)
    model = make(case, torch.float64, **kind, **link(turn))
    if attention and not case.startswith("modernbert"):  # whose eager attention gives NaN in float64
        model.base_model.model.set_attn_implementation(attention)
    batch, logits, doubts = safe_batch(model, 7, seed=turn)
    depths = set()
    for rule in (*rules_for(model, logits, doubts, turn, every=5), {"policy": "never"}):
        out = model.early_exit_forward(**batch, early_exit_config=rule)
        depths |= set(out.exit_layer.tolist())
        for row in range(7):
            padded = {name: value[row : row + 1] for name, value in batch.items()}
            length = int(batch["attention_mask"][row].sum())
            for inputs in (padded, {name: value[:, :length] for name, value in padded.items()}):
                alone = model.early_exit_forward(**inputs, early_exit_config=rule)
                assert alone.exit_layer.tolist() == [out.exit_layer[row]], rule
                close(alone.logits, out.logits[row : row + 1])
    assert len(depths) >= 3


@pytest.mark.parametrize("case", sorted(CASES))
def test_rows_that_never_stop_leave_through_the_models_own_head(case):
    """Bit for bit the answer of the base model, and beside rows that stop early to rounding."""
    model = make(case)
    batch, logits, _ = safe_batch(model, 9, seed=3)
    last = model.base_model.num_blocks
    with torch.no_grad(), model.disable_adapter():
        base = model(**batch).logits
    out = model.early_exit_forward(**batch, policy="never")
    assert out.exit_layer.tolist() == [last] * 9
    with torch.no_grad():
        assert torch.equal(out.logits, model(**batch).logits)
    out = model.early_exit_forward(**batch, early_exit_config=mixed_rule(logits, model.base_model.exit_layers()))
    stayed = out.exit_layer == last
    assert stayed.any() and not stayed.all()
    close(out.logits[stayed], base[stayed])


@pytest.mark.parametrize(("case", "rows"), crossed(CASES, [8, 16, 32]))
def test_a_batch_as_large_as_another_dimension(case, rows):
    """8 is the length of the sequence, 16 the number of DeBERTa's relative positions, 32 the width: a tensor with one
    of them first looks as if it had a row per input."""
    model = make(case)
    exits = model.base_model.exit_layers()
    batch, logits, _ = safe_batch(model, rows, seed=rows)
    rule = mixed_rule(logits, exits)
    out = model.early_exit_forward(**batch, early_exit_config=rule)
    want = build_policy(rule).replay(logits, exits)
    assert out.exit_layer.tolist() == want.tolist()
    close(out.logits, answers(logits, exits, want))
