"""ActiveRows are cut to the longest of them: on every backbone the same answers, and shorter states."""

from __future__ import annotations

import pytest
import torch
import transformers

from badge_peft.early_exit.policies import build_policy
from badge_peft.tuner.architectures import ARCHITECTURES
from tests.design import pairs
from tests.models import CASES, PAD, VOCAB, crossed, exits_of, link, make_badge, make_model

from .rules import answers, mixed_rule, watched_blocks

BLOCKS = 6
LENGTH = 16


def batch_of(lengths, length=LENGTH, seed=1, side="right"):
    """Rows of these lengths, padded to `length`."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, VOCAB, (len(lengths), length), generator=generator)
    positions = torch.arange(length) if side == "right" else torch.arange(length).flip(0)
    mask = (positions < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": input_ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def make(case, **fields):
    layers = {"distilbert": "n_layers"}.get(case, "num_hidden_layers")
    changes = {} if case == "albert-inner" else {layers: BLOCKS}
    return make_badge(case, base=make_model(case, **changes).double(), **fields)


def expected(exit_layer, lengths, blocks, full_rows_until, length=LENGTH):
    """The shapes, from where each row stopped."""
    found = []
    for m in range(1, blocks + 1):
        going = [n for n, stop in enumerate(exit_layer) if stop >= m]
        if not going:
            break
        whole = len(going) == len(exit_layer) or m <= full_rows_until
        found.append((len(exit_layer), length) if whole else (len(going), max(lengths[n] for n in going)))
    return found


def cases_with_mixed_exits(model, lengths, wanted=3):
    """Batches of which some rows stop early and others never, with their lengths, logits and such a rule; the long row
    is each time another."""
    found = 0
    for seed in range(100):
        lengths = [*lengths[1:], lengths[0]]
        batch = batch_of(lengths, seed=seed)
        logits, exits = exits_of(model, batch), model.base_model.exit_layers()
        try:
            rule = mixed_rule(logits, exits)
        except AssertionError:  # every row has an exit surer than any exit of another, or thresholds are too close
            continue
        yield batch, lengths, logits, rule
        found += 1
        if found == wanted:
            return
    assert found


@pytest.mark.parametrize(
    ("case", "pooling", "attention"), pairs(sorted(CASES), ("cls", "mean", "last"), ("sdpa", "eager"))
)
def test_the_same_answers_from_shorter_states(case, pooling, attention):
    turn = sorted(CASES).index(case)
    kind = ("linear", "mha", "past_future")[(turn + len(pooling)) % 3]
    final = "exit" if kind == "past_future" else "base_head"
    model = make(case, exit_pooling=pooling, exit_type=kind, final_exit=final, **link(turn))
    if case.startswith("modernbert") and attention == "eager":  # it gives NaN in float64
        model = model.float()
    model.base_model.model.set_attn_implementation(attention)
    exits = model.base_model.exit_layers()
    for batch, lengths, logits, rule in cases_with_mixed_exits(model, [LENGTH, 3, 11, 6, 4, 9, 2]):
        with watched_blocks(model) as shapes:
            out = model.early_exit_forward(**batch, early_exit_config=rule)
        want = build_policy(rule).replay(logits, exits)
        assert out.exit_layer.tolist() == want.tolist()
        exact = 1e-9 if logits.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(out.logits, answers(logits, exits, want), rtol=exact, atol=10 * exact)
        layout = model.base_model.layout
        assert shapes == expected(want.tolist(), lengths, model.base_model.num_blocks, layout.full_rows_until)


@pytest.mark.parametrize("case", ["bert", "modernbert-mean", "deberta-v2", "mpnet"])
@pytest.mark.parametrize("side", ["left", "none", "4-D"])
def test_where_nothing_may_be_cut(case, side):
    model = make(case, exit_pooling="cls")
    lengths = [LENGTH, 3, 11, 6, 4]
    batch = batch_of(lengths, side="left" if side == "left" else "right")
    if side == "none":
        del batch["attention_mask"]
    elif side == "4-D":
        if case != "bert":
            pytest.skip("takes masks [B, S] only")
        batch["attention_mask"] = batch["attention_mask"].bool()[:, None, None, :].expand(-1, 1, LENGTH, -1)
        if transformers.__version__ < "5":  # BERT takes [B, S, S] there
            batch["attention_mask"] = batch["attention_mask"][:, 0].long()
    logits, exits = exits_of(model, batch), model.base_model.exit_layers()
    rule = mixed_rule(logits, exits)
    with watched_blocks(model) as shapes:
        out = model.early_exit_forward(**batch, early_exit_config=rule)
    want = build_policy(rule).replay(logits, exits)
    assert out.exit_layer.tolist() == want.tolist()
    torch.testing.assert_close(out.logits, answers(logits, exits, want), rtol=1e-9, atol=1e-8)
    assert {positions for _, positions in shapes} == {LENGTH} and len({rows for rows, _ in shapes}) > 1


def test_an_argument_that_nobody_knows_keeps_the_length():
    """A model may hand its blocks something with positions that the layout does not name."""
    model = make("bert")
    for block in model.base_model.wrapped:
        whole, inner = block.forward, block.base_layer.forward
        block.forward = lambda *args, whole=whole, **kwargs: whole(*args, **{**kwargs, "more": torch.ones(5, LENGTH)})
        block.base_layer.forward = lambda *args, inner=inner, more=None, **kwargs: inner(*args, **kwargs)
    batch = batch_of([LENGTH, 3, 11, 6, 4])
    rule = mixed_rule(exits_of(model, batch), model.base_model.exit_layers())
    with watched_blocks(model) as shapes:
        model.early_exit_forward(**batch, early_exit_config=rule)
    assert {positions for _, positions in shapes} == {LENGTH} and len({rows for rows, _ in shapes}) > 1


@pytest.mark.parametrize(("case", "length"), crossed(CASES, [4, 8, 32]))
def test_a_length_as_large_as_another_dimension(case, length):
    """4 is the number of heads, 8 their size, 32 the width."""
    model = make(case)
    lengths = [length, max(1, length // 2), max(1, length // 3), 2, 1, 2]
    batch = batch_of(lengths, length)
    logits, exits = exits_of(model, batch), model.base_model.exit_layers()
    rule = mixed_rule(logits, exits)
    out = model.early_exit_forward(**batch, early_exit_config=rule)
    want = build_policy(rule).replay(logits, exits)
    assert out.exit_layer.tolist() == want.tolist()
    torch.testing.assert_close(out.logits, answers(logits, exits, want), rtol=1e-9, atol=1e-8)


def test_every_row_of_the_table_can_be_trimmed():
    assert all(layout.mask_arguments for layout in ARCHITECTURES.values())
