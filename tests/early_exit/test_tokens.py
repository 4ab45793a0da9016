"""Token classification: each token stops by itself, and a row leaves with its last token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForTokenClassification, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForTokenClassification

from badge_peft import BadgeConfig, EarlyExitOutput, calibrate, collect_exit_logits
from badge_peft.early_exit.policies import build_policy
from tests.models import CASES, LINKS, blocks_of, make_batch, make_model, shake

from .rules import RULES, watched_blocks, with_threshold

ROWS, LENGTH = 6, 9


def make_base(case: str = "bert", num_labels: int = 4, **changes: Any) -> Any:
    """A random token classifier in eval mode."""
    sizes = make_model(case, num_labels=num_labels, **changes).config
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def make(case: str = "bert", base: Any = None, **fields: Any) -> Any:
    model: Any = get_peft_model(
        make_base(case) if base is None else base, BadgeConfig(task_type="TOKEN_CLS", **{"r": 4, **fields})
    ).eval()
    shake(model)
    shake(model, only=".modules_to_save.")
    return model


def full(model: Any, batch: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return model(**batch)


def safe_rule(model: Any, batch: dict[str, Tensor], rule: dict[str, Any]) -> dict[str, Any]:
    """A threshold that rounding cannot reach for any token of this batch."""
    out = full(model, batch)
    real = batch["attention_mask"] != 0
    logits = out.exit_logits.transpose(1, 2)[real]
    doubts = None if out.exit_uncertainty is None else out.exit_uncertainty.transpose(1, 2)[real]
    return with_threshold(rule, logits, model.base_model.exit_layers(), 0.6, doubts)


def check(model: Any, batch: dict[str, Tensor], rule: dict[str, Any]) -> EarlyExitOutput:
    """Each token has the exit and the logits of a replay, and the row that of its last token."""
    out = model.early_exit_forward(**batch, **rule)
    seen, exits = full(model, batch), model.base_model.exit_layers()
    mask = batch.get("attention_mask", torch.ones(seen.logits.shape[:2]))
    for i in range(len(mask)):
        real = mask[i] != 0
        doubts = None if seen.exit_uncertainty is None else seen.exit_uncertainty[i, :, real].T
        stored = seen.exit_logits[i, :, real].transpose(0, 1)  # [s, E, K]
        want = build_policy(rule).replay(stored, exits, "single_label_classification", doubts)
        assert out.token_exit_layer[i, real].tolist() == want.tolist()
        assert (out.token_exit_layer[i, ~real] == 0).all() and (out.logits[i, ~real] == 0).all()
        assert int(out.exit_layer[i]) == int(want.max())
        index = torch.tensor([exits.index(m) for m in want.tolist()])
        picked = stored[torch.arange(len(index)), index]
        torch.testing.assert_close(out.logits[i, real], picked, rtol=1e-4, atol=1e-4)
    return out


# ------------------------------------------------------------------------------------------------------- full depth


@pytest.mark.parametrize("case", sorted(CASES))
def test_full_depth_is_the_base_model_bit_for_bit(case: str) -> None:
    base, batch = make_base(case), make_batch(ROWS, LENGTH)
    with torch.no_grad():
        expected = base(**batch).logits
    model = make(case, base=base, train_head=False)
    out = full(model, batch)
    blocks = model.base_model.num_blocks
    assert torch.equal(out.logits, expected) and out.exit_logits.shape == (ROWS, blocks, LENGTH, 4)
    assert torch.equal(out.exit_logits[:, -1], expected)
    early = model.early_exit_forward(**batch, policy="never")
    real = batch["attention_mask"] != 0
    assert torch.equal(early.logits[real], expected[real]) and early.exit_layer.tolist() == [blocks] * ROWS


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_backbone(case: str, side: str) -> None:
    model, batch = make(case), make_batch(ROWS, LENGTH, side=side)
    out = check(model, batch, safe_rule(model, batch, {"policy": "entropy"}))
    assert len(out.token_exit_layer[batch["attention_mask"] != 0].unique()) > 1


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_policy(rule: dict[str, Any]) -> None:
    learned = rule.get("policy") == "learned"
    model, batch = make(learn_to_exit=learned, exit_layers=[0, 1, 2], final_exit="exit"), make_batch(ROWS, LENGTH)
    check(model, batch, safe_rule(model, batch, rule))


@pytest.mark.parametrize(
    "fields",
    [
        {"placement": "none"},
        {"placement": "ffn", "exit_type": "pooled"},
        {"placement": "mhsa", "exit_type": "residual_mha"},
        {"exit_layers": [2], "final_exit": "exit", "num_labels": 7},
        {"carry": "logits"},
        {"backbone": "lora"},
        {"backbone": "full"},
        *LINKS,
    ],
    ids=str,
)
def test_every_kind_of_exit(fields: dict[str, Any]) -> None:
    model, batch = make(**fields), make_batch(ROWS, LENGTH)
    check(model, batch, safe_rule(model, batch, {"policy": "max_prob"}))


def test_a_batch_is_its_rows() -> None:
    model, batch = make(), make_batch(ROWS, LENGTH)
    rule = safe_rule(model, batch, {"policy": "entropy"})
    whole = model.early_exit_forward(**batch, **rule)
    for i in range(ROWS):
        own = int(batch["attention_mask"][i].sum())
        row = model.early_exit_forward(**{k: v[i : i + 1, :own] for k, v in batch.items()}, **rule)
        assert row.token_exit_layer[0].tolist() == whole.token_exit_layer[i, :own].tolist()
        torch.testing.assert_close(row.logits[0], whole.logits[i, :own], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- who leaves


def test_special_tokens_need_no_answer_and_hold_no_row() -> None:
    model, batch = make(), make_batch(ROWS, LENGTH)
    special = torch.zeros_like(batch["input_ids"])
    special[:, 0] = 1
    out = model.early_exit_forward(**batch, special_tokens_mask=special, policy="fixed_depth", depth=2)
    real = (batch["attention_mask"] != 0) & (special == 0)
    assert (out.token_exit_layer[real] == 2).all() and (out.token_exit_layer[~real] == 0).all()
    assert out.exit_layer.tolist() == [2] * ROWS
    none = model.early_exit_forward(**batch, special_tokens_mask=torch.ones_like(special))
    assert none.exit_layer.tolist() == [0] * ROWS and not none.logits.any() and none.logits.shape == (ROWS, LENGTH, 4)
    with pytest.raises(ValueError, match=r"special_tokens_mask must be a tensor \[6, 9\]"):
        model.early_exit_forward(**batch, special_tokens_mask=special[:, :3])


def test_a_row_leaves_with_its_last_token() -> None:
    model, batch = make(), make_batch(ROWS, LENGTH)
    rule = safe_rule(model, batch, {"policy": "entropy"})
    with watched_blocks(model) as seen:
        out = model.early_exit_forward(**batch, **rule)
    assert [rows for rows, _ in seen] == [n for m in (1, 2, 3) if (n := int((out.exit_layer >= m).sum()))]


def test_logits_that_are_not_finite() -> None:
    model = make()
    with torch.no_grad():
        blocks_of(model)[0].badge_exit["default"]["1"].linear.bias.fill_(torch.nan)
    with pytest.warns(UserWarning, match="2 of 2 rows had logits that are NaN"):
        out = model.early_exit_forward(**make_batch(2, LENGTH))
    assert out.non_finite.tolist() == [True, True]


# ------------------------------------------------------------------------------------------- beside other adapters


def test_tasks_of_tokens_and_of_texts_in_one_pass() -> None:
    model, batch = make(), make_batch(ROWS, LENGTH)
    model.add_adapter("text", BadgeConfig(r=4, num_labels=3, final_exit="exit", exit_pooling="mean"))
    model.add_adapter("tags", BadgeConfig(task_type="TOKEN_CLS", r=4, num_labels=5, final_exit="exit"))
    for name in ("text", "tags"):
        shake(model, seed=5, only=f".{name}.")
    names, rules = ["text", "default", "tags"], {}
    model.eval()
    for name in ("default", "tags"):
        model.set_adapter(name)
        rules[name] = safe_rule(model, batch, {"policy": "entropy"})
    rules["text"] = {"policy": "fixed_depth", "depth": 1}
    out = model.early_exit_forward(**batch, tasks=names, early_exit_config=rules)
    for name in names:
        model.set_adapter(name)
        want = model.early_exit_forward(**batch, **rules[name])
        assert out[name].exit_layer.tolist() == want.exit_layer.tolist()
        torch.testing.assert_close(out[name].logits, want.logits, rtol=1e-4, atol=1e-4)
        if name != "text":
            assert out[name].token_exit_layer.tolist() == want.token_exit_layer.tolist()
    model.set_adapter("default")
    mixed = model.early_exit_forward(**batch, adapter_names=["tags"] * ROWS, **rules["tags"])
    assert mixed.token_exit_layer.tolist() == out["tags"].token_exit_layer.tolist()
    with pytest.raises(ValueError, match="'tags' classifies tokens, so its rows have answers of another shape"):
        model.early_exit_forward(**batch, adapter_names=["tags"] * (ROWS - 1) + ["text"])
    with pytest.raises(ValueError, match="'__base__' classifies tokens, so its rows have answers of another shape"):
        model.early_exit_forward(**batch, adapter_names=["text"] * (ROWS - 1) + ["__base__"])


@pytest.mark.parametrize("rule", [{}, {"policy": "fixed_depth", "depth": 1}], ids=str)
def test_rows_without_an_adapter_are_answered_by_the_base_model(rule: dict[str, Any]) -> None:
    model, batch = make(exit_layers=[1]), make_batch(ROWS, LENGTH)
    out = model.early_exit_forward(**batch, adapter_names=["__base__"] * ROWS, **rule)
    real = batch["attention_mask"] != 0
    with torch.no_grad():
        assert torch.equal(out.logits[real], make_base()(**batch).logits[real])
    assert (out.exit_layer == model.base_model.num_blocks).all()
    assert torch.equal(out.token_exit_layer, out.exit_layer[:, None] * real)


# ------------------------------------------------------------------------------------------------ training, saving


def make_labels(batch: dict[str, Tensor], num_labels: int = 4) -> Tensor:
    labels = torch.randint(0, num_labels, batch["input_ids"].shape, generator=torch.Generator().manual_seed(3))
    return labels.masked_fill((batch["attention_mask"] == 0) | (labels == 0), -100)


def test_the_loss_is_that_of_the_base_models_tokens() -> None:
    base, batch = make_base(), make_batch(ROWS, LENGTH)
    labels = make_labels(batch)
    expected = base(**batch, labels=labels).loss
    model = make(base=base, train_head=False, exit_layers=[1], exit_weights=[0.0, 1.0])
    torch.testing.assert_close(model(**batch, labels=labels).loss, expected)
    joint = make(learn_to_exit=True)
    out = joint.train()(**batch, labels=labels)
    out.loss.backward()
    trained = [name for name, p in joint.named_parameters() if p.requires_grad and p.grad is not None]
    assert any("badge_doubt" in name for name in trained) and any("modules_to_save" in name for name in trained)
    with pytest.raises(
        ValueError, match=r"labels have shape \[6\], but token classification needs one for each token"
    ):
        joint(**batch, labels=torch.zeros(ROWS, dtype=torch.long))
    with pytest.raises(ValueError, match="labels"):
        joint(**batch, labels=labels.masked_fill(labels == 1, 4))


@pytest.mark.parametrize("case", ["bert", "distilbert", "deberta-v2", "modernbert-mean"])
def test_saved_and_loaded(case: str, tmp_path: Path) -> None:
    make_base(case).save_pretrained(tmp_path / "base")
    model = make(case, base=AutoModelForTokenClassification.from_pretrained(tmp_path / "base").eval())
    model.save_pretrained(str(tmp_path / "adapter"))
    batch = make_batch()
    expected = full(model, batch).exit_logits
    base = AutoModelForTokenClassification.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert torch.equal(full(again, batch).exit_logits, expected)
    auto = AutoPeftModelForTokenClassification.from_pretrained(str(tmp_path / "adapter")).eval()
    assert torch.equal(full(auto, batch).exit_logits, expected)


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exit_pooling": "mean"}, "exit_pooling='mean' is not allowed with task_type='TOKEN_CLS'.*must be 'auto'"),
        ({"exit_type": "past_future", "final_exit": "exit"}, "exit_type='past_future' is not allowed with task_type"),
        ({"problem_type": "regression"}, "problem_type='regression' is not allowed with task_type='TOKEN_CLS'"),
    ],
)
def test_configs_that_have_no_meaning_for_tokens(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BadgeConfig(task_type="TOKEN_CLS", **fields)


def test_heads_of_another_kind() -> None:
    with pytest.raises(ValueError, match="'TOKEN_CLS' is not allowed on BertForSequenceClassification.*ForTokenClass"):
        get_peft_model(make_model(), BadgeConfig(task_type="TOKEN_CLS"))
    with pytest.raises(ValueError, match="not allowed on BertForTokenClassification.*task_type='TOKEN_CLS'"):
        get_peft_model(make_base(), BadgeConfig())


def test_a_token_adapter_on_a_model_for_texts() -> None:
    """With an exit of its own behind block M it needs no head, so the two kinds can share a base model."""
    model = make(base=make_model(), final_exit="exit", num_labels=5)
    batch = make_batch(ROWS, LENGTH)
    check(model, batch, safe_rule(model, batch, {"policy": "entropy"}))


# ------------------------------------------------------------------------------------------------------ stored logits


def rows_of(labels: bool = True) -> list[dict[str, Any]]:
    batch = make_batch(ROWS, LENGTH)
    targets, rows = make_labels(batch), []
    for i in range(ROWS):
        own = int(batch["attention_mask"][i].sum())
        row = {"input_ids": batch["input_ids"][i, :own].tolist()}
        rows.append({**row, "labels": targets[i, :own].tolist()} if labels else row)
    return rows


def test_exit_logits_of_tokens_are_rows() -> None:
    model, batch = make(), make_batch(ROWS, LENGTH)
    stored = collect_exit_logits(model, rows_of(), batch_size=4)
    labels, seen = make_labels(batch), full(model, batch)
    counts = labels != -100
    assert stored.labels is not None and stored.labels.tolist() == labels[counts].tolist()
    torch.testing.assert_close(stored.logits, seen.exit_logits.transpose(1, 2)[counts], rtol=1e-4, atol=1e-4)
    whole = collect_exit_logits(model, rows_of(labels=False), batch_size=4)
    assert whole.labels is None and len(whole) == int(batch["attention_mask"].sum())
    rule = safe_rule(model, batch, {"policy": "entropy"})
    out = model.early_exit_forward(**batch, **rule)
    replayed = build_policy(rule).replay(whole)
    assert replayed.tolist() == out.token_exit_layer[batch["attention_mask"] != 0].tolist()
    config = calibrate(stored, policy="max_prob", target_blocks_saved=0.2)
    assert model.early_exit_forward(**batch, early_exit_config=config).logits.shape == (ROWS, LENGTH, 4)
    wrong = rows_of()
    wrong[1]["labels"] = wrong[1]["labels"][:-1]
    with pytest.raises(ValueError, match=r"row 1 has \d+ tokens and labels of shape \[\d+\]: each token needs one"):
        collect_exit_logits(model, wrong)


@pytest.mark.parametrize("backbone", ["full", "lora"])
def test_a_trained_backbone_is_saved_and_loaded(backbone: str, tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path / "base")
    base = AutoModelForTokenClassification.from_pretrained(tmp_path / "base")
    model: Any = get_peft_model(base, BadgeConfig(task_type="TOKEN_CLS", r=4, backbone=backbone))
    batch = make_batch(ROWS, LENGTH)
    labels = torch.where(batch["attention_mask"] != 0, batch["input_ids"] % 4, -100)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, 1e-2), []
    for _ in range(5):
        losses.append(model(**batch, labels=labels).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        AutoModelForTokenClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    assert torch.equal(full(again, batch).exit_logits, full(model, batch).exit_logits)
    rule = safe_rule(model, batch, {"policy": "max_prob"})
    assert torch.equal(check(again, batch, rule).logits, check(model, batch, rule).logits)
