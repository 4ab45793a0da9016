from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from badge_peft import ARCHITECTURES, MultiExitOutput
from badge_peft.tuner.architectures import head_pooling
from badge_peft.tuner.context import current_pass
from badge_peft.tuner.losses import exit_loss
from tests import reference
from tests.design import pairs
from tests.models import (
    CASES,
    HIDDEN,
    LINKS,
    blocks_of,
    checkpoint,
    exits_of,
    make_badge,
    make_batch,
    make_labels,
    make_model,
)

PLACEMENTS = ("block", "ffn", "mhsa", "none")


# ---- equality with the base model


@pytest.mark.parametrize(
    ("case", "placement", "train_head"),
    [
        *((case, placement, True) for case in CASES for placement in PLACEMENTS),
        *((case, placement, False) for case in ("bert", "modernbert-mean") for placement in ("block", "mhsa")),
    ],
)
def test_full_depth_is_the_base_model_bit_for_bit(case, placement, train_head):
    batches = [make_batch(side="right"), make_batch(side="left")]
    base = make_model(case)
    with torch.no_grad():
        answers = [base(**batch, output_hidden_states=True) for batch in batches]
    model = make_badge(base=base, placement=placement, train_head=train_head)
    for batch, expected in zip(batches, answers, strict=True):
        with torch.no_grad():
            found = model(**batch, output_hidden_states=True)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.exit_logits[:, -1], expected.logits)
        assert len(found.hidden_states) == len(expected.hidden_states) > 2
        assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
        assert not torch.equal(found.exit_logits[:, 0], expected.logits)  # so the comparison is not empty


