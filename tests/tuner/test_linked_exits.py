"""Exits that build on one another, against the plain reference of `tests/reference.py`, and what must hold of each
form: it starts as exits that stand alone, and the model's own head knows nothing of it."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from badge_peft import BadgeConfig
from tests import reference
from tests.design import pairs
from tests.models import LINKS, exits_of, make_badge, make_batch, make_model
from tests.tuner.test_layer import compare

EXIT_LAYERS = (None, [0, 1, 2, 3], [0, 2], [2], [1, 3])


@pytest.mark.parametrize(
    ("case", "placement", "pooling", "final_exit", "exit_type", "exit_layers", "link"),
    pairs(
        ("bert", "albert", "deberta-v2", "modernbert-mean"),
        ("block", "ffn", "mhsa", "none"),
        ("cls", "mean", "last"),
        ("base_head", "exit"),
        ("linear", "pooled", "residual_mha"),
        EXIT_LAYERS,
        LINKS,
    ),
)
def test_formulas(case, placement, pooling, final_exit, exit_type, exit_layers, link):
    fields = {"placement": placement, "final_exit": final_exit, "exit_type": exit_type, "exit_layers": exit_layers}
    compare(case, pooling, **fields, **link)


@pytest.mark.parametrize("link", LINKS, ids=str)
@pytest.mark.parametrize("case", ["bert", "albert-groups", "modernbert-cls"])
def test_they_start_as_exits_that_stand_alone(case, link):
    plain = make_badge(case, exit_layers=[0, 1, 2], final_exit="exit")
    model = get_peft_model(make_model(case), BadgeConfig(r=4, exit_layers=[0, 1, 2], final_exit="exit", **link)).eval()
    more = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert more and torch.equal(exits_of(model, make_batch()), exits_of(plain, make_batch()))


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_the_models_own_head_stays_as_it_is(link):
    base, batch = make_model(), make_batch()
    with torch.no_grad():
        expected = base(**batch).logits
        assert torch.equal(make_badge(base=base, train_head=False, **link)(**batch).logits, expected)


# ------------------------------------------------------------------------------------------------------ carried logits


@pytest.mark.parametrize(("exit_layers", "numbers"), [(None, 2), ([0, 1, 2, 3], 3), ([0, 2], 2), ([2], 1), ([3], 0)])
@pytest.mark.parametrize("case", ["bert", "albert"])
def test_one_number_for_each_exit_but_the_first(case, exit_layers, numbers):
    config = {"exit_layers": exit_layers, "final_exit": "exit"}
    sizes = [
        get_peft_model(make_model(case), BadgeConfig(carry=carry, **config)).get_nb_trainable_parameters()[0]
        for carry in (None, "logits")
    ]
    assert sizes[1] - sizes[0] == numbers


def test_carried_logits_take_no_gradient():
    model = make_badge(carry="logits", final_exit="exit", exit_layers=[0, 1, 2, 3])
    parameters = reference.own_weights(model)
    for place, m in enumerate([0, 1, 2, 3]):
        model.zero_grad()
        model(**make_batch()).exit_logits[:, place].square().sum().backward()
        moved = {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
        assert {name.split(".")[1] for name in moved} == {str(m)}
        assert (f"exit.{m}.carry.weight" in moved) == (m > 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_spread(value):
    model = make_badge(carry="logits", final_exit="exit")
    block = model.base_model.wrapped[0]
    block.own_exit("default", 1).linear.register_forward_hook(lambda *args: args[-1].index_fill(0, LAST, value))
    found = exits_of(model, make_batch())
    plain = exits_of(make_badge(carry="logits", final_exit="exit"), make_batch())
    assert found[:, 1:].isfinite().all() and not found[LAST, 0].isfinite().any()
    assert torch.equal(found[:-1], plain[:-1])
    with pytest.warns(UserWarning, match="1 of 4 rows had logits that are NaN or infinite"):
        out = model.early_exit_forward(**make_batch(), policy="max_prob", threshold=0.0)
    assert out.exit_layer.tolist() == [1, 1, 1, 2] and out.non_finite.tolist() == [False, False, False, True]
    torch.testing.assert_close(out.logits[3], found[3, 1])


LAST = torch.tensor([3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype):
    """Under autocast, and with weights in it: the precision of the logits is that of exits that stand alone."""
    plain, model = make_badge(), make_badge(carry="logits")
    wide = exits_of(model, make_batch())
    with torch.autocast("cpu", dtype):
        found, alone = exits_of(model, make_batch()), exits_of(plain, make_batch())
        assert found.dtype == alone.dtype
    scale = float(wide.abs().max())
    torch.testing.assert_close(found.float(), wide, rtol=0.1, atol=0.1 * scale)
    assert exits_of(model.to(dtype), make_batch()).dtype == dtype
