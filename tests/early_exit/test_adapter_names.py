"""`early_exit_forward(adapter_names=...)`: rows of several tasks in one pass, each as in a call of its own adapter."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import BertModel

from badge_peft import BadgeConfig
from tests.models import CASES, make_badge, make_batch, make_model, shake

from .rules import mixed_rule, watched_blocks, with_threshold

ROWS = 14
LENGTH = 12
BASE = "__base__"

# What adapters may differ in, side by side on one backbone: name -> (fields of BadgeConfig, the rule to stop by).
EXIT = {"final_exit": "exit"}  # an exit of one's own behind block M, so any number of labels
ADAPTERS = {
    "default": ({}, {"policy": "entropy"}),  # with a copy of the model's head
    "wide": (
        {**EXIT, "num_labels": 5, "r": 2, "placement": "ffn", "exit_pooling": "mean"},
        {"divergence": "js"},
    ),
    "few": (
        {**EXIT, "num_labels": 2, "exit_layers": [0, 2, 4], "exit_pooling": "last"},
        {"divergence": "ce"},
    ),
    "degree": ({**EXIT, "num_labels": 1, "placement": "none", "exit_type": "mha"}, {"threshold": 0.8}),
    "tags": (
        {**EXIT, "num_labels": 4, "problem_type": "multi_label_classification", "placement": "mhsa"},
        {"policy": "entropy", "threshold": 0.9},
    ),
    "steps": ({"carry": "logits", "exit_pooling": "mean"}, {"policy": "entropy"}),
    "stock": ({"train_head": False, "exit_type": "pooled"}, {"policy": "max_prob", "min_exit": 2}),
    "cascade": (
        {**EXIT, "num_labels": 3, "carry": "logits", "exit_layers": [1, 3]},
        {"policy": "entropy"},
    ),
    "doubts": ({"learn_to_exit": True, "exit_pooling": "mean"}, {"policy": "learned"}),
    "recall": (
        {**EXIT, "num_labels": 2, "placement": "none", "exit_type": "past_future"},
        {"policy": "fixed_depth"},
    ),
}


def make(case="bert", names=tuple(ADAPTERS)):
    """A model of four blocks with several adapters, the first of them active."""
    layers = {"distilbert": "n_layers"}.get(case, "num_hidden_layers")
    changes = {} if case == "albert-inner" else {layers: 4}
    base = make_model(case, **changes)
    model = make_badge(case, base=base, adapter_name=names[0], **ADAPTERS[names[0]][0])
    for seed, name in enumerate(names[1:]):
        model.add_adapter(name, BadgeConfig(**{"r": 4, **ADAPTERS[name][0]}))
        shake(model, seed=seed, only=f".{name}.")  # a saved head, too
    batch = make_batch(ROWS, LENGTH)
    for name in names:  # rules by which some of these rows stop early, and whose thresholds rounding cannot reach
        model.set_adapter(name)
        with torch.no_grad():
            out = model(**batch)
        rule = dict(ADAPTERS[name][1])
        if rule == {"policy": "entropy"}:
            rule = mixed_rule(out.exit_logits, model.exit_layers())
        elif "threshold" not in rule:
            rule = with_threshold(rule, out.exit_logits, model.exit_layers(), 0.5, out.exit_uncertainty)
        model.set_early_exit_config(rule)
    model.set_adapter(names[0])
    return model.eval()


def one_by_one(model, batch, names):
    """The answer of each row in a call of its own adapter with all its rows: (logits [K], exit)."""
    found = [None] * len(names)
    active = model.active_adapter
    for name in sorted(set(names)):
        rows = [i for i, own in enumerate(names) if own == name]
        part = {key: value[rows] if value.shape[0] == len(names) else value for key, value in batch.items()}
        if name == BASE:
            with model.disable_adapter(), torch.no_grad():
                logits = model(**part).logits
            exits = [model.base_model.num_blocks] * len(rows)
        else:
            model.set_adapter(name)
            out = model.early_exit_forward(**part)
            logits, exits = out.logits, out.exit_layer.tolist()
        for row, answer, exit_ in zip(rows, logits, exits, strict=True):
            found[row] = (answer, exit_)
    model.set_adapter(active)
    return found


def check(model, batch, names):
    """One pass gives each row what a call of its own adapter gives."""
    out = model.early_exit_forward(**batch, adapter_names=names)
    want = one_by_one(model, batch, names)
    assert out.exit_layer.tolist() == [exit_ for _, exit_ in want]
    assert out.num_labels.tolist() == [len(logits) for logits, _ in want]
    assert out.logits.shape == (len(names), max(len(logits) for logits, _ in want))
    for row, (logits, _) in zip(out.logits, want, strict=True):
        k = len(logits)
        torch.testing.assert_close(row[:k], logits, rtol=1e-4, atol=1e-4)
        assert (row[k:] == -torch.inf).all()
    return out


def shuffled(names, seed, rows=ROWS):
    """A name for each row, every name at least once where there are enough rows, in random order."""
    rng = random.Random(seed)
    chosen = [*names, *rng.choices(names, k=rows)][:rows]
    rng.shuffle(chosen)
    return chosen


@pytest.fixture(scope="module")
def model():
    """With all of the adapters; nobody may change it."""
    return make()


# ---------------------------------------------------------------------------------------------------- the same answers


@pytest.mark.parametrize("seed", range(6))
def test_rows_of_all_kinds_of_adapters_together(model, seed):
    names = shuffled([*ADAPTERS, BASE], seed)
    out = check(model, make_batch(ROWS, LENGTH, side="left" if seed == 5 else "right"), names)
    assert len(set(out.exit_layer.tolist())) > 1  # rows left at different blocks


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_backbone(case):
    names = ("default", "wide", "stock", "doubts")
    check(make(case, names), make_batch(ROWS, LENGTH), shuffled([*names, BASE], 1))


@pytest.mark.parametrize("name", [*ADAPTERS, BASE])
def test_rows_of_one_adapter_that_need_not_be_active(model, name):
    check(model, make_batch(ROWS, LENGTH), [name] * ROWS)


def test_probabilities_need_no_number_of_labels(model):
    names = shuffled([*ADAPTERS, BASE], 4)
    out = model.early_exit_forward(**make_batch(ROWS, LENGTH), adapter_names=names)
    probabilities = out.logits.softmax(dim=-1)
    assert not probabilities.isnan().any()
    assert (out.logits.argmax(dim=-1) < out.num_labels).all()


def test_survivors_of_all_tasks_travel_together(model):
    with watched_blocks(model) as seen:
        names = shuffled([*ADAPTERS, BASE], 7)
        out = model.early_exit_forward(**make_batch(ROWS, LENGTH), adapter_names=names)
    assert [rows for rows, _ in seen] == [int((out.exit_layer >= m).sum()) for m in range(1, 5)]


# --------------------------------------------------------------------------------------------------- which rule counts


def test_overrides_hold_for_the_rows_of_every_adapter(model):
    names = shuffled(["default", "wide", "stock", "doubts"], 1)
    out = model.early_exit_forward(**make_batch(ROWS, LENGTH), adapter_names=names, policy="fixed_depth", depth=2)
    assert out.exit_layer.tolist() == [2] * ROWS


def test_the_active_adapter_stays_the_active_one(model):
    batch = make_batch(ROWS, LENGTH)
    before = model.early_exit_forward(**batch)
    model.early_exit_forward(**batch, adapter_names=["wide"] * ROWS)
    after = model.early_exit_forward(**batch)
    assert model.active_adapter == "default"
    assert torch.equal(before.logits, after.logits) and before.num_labels is None


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default"] * (ROWS - 1), f"one name for each of the {ROWS} rows"),
        ([], f"one name for each of the {ROWS} rows"),
        ("default", f"one name for each of the {ROWS} rows, got 'default'"),
        (["default"] * (ROWS - 1) + ["other"], "no adapter 'other'; the model has 'default', 'wide'"),
        ([None] * ROWS, f"one name for each of the {ROWS} rows"),
    ],
)
def test_names_that_do_not_fit(model, names, message):
    with pytest.raises(ValueError, match=message):
        model.early_exit_forward(**make_batch(ROWS, LENGTH), adapter_names=names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "lora"}, "backbone='lora'"),
        ({"modules_to_save": ["embeddings"]}, r"modules_to_save=\['bert.embeddings'\]"),
    ],
)
def test_adapters_that_change_what_others_pass_through(fields, message):
    model = make(names=("default", "wide"))
    model.add_adapter("own", BadgeConfig(r=4, **fields))
    batch, names = make_batch(ROWS, LENGTH), shuffled(["default", "wide"], 1)
    with pytest.raises(ValueError, match=f"'own' has {message}.*separate call.*set_adapter"):
        model.early_exit_forward(**batch, adapter_names=[*names[1:], "own"])
    check(model, batch, names)  # beside it, the others work
    model.set_adapter("own")
    with pytest.raises(ValueError, match=f"active adapter 'own' has {message}.*set_adapter with"):
        model.early_exit_forward(**batch, adapter_names=names)


def test_a_part_of_the_head_may_be_an_adapters_own():
    model = make_badge("roberta", modules_to_save=["out_proj"], train_head=False)
    model.add_adapter("second", BadgeConfig(r=2, num_labels=4, final_exit="exit"))
    batch, names = make_batch(ROWS, LENGTH), shuffled(["default", "second"], 1)
    check(model, batch, names)
    model.add_adapter("whole", BadgeConfig(r=2, modules_to_save=["out_proj"]))  # and the head around it
    with pytest.raises(ValueError, match=r"'whole' has modules_to_save=\['classifier.out_proj'\].*separate call"):
        model.early_exit_forward(**batch, adapter_names=[*names[1:], "whole"])


def test_a_rule_that_does_not_fit_one_of_the_adapters(model):
    with pytest.raises(ValueError, match="depth=1 is not allowed"):
        model.early_exit_forward(
            **make_batch(ROWS, LENGTH), adapter_names=shuffled(["default", "few"], 1), policy="fixed_depth", depth=1
        )


def test_a_base_model_without_a_head_has_no_rows_of_its_own():
    model = make_badge(base=BertModel(make_model().config).eval(), final_exit="exit", early_exit={"threshold": 0.5})
    model.add_adapter("second", BadgeConfig(r=2, num_labels=4, final_exit="exit"))
    batch = make_batch(ROWS, LENGTH)
    check(model, batch, shuffled(["default", "second"], 1))
    with pytest.raises(ValueError, match="'__base__', but BertModel has no head"):
        model.early_exit_forward(**batch, adapter_names=shuffled(["default", BASE], 1))


def test_full_depth_says_where_to_go(model):
    with pytest.raises(ValueError, match="early_exit_forward.*adapter_names"):
        model(**make_batch(ROWS, LENGTH), adapter_names=["default"] * ROWS)


def test_disabled_adapters(model):
    with model.disable_adapter(), pytest.raises(ValueError, match="adapter is disabled"):
        model.early_exit_forward(**make_batch(ROWS, LENGTH), adapter_names=["default"] * ROWS)