@pytest.mark.parametrize("changes", [{"chunk_size_feed_forward": 4}, {"attn_implementation": "eager"}], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_settings_of_the_base_model(changes, placement):
    batch = make_batch()
    base = make_model("bert", **changes)
    with torch.no_grad():
        expected = base(**batch)
    assert torch.equal(exits_of(make_badge(base=base, placement=placement), batch)[:, -1], expected.logits)


@pytest.mark.parametrize("case", ["bert", "distilbert", "modernbert-mean"])
def test_attentions_are_handed_on(case):
    batch = make_batch()
    base = make_model(case, attn_implementation="eager")
    expected = base(**batch, output_attentions=True)
    found = make_badge(base=base)(**batch, output_attentions=True)
    assert len(found.attentions) == len(expected.attentions) == 3
    assert all(map(torch.equal, found.attentions, expected.attentions))


@pytest.mark.parametrize(
    "changed",
    [
        lambda batch, model: {"input_ids": batch["input_ids"]},
        lambda batch, model: {**batch, "token_type_ids": torch.ones_like(batch["input_ids"])},
        lambda batch, model: {**batch, "position_ids": torch.arange(8).flip(0).expand(4, 8)},
        lambda batch, model: {**batch, "attention_mask": batch["attention_mask"].bool()},
        lambda batch, model: {name: value[:1] for name, value in batch.items()},
        lambda batch, model: {name: value[:, :1] for name, value in batch.items()},
        lambda batch, model: {
            "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]),
            "attention_mask": batch["attention_mask"],
        },
    ],
)
def test_whatever_the_base_model_takes(changed):
    base = make_model()
    batch = changed(make_batch(), base)
    with torch.no_grad():
        expected = base(**batch).logits
    model = make_badge(base=base, placement="ffn", exit_pooling="mean")
    exits = exits_of(model, batch)
    assert torch.equal(exits[:, -1], expected)
    with torch.no_grad():
        assert torch.equal(model.base_model(**batch).exit_logits, exits)  # past PEFT's outer model, too
        if "input_ids" in batch:
            batch["attention_mask"] = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            positional = (batch.pop("input_ids"), batch.pop("attention_mask"))
            assert torch.equal(model.base_model(*positional, **batch).exit_logits, exits)


@pytest.mark.parametrize("case", CASES)
def test_every_row_is_as_it_is_alone(case):
    batch = make_batch()
    model = make_badge(case, placement="ffn", final_exit="exit").double()
    together = exits_of(model, batch)
    for row, length in enumerate(batch["attention_mask"].sum(dim=1)):
        alone = exits_of(model, {name: value[row : row + 1, :length] for name, value in batch.items()})
        torch.testing.assert_close(alone[0], together[row], rtol=1e-9, atol=1e-9)


# ---- what is given


def test_output():
    batch, labels = make_batch(), make_labels()
    model = make_badge(exit_layers=[0, 2])
    out = model(**batch)
    assert type(out) is MultiExitOutput and list(out) == ["logits", "exit_logits"]
    assert out.exit_logits.shape == (4, 3, 3) and out.loss is None
    out = model(**batch, labels=labels)
    assert list(out) == ["loss", "logits", "exit_logits"] and out.loss.shape == ()
    as_tuple = model(**batch, labels=labels, return_dict=False)
    assert isinstance(as_tuple, tuple) and all(map(torch.equal, as_tuple, out.to_tuple()))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("uniform", [1, 1, 1]), ("linear", [1 / 6, 2 / 6, 3 / 6]), ([0.0, 2.0, 0.5], [0, 2, 0.5])],
)
@pytest.mark.parametrize("final_exit", ["base_head", "exit"])
def test_loss_is_the_weighted_sum_over_the_exits(weights, expected, final_exit):
    batch, labels = make_batch(), make_labels()
    model = make_badge(exit_weights=weights, final_exit=final_exit).double()
    out = model(**batch, labels=labels)
    losses = [reference.cross_entropy(out.exit_logits[:, m], labels) for m in range(3)]
    torch.testing.assert_close(
        out.loss, sum(w * x for w, x in zip(expected, losses, strict=True)).float(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("problem_type", "num_labels"),
    [("single_label_classification", 3), ("multi_label_classification", 3), ("regression", 1), ("regression", 3)],
)
@pytest.mark.parametrize("given", [True, False])
def test_problem_types(problem_type, num_labels, given):
    """The last exit's share of the loss is what the base model gives for the same labels."""
    if problem_type == "regression" and num_labels > 1 and not given:
        num_labels = 1  # transformers infers no regression with several outputs
    labels = make_labels(problem_type, num_labels=num_labels)
    base = make_model(num_labels=num_labels, problem_type=problem_type if given else None)
    expected = copy.deepcopy(base)(**make_batch(), labels=labels).loss
    model = make_badge(base=base, exit_weights=[0.0, 0.0, 1.0])
    assert model.peft_config["default"].problem_type == (problem_type if given else None)
    assert torch.equal(model(**make_batch(), labels=labels).loss, expected)
    assert model.peft_config["default"].problem_type == problem_type
    model.peft_config["default"].exit_weights = "uniform"
    out = model(**make_batch(), labels=labels)
    total = sum(exit_loss(out.exit_logits[:, m], labels, problem_type) for m in range(3))
    torch.testing.assert_close(out.loss, total)


def test_number_of_items_of_an_accumulated_batch():
    batch, labels = make_batch(), make_labels()
    model = make_badge()
    whole = model(**batch, labels=labels).loss
    parts = [
        model(**{name: value[part] for name, value in batch.items()}, labels=labels[part], num_items_in_batch=4).loss
        for part in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, 3]), "label 3 of row . is out of range.*num_labels=3"),
        (torch.tensor([0, -1, 2, 0]), "label -1 of row . is out of range"),
        (torch.tensor([0, 1]), r"labels have shape \[2\].*4 rows"),
        (torch.zeros(4, 2), r"labels have shape \[4, 2\]"),
    ],
)
def test_wrong_labels_are_refused_before_the_pass(labels, message):
    model = make_badge()
    before = exits_of(model, make_batch())
    calls = []
    handle = model.get_base_model().bert.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        model(**make_batch(), labels=labels)
    handle.remove()
    assert not calls and model.peft_config["default"].problem_type is None
    assert torch.equal(exits_of(model, make_batch()), before)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.zeros(0, 8, dtype=torch.long)}, r"batch is empty.*\[0, 8\]"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"batch is empty.*\[2, 0\]"),
        ({"inputs_embeds": torch.zeros(0, 8, HIDDEN)}, r"batch is empty.*\[0, 8, 32\]"),
        ({"attention_mask": torch.ones(2, 8)}, "input_ids or inputs_embeds"),
        ({}, "input_ids or inputs_embeds"),
    ],
)
def test_empty_batch(batch, message):
    model = make_badge()
    for call in (model, model.early_exit_forward):
        with pytest.raises(ValueError, match=message):
            call(**batch)
    assert exits_of(model, make_batch()).shape == (4, 3, 3)


# ---- gradients


def compare_gradients(case: str, checkpointing: dict[str, Any] | None, **fields: Any) -> None:
    """Of the joint loss, in float64, against autograd through the plain reference."""
    base = make_model(case).double()
    batch, labels = make_batch(), make_labels()
    plain = copy.deepcopy(base)
    model = make_badge(base=base, exit_dropout=0.0, exit_weights="linear", **fields)
    config = model.peft_config["default"]
    full = config.backbone == "full"
    layout = ARCHITECTURES[plain.config.model_type]
    for name, parameter in plain.named_parameters():
        parameter.requires_grad = full or name.split(".")[0] in layout.head
    own = {name: p.detach().clone().requires_grad_() for name, p in reference.own_weights(model).items()}
    logits = reference.all_logits(plain, config, own, batch, head_pooling(plain, layout))
    depth = range(1, len(logits) + 1)
    sum(m / sum(depth) * reference.cross_entropy(x, labels) for m, x in zip(depth, logits, strict=True)).backward()

    if checkpointing is not None:
        checkpoint(model, checkpointing)
    calls: list[int] = []  # of the first block: checkpointing runs it a second time
    first = next(blocks_of(model)[0].base_layer.children())
    handle = first.register_forward_hook(lambda *_: calls.append(1))
    loss = model.train()(**batch, labels=labels).loss
    once = len(calls)
    loss.backward()
    handle.remove()
    if checkpointing is None or full:
        assert len(calls) == (once if checkpointing is None else 2 * once)

    found = {name: p.grad for name, p in reference.own_weights(model).items()}
    expected: dict[str, Tensor | None] = {name: p.grad for name, p in own.items()}
    assert all(gradient.any() for gradient in found.values())
    for name, parameter in model.get_base_model().named_parameters():
        if ".badge_" not in name and ".original_module." not in name:
            found[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = parameter.grad
    expected.update({name: p.grad for name, p in plain.named_parameters()})
    assert found.keys() == expected.keys()
    assert sum(expected[name] is not None for name in expected.keys() - own.keys()) > (10 if full else 1)
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if found[name] is None else found[name],
            zero if gradient is None else gradient,
            rtol=1e-5,  # the loss is worked out in float32
            atol=1e-7 * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )


NOT_REENTRANT = {"use_reentrant": False}
EXITS_OF_OTHER_KINDS = [
    {"placement": "ffn"},
    {"exit_type": "pooled"},
    {"exit_type": "mha", "bias": True},
    *LINKS,
    {**LINKS[0], "exit_layers": [0, 2], "final_exit": "exit"},
]


@pytest.mark.parametrize(
    ("case", "checkpointing", "fields"),
    [
        *((case, None, {"placement": placement}) for case, placement in pairs(CASES, PLACEMENTS)),
        *(
            (case, None if case == "albert" else NOT_REENTRANT, fields)
            for case, fields in pairs(("bert", "albert", "modernbert-mean"), EXITS_OF_OTHER_KINDS)
        ),
        # where nothing inside of a block is read
        ("bert", {"use_reentrant": True}, {"placement": "none"}),
        ("modernbert-cls", {"use_reentrant": True}, {"placement": "block"}),
    ],
    ids=str,
)
def test_gradients_with_a_trained_backbone(case, checkpointing, fields):
    compare_gradients(case, checkpointing, backbone="full", **fields)


@pytest.mark.parametrize(
    ("case", "placement"),
    [
        (case, PLACEMENTS[(turn + more) % 4])
        for turn, case in enumerate(case for case in CASES if not case.startswith(("albert", "mpnet")))
        for more in (0, 2)
    ],
)
def test_gradients_with_checkpointing(case, placement):
    """ALBERT and MPNet have none in transformers. What is recomputed is the block, the same for every placement."""
    compare_gradients(case, NOT_REENTRANT, placement=placement, backbone="full")


@pytest.mark.parametrize("checkpointing", [None, NOT_REENTRANT, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("case", ["bert", "modernbert-mean"])
def test_gradients_with_a_frozen_backbone(case, placement, checkpointing):
    compare_gradients(case, checkpointing, placement=placement)


@pytest.mark.parametrize(
    ("case", "placement"),
    [("bert", "block"), ("bert", "ffn"), ("bert", "mhsa"), ("deberta-v2", "block"), ("modernbert-cls", "ffn")],
)
def test_reentrant_checkpointing_that_would_lose_gradients_is_refused(case, placement):
    model = make_badge(case, placement=placement, backbone="full").train()
    checkpoint(model, {"use_reentrant": True})
    with pytest.raises(RuntimeError, match="re-entrant gradient checkpointing.*'use_reentrant': False"):
        model(**make_batch(), labels=make_labels())
    assert current_pass() is None
    checkpoint(model, NOT_REENTRANT)
    model(**make_batch(), labels=make_labels()).loss.backward()
    assert exits_of(model.eval(), make_batch()).shape == (4, 3, 3)


def test_frozen_backbone_takes_no_gradient():
    model = make_badge().train()
    model(**make_batch(), labels=make_labels()).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, p in model.named_parameters() if ".badge_" in n or ".modules_to_save." in n}


# ---- nothing stays behind


@pytest.mark.parametrize(
    "states",
    [torch.zeros(1, 20, HIDDEN), torch.zeros(20, HIDDEN), torch.zeros(3, 5, HIDDEN)],
    ids=lambda x: f"{x.ndim}d",
)
def test_states_that_attention_has_unpadded_are_refused(states):
    """Flash attention may put a batch into one row, [1, total, d]; rows could then not stop one by one."""
    model = make_badge()
    before = exits_of(model, make_batch())
    embeddings = model.get_base_model().bert.embeddings
    handle = embeddings.register_forward_hook(lambda *_: states)
    with pytest.raises(ValueError, match=r"states of shape .* for a batch of 4.*unpadded.*attn_implementation='sdpa'"):
        model(input_ids=make_batch()["input_ids"])
    handle.remove()
    assert torch.equal(exits_of(model, make_batch()), before)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_mask_of_four_dimensions(pooling):
    """The backbone may take one, a pooling over real tokens cannot."""
    batch = make_batch()
    mask = batch["attention_mask"][:, None, None, :].expand(4, 1, 8, 8)
    additive = {"input_ids": batch["input_ids"], "attention_mask": (1.0 - mask) * torch.finfo(torch.float32).min}
    message = rf"exit_pooling='{pooling}' needs .* \[batch, sequence\], got \[4, 1, 8, 8\]"
    model = make_badge(exit_pooling=pooling)
    for call in (model, model.early_exit_forward):
        with pytest.raises(ValueError, match=message):
            call(**additive)


@pytest.mark.parametrize(
    ("case", "placement", "dtype"), pairs(CASES, ("ffn", "mhsa"), (torch.bfloat16, torch.float16))
)
def test_base_model_in_half_precision(case, placement, dtype):
    base = make_model(case).to(dtype)
    batch = make_batch()
    with torch.no_grad():
        expected = base(**batch).logits
    model = make_badge(base=base, placement=placement)
    assert all(p.dtype == torch.float32 for p in reference.own_weights(model).values())
    with torch.no_grad():
        out = model(**batch)
    assert out.logits.dtype == dtype and torch.equal(out.logits, expected)
    assert out.exit_logits.dtype == torch.float32 and torch.isfinite(out.exit_logits).all()
    assert torch.equal(out.exit_logits[:, -1], expected.float())
    loss = model.train()(**batch, labels=make_labels()).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in reference.own_weights(model).values())
